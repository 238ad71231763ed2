"""One entry of a tuple."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ReduceTuple(nn.Module):
    """Pick one entry of a tuple, such as the output of a recurrent layer: ``x[index]``.

    Args:
        index: position of the entry.
    """

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index = index

    def forward(self, input: Sequence[Tensor]) -> Tensor:
        """The entry."""
        return input[self.index]

    def extra_repr(self) -> str:
        """The position."""
        return f"index={self.index}"
