"""How the entries of a product lie in a parameter, and inputs cut into patches."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from backpack.forms.limits import PATCH_BYTES, Limit
from backpack.forms.overlaps import Overlap, overlap_of, overlapping_gram
from backpack.forms.products import MIRRORED, gram_matrix


@dataclass(frozen=True)
class Layout:
    """How matrices ``[*lead, q, o, i]`` are stored in a parameter.

    ``kind`` is ``"out_in"`` (row-major ``[q * o, i]``: linear, convolution), ``"in_out"``
    (``[i, o]``: a matrix that multiplies from the right) or ``"convt"`` (``[q * i, o, *kernel]``
    with the kernel flattened into ``i``: transposed convolution).
    """

    shape: torch.Size
    kind: str = "out_in"

    def store(self, matrix: Tensor) -> Tensor:
        """``[*lead, q, o, i] -> [*lead, *p]``."""
        lead = matrix.shape[:-3]
        if self.kind == "in_out":
            matrix = matrix.mT
        elif self.kind == "convt":
            matrix = matrix.unflatten(-1, (-1, *self.shape[2:])).movedim(len(lead) + 2, len(lead) + 1)
        return matrix.reshape(*lead, *self.shape)

    def load(self, stored: Tensor, groups: int, outputs: int) -> Tensor:
        """``[*lead, *p] -> [*lead, q, o, i]``, the inverse of :meth:`store`."""
        lead = stored.shape[: stored.dim() - len(self.shape)]
        size = self.shape.numel() // max(groups * outputs, 1)
        if self.kind == "in_out":
            return stored.reshape(*lead, groups, size, outputs).mT
        if self.kind == "convt":
            inputs = self.shape[0] // groups
            split = stored.reshape(*lead, groups, inputs, outputs, *self.shape[2:])
            stored = split.movedim(len(lead) + 2, len(lead) + 1)
        return stored.reshape(*lead, groups, outputs, size)

    def transposed(self) -> Layout:
        """The layout of the parameter this one is the transpose of."""
        kind = {"out_in": "in_out", "in_out": "out_in"}[self.kind]
        return Layout(torch.Size(reversed(self.shape)), kind)


@dataclass(eq=False)
class Patches:
    """Inputs ``[n, q, s, i]`` that overlap, written out when they are used, and as far as they are.

    Attributes:
        windows: a view of the padded input, ``[n, q, channels, *kernel, *positions]``.
        ndim: number of axes of the kernel, and of the positions.
        keep: whether what was written out is kept, because it is used again. In grad mode it is kept in
            any case, as the graph holds on to it: once, and not once for each use.
    """

    windows: Tensor
    ndim: int
    keep: bool = False
    _kept: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        n, q, *features = self.windows.shape
        positions, inside = features[-self.ndim :], features[: -self.ndim]
        return torch.Size((n, q, prod(positions), prod(inside)))

    def __getitem__(self, samples: slice | Tensor) -> Tensor | Patches:
        if self.keep or torch.is_grad_enabled():
            return self.written()[samples]
        return Patches(self.windows[samples], self.ndim)

    def written(self) -> Tensor:
        """``[n, q, s, i]``."""
        differentiable = torch.is_grad_enabled()
        known = self._kept
        if known is not None and (
            known.requires_grad or not (differentiable and self.windows.requires_grad)
        ):
            return known
        written = self.windows.flatten(-self.ndim).flatten(2, -2).mT
        if self.keep or differentiable:
            self._kept = written
        return written

    def write(self, place: Tensor) -> None:
        """Write them to a place ``[n, q, s, i]``."""
        if self._kept is not None:
            place.copy_(self._kept)
            return
        inside, positions = self.windows.shape[2 : -self.ndim], self.windows.shape[-self.ndim :]
        split = place.unflatten(3, inside).unflatten(2, positions)
        split.movedim(tuple(range(2, 2 + self.ndim)), tuple(range(-self.ndim, 0))).copy_(self.windows)

    def step(self, limits: Limit) -> int:
        """Number of samples whose patches take about that much memory."""
        size = self.shape[1:].numel() * self.windows.element_size()
        return max(1, limits[self.windows.device.type] // max(1, size))

    def overlap(self) -> Overlap | None:
        """What windows share, where :meth:`gram` makes use of it."""
        n, q, s, i = self.shape
        # Less precise numbers are added up in as few steps as can be; on a device it was not measured.
        plain = self.windows.device.type == "cpu" and self.windows.element_size() >= 4
        large = n * q * s * i**2 >= MIRRORED
        return overlap_of(self.windows, self.ndim) if plain and large else None

    def gram(self) -> Tensor:
        """``sum_{n,q,s} a a^T``, written out piece by piece; large ones from what windows share."""
        overlap = self.overlap()
        if overlap is not None and not torch.is_grad_enabled():
            step = self.step(PATCH_BYTES) * overlap.kernel
            return overlapping_gram(self.windows, self.ndim, overlap, step)
        total = self.windows.new_zeros(self.shape[-1], self.shape[-1])
        for part in self.windows.split(self.step(PATCH_BYTES)):
            together = part.movedim((0, 1), (-self.ndim - 2, -self.ndim - 1))
            total = total + gram_matrix(together.reshape(self.shape[-1], -1).mT)
        return total
