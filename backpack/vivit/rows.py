"""Rows of matrices that are kept as forms, and their linear algebra.

Letters: ``v`` columns, ``n`` samples, ``k`` vectors, ``p`` a parameter's shape. A *row* is one column
of one sample, a vector in the space of parameters; rows are numbered pass by pass, columns first.

A form of ``v`` columns takes as much memory as activations times columns, where the rows themselves
would take ``v n`` times the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backpack.own import Form
from backpack.vivit.kept import Piece, Versions
from backpack.vivit.settled import in_precision, joined, sharing, tensors_of


@dataclass
class Rows:
    """Columns of one backward pass for some samples of its batch.

    Attributes:
        columns: their number.
        samples: number of samples that are kept.
        scale: what every row is multiplied by.
        weight: how many samples each of them stands for.
        forms: for every parameter, its forms with the columns that they are about; others are zero.
        versions: tensors that must not have been changed since.
    """

    columns: int
    samples: int
    scale: float = 1.0
    weight: float = 1.0
    forms: dict[Tensor, list[tuple[slice, Form]]] = field(default_factory=dict)
    versions: dict[Tensor, Versions] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.columns * self.samples

    def add(self, parameter: Tensor, pieces: Iterable[Piece], firsts: Sequence[int]) -> None:
        """Take the forms of a parameter; chunks that meet the same inputs become one form.

        Args:
            parameter: the parameter.
            pieces: its forms.
            firsts: number of the first column of each chunk.
        """
        kept = sorted(pieces, key=lambda piece: piece.chunk)
        if not kept:
            self.forms[parameter] = []
            return
        self.versions[parameter] = [pair for piece in kept for pair in piece.versions]
        runs: list[list[Piece]] = []
        for piece in kept:
            if runs and runs[-1][-1].chunk + 1 == piece.chunk:
                runs[-1].append(piece)
            else:
                runs.append([piece])
        placed: list[tuple[slice, Form]] = []
        for run in runs:
            whole = joined([piece.form for piece in run])
            found = [whole] if whole is not None else [piece.form for piece in run]
            first = firsts[run[0].chunk]
            for form in found:
                placed.append((slice(first, first + form.columns), form))
                first += form.columns
        self.forms[parameter] = placed
        if len(kept) > 1:  # columns were copied
            known = [(t, t._version) for _, f in placed for t in tensors_of(f)]
            self.versions[parameter] = _of_memory(self.versions[parameter] + known, placed)

    def share(self, other: Rows) -> None:
        """Hold inputs that the other rows have too in their memory."""
        for parameter, placed in self.forms.items():
            theirs = other.forms.get(parameter, [])
            if len(placed) == len(theirs) == 1:
                ((place, form),) = placed
                self.forms[parameter] = [(place, sharing(theirs[0][1], form))]
                known = self.versions[parameter] + other.versions[parameter]
                self.versions[parameter] = _of_memory(known, self.forms[parameter])

    def of(self, parameter: Tensor) -> list[tuple[slice, Form]]:
        """The forms of a parameter.

        Raises:
            RuntimeError: if tensors that they refer to have been changed in place.
        """
        for tensor, version in self.versions.get(parameter, ()):
            if tensor._version != version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(tensor.shape)}, which a parameter of shape "
                    f"{tuple(parameter.shape)} met in the backward pass, has been changed in place "
                    "since; ask for results before, or give the model a copy of what you overwrite"
                )
        return self.forms.get(parameter, [])


def _of_memory(versions: Versions, placed: list[tuple[slice, Form]]) -> Versions:
    """The versions of tensors that forms still refer to."""
    alive = {id(t) for _, form in placed for t in tensors_of(form)}
    return [pair for pair in versions if id(pair[0]) in alive]


class Beside(Rows):
    """Columns of a pass and its individual gradients, for products of all with all."""

    def __init__(self, first: Rows, second: Rows) -> None:
        super().__init__(first.columns + second.columns, first.samples)
        self.parts = first, second

    def of(self, parameter: Tensor) -> list[tuple[slice, Form]]:
        """As one form, if they meet the same inputs: rows are then written once."""
        first, second = (rows.of(parameter) for rows in self.parts)
        if len(first) == len(second) == 1:
            (place, form), (_, other) = first[0], second[0]
            whole = joined([form, other]) if place.stop == self.parts[0].columns else None
            if whole is not None:
                return [(slice(place.start, self.columns), whole)]
        columns = self.parts[0].columns
        shifted = [(slice(v.start + columns, v.stop + columns), form) for v, form in second]
        return first + shifted


def memory_of(sides: Iterable[Rows]) -> int:
    """Bytes of all memory that forms refer to; each counts once."""
    found = {}
    for rows in sides:
        for placed in rows.forms.values():
            for _, form in placed:
                for tensor in tensors_of(form):
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def total_count(sides: Sequence[Rows]) -> int:
    """Number of rows of several passes."""
    return sum(rows.count for rows in sides)


@torch.no_grad()
def inner(
    left: Sequence[Rows],
    right: Sequence[Rows],
    parameters: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Inner products of all rows, summed over parameters, in double precision.

    Args:
        left: rows of several passes.
        right: others, or the same object.
        parameters: the parameters of the group.
        dtype: precision of the single products; that of the forms by default.

    Returns:
        ``[rows of left, rows of right]``.
    """
    like, symmetric = parameters[0], left is right
    if len(left) == len(right) == 1:
        return _inner_of_passes(left[0], right[0], parameters, dtype)
    result = like.new_zeros(total_count(left), total_count(right), dtype=torch.float64)
    below = 0
    for i, a in enumerate(left):
        beside = 0
        for j, b in enumerate(right):
            if not symmetric or j <= i:
                block = _inner_of_passes(a, b, parameters, dtype)
                result[below : below + a.count, beside : beside + b.count] = block
                if symmetric and j < i:
                    result[beside : beside + b.count, below : below + a.count] = block.mT
            beside += b.count
        below += a.count
    return result


