"""Operations that write rows to places: assignments, scatters, and their in-place forms.

What is written must belong to the samples that the places belong to. That is compared entry by entry:
which sample each place of the target belongs to, and which sample each entry of the source. Where
they differ, the target's axis is found anew from all its entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from backpack._ambient import ambient
from backpack.samples.axis import SampleAxis, owners_of, regular_axis, sample_axis_of
from backpack.samples.entries import FREE, Call, coded, decoded, moves_entries
from backpack.samples.movers import argument, mover

_LOST = "rows written to places of other samples"


def _aligned(values: Tensor, shape: torch.Size) -> Tensor:
    """As an assignment broadcasts values: leading axes of length one may be too many."""
    while values.dim() > len(shape) and values.shape[0] == 1:
        values = values[0]
    return values.expand(shape)


def _fits(axis: SampleAxis, target: Tensor, owners: Tensor, index: Any) -> bool:
    """Whether ``target[index] = values`` writes to each sample's places what is that sample's."""
    if axis.lost or not axis.fits(target.shape):
        return False
    places = owners_of(axis, target.shape, target.device)[index]
    return torch.equal(places, _aligned(owners, places.shape))


def _fits_rows(axis: SampleAxis, source: SampleAxis, values: Tensor, index: Any) -> bool | None:
    """The same where whole rows go to places of the sample axis; ``None`` if that is not so."""
    if (
        not (isinstance(index, tuple) and index and isinstance(index[-1], Tensor))
        or index[-1].dim() != 1
    ):
        return None
    dim, places = len(index) - 1, index[-1]
    plain = all(isinstance(i, slice) and i == slice(None) for i in index[:-1])
    if not plain or places.dtype == torch.bool or source.dim != dim or axis.lost:
        return None
    if axis.bare or source.bare or len(places) != values.shape[dim] or len(places) < 2:
        return None
    if axis.dim != dim:  # where all rows have one and the same sample
        return None if source.solo is not None or source.size < 2 else False
    device = values.device
    return torch.equal(axis.sample_ids(device)[places], source.sample_ids(device))


def assigned(
    target: Tensor, values: Any, index: Any, part: Any = ..., adds: bool = False
) -> SampleAxis | None:
    """The sample axis of ``target`` after ``target[index] = values[part]``, or ``+=`` (``adds``).

    A target that has no axis yet, or a tentative one, gets the axis that fits the values.
    """
    own = sample_axis_of(target)
    if own is not None and own.lost and own.tentative:  # a constant
        own = None
    source = sample_axis_of(values) if isinstance(values, Tensor) else None
    if source is None or (source.lost and not values.requires_grad):
        return own
    if source.lost:
        return source
    if own is not None and own.lost:
        return own
    owners = owners_of(source, values.shape, target.device)[part]

    def fits(axis: SampleAxis) -> bool:
        same = values.dim() == target.dim() and owners.shape == values.shape
        found = _fits_rows(axis, source, values, index) if same and axis.fits(target.shape) else None
        return _fits(axis, target, owners, index) if found is None else found

    if own is not None and fits(own):
        return own if source.tentative else own.certain()
    # A row that all may look at is its sample's where it takes the place of a whole row.
    common = source.solo is not None and own is not None and not own.tentative and own.size > 1
    if source.tentative and not common and (own is None or not own.tentative):
        return own
    # Where parameters were written to a tentative axis, it is part of the graph.
    if own is None or (own.tentative > source.tentative and not target.requires_grad):
        guess = source.tentative
        candidates = [regular_axis(source.size, d, tentative=guess) for d in range(target.dim())]
        for known in (*(() if guess else ambient.stated), source):
            candidates += [known.moved(d) for d in range(target.dim())]
        for axis in candidates:
            if fits(axis):
                return axis
        own = None
    free = torch.full(target.shape, FREE, dtype=torch.float32, device=target.device)
    before = free if own is None or not own.fits(target.shape) else coded(own, target)
    found = _written(before, index, owners.to(torch.float32) + 1, adds)
    after = None if found is None else decoded(found, source.size)
    if common and source.tentative:
        return own if after is None or after.solo is not None else after
    return replace(after or source.losing(_LOST), tentative=source.tentative)


def _written(samples: Tensor, index: Any, values: Tensor, adds: bool) -> Tensor | None:
    """Samples of a tensor's entries after some were overwritten, or added to; ``None`` if mixed."""
    places = torch.arange(samples.numel(), device=samples.device).reshape(samples.shape)[index]
    values, places = _aligned(values, places.shape).reshape(-1), places.reshape(-1)
    found = samples.reshape(-1)
    if not adds:
        found = found.index_fill(0, places, FREE)
    high = found.scatter_reduce(0, places, values, "amax")
    nobody = float("inf")
    low = torch.where(found == FREE, nobody, found)
    low = low.scatter_reduce(0, places, torch.where(values == FREE, nobody, values), "amin")
    return high.reshape(samples.shape) if bool(((low == high) | (low == nobody)).all()) else None


