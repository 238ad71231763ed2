"""Forms made of other forms: pullbacks, those of one sample; and :func:`merge` of all uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from backpack.forms.base import Dense, Factor, Form, Positioned, Sharing, sum_first
from backpack.forms.layout import Layout, Patches
from backpack.forms.lookup import Lookup
from backpack.forms.memory import fresh
from backpack.forms.outer import Outer
from backpack.forms.ragged import beside
from backpack.forms.sums import Sum


@dataclass(frozen=True, eq=False)
class Together(Form):
    """Columns that belong to all samples together: sums over samples are known, single samples are not.

    Attributes:
        values: ``[v, *p]``.
        samples: number of samples.
    """

    values: Tensor
    samples: int = field()

    @property
    def shape(self) -> torch.Size:
        return self.values.shape[1:]

    @property
    def columns(self) -> int:
        return self.values.shape[0]

    @property
    def like(self) -> Tensor:
        return self.values

    def take(self, columns: slice, samples: slice | Tensor) -> Form:
        raise RuntimeError(
            "a quantity looks at single samples of a form, but its class says that it does not; set "
            "its attribute per_sample = True"
        )

    def dense(self) -> Tensor:
        return self.take(slice(None), slice(None)).dense()

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        self.take(slice(None), slice(None))
        yield from ()

    def total(self) -> Tensor:
        return self.values.sum(0)

    def square_sum(self, sign: Tensor | None = None) -> Tensor:
        """``sum_v sign_v G^2``; ``sign [v, n]`` is the same for all samples."""
        return Dense(self.values.unsqueeze(1)).square_sum(None if sign is None else sign[:, :1])


@dataclass(frozen=True, eq=False)
class Wrapped(Form):
    """A form made from another one of as many columns.

    Attributes:
        form: the other.
    """

    form: Form

    @property
    def columns(self) -> int:
        return self.form.columns

    @property
    def like(self) -> Tensor:
        return self.form.like


@dataclass(frozen=True, eq=False)
class Pullback(Wrapped):
    """A form of a tensor made from parameters only, carried on to one of those parameters.

    Attributes:
        form: the form of the derived tensor ``t``.
        vjp: linear map ``[m, *t] -> [m, *p]``, the transposed Jacobian of ``t`` in the parameter.
        shape: the parameter's shape ``p``.
    """

    vjp: Callable[[Tensor], Tensor]
    shape: torch.Size = field()

    @property
    def samples(self) -> int:
        return self.form.samples

    @property
    def like(self) -> Tensor:
        like = self.form.like
        return like.real if like.is_complex() else like

    def take(self, columns: slice, samples: slice | Tensor) -> Pullback:
        return Pullback(self.form.take(columns, samples), self.vjp, self.shape)

    def dense(self) -> Tensor:
        g = self.form.dense()
        return self.vjp(g.flatten(0, 1)).reshape(*g.shape[:2], *self.shape)

    def total(self) -> Tensor:
        return self.vjp(self.form.total().unsqueeze(0))[0]

    def combine(self, weights: Tensor) -> Tensor:
        return self.vjp(self.form.combine(weights))


@dataclass(frozen=True, eq=False)
class Scaled(Wrapped):
    """A form multiplied entry by entry: that of a parameter of which single entries are functions.

    Attributes:
        form: the form of what is made from the parameter, of the parameter's shape.
        scale: the derivatives of its entries, ``[*p]``.
    """

    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.form.shape

    @property
    def samples(self) -> int:
        return self.form.samples

    @property
    def projects(self) -> bool:
        return self.form.projects

    def take(self, columns: slice, samples: slice | Tensor) -> Scaled:
        return Scaled(self.form.take(columns, samples), self.scale)

    def dense(self) -> Tensor:
        return self.form.dense() * self.scale

    def written(self) -> Form:
        """Itself, which needs no graph."""
        return self

    def total(self) -> Tensor:
        return self.form.total() * self.scale

    def square_sum(self, sign: Tensor | None = None) -> Tensor:
        return self.form.square_sum(sign) * self.scale.square()

    def square_sum_per_sample(self, sign: Tensor | None = None) -> Tensor:
        return self.form.square_sum_per_sample(sign) * self.scale.square()

    def centred_square_sum(self) -> tuple[Tensor | None, Tensor]:
        centre, squares = self.form.centred_square_sum()
        return None if centre is None else centre * self.scale, squares * self.scale.square()

    def squared_norms(self) -> Tensor:
        form = self.form
        if not isinstance(form, Outer) or form.positions != 1:
            return super().squared_norms()
        (q, o), squares = (form.g.shape[2], form.g.shape[-1]), sum_first(form.g.square())[:, :, 0]
        weights = form.layout.load(self.scale.square(), q, o)
        # A weight in another precision than the parameter that it is made from.
        squares = squares.to(torch.promote_types(squares.dtype, weights.dtype))
        weights = weights.to(squares.dtype)
        return ((squares.unsqueeze(2) @ weights).squeeze(2) * form.a[:, :, 0].square()).sum((1, 2))

    def project(self, vectors: Tensor) -> Tensor:
        return self.form.project(vectors * self.scale)

    def combine(self, weights: Tensor) -> Tensor:
        return self.form.combine(weights) * self.scale


@dataclass(frozen=True, eq=False)
class Part(Wrapped):
    """The form of an operation on one sample only, or some in a row; for all others it is zero.

    Attributes:
        form: that sample's, ``[v, 1, *p]``, or ``[v, k, *p]`` of ``k`` samples.
        sample: which it is, or the first.
        samples: number of samples.
    """

    sample: int
    samples: int = field()

    @property
    def shape(self) -> torch.Size:
        return self.form.shape

    def written(self) -> Part:
        return Part(Dense(self.form.dense()), self.sample, self.samples)

    def take(self, columns: slice, samples: slice | Tensor) -> Form:
        return _together([self]).take(columns, samples)

    def dense(self) -> Tensor:
        found = self.like.new_zeros(self.columns, self.samples, *self.shape)
        return found.index_copy(1, self._at(), self.form.dense())

    @property
    def _range(self) -> range:
        return range(self.sample, self.sample + self.form.samples)

    def _at(self) -> Tensor:
        return torch.tensor(list(self._range), device=self.like.device)

    def total(self) -> Tensor:
        return self.form.total()

    def square_sum(self, sign: Tensor | None = None) -> Tensor:
        own = slice(self._range.start, self._range.stop)
        return self.form.square_sum(None if sign is None else sign[:, own])

    def squared_norms(self) -> Tensor:
        return self.like.new_zeros(self.samples).index_copy(0, self._at(), self.form.squared_norms())

    def together(self) -> Form:
        """The form of all samples, zero for the others."""
        return _together([self])

    def kronecker(self, sharing: Sharing = None) -> list[Factor]:
        return self.together().kronecker(sharing)

    def rotated_square_sum(self, bases: Sequence[Tensor]) -> Tensor:
        return self.form.rotated_square_sum(bases)


def of_one(form: Form, function: Callable[[Form], Form]) -> Form:
    """``function(form)``; where the form is of some samples, of theirs."""
    if isinstance(form, Part):
        return Part(function(form.form), form.sample, form.samples)
    return function(form)


def among(form: Form, start: int, size: int) -> Form:
    """The form of samples that are counted from ``start``, of ``size`` altogether."""
    if isinstance(form, Part):
        return Part(form.form, start + form.sample, size)
    return Part(form, start, size)


def _together(singles: Sequence[Part]) -> Form:
    """One form of all samples, from forms of one sample each; those of one sample are summed.

    Forms of several samples in a row have ranges that are the same or apart.
    """
    if all(single.form.samples == 1 for single in singles):
        joined = beside([(s.sample, s.form) for s in singles], singles[0].samples)
        if joined is not None:
            return joined
    size, like = singles[0].samples, singles[0].like
    of: dict[range, list[Form]] = {}
    for single in singles:
        of.setdefault(single._range, []).append(single.form)
    alone = [single for single in singles if len(single._range) == 1]
    if len(alone) < len(singles) and _overlap(list(of)):
        several = [single for single in singles if len(single._range) != 1]
        return merge([_together(alone), _together(several)])
    forms = {place: merge(of[place]) for place in sorted(of, key=lambda place: place.start)}
    at = torch.tensor([n for place in forms for n in place], device=like.device, dtype=torch.long)
    found, everybody = list(forms.values()), len(at) == size

    def placed(parts: list[Tensor], dim: int) -> Tensor:
        """Put samples at their places, and fill up with zeros."""
        shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
        parts = [_filled(part, [*shape[:dim], part.shape[dim], *shape[dim + 1 :]]) for part in parts]
        if everybody:
            return torch.cat(parts, dim)
        shape[dim] = size
        return parts[0].new_zeros(shape).index_copy(dim, at, torch.cat(parts, dim))

    def counted(forms: Sequence[Positioned]) -> Tensor | None:
        """Positions of each sample; ``None`` if all have as many."""
        counts = torch.cat([_positions_of_each(form, at) for form in forms])
        if everybody:
            return None if bool((counts == counts[:1]).all()) else counts
        return torch.zeros(size, dtype=at.dtype, device=at.device).index_copy(0, at, counts)

    if all(isinstance(form, Outer) for form in found):
        outers: list[Outer] = found  # type: ignore[assignment]
        if len({(form.layout, form.inputs.shape[1]) for form in outers}) == 1:
            a, g = placed([form.a for form in outers], 0), placed([form.g for form in outers], 1)
            return Outer(a, g, outers[0].layout, counted(outers))
    if all(isinstance(form, Lookup) for form in found):
        lookups: list[Lookup] = found  # type: ignore[assignment]
        whole = [
            torch.ones_like(f.index, dtype=torch.bool) if f.reads is None else f.reads for f in lookups
        ]
        index, reads = placed([form.index for form in lookups], 0), placed(whole, 0)
        g = placed([form.g for form in lookups], 1)
        return Lookup(index, g, lookups[0].shape, reads, counted(lookups))
    return Dense(placed([form.dense() for form in found], 1))


def _overlap(places: Sequence[range]) -> bool:
    return len({n for place in places for n in place}) < sum(map(len, places))


def _positions_of_each(form: Positioned, like: Tensor) -> Tensor:
    """The number of positions of each sample, ``[n]``."""
    if form.counts is not None:
        return form.counts.to(like)
    each = form.all_positions // max(form.samples, 1)
    return torch.full((form.samples,), each, dtype=like.dtype, device=like.device)


def _filled(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Filled up with zeros, at the end of each axis."""
    if list(x.shape) == list(shape):
        return x
    margins = [
        m for size, old in zip(reversed(shape), reversed(x.shape), strict=True) for m in (0, size - old)
    ]
    return torch.nn.functional.pad(x, margins)


