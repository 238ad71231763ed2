"""Forms that outlive the backward pass in which they were made, and their linear algebra.

Letters: ``v`` columns, ``n`` samples, ``k`` vectors, ``p`` a parameter's shape. A *row* is one column
of one sample, a vector in the space of parameters; rows are numbered pass by pass, columns first.

A form of ``v`` columns takes as much memory as activations times columns, where the rows themselves
would take ``v n`` times the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backpack.own import (
    BackpropExtension,
    Columns,
    ColumnSource,
    Context,
    Dense,
    Form,
    Lookup,
    LossGradient,
    Outer,
    Pass,
    Patches,
    Sum,
    Wanted,
)

Versions = list[tuple[Tensor, int]]


# --------------------------------------------------------------------------------------
# Single forms


def settled(form: Form) -> Form:
    """The form without a graph, in single precision at least.

    Kinds that need the graph (of derived parameters) are written out while it is there.
    """
    if isinstance(form, Outer):
        inputs = form.inputs
        kept = (
            Patches(inputs.windows.detach(), inputs.ndim)
            if isinstance(inputs, Patches)
            else inputs.detach()
        )
        return replace(form, inputs=kept, g=_at_least_single(form.g))
    if isinstance(form, Lookup):
        return replace(form, index=form.index.detach(), g=_at_least_single(form.g))
    if isinstance(form, Sum):
        return Sum(tuple(settled(each) for each in form.forms))
    return Dense(_at_least_single(form.dense()))


def _at_least_single(x: Tensor) -> Tensor:
    x = x.detach()
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def in_precision(form: Form, dtype: torch.dtype | None) -> Form:
    """The form with columns of another precision; inputs follow piece by piece, where they are used."""
    if dtype is None or form.like.dtype == dtype:
        return form
    if isinstance(form, Sum):
        return Sum(tuple(in_precision(each, dtype) for each in form.forms))
    if isinstance(form, (Outer, Lookup)):
        return replace(form, g=form.g.to(dtype))
    assert isinstance(form, Dense)
    return Dense(form.values.to(dtype))


def tensors_of(form: Form) -> Iterator[Tensor]:
    """The memory that a settled form refers to."""
    if isinstance(form, Outer):
        yield form.inputs.windows if isinstance(form.inputs, Patches) else form.inputs
        yield form.g
    elif isinstance(form, Lookup):
        yield from (form.index, form.g)
    elif isinstance(form, Sum):
        for each in form.forms:
            yield from tensors_of(each)
    else:
        assert isinstance(form, Dense)
        yield form.values


def joined(forms: Sequence[Form]) -> Form | None:
    """One form with the columns of all, one after the other; ``None`` where they meet other inputs."""
    first, *rest = forms
    if not rest:
        return first
    if isinstance(first, Dense) and all(isinstance(form, Dense) for form in rest):
        return Dense(torch.cat([form.values for form in forms]))  # type: ignore[attr-defined]
    if isinstance(first, Outer):
        for form in rest:
            alike = isinstance(form, Outer) and form.layout == first.layout
            if not alike or not _same_inputs(first.inputs, form.inputs):  # type: ignore[attr-defined]
                return None
        return replace(first, g=_side_by_side([form.g for form in forms]))  # type: ignore[attr-defined]
    if isinstance(first, Lookup):
        for form in rest:
            if not isinstance(form, Lookup) or not torch.equal(form.index, first.index):
                return None
        return replace(first, g=torch.cat([form.g for form in forms]))  # type: ignore[attr-defined]
    if isinstance(first, Sum) and all(
        isinstance(form, Sum) and len(form.forms) == len(first.forms) for form in rest
    ):
        parts = [joined(part) for part in zip(*(form.forms for form in forms), strict=True)]  # type: ignore[attr-defined]
        whole = [part for part in parts if part is not None]
        return Sum(tuple(whole)) if len(whole) == len(parts) else None
    return None


def sharing(form: Form, other: Form) -> Form:
    """The other form, with the inputs of the first where they are equal: memory is held once."""
    if isinstance(form, Sum) and isinstance(other, Sum) and len(form.forms) == len(other.forms):
        pairs = zip(form.forms, other.forms, strict=True)
        return Sum(tuple(sharing(a, b) for a, b in pairs))
    if not isinstance(form, Outer) or not isinstance(other, Outer):
        return other
    a, b = form.inputs, other.inputs
    if isinstance(a, Patches) and isinstance(b, Patches):
        same = a.ndim == b.ndim and _equal(a.windows, b.windows)
    else:
        same = isinstance(a, Tensor) and isinstance(b, Tensor) and _equal(a, b)
    return replace(other, inputs=a) if same else other


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same view of memory with the same contents (which may overlap)."""
    about = [(x.shape, x.stride(), x.dtype, x.device, x.storage_offset()) for x in (a, b)]
    memory = [x.untyped_storage() for x in (a, b)]
    if about[0] != about[1] or memory[0].nbytes() != memory[1].nbytes():
        return False
    whole = [torch.empty(0, dtype=a.dtype, device=a.device).set_(each) for each in memory]
    return memory[0].data_ptr() == memory[1].data_ptr() or torch.equal(*whole)


