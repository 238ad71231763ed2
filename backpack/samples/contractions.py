"""How products move the sample axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backpack.samples.axis import NOBODY, SampleAxis, axis_of, sample_axis_of
from backpack.samples.movers import argument, mover
from backpack.samples.segments import axis_by_matrix


@mover("scaled_dot_product_attention")
def _attention(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    masked = _masked(new, args, kwargs)
    if masked is not None:
        return masked
    queries = all(
        old is not argument(args, kwargs, at, name) for at, name in ((1, "key"), (2, "value"))
    )
    # Queries do not see each other.
    if batch.dim >= old.dim() - (1 if queries and old is argument(args, kwargs, 0, "query") else 2):
        return batch.losing("attention along the sample axis mixes samples")
    return aligned(batch, old, new)


def _masked(new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SampleAxis | None:
    """The axis where a mask lets positions see those of their own sample only."""
    tensors = [argument(args, kwargs, at, name) for at, name in enumerate(("query", "key", "value"))]
    mask, axes = argument(args, kwargs, 3, "attn_mask"), []
    for x in tensors:
        axis = sample_axis_of(x)
        if axis is None or axis.lost or axis.bare or axis.dim != x.dim() - 2 or axis.size < 2:
            return None
        axes.append(axis)
    if not isinstance(mask, Tensor) or mask.requires_grad or mask.dim() < 2:
        return None
    queries, keys, values = (axis.sample_ids(new.device) for axis in axes)
    sees = mask if mask.dtype == torch.bool else mask > -torch.inf
    sees = sees.reshape(-1, *sees.shape[-2:]).any(0)
    if not torch.equal(keys, values) or bool((sees & (queries.unsqueeze(1) != keys)).any()):
        return None
    return axes[0].moved(new.dim() - 2)


@mover("embedding")
def _embedding(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    if old is not argument(args, kwargs, 0, "input"):
        return batch.losing("a table that depends on the data")
    return batch


@mover("embedding_bag")
def _bags(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    """Bags are rows ``[bags, positions]``, or begin where ``offsets`` say."""
    if old is argument(args, kwargs, 1, "weight"):
        return batch.losing("a table that depends on the data")
    offsets = argument(args, kwargs, 2, "offsets")
    if offsets is old:
        return batch
    if offsets is None:
        mixes = batch.dim != 0
        return batch.losing("embedding_bag mixes samples: they are in its bags") if mixes else batch
    count, places = new.shape[0], torch.arange(len(old), device=old.device)
    bags = torch.searchsorted(offsets[:count].to(places), places, right=True) - 1
    ids = batch.sample_ids(old.device)
    last = torch.full((count,), NOBODY, device=old.device).index_copy(0, bags, ids)
    axis = axis_of(last.unsqueeze(1).expand(new.shape), batch.size)
    if axis is None or axis.dim != 0 or not bool((last[bags] == ids).all()):
        return batch.losing("embedding_bag mixes samples: a bag has rows of several")
    return axis


@mover("linear")
def _linear(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    if old is not argument(args, kwargs, 0, "input") or old is argument(args, kwargs, 1, "weight"):
        return batch.losing("a weight that depends on the data")
    if batch.dim == old.dim() - 1:
        return batch.losing("a product over the sample axis mixes samples")
    return batch


# Names of the tensors in products, in the order of their places.
_FACTORS = ("input", "mat1", "batch1", "mat", "mat2", "batch2", "vec", "vec2", "other", "tensor")


@mover("__rmatmul__")
def _reflected(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    return _matmul(batch, old, new, args[::-1], kwargs)


@mover("matmul", "__matmul__", "bmm", "mm", "mv", "dot", "addmm", "baddbmm", "addmv")
def _matmul(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    named = (kwargs[name] for name in _FACTORS if name in kwargs)
    tensors = [a for a in (*args, *named) if isinstance(a, Tensor)]
    left, right = tensors[-2:]
    # The same tensor may be several of them.
    found = [aligned(batch, old, new)] if len(tensors) == 3 and old is tensors[0] else []
    if old is left:
        found.append(_factor(batch, old, right, new, first=True))
    if old is right:
        found.append(_factor(batch, old, left, new, first=False))
    agree = all(axis.agrees(found[0]) for axis in found)
    return found[0] if agree else batch.losing("a product of samples with samples")


def _factor(batch: SampleAxis, here: Tensor, other: Tensor, new: Tensor, first: bool) -> SampleAxis:
    """The axis of a product, from that of one of its two factors."""
    last = here.dim() - 1
    if batch.dim == (last if first or last == 0 else last - 1):
        found = None
        if batch.size > 1 and last < 2 and new.dim():
            matrix = other.mT if first and other.dim() == 2 else other
            found = axis_by_matrix(batch, matrix, new.dim() - 1 if first else 0)
        return found or batch.losing("a product over the sample axis mixes samples")
    if batch.dim < last - 1:  # one of the axes that number matrices
        return batch.moved(batch.dim + (new.dim() - here.dim() if other.dim() > 1 else 0))
    if first:
        return batch.moved(new.dim() - (1 if other.dim() == 1 else 2))
    return batch.moved(new.dim() - 1)


@mover("einsum")
def _einsum(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    equation = args[0]
    operands = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    terms, result = einsum_labels(equation, [x.dim() for x in operands])
    mine = {term[batch.dim] for term, x in zip(terms, operands, strict=True) if x is old}
    label = next(iter(mine))
    if len(mine) == 1 and label in result:
        return batch.moved(result.index(label))
    if len(mine) == 1 and len(terms) == 2 and batch.size > 1:
        at = 0 if operands[1] is old else 1
        others = [other for other in terms[at] if other != label]
        if len(others) == 1 and len(terms[at]) == 2 and others[0] in result:
            matrix = operands[at] if terms[at][1] == label else operands[at].mT
            alone = others[0] not in terms[1 - at]
            found = axis_by_matrix(batch, matrix, result.index(others[0])) if alone else None
            if found is not None:
                return found
    return batch.losing(f"einsum {equation!r} sums over the sample axis")


def einsum_labels(equation: str, ndims: Sequence[int]) -> tuple[list[list[Any]], list[Any]]:
    """A label for every axis of the operands and of the result: a letter, or a place in an ellipsis."""
    left, arrow, right = equation.replace(" ", "").partition("->")

    def spelled(term: str, width: int) -> list[Any]:
        before, dots, after = term.partition("...")
        # Axes under an ellipsis are aligned from the right.
        return [*before, *(range(-width, 0) if dots else ()), *after]

    texts = left.split(",")
    widths = [n - len(t.replace("...", "")) for t, n in zip(texts, ndims, strict=True)]
    terms = [spelled(term, width) for term, width in zip(texts, widths, strict=True)]
    widest = max((w for w, t in zip(widths, texts, strict=True) if "..." in t), default=0)
    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        right = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return terms, spelled(right, widest)


def aligned(batch: SampleAxis, old: Tensor, new: Tensor) -> SampleAxis:
    """Broadcasting aligns axes from the right."""
    return batch.moved(batch.dim + new.dim() - old.dim())
