"""How operations move the sample axis: one function per kind of operation.

A mover takes the axis before, the tensor that has it, the result, and the operation's arguments, and
returns the axis of the result, lost where the operation mixes samples.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from backpack.batch import Batch, batch_of, picked_axis, regular_axis

Mover = Callable[[Batch, Tensor, Tensor, tuple, dict], Batch]
MOVERS: dict[Any, Mover] = {}


def spellings(*names: str) -> list[Any]:
    """All function objects the torch-function protocol may report for these names."""
    found = []
    for name in names:
        for space in (torch, Tensor, torch.nn.functional, torch._C._nn, torch.special, torch.linalg):
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


def argument(args: tuple, kwargs: dict, place: int, *names: str, default: Any = None) -> Any:
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
def _transpose(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    first = wrap(argument(args, kwargs, 1, "dim0", "axis0"), new.dim())
    second = wrap(argument(args, kwargs, 2, "dim1", "axis1"), new.dim())
    return batch.moved({first: second, second: first}.get(batch.dim, batch.dim))


@mover("T")
def _reversed(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return batch.moved(new.dim() - 1 - batch.dim)


@mover("t", "H", "adjoint", "mT", "mH")
def _matrix_transpose(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    last = new.dim() - 1
    if last < 1:
        return batch
    return batch.moved({last: last - 1, last - 1: last}.get(batch.dim, batch.dim))


@mover("permute")
def _permute(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dims = kwargs.get("dims") or (args[1:] if isinstance(args[1], int) else args[1])
    return batch.moved(dims_of(dims, new.dim()).index(batch.dim))


@mover("movedim", "moveaxis")
def _movedim(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    source = dims_of(argument(args, kwargs, 1, "source"), new.dim())
    target = dims_of(argument(args, kwargs, 2, "destination"), new.dim())
    order: list[int | None] = [None] * new.dim()
    for s, t in zip(source, target, strict=True):
        order[t] = s
    rest = iter(d for d in range(new.dim()) if d not in source)
    return batch.moved([next(rest) if d is None else d for d in order].index(batch.dim))


@mover("reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze")
@mover("ravel", "atleast_2d", "atleast_3d")
def _reshape(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return reshaped(batch, old.shape, new.shape)


def reshaped(batch: Batch, old: torch.Size, new: torch.Size) -> Batch:
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


def _reshape_picked(batch: Batch, old: torch.Size, new: torch.Size) -> Batch:
    """An axis of picked entries may move, but not be split or merged."""
    left = 1
    for dim, length in enumerate(new):
        if left == prod(old[: batch.dim]) and length == batch.length:
            return batch.moved(dim)
        left *= length
    return batch.losing(f"reshape {tuple(old)} -> {tuple(new)} of picked samples")


@mover("expand", "expand_as", "broadcast_to")
def _expand(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    moved = batch.moved(batch.dim + new.dim() - old.dim())
    if old.shape[batch.dim] == 1 and new.shape[moved.dim] != 1:
        return batch.losing("a batch of one was expanded")
    return moved


@mover("repeat", "tile")
def _repeat(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    moved = batch.moved(batch.dim + new.dim() - old.dim())
    factor = new.shape[moved.dim] // max(old.shape[batch.dim], 1)
    if batch.picked is not None and factor != 1:
        return moved.taking(torch.arange(batch.length, device=new.device).repeat(factor), new)
    return moved.placed(moved.dim, moved.outer * factor, moved.inner)


@mover("repeat_interleave")
def _repeat_interleave(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
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


@mover("__getitem__")
def _getitem(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    table, index = args
    if old is not table:
        own = batch_of(table)
        if own is not None and not own.lost:  # only places are taken from the index
            return _getitem(own, table, new, args, kwargs)
        # the index depends on the data: a table is looked up
        if old is index and old.dtype not in _MASKS:
            return batch
        return batch.losing("a lookup with several indices")
    items = _items(index, old.dim())
    if items is None:
        return batch.losing("an index of an unusual form")
    return _indexed(batch, old, new, items)


_MASKS = (torch.bool, torch.uint8)


def _items(index: Any, ndim: int) -> list[Any] | None:
    """An index as ``None``, integers, slices and tensors, without an ellipsis; ``None`` for others."""
    found: list[Any] = []
    ellipsis, taken = None, 0
    for i in index if isinstance(index, tuple) else (index,):
        if i is Ellipsis:
            ellipsis = len(found)
            continue
        if isinstance(i, bool):
            return None
        if not (i is None or isinstance(i, (slice, Tensor))):
            try:
                i = operator.index(i)
            except TypeError:
                try:
                    i = torch.as_tensor(list(i) if isinstance(i, (tuple, range)) else i)
                except (TypeError, ValueError, RuntimeError):
                    return None
        if isinstance(i, Tensor) and (i.is_floating_point() or i.dtype == torch.uint8):
            return None
        if isinstance(i, Tensor) and not i.dim():
            if i.dtype == torch.bool:
                return None
            i = int(i)
        found.append(i)
        taken += _taken(i)
    rest = [slice(None)] * (ndim - taken)
    at = len(found) if ellipsis is None else ellipsis
    return found[:at] + rest + found[at:]


def _taken(i: Any) -> int:
    """Number of axes that an item of an index takes."""
    if i is None:
        return 0
    return i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1


def _indexed(batch: Batch, old: Tensor, new: Tensor, items: list[Any]) -> Batch:
    # The result's axes before tensors are looked up: an axis of ``old``, or a tensor that picks.
    axes: list[Any] = []
    at, here = 0, None
    for i in items:
        width = _taken(i)
        if at <= batch.dim < at + width:
            here = i
        if i is None:
            axes.append(None)
        elif not isinstance(i, int):
            axes.append(at if isinstance(i, slice) else i)
        at += width
    if isinstance(here, int):
        return batch.alone(here, new.shape, new.device)
    picks = [d for d, axis in enumerate(axes) if isinstance(axis, Tensor)]
    vectors = [axes[d] for d in picks]
    if picks:
        # Axes of the places: where the first index stands, or in front if others are in between.
        width = max(1 if v.dtype == torch.bool else v.dim() for v in vectors)
        landing = picks[0] if picks[-1] - picks[0] + 1 == len(picks) else 0
        axes = [axis for axis in axes if not isinstance(axis, Tensor)]
        axes[landing:landing] = [None] * width
    if isinstance(here, Tensor):
        if any(v.dim() != 1 for v in vectors):
            return batch.losing("indexing along the sample axis together with other axes")
        vectors = [v.nonzero()[:, 0] if v.dtype == torch.bool else v for v in vectors]
        mine = here.nonzero()[:, 0] if here.dtype == torch.bool else here
        mine = mine.expand(max((len(v) for v in vectors), key=lambda n: n != 1))
        return batch.taking(mine, new).moved(landing)
    if not isinstance(here, slice):
        return batch.losing("an index of an unusual form")
    moved, length = batch.moved(axes.index(batch.dim)), old.shape[batch.dim]
    return moved if here.indices(length) == (0, length, 1) else moved.taking(here, old)


@mover("select", "select_copy")
def _select(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = wrap(argument(args, kwargs, 1, "dim"), old.dim())
    if dim == batch.dim:
        return batch.alone(int(argument(args, kwargs, 2, "index")), new.shape, new.device)
    return batch.moved(batch.dim - (dim < batch.dim))


@mover("unbind")
def _unbind(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = wrap(argument(args, kwargs, 1, "dim", default=0), old.dim())
    if dim == batch.dim:
        start = _start(old, new, dim)
        if start is None:
            return batch.losing("unbinding the sample axis")
        return batch.alone(start, new.shape, new.device)
    return batch.moved(batch.dim - (dim < batch.dim))


def _start(old: Tensor, new: Tensor, dim: int) -> int | None:
    """Where along an axis a view begins: that tells which part it is; ``None`` if it cannot be told."""
    stride = old.stride(dim)
    if not stride or not new.numel():
        return None
    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
        return None
    return (new.storage_offset() - old.storage_offset()) // stride


@mover("index_select")
def _index_select(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = wrap(argument(args, kwargs, 1, "dim"), new.dim())
    index, table = argument(args, kwargs, 2, "index"), argument(args, kwargs, 0, "input")
    if old is not table:
        own = batch_of(table)
        known = own is not None and not own.lost
        return _index_select(own, table, new, args, kwargs) if known else batch.moved(dim)  # type: ignore[arg-type]
    return batch.taking(index.reshape(-1), old) if dim == batch.dim else batch


@mover("narrow", "chunk", "split", "tensor_split", "split_with_sizes", "hsplit", "vsplit", "dsplit")
def _parts(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    length, start = new.shape[batch.dim], _start(old, new, batch.dim)
    if length == old.shape[batch.dim]:
        return batch
    if start is None:
        return batch.losing("taking parts of the sample axis")
    return batch.taking(slice(start, start + length), old)


def _unfold(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    if new.shape[batch.dim] != old.shape[batch.dim]:
        return batch.losing("taking parts of the sample axis")
    return batch


MOVERS[Tensor.unfold] = _unfold  # the function of that name takes patches of images


@mover("gather", "take_along_dim")
def _gather(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = argument(
        args, kwargs, 2 if isinstance(argument(args, kwargs, 1, "dim"), Tensor) else 1, "dim"
    )
    table = argument(args, kwargs, 0, "input")
    own = batch_of(table)
    if own is None:
        # a table, and an index that depends on the data
        return batch if dim is not None else batch.losing("entries gathered from a flattened table")
    if old is not table and not own.lost:  # only places are taken from the index
        return _gather(own, table, new, args, kwargs)
    if dim is None or wrap(dim, new.dim()) == batch.dim:
        return batch.losing("entries gathered along the sample axis")
    return batch


@mover("stack")
def _stack(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = wrap(argument(args, kwargs, 1, "dim", default=0), new.dim())
    if batch.solo is not None:
        axes = [batch_of(part) for part in argument(args, kwargs, 0, "tensors")]
        ones = [axis.solo for axis in axes if axis is not None and not axis.lost]
        if None not in ones and len(ones) == len(axes) > 1:
            return picked_axis(torch.tensor(ones, device=new.device), batch.size, dim)
    return batch.moved(batch.dim + (dim <= batch.dim))


@mover("cat", "concat", "concatenate")
def _cat(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = wrap(argument(args, kwargs, 1, "dim", "axis", default=0), new.dim())
    if dim != batch.dim:
        return batch
    parts = argument(args, kwargs, 0, "tensors")
    axes = [batch_of(p) for p in parts]
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


@mover("sum", "mean", "amax", "amin", "prod", "logsumexp", "var", "std", "any", "all")
@mover("max", "min", "median", "argmax", "argmin", "nansum", "nanmean", "count_nonzero")
def _reduction(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = kwargs.get("dim", kwargs.get("axis"))
    if dim is None and len(args) > 1:
        if isinstance(args[1], Tensor):  # max(a, b) is elementwise
            return aligned(batch, old, new)
        dim = args[1]
        if isinstance(dim, torch.dtype):
            dim = None
    return _reduced(batch, old, new, dim)


@mover("norm", "vector_norm", "quantile", "nanquantile")
def _reduction_later(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    q = argument(args, kwargs, 1, "q")
    dims = dims_of(argument(args, kwargs, 2, "dim", "axis"), old.dim())
    if isinstance(q, Tensor) and q.dim():  # several quantiles, on an axis in front
        moved = _reduced(batch, old, new[0], dims)
        return moved if moved.lost else moved.moved(moved.dim + 1)
    return _reduced(batch, old, new, dims)


@mover("kthvalue")
def _kthvalue(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _reduced(batch, old, new, argument(args, kwargs, 2, "dim", default=-1))


@mover("mode")
def _mode(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _reduced(batch, old, new, argument(args, kwargs, 1, "dim", default=-1))


def _reduced(batch: Batch, old: Tensor, new: Tensor, dim: Any) -> Batch:
    dims = dims_of(dim, old.dim())
    if batch.dim in dims:
        return batch.losing("a reduction over the sample axis mixes samples")
    if new.dim() == old.dim():
        return batch
    return batch.moved(batch.dim - sum(d < batch.dim for d in dims))


@mover("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def _mixing(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _alongdims_of(batch, old, argument(args, kwargs, 1, "dim", "axis"))


@mover("softmax", "log_softmax", "softmin")
def _softmax(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    implicit = 0 if old.dim() in (0, 1, 3) else 1  # torch's, which warns
    dim = argument(args, kwargs, 1, "dim")
    return _alongdims_of(batch, old, implicit if dim is None else dim)


@mover("flip")
def _flip(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dims = argument(args, kwargs, 1, "dims")
    return _turned(batch, old, args[1:] if isinstance(dims, int) and len(args) > 2 else dims)


@mover("flipud")
def _flipud(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _turned(batch, old, 0)


@mover("fliplr")
def _fliplr(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _turned(batch, old, 1)


def _turned(batch: Batch, old: Tensor, dims: Any) -> Batch:
    if batch.dim not in dims_of(dims, old.dim()):
        return batch
    return picked_axis(batch.sample_ids(old.device).flip(0), batch.size, batch.dim, batch.tentative)


@mover("sort", "argsort")
def _sort(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    place = 2 if "stable" in kwargs and len(args) > 2 and isinstance(args[1], bool) else 1
    dim = argument(args, kwargs, place, "dim", default=-1)
    return _alongdims_of(batch, old, -1 if isinstance(dim, bool) else dim)


@mover("msort")
def _first_axis(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _alongdims_of(batch, old, 0)


@mover("roll")
def _roll(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    shifts, dims = argument(args, kwargs, 1, "shifts"), argument(args, kwargs, 2, "dims")
    if dims is None or dims == ():
        return batch.losing("rolling the flattened samples")
    shifts = (shifts,) if isinstance(shifts, int) else shifts
    along = [s for s, d in zip(shifts, dims_of(dims, old.dim()), strict=True) if d == batch.dim]
    if not along:
        return batch
    rolled = batch.sample_ids(old.device).roll(sum(along))
    return picked_axis(rolled, batch.size, batch.dim, batch.tentative)


@mover("topk")
def _topk(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _alongdims_of(batch, old, argument(args, kwargs, 2, "dim", default=-1))


@mover("normalize")
def _normalize(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _alongdims_of(batch, old, argument(args, kwargs, 2, "dim", default=1))


@mover("renorm")
def _renorm(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    if wrap(argument(args, kwargs, 2, "dim"), old.dim()) == batch.dim:
        return batch
    return batch.losing("norms over the sample axis mix samples")


@mover("layer_norm", "rms_norm")
def _layer_norm(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    shape = argument(args, kwargs, 1, "normalized_shape")
    if old is not argument(args, kwargs, 0, "input"):
        return aligned(batch, old, new)
    if batch.dim >= old.dim() - len(shape):
        return batch.losing("a norm over the sample axis mixes samples")
    return batch


@mover("scaled_dot_product_attention")
def _attention(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    queries = all(
        old is not argument(args, kwargs, at, name) for at, name in ((1, "key"), (2, "value"))
    )
    # Queries do not see each other.
    if batch.dim >= old.dim() - (1 if queries and old is argument(args, kwargs, 0, "query") else 2):
        return batch.losing("attention along the sample axis mixes samples")
    return aligned(batch, old, new)


@mover("embedding")
def _embedding(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    if old is not argument(args, kwargs, 0, "input"):
        return batch.losing("a table that depends on the data")
    return batch


_LIKE = "zeros ones full empty rand randn randint".split()
_LIKE = [f"{name}_like" for name in _LIKE] + [f"new_{name}" for name in _LIKE]
# Operations that take no more than the shape or kind of a tensor.
LIKE = frozenset(spellings(*_LIKE))


@mover(*_LIKE)
def _like(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    """Nobody's rows as yet: the size matches, and no more is known."""
    if batch.solo is not None:
        return replace(batch, tentative=True, lost="made like one sample")
    if batch.picked is not None and batch.length == batch.size:
        return regular_axis(batch.size, batch.dim, tentative=True)
    return replace(batch, tentative=True)


