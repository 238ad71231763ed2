"""Sums of forms of different kinds, also of a matrix that is a table too (a tied head)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backpack.forms.base import SMALL, Form, room_for_pairs
from backpack.forms.lookup import Lookup
from backpack.forms.outer import CANCELLED, Outer
from backpack.forms.strips import Read, Strips


@dataclass(frozen=True, eq=False)
class Sum(Form):
    """The sum of forms of different kinds: a parameter used by operations of different kinds."""

    forms: tuple[Form, ...]
    projects = True
    parted = True

    @property
    def shape(self) -> torch.Size:
        return self.forms[0].shape

    @property
    def columns(self) -> int:
        return self.forms[0].columns

    @property
    def samples(self) -> int:
        return self.forms[0].samples

    @property
    def like(self) -> Tensor:
        return self.forms[0].like

    def _tied(self) -> tuple[Outer, Lookup] | None:
        """A matrix that meets inputs and is a table too, if it is that and nothing else."""
        if len(self.forms) != 2 or torch.is_grad_enabled():
            return None
        outer, lookup = sorted(self.forms, key=lambda form: isinstance(form, Lookup))
        small = self.columns * self.samples * self.shape.numel() <= SMALL
        if small or not isinstance(outer, Outer) or not isinstance(lookup, Lookup):
            return None
        if outer.g.shape[2] != 1 or len(outer.shape) != 2:
            return None
        dtype = torch.promote_types(outer.g.dtype, lookup.g.dtype)  # after autocast
        return replace(outer, g=outer.g.to(dtype)), replace(lookup, g=lookup.g.to(dtype))

    def _strips(self, outer: Outer, lookup: Lookup) -> Strips:
        return replace(outer.strips(), read=Read(*lookup.touched()))

    def square_sum(self, sign: Tensor | None = None) -> Tensor:
        """Of a tied matrix, some rows at a time."""
        tied = self._tied()
        return super().square_sum(sign) if tied is None else self._strips(*tied).square_sum(sign)

    def centred_square_sum(self) -> tuple[Tensor | None, Tensor]:
        """Of a tied matrix, some rows at a time."""
        tied = self._tied()
        if tied is None:
            return super().centred_square_sum()
        return self._strips(*tied).centred_square_sum()

    def squared_norms(self) -> Tensor:
        """Of a tied matrix: those of both uses, and twice their product, by the rows that are read."""
        tied = self._tied()
        if tied is None:
            return super().squared_norms()
        outer, lookup = tied
        strips, read = outer.strips(), lookup.read
        # What the first use has at the rows that the second reads, [v, n, s, t].
        index = lookup.index.unsqueeze(1).expand(-1, outer.positions, -1)
        at_rows = torch.stack([left.gather(2, index) for left in strips.left])
        products = at_rows * (strips.right @ read.mT)
        norms = outer.squared_norms() + lookup.squared_norms()
        scale, norms = norms + 2 * products.abs().sum((0, 2, 3)), norms + 2 * products.sum((0, 2, 3))
        # Where the uses cancel, digits are lost: there the matrix is written out.
        doubtful = norms < CANCELLED * scale
        if not bool(doubtful.any()):
            return norms
        which = doubtful.nonzero()[:, 0]
        parts = outer.take(slice(None), which), lookup.take(slice(None), which)
        return norms.index_copy(0, which, self._strips(*parts).squared_norms())

    def take(self, columns: slice, samples: slice | Tensor) -> Sum:
        return Sum(tuple(form.take(columns, samples) for form in self.forms))

    def dense(self) -> Tensor:
        first, *rest = (form.dense() for form in self.forms)
        return sum(rest, first)

    def total(self) -> Tensor:
        first, *rest = (form.total() for form in self.forms)
        return sum(rest, first)

    def project(self, vectors: Tensor) -> Tensor:
        first, *rest = (form.project(vectors) for form in self.forms)
        return sum(rest, first)

    def combine(self, weights: Tensor) -> Tensor:
        first, *rest = (form.combine(weights) for form in self.forms)
        return sum(rest, first)

    def inner(self, other: Form) -> Tensor:
        """Pairs of forms, each once."""
        total = room_for_pairs(self, other).flatten(2).flatten(0, 1)
        others = other.forms if isinstance(other, Sum) else (other,)
        for i, form in enumerate(self.forms):
            for j, each in enumerate(others):
                if other is not self or i <= j:
                    part = form.inner(each)
                    total = total + (part if other is not self or i == j else part + part.mT)
        return total