def _along(dim: int, index: Any) -> tuple[Any, ...]:
    return (*(slice(None),) * dim, index)


def _writes(names: str, place: int, *sources: str, adds: Callable[..., bool]) -> Any:
    """Register a function from arguments to index, and the part of the values that is written.

    ``adds`` tells from keyword arguments whether values are added to what is there.
    """

    def register(function: Any) -> Any:
        def move(
            batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> SampleAxis:
            target = argument(args, kwargs, 0, "input", "self")
            values = argument(args, kwargs, place, *sources)
            index, part = function(target, args, kwargs)
            found = assigned(target, values, index, part, adds(args, kwargs))
            return batch.losing(_LOST) if found is None else found

        mover(*names.split())(move)
        return function

    return register


def _never(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return False


def _always(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return True


def _if_asked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(argument(args, kwargs, 3, "accumulate"))


def _if_reduced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return kwargs.get("reduce") is not None


def _dim(target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    dim = argument(args, kwargs, 1, "dim")
    return dim + target.dim() if dim < 0 else dim


@_writes("index_add index_reduce", 3, "source", adds=_always)
@_writes("index_copy", 3, "source", adds=_never)
@_writes("index_fill", 3, "value", adds=_never)
def _index(target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _along(_dim(target, args, kwargs), argument(args, kwargs, 2, "index").reshape(-1)), ...


@_writes("index_put", 2, "values", adds=_if_asked)
def _index_put(target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return tuple(argument(args, kwargs, 1, "indices")), ...


@_writes("select_scatter", 1, "src", adds=_never)
def _select_scatter(target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = argument(args, kwargs, 2, "dim")
    return _along(dim % target.dim(), argument(args, kwargs, 3, "index")), ...


@_writes("slice_scatter", 1, "src", adds=_never)
def _slice_scatter(target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = enumerate(("start", "end", "step"), 3)
    index = slice(*(argument(args, kwargs, place, name) for place, name in names))
    return _along(argument(args, kwargs, 2, "dim", default=0) % target.dim(), index), ...


@_writes("copy_", 1, "src", "other", adds=_never)
def _copy(target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return ..., ...


def _repeats(index: Tensor, dim: int) -> bool:
    """Whether all entries along an axis are one and the same, as after ``expand``."""
    return index.shape[dim] == 1 or (index.shape[dim] > 1 and index.stride(dim) == 0)


@_writes("scatter", 3, "src", "value", adds=_if_reduced)
@_writes("scatter_add scatter_reduce", 3, "src", "value", adds=_always)
def _scatter(target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The index may be smaller than the source, of which the first entries are written."""
    dim, index = _dim(target, args, kwargs), argument(args, kwargs, 2, "index")
    part = tuple(slice(n) for n in index.shape)
    others = [d for d in range(index.dim()) if d != dim]
    if index.dim() and all(_repeats(index, d) and index.shape[d] == target.shape[d] for d in others):
        rows = index
        for d in reversed(others):
            rows = rows.select(d, 0)
        return _along(dim, rows), part
    grid = torch.meshgrid(*(torch.arange(n, device=index.device) for n in index.shape), indexing="ij")
    places = tuple(index if d == dim else along for d, along in enumerate(grid))
    return places, part


@mover("masked_scatter", "put")
def _in_order(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    """Values are taken in order, from whichever sample's."""
    values = argument(args, kwargs, 2, "source")
    if sample_axis_of(values) is not None:
        return batch.losing("values taken in order over all samples")
    target = argument(args, kwargs, 0, "input", "self")
    return sample_axis_of(target) or batch.losing(_LOST)


def _put(call: Call) -> Tensor | None:
    target, source = call.samples(call.argument(0, "input")), call.samples(call.argument(2, "source"))
    places = call.argument(1, "index").reshape(-1)
    found = _written(target.reshape(-1), places, source.reshape(-1), _if_asked(call.args, call.kwargs))
    return None if found is None else found.reshape(target.shape)


moves_entries("put", index=(1, "index"), run=_put)
