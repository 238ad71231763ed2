"""Forms of one sample each, of different sizes, beside each other: one form in few operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backpack.forms.base import Dense, Form
from backpack.forms.layout import Patches
from backpack.forms.memory import fresh
from backpack.forms.outer import Outer


def beside(forms: Sequence[tuple[int, Form]], size: int) -> Form | None:
    """The form of ``size`` samples, from forms ``[v, 1, *p]`` of one sample each, with its number.

    Forms of one sample are added up: positions that share a weight are counted one after the other.
    Samples without a form are zero.

    Returns:
        ``None`` if they are not of one kind, or of one for which nothing is gained.
    """
    kind, columns = type(forms[0][1]), forms[0][1].columns
    if any(type(form) is not kind or form.columns != columns for _, form in forms):
        return None
    forms = sorted(forms, key=lambda pair: pair[0])
    if kind is Dense:
        return _values([form.values for _, form in forms], [n for n, _ in forms], size)  # type: ignore[attr-defined]
    return _positions(forms, size) if kind is Outer else None  # type: ignore[arg-type]


def _values(values: Sequence[Tensor], of: list[int], size: int) -> Dense:
    like = values[0]
    if of != list(range(size)):
        found, at = torch.cat(tuple(values), 1), torch.tensor(of, device=like.device)
        return Dense(found.new_zeros(len(like), size, *like.shape[2:]).index_add(1, at, found))
    if torch.is_grad_enabled():
        return Dense(torch.cat(tuple(values), 1))
    return Dense(torch.cat(tuple(values), 1, out=fresh(like, (len(like), size, *like.shape[2:]))))


def _positions(forms: Sequence[tuple[int, Outer]], size: int) -> Outer | None:
    first = forms[0][1]
    layout, like = first.layout, first.g
    for _, form in forms:
        alike = form.layout == layout and form.inputs.shape[1] == first.inputs.shape[1]
        if not alike or form.counts is not None or form.call is not None or form.g.dtype != like.dtype:
            return None
    counts, places = [0] * size, list[tuple[int, int, int]]()
    for sample, form in forms:
        places.append((sample, counts[sample], form.positions))
        counts[sample] += form.positions
    longest = max(counts)
    full = min(counts) == longest
    each = None if full else torch.tensor(counts, device=like.device)
    if torch.is_grad_enabled():
        flat = [sample * longest + start + k for sample, start, many in places for k in range(many)]
        at = torch.tensor(flat, device=like.device)

        def placed(x: Tensor, dim: int) -> Tensor:
            """``[..., rows, features] -> [..., N, s, features]``, positions of all samples."""
            if not full:
                x = x.new_zeros(*x.shape[:dim], size * longest, x.shape[-1]).index_copy(dim, at, x)
            return x.unflatten(dim, (size, longest)).movedim(dim, dim - 1)

        a = placed(torch.cat([form.a for _, form in forms], 2)[0], 1)
        return Outer(a, placed(torch.cat([form.g for _, form in forms], 3)[:, 0], 2), layout, each)
    (_, q, _, i), (v, o) = first.inputs.shape, (len(like), like.shape[-1])
    room = like.new_empty if full else like.new_zeros
    a, g = room(size, q, longest, i), room(v, size, q, longest, o)
    for (_, form), (sample, start, many) in zip(forms, places, strict=True):
        g[:, sample, :, start : start + many] = form.g[:, 0]
        place = a[sample : sample + 1, :, start : start + many]
        if isinstance(form.inputs, Patches):
            form.inputs.write(place)
        else:
            place.copy_(form.inputs)
    return Outer(a, g, layout, each)
