"""Nested tensors (jagged layout): the rows of all components, and where each of them is.

In: a nested tensor. Out: its rows, one after the other, through which the graph goes; or the other way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backpack._torch import (
    NestedParts,
    nested_parts,
    nested_rows,
    nested_view_of,
    without_torch_function,
)

# On a nested tensor: the tensor of rows that it was made from, which the graph goes through.
ROWS = "_backpack_rows"


def rows_of(x: Tensor) -> Tensor:
    """All components' rows, one after the other."""
    known = x.__dict__.get(ROWS)
    return nested_rows(x) if known is None else known


def made_of(rows: Tensor, parts: NestedParts, axis: int | None = None) -> Tensor:
    """The nested tensor of rows."""
    made = nested_view_of(rows, parts, parts.axis if axis is None else axis)
    setattr(made, ROWS, rows)
    return made


class Places(NamedTuple):
    """Where rows are.

    Attributes:
        component: of each row, ``[rows]``.
        step: its place among those of its component.
        lengths: how many rows each component has, ``[B]``.
    """

    component: Tensor
    step: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Places:
        with without_torch_function():
            offsets = nested_parts(x).offsets.long()
            lengths = offsets.diff()
            component = torch.arange(len(lengths), device=offsets.device).repeat_interleave(lengths)
            step = torch.arange(len(component), device=offsets.device) - offsets[component]
            return cls(component, step, lengths)

    def pad(self, rows: Tensor, axis: int, fill: float = 0.0, longest: int | None = None) -> Tensor:
        """``[B, steps, *]``, from rows on an axis."""
        rows = rows.movedim(axis, 0)
        if longest is None:
            longest = int(self.lengths.max()) if len(self.lengths) else 0
        full = rows.new_full((len(self.lengths), longest, *rows.shape[1:]), fill)
        return full.index_put((self.component, self.step), rows)

    def there(self) -> Tensor:
        """Which steps of a padded batch are rows, ``[B, steps]``."""
        with without_torch_function():
            steps = int(self.lengths.max()) if len(self.lengths) else 0
            return torch.arange(steps, device=self.lengths.device) < self.lengths[:, None]

    def unpad(self, full: Tensor, axis: int) -> Tensor:
        return full[self.component, self.step].movedim(0, axis)


def alike(x: NestedParts, y: NestedParts) -> bool:
    """Whether two have components of the same lengths, on the same axis."""
    return x.axis == y.axis and (x.offsets is y.offsets or torch.equal(x.offsets, y.offsets))