def merge(forms: Sequence[Form]) -> Form:
    """The form of a parameter used several times: sums come before squares.

    Forms of one kind become one form with more shared positions; forms of different kinds are
    summed block by block.
    """
    if len(forms) == 1:
        return forms[0]
    singles = [form for form in forms if isinstance(form, Part)]
    if singles:
        forms = [_together(singles), *(form for form in forms if not isinstance(form, Part))]
        return merge(forms)
    merged: list[Form] = []
    outers: dict[tuple[Layout, int], list[Outer]] = {}
    lookups = [form for form in forms if isinstance(form, Lookup)]
    dense = [form for form in forms if isinstance(form, Dense)]
    for form in forms:
        if isinstance(form, Outer):
            outers.setdefault((form.layout, form.inputs.shape[1]), []).append(form)
        elif not isinstance(form, (Lookup, Dense)):
            merged.append(form)
    for (layout, _), group in outers.items():
        group = _by_call(group)
        merged.append(group[0] if len(group) == 1 else _joined(group, layout))
    if lookups:
        index, g = torch.cat([f.index for f in lookups], 1), torch.cat([f.g for f in lookups], 2)
        reads = None
        if any(f.reads is not None for f in lookups):
            every = [torch.ones_like(f.index) > 0 if f.reads is None else f.reads for f in lookups]
            reads = torch.cat(every, 1)
        merged.append(Lookup(index, g, lookups[0].shape, reads, _position_counts(lookups)))
    if dense:
        first, *rest = (f.values for f in dense)
        merged.append(Dense(sum(rest, first)))
    return merged[0] if len(merged) == 1 else Sum(tuple(merged))


