"""Operations that write rows to places: assignments, scatters, and their in-place forms.

What is written must belong to the samples that the places belong to. That is compared entry by entry:
which sample each place of the target belongs to, and which sample each entry of the source.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backpack.batch import Batch, batch_of, owners_of, regular_axis
from backpack.moves import argument, mover

_LOST = "rows written to places of other samples"


def _fits(axis: Batch, target: Tensor, source: Batch, values: Tensor, index: Any) -> bool:
    """Whether ``target[index] = values`` writes to each sample's places what is that sample's."""
    if axis.lost or not axis.fits(target.shape):
        return False
    places = owners_of(axis, target.shape, target.device)[index]
    owners = owners_of(source, values.shape, target.device)
    while owners.dim() > places.dim() and owners.shape[0] == 1:
        owners = owners[0]
    return torch.equal(places, owners.expand_as(places))


def assigned(target: Tensor, values: Any, index: Any) -> Batch | None:
    """The sample axis of ``target`` after ``target[index] = values``.

    A target that has no axis yet, or a tentative one, gets the axis that fits the values.
    """
    own = batch_of(target)
    source = batch_of(values) if isinstance(values, Tensor) else None
    if source is None or (source.lost and not values.requires_grad):
        return own
    if source.lost:
        return source
    if own is not None and own.lost:
        return own
    if own is not None and _fits(own, target, source, values, index):
        return own if source.tentative else own.certain()
    if source.tentative:
        return own
    if own is None or own.tentative:
        candidates = [regular_axis(source.size, d) for d in range(target.dim())]
        for axis in [*candidates, *(source.moved(d) for d in range(target.dim()))]:
            if _fits(axis, target, source, values, index):
                return axis
    return source.losing(_LOST)


def _along(dim: int, index: Any) -> tuple[Any, ...]:
    return (*(slice(None),) * dim, index)


def _writes(names: str, place: int, *sources: str) -> Any:
    """Register a function from arguments to ``(index, values)`` for operations on a target."""

    def register(function: Any) -> Any:
        def move(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
            target = argument(args, kwargs, 0, "input", "self")
            values = argument(args, kwargs, place, *sources)
            found = assigned(target, values, function(target, args, kwargs))
            return batch.losing(_LOST) if found is None else found

        mover(*names.split())(move)
        return function

    return register


def _dim(target: Tensor, args: tuple, kwargs: dict) -> int:
    dim = argument(args, kwargs, 1, "dim")
    return dim + target.dim() if dim < 0 else dim


@_writes("index_add index_copy index_reduce", 3, "source")
@_writes("index_fill", 3, "value")
def _index(target: Tensor, args: tuple, kwargs: dict) -> Any:
    return _along(_dim(target, args, kwargs), argument(args, kwargs, 2, "index").reshape(-1))


@_writes("index_put", 2, "values")
def _index_put(target: Tensor, args: tuple, kwargs: dict) -> Any:
    return tuple(argument(args, kwargs, 1, "indices"))


@_writes("select_scatter", 1, "src")
def _select_scatter(target: Tensor, args: tuple, kwargs: dict) -> Any:
    dim = argument(args, kwargs, 2, "dim")
    return _along(dim % target.dim(), argument(args, kwargs, 3, "index"))


@_writes("slice_scatter", 1, "src")
def _slice_scatter(target: Tensor, args: tuple, kwargs: dict) -> Any:
    names = enumerate(("start", "end", "step"), 3)
    index = slice(*(argument(args, kwargs, place, name) for place, name in names))
    return _along(argument(args, kwargs, 2, "dim", default=0) % target.dim(), index)


@_writes("scatter scatter_add scatter_reduce", 3, "src", "value")
def _scatter(target: Tensor, args: tuple, kwargs: dict) -> Any:
    dim, index = _dim(target, args, kwargs), argument(args, kwargs, 2, "index")
    grid = torch.meshgrid(*(torch.arange(n, device=index.device) for n in index.shape), indexing="ij")
    return tuple(index if d == dim else places for d, places in enumerate(grid))


@mover("masked_scatter", "put")
def _in_order(batch: Batch, old: Tensor, new: Tensor, args: tuple, kwargs: dict) -> Batch:
    """Values are taken in order, from whichever sample's."""
    values = argument(args, kwargs, 2, "source")
    if batch_of(values) is not None:
        return batch.losing("values taken in order over all samples")
    target = argument(args, kwargs, 0, "input", "self")
    return batch_of(target) or batch.losing(_LOST)