def _inner_of_passes(
    a: Rows, b: Rows, parameters: Sequence[Tensor], dtype: torch.dtype | None
) -> Tensor:
    like = parameters[0]
    result = like.new_zeros(a.columns, a.samples, b.columns, b.samples, dtype=torch.float64)
    for p in parameters:
        forms = [(place, in_precision(form, dtype)) for place, form in a.of(p)]
        others = forms if a is b else [(place, in_precision(form, dtype)) for place, form in b.of(p)]
        for i, (v, form) in enumerate(forms):
            for j, (w, other) in enumerate(others):
                if a is b and j > i:
                    continue
                shape = form.columns, form.samples, other.columns, other.samples
                found = form.inner(other).reshape(shape)
                result[v, :, w] += found
                if a is b and j < i:
                    result[w, :, v] += found.permute(2, 3, 0, 1)
    return result.reshape(a.count, b.count).mul_(a.scale * b.scale)


@torch.no_grad()
def project(
    sides: Sequence[Rows],
    parameters: Sequence[Tensor],
    vectors: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Inner products of all rows with vectors ``[k, *p]``, in double precision: ``[k, rows]``."""
    parts = []
    for rows in sides:
        shape = len(vectors[0]), rows.columns, rows.samples
        part = vectors[0].new_zeros(shape, dtype=torch.float64)
        for p, u in zip(parameters, vectors, strict=True):
            for v, form in rows.of(p):
                found = in_precision(form, dtype)
                part[:, v] += found.project(u.to(found.like.dtype)).to(part)
        parts.append(part.flatten(1) * rows.scale)
    return torch.cat(parts, 1)


@torch.no_grad()
def combine(
    sides: Sequence[Rows],
    parameters: Sequence[Tensor],
    weights: Tensor,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Sums of all rows with weights ``[k, rows]``: for each parameter ``[k, *p]``."""
    result = []
    for p in parameters:
        total: Tensor | None = None
        first = 0
        for rows in sides:
            w = weights[:, first : first + rows.count] * rows.scale
            w = w.reshape(len(weights), rows.columns, rows.samples)
            for v, form in rows.of(p):
                found = in_precision(form, dtype)
                part = found.combine(w[:, v].to(found.like.dtype)).to(dtype or p.dtype)
                total = part if total is None else total.add_(part)
            first += rows.count
        if total is None:
            total = p.detach().new_zeros(len(weights), *p.shape, dtype=dtype or p.dtype)
        result.append(total)
    return result


@torch.no_grad()
def squared_norms(
    sides: Sequence[Rows], parameters: Sequence[Tensor], dtype: torch.dtype | None = None
) -> Tensor:
    """Squared norms of all columns of each sample together, in double: ``[samples of all passes]``."""
    parts = []
    for rows in sides:
        part = parameters[0].new_zeros(rows.samples, dtype=torch.float64)
        for p in parameters:
            for _, form in rows.of(p):
                part += in_precision(form, dtype).squared_norms().to(part)
        parts.append(part * rows.scale**2)
    return torch.cat(parts) if parts else parameters[0].new_zeros(0, dtype=torch.float64)


@torch.no_grad()
def traces(
    left: Rows, right: Rows, parameters: Sequence[Tensor], dtype: torch.dtype | None = None
) -> Tensor:
    """Inner products of equal columns, summed over these, in double: ``[samples, samples]``."""
    result = parameters[0].new_zeros(left.samples, right.samples, dtype=torch.float64)
    for p in parameters:
        forms = _single_columns(left, p, dtype)
        others = forms if left is right else _single_columns(right, p, dtype)
        for column in forms.keys() & others.keys():
            for form in forms[column]:
                for other in others[column]:
                    result += form.inner(other).to(result)
    return result * (left.scale * right.scale)


def _single_columns(rows: Rows, parameter: Tensor, dtype: torch.dtype | None) -> dict[int, list[Form]]:
    found: dict[int, list[Form]] = {}
    for place, form in rows.of(parameter):
        for j in range(form.columns):
            part = in_precision(form.take(slice(j, j + 1), slice(None)), dtype)
            found.setdefault(place.start + j, []).append(part)
    return found
