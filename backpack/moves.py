"""How operations move the sample axis: one function per kind of operation.

A mover takes the axis before, the tensor that has it, the result, and the operation's arguments, and
returns the axis of the result, lost where the operation mixes samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from backpack.batch import Batch, Rows, batch_of, regular_axis

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


@mover("t", "T", "H", "adjoint", "mT", "mH")
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
        return batch.losing("repeating picked samples")
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
    if old is not args[0]:
        own = batch_of(args[0])
        if own is not None and not own.lost:  # only places are taken from the index
            return _getitem(own, args[0], new, args, kwargs)
        # the index depends on the data: a table is looked up
        return batch if old is args[1] else _looked_up(batch, old, args)
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    taken = sum(
        i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1
        for i in index
        if i is not None and i is not Ellipsis and not isinstance(i, bool)
    )
    before, after = 0, 0
    advanced: list[tuple[int, int]] = []
    for i in index:
        if i is None or isinstance(i, bool):
            after += 1
        elif i is Ellipsis:
            width = old.dim() - taken
            if before <= batch.dim < before + width:
                break
            before, after = before + width, after + width
        elif isinstance(i, (Tensor, list)) and not (isinstance(i, Tensor) and i.dim() == 0):
            width = i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1
            if before <= batch.dim < before + width:
                return _pick(batch, i, width, index, old, new)
            ndim = 1 if isinstance(i, list) or i.dtype == torch.bool else i.dim()
            advanced.append((before, ndim))
            before += width
        elif isinstance(i, slice):
            if before == batch.dim:
                if i.indices(old.shape[before]) == (0, old.shape[before], 1):
                    break
                return batch.moved(after).taking(i, old)
            before, after = before + 1, after + 1
        else:
            if before == batch.dim:
                return batch.losing("selecting one entry of the sample axis")
            before += 1
        if before > batch.dim:
            break
    if advanced:
        # Broadcast index axes land where the first index stood (if contiguous) or in front.
        candidates = [d for d in range(new.dim()) if new.shape[d] == batch.length]
        if batch.dim == 0 and min(a for a, _ in advanced) > 0 and len(advanced) == 1:
            return batch
        if len(candidates) != 1:
            return batch.losing("indexing with tensors")
        return batch.moved(candidates[0])
    return batch.moved(batch.dim - before + after)


def _is_pick(i: Any) -> bool:
    """Whether an index picks entries by a list or tensor (a scalar selects, and drops its axis)."""
    return isinstance(i, list) or (isinstance(i, Tensor) and i.dim() > 0)


def _pick(batch: Batch, i: Any, width: int, index: tuple, old: Tensor, new: Tensor) -> Batch:
    """Entries of the sample axis picked by a list, a mask, or a vector of places.

    Other axes may be picked from with as many places: then one entry is picked for each.
    """
    picks = i if isinstance(i, Tensor) else torch.as_tensor(i, device=new.device)
    others = [torch.as_tensor(j) for j in index if _is_pick(j) and j is not i]
    mask = picks.dtype == torch.bool or any(j.dtype == torch.bool for j in others)
    if width != 1 or picks.dim() != 1 or any(j.dim() != 1 for j in others) or (mask and others):
        return batch.losing("indexing along the sample axis together with other axes")
    if others:
        picks = picks.expand(max(len(j) for j in (picks, *others)))
    return batch.taking(picks, new).moved(_landing(index, old.dim()))


def _landing(index: tuple, ndim: int) -> int:
    """Where picked axes land: where the first of them stood, or in front if they stood apart."""
    taken = sum(j is not None and j is not Ellipsis and not isinstance(j, bool) for j in index)
    place, out, apart = -1, 0, False
    for j in index:
        if _is_pick(j):
            if place >= 0 and out > place + 1:
                apart = True
            elif place < 0:
                place, out = out, out + 1
        elif j is Ellipsis:
            out += ndim - taken
        elif j is None or isinstance(j, (bool, slice)):
            out += 1
    return 0 if apart else place


def _looked_up(batch: Batch, old: Tensor, args: tuple) -> Batch:
    """The axis of one of several indices, each of which has one place for each sample."""
    table, index = args
    picks = [torch.as_tensor(j) for j in index if _is_pick(j)] if isinstance(index, tuple) else []
    if not picks or any(j.dim() != 1 or len(j) != len(old) or j.dtype == torch.bool for j in picks):
        return batch.losing("a lookup with several indices")
    return batch.moved(_landing(index, table.dim()))


@mover("select", "select_copy")
def _select(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = wrap(argument(args, kwargs, 1, "dim"), old.dim())
    if dim == batch.dim:
        return batch.losing("selecting one entry of the sample axis")
    return batch.moved(batch.dim - (dim < batch.dim))


@mover("unbind")
def _unbind(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = wrap(argument(args, kwargs, 1, "dim", default=0), old.dim())
    if dim == batch.dim:
        return batch.losing("unbinding the sample axis")
    return batch.moved(batch.dim - (dim < batch.dim))


@mover("index_select")
def _index_select(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = wrap(argument(args, kwargs, 1, "dim"), new.dim())
    index, table = argument(args, kwargs, 2, "index"), argument(args, kwargs, 0, "input")
    if old is not table:
        own = batch_of(table)
        known = own is not None and not own.lost
        return _index_select(own, table, new, args, kwargs) if known else batch.moved(dim)  # type: ignore[arg-type]
    return batch.taking(index.reshape(-1), old) if dim == batch.dim else batch


@mover("narrow", "chunk", "split", "tensor_split", "split_with_sizes")
def _parts(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    length, stride = new.shape[batch.dim], old.stride(batch.dim)
    if length == old.shape[batch.dim]:
        return batch
    if not stride or not length or old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
        return batch.losing("taking parts of the sample axis")
    # A view: where it begins tells which part it is.
    start = (new.storage_offset() - old.storage_offset()) // stride
    return batch.taking(slice(start, start + length), old)


@mover("unfold")
def _unfold(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    if new.shape[batch.dim] != old.shape[batch.dim]:
        return batch.losing("taking parts of the sample axis")
    return batch


@mover("gather", "take_along_dim")
def _gather(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = argument(
        args, kwargs, 2 if isinstance(argument(args, kwargs, 1, "dim"), Tensor) else 1, "dim"
    )
    if batch_of(argument(args, kwargs, 0, "input")) is None:
        return batch  # a table, and an index that depends on the data
    if dim is None or wrap(dim, new.dim()) == batch.dim:
        return batch.losing("entries gathered along the sample axis")
    return batch


@mover("stack")
def _stack(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = wrap(argument(args, kwargs, 1, "dim", default=0), new.dim())
    return batch.moved(batch.dim + (dim <= batch.dim))


@mover("cat", "concat", "concatenate")
def _cat(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = wrap(argument(args, kwargs, 1, "dim", "axis", default=0), new.dim())
    if dim != batch.dim:
        return batch
    parts = args[0]
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
    return Batch(batch.size, dim, picked=Rows(torch.cat(samples), batch.size))


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
    if isinstance(q, Tensor) and q.dim():
        return batch.losing("several quantiles")
    return _reduced(batch, old, new, argument(args, kwargs, 2, "dim", "axis"))


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
    return _alongdims_of(batch, old, args[1:] if isinstance(dims, int) and len(args) > 2 else dims)


@mover("sort", "argsort")
def _sort(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    place = 2 if "stable" in kwargs and len(args) > 2 and isinstance(args[1], bool) else 1
    dim = argument(args, kwargs, place, "dim", default=-1)
    return _alongdims_of(batch, old, -1 if isinstance(dim, bool) else dim)


@mover("msort", "flipud")
def _first_axis(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _alongdims_of(batch, old, 0)


@mover("roll")
def _roll(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _alongdims_of(batch, old, argument(args, kwargs, 2, "dims") or None)


@mover("topk")
def _topk(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _alongdims_of(batch, old, argument(args, kwargs, 2, "dim", default=-1))


@mover("normalize")
def _normalize(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _alongdims_of(batch, old, argument(args, kwargs, 2, "dim", default=1))


@mover("renorm")
def _renorm(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    if wrap(argument(args, kwargs, 2, "dim"), old.dim()) == batch.dim and batch.plain:
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
    if batch.dim >= old.dim() - 2:
        return batch.losing("attention along the sample axis mixes samples")
    return aligned(batch, old, new)


@mover("embedding")
def _embedding(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    if old is not argument(args, kwargs, 0, "input"):
        return batch.losing("a table that depends on the data")
    return batch


@mover("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
@mover("randint_like", "new_zeros", "new_ones", "new_full", "new_empty")
def _like(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    """Nobody's rows as yet: the size matches, and no more is known."""
    if batch.picked is not None and batch.length == batch.size:
        return regular_axis(batch.size, batch.dim, tentative=True)
    return replace(batch, tentative=True)


