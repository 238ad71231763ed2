"""Where the samples sit: the sample axis of a tensor and how operations move it.

Letters: ``N`` samples, ``k`` rows per sample where a sample axis holds several (flattened time
steps, patches, heads).

Every tensor that depends on the data carries a :class:`Batch`. Most operations leave the axis
where it is; those that move, merge, drop or mix it are listed here and in ``placing.py``, those
that act on each entry by itself here. All others are tried out (``probe.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from backpack.probe import keeps_apart

MARK = "_backpack_batch"


class Rows:
    """Which sample each row belongs to, where rows were picked by an index."""

    def __init__(self, samples: Tensor, size: int) -> None:
        self.samples = samples
        order = samples.argsort(stable=True)
        counts = torch.bincount(samples, minlength=size)
        starts = counts.cumsum(0) - counts
        slots = torch.empty_like(samples)
        slots[order] = torch.arange(len(samples), device=samples.device) - starts[samples[order]]
        self.slots = slots
        self.width = int(counts.max()) if len(samples) else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and torch.equal(self.samples, other.samples)

    def __hash__(self) -> int:
        return hash(len(self.samples))


@dataclass(frozen=True, slots=True)
class Batch:
    """The sample axis of one tensor.

    Axis ``dim`` has ``outer * size * inner`` entries, samples in the middle: ``inner > 1`` after
    ``[N, T, d] -> [N * T, d]``, ``outer > 1`` after ``[T, N, d] -> [T * N, d]``.

    Attributes:
        size: number of samples ``N``.
        dim: axis that holds them.
        outer: slower-varying factor flattened into that axis.
        inner: faster-varying factor flattened into that axis.
        tentative: the axis is inferred from a matching size (a tensor made by a factory function, a
            second input); it gives way when it disagrees with one that is certain.
        lost: why the axis is no longer known, if it is not.
        picked: which sample each entry belongs to, where they follow no pattern (entries picked by an
            index, experts that see some tokens of each sample).
        length: number of entries of the axis.
    """

    size: int
    dim: int = 0
    outer: int = 1
    inner: int = 1
    tentative: bool = False
    lost: str | None = None
    picked: Rows | None = None
    length: int = field(init=False, compare=False, default=0)

    def __post_init__(self) -> None:
        regular = self.outer * self.size * self.inner
        length = regular if self.picked is None else len(self.picked.samples)
        object.__setattr__(self, "length", length)

    @property
    def width(self) -> int:
        """Number ``k`` of entries per sample (the largest, where they differ)."""
        return self.outer * self.inner if self.picked is None else self.picked.width

    @property
    def plain(self) -> bool:
        """Whether there is one entry for each sample, in order."""
        return self.picked is None and self.outer == self.inner == 1

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of that shape can have this sample axis."""
        return self.dim < len(shape) and shape[self.dim] == self.length

    def moved(self, dim: int) -> Batch:
        """The same axis at another place."""
        return self.placed(dim, self.outer, self.inner)

    def placed(self, dim: int, outer: int, inner: int) -> Batch:
        """The same samples at another place or with other factors."""
        if dim == self.dim and outer == self.outer and inner == self.inner:
            return self
        if self.picked is None and self.lost is None:
            return regular_axis(self.size, dim, outer, inner, self.tentative)
        return Batch(self.size, dim, outer, inner, self.tentative, self.lost, self.picked)

    def taking(self, index: Tensor | slice, tensor: Tensor) -> Batch:
        """The axis after some of its entries were picked."""
        samples = self.sample_ids(tensor.device)[index]
        if len(samples) == self.size and bool((samples[1:] - samples[:-1] == 1).all()):
            return regular_axis(self.size, self.dim, tentative=self.tentative)
        return Batch(self.size, self.dim, tentative=self.tentative, picked=Rows(samples, self.size))

    def agrees(self, other: Batch) -> bool:
        """Whether two axes place the samples alike."""
        if self is other:
            return True
        if (self.size, self.dim, self.lost) != (other.size, other.dim, other.lost):
            return False
        if self.picked is None and other.picked is None:
            return (self.outer, self.inner) == (other.outer, other.inner)
        picked = self.picked or other.picked
        assert picked is not None
        device = picked.samples.device
        return torch.equal(self.sample_ids(device), other.sample_ids(device))

    def certain(self) -> Batch:
        """The same axis, no longer a guess."""
        return replace(self, tentative=False) if self.tentative else self

    def losing(self, why: str) -> Batch:
        """The axis after an operation that leaves its place unknown."""
        return _lost_axis(self, why) if self.picked is None else replace(self, lost=why)

    def split(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """Bring samples to the front: ``[*lead, *shape] -> [*lead, N, k, *rest]``.

        Samples with fewer than ``k`` entries are filled up with zeros.
        """
        axis = lead + self.dim
        if self.picked is not None:
            tensor = tensor.movedim(axis, 0)
            full = tensor.new_zeros(self.size, self.width, *tensor.shape[1:])
            full = full.index_put((self.picked.samples, self.picked.slots), tensor)
            return full.movedim((0, 1), (lead, lead + 1))
        if self.plain:
            return tensor.movedim(axis, lead).unsqueeze(lead + 1)
        tensor = tensor.unflatten(axis, (self.outer, self.size, self.inner))
        tensor = tensor.movedim((axis + 1, axis, axis + 2), (lead, lead + 1, lead + 2))
        return tensor.flatten(lead + 1, lead + 2)

    def join(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """Inverse of :meth:`split`."""
        axis = lead + self.dim
        if self.picked is not None:
            tensor = tensor.movedim((lead, lead + 1), (0, 1))
            return tensor[self.picked.samples, self.picked.slots].movedim(0, axis)
        tensor = tensor.unflatten(lead + 1, (self.outer, self.inner))
        tensor = tensor.movedim((lead + 1, lead, lead + 2), (axis, axis + 1, axis + 2))
        return tensor.flatten(axis, axis + 2)

    def rows(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """All axes but the last become shared positions: ``[*lead, N, S, features]``."""
        regular = self.dim == 0 and self.outer == 1 and self.picked is None
        if regular and tensor.dim() > 1 + lead:
            return tensor.reshape(
                *tensor.shape[:lead], self.size, -1 if tensor.numel() else 0, tensor.shape[-1]
            )
        split = self.split(tensor, lead)
        return split.flatten(lead + 1, -2) if split.dim() > lead + 2 else split.unsqueeze(-1)

    def sample_ids(self, device: torch.device) -> Tensor:
        """The sample each entry of the axis belongs to."""
        if self.picked is not None:
            return self.picked.samples
        ids = torch.arange(self.size, device=device)
        return ids.repeat_interleave(self.inner).repeat(self.outer)


@lru_cache(4096)
def regular_axis(
    size: int, dim: int = 0, outer: int = 1, inner: int = 1, tentative: bool = False
) -> Batch:
    """A sample axis in regular order; the same object for the same arguments."""
    return Batch(size, dim, outer, inner, tentative)


@lru_cache(4096)
def _lost_axis(batch: Batch, why: str) -> Batch:
    return replace(batch, lost=why)


class _Inputs(threading.local):
    """Sample axes of the inputs of the forward pass that this thread is in, by the inputs' ids.

    Inputs belong to the user, who may pass them elsewhere too: their axes are not noted on them.
    """

    axes: dict[int, Batch] = {}


entered = _Inputs()


def batch_of(tensor: Tensor) -> Batch | None:
    """The sample axis of ``tensor``; ``None`` if it does not depend on the data."""
    batch = getattr(tensor, MARK, None)
    return entered.axes.get(id(tensor)) if batch is None else batch


def mark(tensor: Tensor, batch: Batch) -> None:
    """Note the sample axis on the tensor object itself, so that nothing is kept alive."""
    setattr(tensor, MARK, batch)


# --------------------------------------------------------------------------------------
# How operations move the axis. A mover takes (batch, tensor before, result, args, kwargs).

Mover = Callable[[Batch, Tensor, Tensor, tuple, dict], Batch]
MOVERS: dict[Any, Mover] = {}
ELEMENTWISE: set[Any] = set()


def _spellings(*names: str) -> list[Any]:
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
        for func in _spellings(*names):
            MOVERS[func] = function
        return function

    return register


def argument(args: tuple, kwargs: dict, place: int, *names: str, default: Any = None) -> Any:
    """An argument by its name or its place."""
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[place] if len(args) > place else default


def _wrap(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def _dims(dims: Any, ndim: int) -> list[int]:
    if dims is None:
        return list(range(ndim))
    if isinstance(dims, int):
        dims = (dims,)
    return [_wrap(d, ndim) for d in dims]


@mover("transpose", "swapaxes", "swapdims")
def _transpose(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    first = _wrap(argument(args, kwargs, 1, "dim0", "axis0"), new.dim())
    second = _wrap(argument(args, kwargs, 2, "dim1", "axis1"), new.dim())
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
    return batch.moved(_dims(dims, new.dim()).index(batch.dim))


@mover("movedim", "moveaxis")
def _movedim(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    source = _dims(argument(args, kwargs, 1, "source"), new.dim())
    target = _dims(argument(args, kwargs, 2, "destination"), new.dim())
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
        if covers and length and before % left == 0 and after % right == 0:
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
    if _wrap(dim, old.dim()) != batch.dim:
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
    dim = _wrap(argument(args, kwargs, 1, "dim"), old.dim())
    if dim == batch.dim:
        return batch.losing("selecting one entry of the sample axis")
    return batch.moved(batch.dim - (dim < batch.dim))


@mover("unbind")
def _unbind(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = _wrap(argument(args, kwargs, 1, "dim", default=0), old.dim())
    if dim == batch.dim:
        return batch.losing("unbinding the sample axis")
    return batch.moved(batch.dim - (dim < batch.dim))


@mover("index_select")
def _index_select(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = _wrap(argument(args, kwargs, 1, "dim"), new.dim())
    index, table = argument(args, kwargs, 2, "index"), argument(args, kwargs, 0, "input")
    if old is not table:
        own = batch_of(table)
        known = own is not None and not own.lost
        return _index_select(own, table, new, args, kwargs) if known else batch.moved(dim)  # type: ignore[arg-type]
    return batch.taking(index.reshape(-1), old) if dim == batch.dim else batch


@mover("narrow", "chunk", "split", "tensor_split", "split_with_sizes")
@mover("unfold")
def _along(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    if new.dim() <= batch.dim or new.shape[batch.dim] != old.shape[batch.dim]:
        return batch.losing("taking parts of the sample axis")
    return batch


@mover("gather", "take_along_dim")
def _gather(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = argument(
        args, kwargs, 2 if isinstance(argument(args, kwargs, 1, "dim"), Tensor) else 1, "dim"
    )
    if batch_of(argument(args, kwargs, 0, "input")) is None:
        return batch  # a table, and an index that depends on the data
    if dim is None or _wrap(dim, new.dim()) == batch.dim:
        return batch.losing("entries gathered along the sample axis")
    return batch


@mover("stack")
def _stack(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = _wrap(argument(args, kwargs, 1, "dim", default=0), new.dim())
    return batch.moved(batch.dim + (dim <= batch.dim))


@mover("cat", "concat", "concatenate")
def _cat(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dim = _wrap(argument(args, kwargs, 1, "dim", "axis", default=0), new.dim())
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
            return _aligned(batch, old, new)
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
    dims = _dims(dim, old.dim())
    if batch.dim in dims:
        return batch.losing("a reduction over the sample axis mixes samples")
    if new.dim() == old.dim():
        return batch
    return batch.moved(batch.dim - sum(d < batch.dim for d in dims))


@mover("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def _mixing(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _along_dims(batch, old, argument(args, kwargs, 1, "dim", "axis"))


@mover("softmax", "log_softmax", "softmin")
def _softmax(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    implicit = 0 if old.dim() in (0, 1, 3) else 1  # torch's, which warns
    dim = argument(args, kwargs, 1, "dim")
    return _along_dims(batch, old, implicit if dim is None else dim)


@mover("flip")
def _flip(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    dims = argument(args, kwargs, 1, "dims")
    return _along_dims(batch, old, args[1:] if isinstance(dims, int) and len(args) > 2 else dims)


@mover("sort", "argsort")
def _sort(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    place = 2 if "stable" in kwargs and len(args) > 2 and isinstance(args[1], bool) else 1
    dim = argument(args, kwargs, place, "dim", default=-1)
    return _along_dims(batch, old, -1 if isinstance(dim, bool) else dim)


@mover("msort", "flipud")
def _first_axis(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _along_dims(batch, old, 0)


@mover("roll")
def _roll(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _along_dims(batch, old, argument(args, kwargs, 2, "dims") or None)


@mover("topk")
def _topk(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _along_dims(batch, old, argument(args, kwargs, 2, "dim", default=-1))


@mover("normalize")
def _normalize(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    return _along_dims(batch, old, argument(args, kwargs, 2, "dim", default=1))


@mover("renorm")
def _renorm(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    if _wrap(argument(args, kwargs, 2, "dim"), old.dim()) == batch.dim and batch.plain:
        return batch
    return batch.losing("norms over the sample axis mix samples")


@mover("layer_norm", "rms_norm")
def _layer_norm(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    shape = argument(args, kwargs, 1, "normalized_shape")
    if old is not argument(args, kwargs, 0, "input"):
        return _aligned(batch, old, new)
    if batch.dim >= old.dim() - len(shape):
        return batch.losing("a norm over the sample axis mixes samples")
    return batch


@mover("scaled_dot_product_attention")
def _attention(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    if batch.dim >= old.dim() - 2:
        return batch.losing("attention along the sample axis mixes samples")
    return _aligned(batch, old, new)


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


def _along_dims(batch: Batch, old: Tensor, dims: Any) -> Batch:
    if batch.dim in _dims(dims, old.dim()):
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
        return _aligned(batch, old, new)
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


def _aligned(batch: Batch, old: Tensor, new: Tensor) -> Batch:
    """Broadcasting aligns axes from the right."""
    return batch.moved(batch.dim + new.dim() - old.dim())


# Several arguments, broadcast, entry by entry.
ELEMENTWISE.update(
    _spellings(
        *"add sub mul div true_divide divide multiply subtract rsub pow maximum minimum fmod".split(),
        *"add_ sub_ mul_ div_ pow_ lerp addcmul addcdiv masked_fill masked_fill_ copy_".split(),
        *"eq ne lt le gt ge where __radd__ __rmul__ __rsub__ __rdiv__ __rtruediv__ __rpow__".split(),
        *"__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __floordiv__ __rfloordiv__ floor_divide".split(),
        *"remainder __mod__ __rmod__ atan2 arctan2 hypot xlogy xlog1py logaddexp logaddexp2".split(),
        *"fmax fmin float_power ldexp copysign heaviside clamp clip clamp_min clamp_max".split(),
        *"logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor __and__ __or__".split(),
        *"__xor__ isclose not_equal greater greater_equal less less_equal".split(),
    )
)
# One argument, entry by entry (or as good as, for samples).
POINTWISE: set[Any] = set(
    _spellings(
        *"abs absolute neg negative positive __neg__ __pos__ __abs__ __invert__ square".split(),
        *"sqrt reciprocal exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan".split(),
        *"sinh cosh rsqrt tanh asinh acosh atanh erf erfc erfinv lgamma digamma logit".split(),
        *"expit sigmoid sinc relu relu6 leaky_relu elu selu celu gelu silu mish hardtanh".split(),
        *"hardswish hardsigmoid hardshrink softshrink tanhshrink softsign softplus".split(),
        *"logsigmoid log_sigmoid threshold rrelu round floor ceil trunc fix frac sign sgn".split(),
        *"nan_to_num isnan isinf isfinite logical_not bitwise_not angle conj resolve_conj".split(),
        *"real imag dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d".split(),
        *"dropout2d dropout3d bernoulli to type float double half bfloat16 int long bool".split(),
        *"short byte contiguous clone detach cpu cuda requires_grad_ type_as alias zero".split(),
        *"zero_ fill fill_ normal_ uniform_ random_ bernoulli_ exponential_ nll_loss".split(),
        *"cross_entropy".split(),
    )
)
# Layers that mix their last axes, so many of them, and no others.
_LAST_AXES: dict[Any, int] = {
    func: ndim + channels
    for ndim in (1, 2, 3)
    for channels, names in (
        (1, "conv{}d conv_transpose{}d"),
        (0, "avg_pool{}d max_pool{}d adaptive_avg_pool{}d lp_pool{}d"),
    )
    for func in _spellings(*names.format(*4 * (ndim,)).split())
}
# Layers whose samples come first; these do something else where they do not.
_SAMPLES_FIRST = frozenset(_spellings("batch_norm", "instance_norm", "group_norm", "interpolate"))


def known(func: Any, batch: Batch, old: Tensor, args: tuple) -> bool:
    """Whether an operation without a mover is known to leave samples where they are, and apart."""
    if func in POINTWISE or func in ELEMENTWISE:
        return True
    if not args or old is not args[0] or not old.dim() > 1:
        return False
    if func in _SAMPLES_FIRST:
        return batch.dim == 0
    last = _LAST_AXES.get(func)
    return last is not None and batch.dim < old.dim() - last


FACTORIES = frozenset(
    _spellings(*"zeros ones empty full rand randn randint arange eye linspace tensor".split())
)
EXPANSIONS = frozenset(_spellings("expand", "expand_as", "broadcast_to", "repeat", "tile"))


def propagate(
    func: Any,
    args: tuple,
    kwargs: dict,
    new: Tensor,
    marked: list[tuple[Tensor, Batch]],
    place: int = 0,
) -> tuple[Batch | None, list[Tensor]]:
    """The sample axis of an operation's result.

    Args:
        func: the function as the torch-function protocol reports it.
        args: its positional arguments.
        kwargs: its keyword arguments.
        new: one result tensor.
        marked: the arguments that have a sample axis.
        place: which of the results.

    Returns:
        The result's axis, and the arguments that are taken for constants after all: those whose
        tentative axis disagrees with a certain one, or gets lost.
    """
    if len(marked) == 1 and func not in MOVERS:  # nearly all calls
        old, batch = marked[0]
        same = func not in ELEMENTWISE or new.dim() == old.dim()
        if same and batch.lost is None and batch.fits(new.shape) and known(func, batch, old, args):
            return batch, []
    batch, demoted = _propagate(func, args, kwargs, new, marked)
    if batch.lost is None and func not in MOVERS:
        data = [(old, axis) for old, axis in marked if not any(old is each for each in demoted)]
        if not (func in ELEMENTWISE or all(known(func, axis, old, args) for old, axis in data)):
            if not keeps_apart(func, args, kwargs, place, data, batch):
                batch = batch.losing(f"{_name(func)} mixes samples")
    if batch.lost and batch.tentative:
        return None, [tensor for tensor, _ in marked]
    return batch, demoted


def _propagate(
    func: Any, args: tuple, kwargs: dict, new: Tensor, marked: list[tuple[Tensor, Batch]]
) -> tuple[Batch, list[Tensor]]:
    move = MOVERS.get(func)
    aligns = move is not None or func in ELEMENTWISE
    chosen: Batch | None = None
    demoted: list[Tensor] = []
    # Certain axes come before tentative ones, and lost ones first.
    for old, batch in sorted(marked, key=lambda pair: (pair[1].tentative, pair[1].lost is None)):
        if chosen is not None and chosen.lost:
            break
        here = batch
        if batch.lost is None:
            if move is not None:
                here = move(batch, old, new, args, kwargs)
            elif func in ELEMENTWISE:
                here = _aligned(batch, old, new)
            if not here.lost and not here.fits(new.shape):
                here = here.losing(f"{_name(func)} gave shape {tuple(new.shape)}")
        if chosen is None:
            chosen = here
        elif not chosen.agrees(here):
            if batch.tentative:
                demoted.append(old)
            elif aligns or old.requires_grad:
                chosen = chosen.losing(f"{_name(func)} combines different sample axes")
    assert chosen is not None
    return chosen, demoted


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))
