"""Reordering of axes."""

from __future__ import annotations

from torch import Tensor, nn


class Permute(nn.Module):
    """Reorder axes, the samples' axis 0 excepted: ``x.permute(dims)`` or ``x.transpose(*dims)``.

    Args:
        *dims: the new order of all axes, or the two axes to swap.
        init_transpose: whether ``dims`` are two axes to swap.

    Raises:
        ValueError: if axis 0 moves (for negative axes of a swap, when the module is called), or a
            swap is not of two axes.
    """

    def __init__(self, *dims: int, init_transpose: bool = False) -> None:
        super().__init__()
        self.dims = dims
        self.transpose = init_transpose
        if init_transpose and len(dims) != 2:
            raise ValueError(f"Permute: a transpose swaps two axes, but got dims={dims}.")
        if not init_transpose:
            self._check(len(dims))
        elif min(dims) >= 0:
            self._check(max(dims) + 1)

    def forward(self, input: Tensor) -> Tensor:
        """The input with its axes reordered."""
        if not self.transpose:
            return input.permute(self.dims)
        if min(self.dims) < 0:
            self._check(input.ndim)
        return input.transpose(*self.dims)

    def _check(self, ndim: int) -> None:
        """Raise where axis 0 of a tensor with that many axes moves."""
        dims = [dim + ndim if dim < 0 else dim for dim in self.dims]
        moves = len(set(dims)) > 1 and 0 in dims if self.transpose else dims[:1] != [0]
        if moves:
            raise ValueError(
                f"Permute: dims={self.dims}, init_transpose={self.transpose} moves axis 0, which "
                "holds the samples; keep it in its place."
            )

    def extra_repr(self) -> str:
        """The axes."""
        return ", ".join(map(str, self.dims)) + ", init_transpose=True" * self.transpose