def _alongdims_of(batch: Batch, old: Tensor, dims: Any) -> Batch:
    if batch.dim in dims_of(dims, old.dim()):
        return batch.losing("an operation along the sample axis mixes samples")
    return batch


@mover("linear")
def _linear(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    if old is not argument(args, kwargs, 0, "input"):
        return batch.losing("a weight that depends on the data")
    if batch.dim == old.dim() - 1:
        return batch.losing("a product over the sample axis mixes samples")
    return batch


# Names of the tensors in products, in the order of their places.
_FACTORS = ("input", "mat1", "batch1", "mat", "mat2", "batch2", "vec", "vec2", "other", "tensor")


@mover("matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "dot", "addmm", "baddbmm", "addmv")
def _matmul(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    named = (kwargs[name] for name in _FACTORS if name in kwargs)
    tensors = [a for a in (*args, *named) if isinstance(a, Tensor)]
    if len(tensors) == 3 and old is tensors[0]:
        return aligned(batch, old, new)
    left, right = tensors[-2:]
    here, other = (right, left) if old is right else (left, right)
    last = here.dim() - 1
    contracted = last if here is left or last == 0 else last - 1
    if batch.dim == contracted or (left is right and batch.dim >= last - 1):
        return batch.losing("a product over the sample axis mixes samples")
    if batch.dim < last - 1:  # one of the axes that number matrices
        return batch.moved(batch.dim + (new.dim() - here.dim() if other.dim() > 1 else 0))
    if here is left:
        return batch.moved(new.dim() - (1 if other.dim() == 1 else 2))
    return batch.moved(new.dim() - 1)


@mover("einsum")
def _einsum(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if not isinstance(args[0], str) or "." in args[0]:
        return batch.losing("einsum with '...' or sublists") if not batch.fits(new.shape) else batch
    equation = args[0].replace(" ", "")
    terms, _, result = equation.partition("->")
    letters = {
        term[batch.dim]
        for term, operand in zip(terms.split(","), operands, strict=True)
        if operand is old
    }
    if len(letters) == 1 and (letter := letters.pop()) in result:
        return batch.moved(result.index(letter))
    return batch.losing(f"einsum {args[0]!r} sums over the sample axis")


def aligned(batch: Batch, old: Tensor, new: Tensor) -> Batch:
    """Broadcasting aligns axes from the right."""
    return batch.moved(batch.dim + new.dim() - old.dim())