def _by_call(group: Sequence[Outer]) -> list[Outer]:
    """Results of one call have met the same inputs: their columns are added up, place by place."""
    found: dict[int, Outer] = {}
    for form in group:
        key = id(form if form.call is None else form.call)
        before = found.get(key)
        found[key] = form if before is None else replace(before, g=before.g + form.g)
    return list(found.values())


def _position_counts(forms: Sequence[Positioned]) -> Tensor | None:
    """Positions of each sample in all forms together; ``None`` if they have as many in each."""
    if all(form.counts is None for form in forms):
        return None
    found = torch.zeros(forms[0].samples, dtype=torch.long, device=forms[0].like.device)
    for form in forms:
        found = found + _positions_of_each(form, found)
    return found


def _joined(group: Sequence[Outer], layout: Layout) -> Outer:
    """One form with the positions of all; patches are written once, to their place in the result."""
    g, counts = torch.cat([form.g for form in group], 3), _position_counts(group)
    if torch.is_grad_enabled():
        return Outer(torch.cat([form.a for form in group], 2), g, layout, counts)
    n, q, _, i = group[0].inputs.shape
    a, first = fresh(g, (n, q, g.shape[3], i)), 0
    for form in group:
        place = a[:, :, first : first + form.positions]
        first += form.positions
        if isinstance(form.inputs, Patches):
            form.inputs.write(place)
        else:
            place.copy_(form.inputs)
    return Outer(a, g, layout, counts)
