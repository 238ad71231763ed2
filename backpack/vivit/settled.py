"""Single forms that outlive the backward pass in which they were made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from backpack.own import Dense, Form, Lookup, Outer, Patches, Sum


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
