"""How operations move the sample axis: one function per kind of operation.

A mover takes the axis before, the tensor that has it, the result, and the operation's arguments, and
returns the axis of the result, lost where the operation mixes samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from backpack._torch import SPACES
from backpack.samples.axis import MADE, SampleAxis, picked_axis, regular_axis, sample_axis_of

Mover = Callable[[SampleAxis, Tensor, Tensor, tuple[Any, ...], dict[str, Any]], SampleAxis]


MOVERS: dict[Any, Mover] = {}


def spellings(*names: str) -> list[Any]:
    """All function objects the torch-function protocol may report for these names."""
    found = []
    for name in names:
        for space in SPACES:
            func = getattr(space, name, None)
            if func is None:
                continue
            getter = getattr(func, "__get__", None)  # of properties
            if callable(func) or getter is not None:
                found.append(func if callable(func) else getter)
    return found


def mover(*names: str) -> Callable[[Mover], Mover]:
    """Register how operations of these names move the sample axis."""

    def register(function: Mover) -> Mover:
        for func in spellings(*names):
            MOVERS[func] = function
        return function

    return register


def argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: int, *names: str, default: Any = None
) -> Any:
    """An argument by its name or its place."""
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[place] if len(args) > place else default


def wrap(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def dims_of(dims: Any, ndim: int) -> list[int]:
    if dims is None:
        return list(range(ndim))
    if isinstance(dims, int):
        dims = (dims,)
    return [wrap(d, ndim) for d in dims]


@mover("transpose", "swapaxes", "swapdims")
def _transpose(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    first = wrap(argument(args, kwargs, 1, "dim0", "axis0"), new.dim())
    second = wrap(argument(args, kwargs, 2, "dim1", "axis1"), new.dim())
    return batch.moved({first: second, second: first}.get(batch.dim, batch.dim))


@mover("T")
def _reversed(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    return batch.moved(new.dim() - 1 - batch.dim)


@mover("t", "H", "adjoint", "mT", "mH")
def _matrix_transpose(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    last = new.dim() - 1
    if last < 1:
        return batch
    return batch.moved({last: last - 1, last - 1: last}.get(batch.dim, batch.dim))


@mover("permute")
def _permute(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    dims = kwargs.get("dims") or (args[1:] if isinstance(args[1], int) else args[1])
    return batch.moved(dims_of(dims, new.dim()).index(batch.dim))


@mover("movedim", "moveaxis")
def _movedim(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    source = dims_of(argument(args, kwargs, 1, "source"), new.dim())
    target = dims_of(argument(args, kwargs, 2, "destination"), new.dim())
    order: list[int | None] = [None] * new.dim()
    for s, t in zip(source, target, strict=True):
        order[t] = s
    rest = iter(d for d in range(new.dim()) if d not in source)
    return batch.moved([next(rest) if d is None else d for d in order].index(batch.dim))


@mover("reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze")
@mover("ravel", "atleast_2d", "atleast_3d")
def _reshape(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    return reshaped(batch, old.shape, new.shape)


def reshaped(batch: SampleAxis, old: torch.Size, new: torch.Size) -> SampleAxis:
    """Row-major order is kept: match the products of the axes before the samples."""
    if not batch.size and 0 in new:  # no samples: any axis without entries is theirs
        return batch.placed(list(new).index(0), 1, 1)
    if batch.picked is not None:
        return _reshape_picked(batch, old, new)
    if batch.dim == 0 and batch.outer == 1 and new and batch.size:
        inner, rest = divmod(new[0], batch.size)
        if inner and not rest:
            return batch.placed(0, 1, inner)
    before = prod(old[: batch.dim]) * batch.outer
    after = prod(old[batch.dim + 1 :]) * batch.inner
    left, found = 1, None
    for dim, length in enumerate(new):
        right = prod(new[dim + 1 :])
        covers = left * length * right == before * batch.size * after
        if covers and left and length and right and before % left == 0 and after % right == 0:
            outer, inner = before // left, after // right
            if outer * batch.size * inner == length:
                if outer == inner == 1:  # one sample fits many axes: prefer one that holds no more
                    return batch.placed(dim, 1, 1)
                found = found or batch.placed(dim, outer, inner)
        left *= length
    return found or batch.losing(f"reshape {tuple(old)} -> {tuple(new)} splits the sample axis")


def _reshape_picked(batch: SampleAxis, old: torch.Size, new: torch.Size) -> SampleAxis:
    """An axis of picked entries may move, but not be split or merged."""
    left = 1
    for dim, length in enumerate(new):
        if left == prod(old[: batch.dim]) and length == batch.length:
            return batch.moved(dim)
        left *= length
    return batch.losing(f"reshape {tuple(old)} -> {tuple(new)} of picked samples")


@mover("expand", "expand_as", "broadcast_to")
def _expand(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    moved = batch.moved(batch.dim + new.dim() - old.dim())
    if old.shape[batch.dim] == 1 and new.shape[moved.dim] != 1:
        return batch.losing("a batch of one was expanded")
    return moved


@mover("repeat", "tile")
def _repeat(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    moved = batch.moved(batch.dim + new.dim() - old.dim())
    factor = new.shape[moved.dim] // max(old.shape[batch.dim], 1)
    if batch.picked is not None and factor != 1:
        return moved.taking(torch.arange(batch.length, device=new.device).repeat(factor), new)
    return moved.placed(moved.dim, moved.outer * factor, moved.inner)


@mover("repeat_interleave")
def _repeat_interleave(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    dim = argument(args, kwargs, 2, "dim")
    repeats = argument(args, kwargs, 1, "repeats")
    if dim is None:
        return batch.losing("repeat_interleave without dim flattens the sample axis")
    if wrap(dim, old.dim()) != batch.dim:
        return batch
    if not isinstance(repeats, int) or batch.picked is not None:
        return batch.taking(
            torch.arange(batch.length, device=old.device).repeat_interleave(repeats), old
        )
    return batch.placed(batch.dim, batch.outer, batch.inner * repeats)


@mover("stack")
def _stack(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    dim = wrap(argument(args, kwargs, 1, "dim", default=0), new.dim())
    if batch.solo is not None:
        axes = [sample_axis_of(part) for part in argument(args, kwargs, 0, "tensors")]
        ones = [axis.solo for axis in axes if axis is not None and not axis.lost]
        if None not in ones and len(ones) == len(axes) > 1:
            return picked_axis(torch.tensor(ones, device=new.device), batch.size, dim)
    return batch.moved(batch.dim + (dim <= batch.dim))


@mover("cat", "concat", "concatenate")
def _cat(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    dim = wrap(argument(args, kwargs, 1, "dim", "axis", default=0), new.dim())
    if dim != batch.dim:
        return batch
    parts = argument(args, kwargs, 0, "tensors")
    axes = [sample_axis_of(p) for p in parts]
    if batch.picked is None and all(axis == batch for axis in axes):
        return batch.placed(batch.dim, batch.outer * len(parts), batch.inner)
    samples = []
    for part, axis in zip(parts, axes, strict=True):
        if axis is None or axis.lost or axis.dim != batch.dim:
            return batch.losing("concatenating samples with something else")
        samples.append(axis.sample_ids(part.device))
    if old is not parts[0]:
        return _cat(axes[0], parts[0], new, args, kwargs)  # type: ignore[arg-type]
    return picked_axis(torch.cat(samples), batch.size, dim)


# What puts tensors beside each other.
JOINS = frozenset(spellings("stack", "cat", "concat", "concatenate"))
_STACKS = frozenset(spellings("stack"))
# Axes of so many rows are remembered.
_REMEMBERED = 2**12


def joined(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    new: Tensor,
    marked: Sequence[tuple[Tensor, SampleAxis]],
) -> SampleAxis | None:
    """The axis of tensors of one sample each beside each other, which asks each of them once."""
    parts = argument(args, kwargs, 0, "tensors")
    size, dim = marked[0][1].size, wrap(argument(args, kwargs, 1, "dim", "axis", default=0), new.dim())
    if not isinstance(parts, (list, tuple)) or len(parts) != len(marked) or size == 1:
        return None
    samples: list[tuple[int, int]] = []
    tentative = min(axis.tentative for _, axis in marked)
    for part, (tensor, axis) in zip(parts, marked, strict=True):
        sample = axis.solo
        if part is not tensor or sample is None or axis.lost or axis.size != size:
            return None
        if func in _STACKS:
            samples.append((sample, 1))
        elif axis.bare or axis.dim != dim:
            return None
        else:
            samples.append((sample, axis.length))
    length = sum(many for _, many in samples)
    found = _joined_axis if length <= _REMEMBERED else _joined_axis.__wrapped__
    return found(tuple(samples), size, dim, new.device, tentative)


@lru_cache(256)
def _joined_axis(
    samples: tuple[tuple[int, int], ...], size: int, dim: int, device: torch.device, tentative: int
) -> SampleAxis:
    ids = [sample for sample, length in samples for _ in range(length)]
    return picked_axis(torch.tensor(ids, device=device), size, dim, tentative)


@mover("flip")
def _flip(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    dims = argument(args, kwargs, 1, "dims")
    return _turned(batch, old, args[1:] if isinstance(dims, int) and len(args) > 2 else dims)


@mover("flipud")
def _flipud(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    return _turned(batch, old, 0)


@mover("fliplr")
def _fliplr(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    return _turned(batch, old, 1)


def _turned(batch: SampleAxis, old: Tensor, dims: Any) -> SampleAxis:
    if batch.dim not in dims_of(dims, old.dim()):
        return batch
    return picked_axis(batch.sample_ids(old.device).flip(0), batch.size, batch.dim, batch.tentative)


@mover("msort")
def _first_axis(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    return along_dims(batch, old, 0)


@mover("roll")
def _roll(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    shifts, dims = argument(args, kwargs, 1, "shifts"), argument(args, kwargs, 2, "dims")
    if dims is None or dims == ():
        return batch.losing("rolling the flattened samples")
    shifts = (shifts,) if isinstance(shifts, int) else shifts
    along = [s for s, d in zip(shifts, dims_of(dims, old.dim()), strict=True) if d == batch.dim]
    if not along:
        return batch
    rolled = batch.sample_ids(old.device).roll(sum(along))
    return picked_axis(rolled, batch.size, batch.dim, batch.tentative)


_LIKE = "zeros ones full empty rand randn randint".split()


_LIKE = [f"{name}_like" for name in _LIKE] + [f"new_{name}" for name in _LIKE]


# Operations that take no more than the shape or kind of a tensor.
LIKE = frozenset(spellings(*_LIKE))


@mover(*_LIKE)
def _like(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    """Nobody's rows as yet: the size matches, and no more is known."""
    if batch.solo is not None:
        return replace(batch, tentative=True, lost="made like one sample")
    if batch.picked is not None and batch.length == batch.size:
        return regular_axis(batch.size, batch.dim, tentative=MADE)
    return replace(batch, tentative=MADE)


def along_dims(batch: SampleAxis, old: Tensor, dims: Any) -> SampleAxis:
    if batch.dim in dims_of(dims, old.dim()):
        return batch.losing("an operation along the sample axis mixes samples")
    return batch
