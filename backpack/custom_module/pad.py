"""Padding as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class Pad(nn.Module):
    """Pad the last axes of the input: ``torch.nn.functional.pad``.

    Args:
        pad: entries added before and after the last axis, then before and after the one before it,
            and so on; negative ones crop.
        mode: ``"constant"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        value: what to fill with in mode ``"constant"``.
    """

    def __init__(self, pad: Sequence[int], mode: str = "constant", value: float = 0.0) -> None:
        super().__init__()
        self.pad = tuple(pad)
        self.mode = mode
        self.value = value

    def forward(self, input: Tensor) -> Tensor:
        """The padded input."""
        # The other modes take no value.
        value = self.value if self.mode == "constant" else None
        return F.pad(input, self.pad, mode=self.mode, value=value)

    def extra_repr(self) -> str:
        """The padding."""
        return f"pad={self.pad}, mode={self.mode!r}, value={self.value}"
