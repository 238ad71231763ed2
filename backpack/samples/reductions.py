"""How reductions and operations along an axis move the sample axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backpack.samples.axis import SampleAxis
from backpack.samples.contractions import aligned
from backpack.samples.movers import along_dims, argument, dims_of, mover, wrap


@mover("sum", "mean", "amax", "amin", "prod", "logsumexp", "var", "std", "any", "all")
@mover("max", "min", "median", "argmax", "argmin", "nansum", "nanmean", "count_nonzero")
def _reduction(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    dim = kwargs.get("dim", kwargs.get("axis"))
    if dim is None and len(args) > 1:
        if isinstance(args[1], Tensor):  # max(a, b) is elementwise
            return aligned(batch, old, new)
        dim = args[1]
        if isinstance(dim, torch.dtype):
            dim = None
    return _reduced(batch, old, new, dim)


@mover("norm", "vector_norm", "quantile", "nanquantile")
def _reduction_later(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    q = argument(args, kwargs, 1, "q")
    dims = dims_of(argument(args, kwargs, 2, "dim", "axis"), old.dim())
    if isinstance(q, Tensor) and q.dim():  # several quantiles, on an axis in front
        moved = _reduced(batch, old, new[0], dims)
        return moved if moved.lost else moved.moved(moved.dim + 1)
    return _reduced(batch, old, new, dims)


@mover("kthvalue")
def _kthvalue(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    return _reduced(batch, old, new, argument(args, kwargs, 2, "dim", default=-1))


@mover("mode")
def _mode(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    return _reduced(batch, old, new, argument(args, kwargs, 1, "dim", default=-1))


def _reduced(batch: SampleAxis, old: Tensor, new: Tensor, dim: Any) -> SampleAxis:
    dims = dims_of(dim, old.dim())
    if batch.dim in dims:
        return batch.losing("a reduction over the sample axis mixes samples")
    if new.dim() == old.dim():
        return batch
    return batch.moved(batch.dim - sum(d < batch.dim for d in dims))


@mover("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def _mixing(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    return along_dims(batch, old, argument(args, kwargs, 1, "dim", "axis"))


@mover("softmax", "log_softmax", "softmin")
def _softmax(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    implicit = 0 if old.dim() in (0, 1, 3) else 1  # torch's, which warns
    dim = argument(args, kwargs, 1, "dim")
    return along_dims(batch, old, implicit if dim is None else dim)


@mover("sort", "argsort")
def _sort(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    place = 2 if "stable" in kwargs and len(args) > 2 and isinstance(args[1], bool) else 1
    dim = argument(args, kwargs, place, "dim", default=-1)
    return along_dims(batch, old, -1 if isinstance(dim, bool) else dim)


@mover("topk")
def _topk(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    return along_dims(batch, old, argument(args, kwargs, 2, "dim", default=-1))


@mover("normalize")
def _normalize(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    return along_dims(batch, old, argument(args, kwargs, 2, "dim", default=1))


@mover("renorm")
def _renorm(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    if wrap(argument(args, kwargs, 2, "dim"), old.dim()) == batch.dim:
        return batch
    return batch.losing("norms over the sample axis mix samples")


@mover("layer_norm", "rms_norm")
def _layer_norm(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    shape = argument(args, kwargs, 1, "normalized_shape")
    if old is not argument(args, kwargs, 0, "input"):
        return aligned(batch, old, new)
    if batch.dim >= old.dim() - len(shape):
        return batch.losing("a norm over the sample axis mixes samples")
    return batch
