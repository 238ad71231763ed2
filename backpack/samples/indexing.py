"""How reading at indices moves the sample axis."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from backpack.samples.axis import SampleAxis, sample_axis_of
from backpack.samples.movers import MOVERS, argument, mover, wrap


@mover("__getitem__")
def _getitem(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    table, index = args
    if old is not table:
        own = sample_axis_of(table)
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


def _indexed(batch: SampleAxis, old: Tensor, new: Tensor, items: list[Any]) -> SampleAxis:
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
def _select(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    dim = wrap(argument(args, kwargs, 1, "dim"), old.dim())
    if dim == batch.dim:
        return batch.alone(int(argument(args, kwargs, 2, "index")), new.shape, new.device)
    return batch.moved(batch.dim - (dim < batch.dim))


@mover("unbind")
def _unbind(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
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
def _index_select(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    dim = wrap(argument(args, kwargs, 1, "dim"), new.dim())
    index, table = argument(args, kwargs, 2, "index"), argument(args, kwargs, 0, "input")
    if old is not table:
        own = sample_axis_of(table)
        known = own is not None and not own.lost
        return _index_select(own, table, new, args, kwargs) if known else batch.moved(dim)  # type: ignore[arg-type]
    return batch.taking(index.reshape(-1), old) if dim == batch.dim else batch


@mover("narrow", "chunk", "split", "tensor_split", "split_with_sizes", "hsplit", "vsplit", "dsplit")
def _parts(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    length = new.shape[batch.dim]
    if length == old.shape[batch.dim]:
        return batch
    start = _start(old, new, batch.dim)
    if start is None:
        return batch.losing("taking parts of the sample axis")
    return batch.taking(slice(start, start + length), old)


def _unfold(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    if new.shape[batch.dim] != old.shape[batch.dim]:
        return batch.losing("taking parts of the sample axis")
    return batch


MOVERS[Tensor.unfold] = _unfold  # the function of that name takes patches of images


@mover("gather", "take_along_dim")
def _gather(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    dim = argument(
        args, kwargs, 2 if isinstance(argument(args, kwargs, 1, "dim"), Tensor) else 1, "dim"
    )
    table = argument(args, kwargs, 0, "input")
    own = sample_axis_of(table)
    if own is None:
        # a table, and an index that depends on the data
        return batch if dim is not None else batch.losing("entries gathered from a flattened table")
    if old is not table and not own.lost:  # only places are taken from the index
        return _gather(own, table, new, args, kwargs)
    if dim is None or wrap(dim, new.dim()) == batch.dim:
        return batch.losing("entries gathered along the sample axis")
    return batch