def _alongdims_of(batch: Batch, old: Tensor, dims: Any) -> Batch:
    if batch.dim in dims_of(dims, old.dim()):
        return batch.losing("an operation along the sample axis mixes samples")
    return batch


@mover("linear")
def _linear(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    if old is not argument(args, kwargs, 0, "input") or old is argument(args, kwargs, 1, "weight"):
        return batch.losing("a weight that depends on the data")
    if batch.dim == old.dim() - 1:
        return batch.losing("a product over the sample axis mixes samples")
    return batch


# Names of the tensors in products, in the order of their places.
_FACTORS = ("input", "mat1", "batch1", "mat", "mat2", "batch2", "vec", "vec2", "other", "tensor")


@mover("__rmatmul__")
def _reflected(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _matmul(batch, old, new, args[::-1], kwargs)


@mover("matmul", "__matmul__", "bmm", "mm", "mv", "dot", "addmm", "baddbmm", "addmv")
def _matmul(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
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


def _factor(batch: Batch, here: Tensor, other: Tensor, new: Tensor, first: bool) -> Batch:
    """The axis of a product, from that of one of its two factors."""
    last = here.dim() - 1
    if batch.dim == (last if first or last == 0 else last - 1):
        return batch.losing("a product over the sample axis mixes samples")
    if batch.dim < last - 1:  # one of the axes that number matrices
        return batch.moved(batch.dim + (new.dim() - here.dim() if other.dim() > 1 else 0))
    if first:
        return batch.moved(new.dim() - (1 if other.dim() == 1 else 2))
    return batch.moved(new.dim() - 1)


@mover("einsum")
def _einsum(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    equation = args[0]
    operands = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    terms, result = _labels(equation, [x.dim() for x in operands])
    mine = {term[batch.dim] for term, x in zip(terms, operands, strict=True) if x is old}
    if len(mine) == 1 and (label := mine.pop()) in result:
        return batch.moved(result.index(label))
    return batch.losing(f"einsum {equation!r} sums over the sample axis")


def _labels(equation: str, ndims: Sequence[int]) -> tuple[list[list[Any]], list[Any]]:
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


def aligned(batch: Batch, old: Tensor, new: Tensor) -> Batch:
    """Broadcasting aligns axes from the right."""
    return batch.moved(batch.dim + new.dim() - old.dim())
