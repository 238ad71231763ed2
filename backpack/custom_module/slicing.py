"""Slicing as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Slicing(nn.Module):
    """Slice the input: ``x[slice_info]``.

    Args:
        slice_info: what stands in the brackets, a tuple with one entry per axis. Axis 0 holds the
            samples: leave it whole (``slice(None)``).

    Example:
        >>> import torch
        >>> Slicing((slice(None), slice(0, 2)))(torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(self, slice_info: Any) -> None:
        super().__init__()
        self.slice_info = slice_info

    def forward(self, input: Tensor) -> Tensor:
        """The slice."""
        return input[self.slice_info]

    def extra_repr(self) -> str:
        """What stands in the brackets."""
        return f"slice_info={self.slice_info}"