def _side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """Columns ``[v, ..., s, o]`` as one tensor, in the order of memory that they have."""
    if all(g.stride(-1) == 1 for g in columns):
        return torch.cat(list(columns))
    return torch.cat([g.mT for g in columns]).mT


def _same_inputs(a: Tensor | Patches, b: Tensor | Patches) -> bool:
    if isinstance(a, Patches) and isinstance(b, Patches):
        return a.ndim == b.ndim and _same_inputs(a.windows, b.windows)
    if isinstance(a, Patches) or isinstance(b, Patches):
        return False
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


# --------------------------------------------------------------------------------------
# Keeping


class Piece(NamedTuple):
    """The form of one chunk of columns.

    Attributes:
        chunk: its number.
        form: the form.
        versions: the tensors that it refers to, and how often they had been changed in place.
    """

    chunk: int
    form: Form
    versions: Versions


class Kept(NamedTuple):
    """What is kept of a parameter.

    Attributes:
        samples: number of samples of the batch.
        pieces: forms of the samples that are kept.
    """

    samples: int
    pieces: list[Piece]


class Numbered(ColumnSource):
    """Columns of another source, with a number for each chunk; notes what it sees of the pass.

    Parameters that a chunk does not reach are not told of it: by their numbers, chunks of different
    parameters are matched.

    Attributes:
        source: the other source; ``None``: no columns.
        every_column: whether as many columns are wanted as there are model outputs, not as few as do.
        sizes: number of columns of each chunk so far.
        begun: number of the first chunk of the last call.
        order: the parameters, in the order of the models that hold them.
    """

    def __init__(self, source: ColumnSource | None, every_column: bool = False) -> None:
        self.source, self.every_column = source, every_column
        self.random = source is not None and source.random  # type: ignore[misc]
        self.second_order = source is not None and source.second_order  # type: ignore[misc]
        self.sizes: list[int] = []
        self.begun = 0
        self.order: dict[Tensor, None] = {}

    def restart(self) -> None:
        """Forget the pass before."""
        self.sizes, self.order = [], {}

    def chunks(self, given: Pass, wanted: Wanted) -> Iterator[Columns]:
        found = [leaf.parameter for leaf in given.leaves]
        owners = [recording.module() for recording in given.graph.recordings]
        known = [p for owner in owners if owner is not None for p in owner.parameters()]
        self.order |= dict.fromkeys([*(p for p in known if p in set(found)), *found])
        self.begun = len(self.sizes)
        if self.source is None:
            return
        wanted = wanted._replace(every_column=wanted.every_column or self.every_column)
        for columns in self.source.chunks(given, wanted):
            self.sizes.append(len(columns.values[0]))
            yield columns


class Keep(BackpropExtension):
    """Forms of all chunks of columns of a parameter, kept.

    Args:
        savefield: the parameter's attribute.
        source: the columns.
        subsampling: samples to keep; default all.
        deliver: is given the parameter and what is kept of it, in place of the attribute.
    """

    needs_gradient = False

    def __init__(
        self,
        savefield: str,
        source: Numbered | LossGradient,
        subsampling: Sequence[int] | None = None,
        deliver: Callable[[Tensor, Kept], None] | None = None,
    ) -> None:
        self.savefield, self.source, self.subsampling = savefield, source, subsampling
        self.deliver = deliver

    def reduce(self, form: Form, sign: Tensor | None = None) -> list[Piece]:
        number = len(self.source.sizes) - 1 if isinstance(self.source, Numbered) else 0
        if self.subsampling is not None:
            form = form.take(slice(None), _index(self.subsampling, form.samples))
        with torch.no_grad():
            form = settled(form)
        return [Piece(number, form, [(t, t._version) for t in tensors_of(form)])]

    def finish(self, state: list[Piece], context: Context) -> Any:
        kept = Kept(context.samples, state)
        return kept if self.deliver is None else self.deliver(context.parameter, kept)

    def zero(self, context: Context) -> Any:
        return self.finish([], context)


def _index(subsampling: Sequence[int], samples: int) -> Tensor:
    index = torch.as_tensor(list(subsampling), dtype=torch.long)
    if index.numel() and (int(index.max()) >= samples or int(index.min()) < -samples):
        raise IndexError(
            f"subsampling {list(subsampling)} is out of range for a batch of {samples} samples"
        )
    if len(set((index % max(samples, 1)).tolist())) < len(index):
        raise ValueError(f"subsampling {list(subsampling)} names a sample twice")
    return index % max(samples, 1)


# --------------------------------------------------------------------------------------
# Rows


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
