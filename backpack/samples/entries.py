"""Operations that only move entries, run on the samples that the entries belong to.

Indexing, gathering, joining, padding and writing leave each entry what it is and put it elsewhere. Run
on a tensor that holds, in place of its entries, the samples these belong to, they tell the sample of
each entry of the result, and thus its sample axis. That costs as much as the operation itself, and is
done only where ``movers.py`` does not know better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backpack._torch import tree_flatten, tree_unflatten
from backpack.samples.axis import NOBODY, SampleAxis, axis_of, owners_of
from backpack.samples.movers import argument, spellings

# Samples are counted from one in the tensors that operations run on: what they fill with is nobody's.
FREE = NOBODY + 1
# Numbers up to here are exact in single precision, which all operations take.
_LARGEST = 2**24


class Call(NamedTuple):
    """An operation with the samples of its arguments.

    Attributes:
        func: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        owners: samples of the entries of arguments that depend on the data, by the arguments' ids.
        shape: the result's.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    owners: dict[int, Tensor]
    shape: torch.Size

    def argument(self, place: int, *names: str) -> Any:
        return argument(self.args, self.kwargs, place, *names)

    def samples(self, x: Any) -> Tensor:
        """Samples of the entries of a tensor, or of a number."""
        if id(x) in self.owners:
            return self.owners[id(x)]
        shape = x.shape if isinstance(x, Tensor) else ()
        device = next(iter(self.owners.values())).device
        return torch.full(shape, FREE, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class _Entries:
    """How an operation that moves entries is run on their samples.

    Attributes:
        index: place and name of an argument that says where entries go, or come from.
        fill: place and name of a number that entries are filled with.
        run: another way to run it.
        lookup: samples of the result where the index depends on the data and the table does not.
    """

    index: tuple[int, str] | None = None
    fill: tuple[int, str] | None = None
    run: Callable[[Call], Tensor | None] | None = None
    lookup: Callable[[Call], Tensor | None] | None = None


ENTRIES: dict[Any, _Entries] = {}


def moves_entries(names: str, **how: Any) -> None:
    """Register operations that move entries."""
    for func in spellings(*names.split()):
        ENTRIES[func] = _Entries(**how)


def entry_axis(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    new: Tensor,
    marked: list[tuple[Tensor, SampleAxis]],
    place: int = 0,
) -> SampleAxis | None:
    """The sample axis of the result of an operation that moves entries.

    Args:
        func: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        new: its result.
        marked: the arguments that have a sample axis, none of them lost.
        place: which of its results.

    Returns:
        ``None`` if there is no such axis, or if the operation does not only move entries.
    """
    how = ENTRIES.get(func)
    size = marked[0][1].size if marked else _LARGEST
    fit = all(axis.fits(x.shape) and axis.size == size for x, axis in marked)
    if how is None or not fit or size >= _LARGEST:
        return None
    call = Call(func, args, kwargs, {id(x): coded(axis, x) for x, axis in marked}, new.shape)
    try:
        with torch.no_grad():
            found = _run(call, how, place)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
        return None
    if found is None or found.shape != new.shape:
        return None
    axis = decoded(found, size)
    tentative = min((each.tentative for _, each in marked), default=0)
    return replace(axis, tentative=tentative) if axis is not None and tentative else axis


def coded(axis: SampleAxis, x: Tensor) -> Tensor:
    """Samples of the entries of a tensor, counted from one."""
    return owners_of(axis, x.shape, x.device).to(torch.float32) + 1


def decoded(samples: Tensor, size: int) -> SampleAxis | None:
    """The sample axis of a tensor from the samples of its entries, counted from one."""
    return axis_of(samples.long() - 1, size)


def _run(call: Call, how: _Entries, place: int) -> Tensor | None:
    leaves, spec = tree_flatten((call.args, call.kwargs))
    index = None if how.index is None else call.argument(*how.index)
    places = [x for x in tree_flatten(index)[0] if isinstance(x, Tensor)]
    values = [
        j for j, x in enumerate(leaves) if isinstance(x, Tensor) and not any(x is i for i in places)
    ]
    if not any(id(leaves[j]) in call.owners for j in values):
        return None if how.lookup is None else how.lookup(call)
    if how.run is not None:
        return how.run(call)
    for j in values:
        leaves[j] = call.samples(leaves[j])
    args, kwargs = tree_unflatten(leaves, spec)
    if how.fill is not None:
        at, name = how.fill
        if not isinstance(kwargs.get(name), (Tensor, type(None))):
            kwargs[name] = FREE
        elif len(args) > at and not isinstance(args[at], (Tensor, type(None))):
            args = (*args[:at], FREE, *args[at + 1 :])
    out = call.func(*args, **kwargs)
    return out if isinstance(out, Tensor) else out[place]


# --------------------------------------------------------------------------------------
# Lookups: the result belongs to whom the index belongs to, whichever the table


def _lookup(place: int) -> Callable[[Call], Tensor | None]:
    """An index of the result's shape, or of one that is broadcast to it."""

    def samples(call: Call) -> Tensor | None:
        found = call.samples(call.argument(place, "index", "indices"))
        return found.expand(call.shape) if found.dim() == len(call.shape) else found.reshape(call.shape)

    return samples


def _lookup_select(call: Call) -> Tensor | None:
    found, dim = call.samples(call.argument(2, "index")), call.argument(1, "dim") % len(call.shape)
    return found.reshape([-1 if d == dim else 1 for d in range(len(call.shape))]).expand(call.shape)


def _lookup_items(call: Call) -> Tensor | None:
    """All indices together become one, into a table whose entries are the samples of its places."""
    table, index = call.args
    items = index if isinstance(index, tuple) else (index,)
    picks: list[tuple[Tensor, Tensor]] = []
    for i in items:
        if isinstance(i, Tensor) and i.dtype == torch.bool and i.dim():
            places, samples = i.nonzero().unbind(1), call.samples(i)[i]
            picks += [(each, samples) for each in places]
        elif isinstance(i, Tensor) and i.dim():
            picks.append((i, call.samples(i)))
        elif not (i is None or i is Ellipsis or isinstance(i, (int, slice))):
            each = torch.as_tensor(i, device=table.device)
            if each.dtype == torch.bool:
                return None
            picks.append((each, call.samples(each)))
    whose = united(torch.broadcast_tensors(*(samples for _, samples in picks)))
    if whose is None:
        return None
    first = torch.arange(whose.numel(), device=whose.device).reshape(whose.shape)
    rest = torch.zeros_like(first)
    # The same index with one place for each entry; axes that it takes from become as long as that.
    left = [first, *[rest] * (len(picks) - 1)]
    new_index: list[Any] = []
    shape: list[int] = []
    taken = sum(_width(i) for i in items)
    for i in items:
        if i is Ellipsis:
            width = table.dim() - taken
            shape += table.shape[len(shape) : len(shape) + width]
            new_index.append(i)
        elif i is None or isinstance(i, (int, slice)) or (isinstance(i, Tensor) and not i.dim()):
            shape += table.shape[len(shape) : len(shape) + _width(i)]
            new_index.append(i)
        else:
            for _ in range(_width(i)):
                new_index.append(left.pop(0))
                shape.append(whose.numel())
    shape += table.shape[len(shape) :]
    at = next(d for d, i in enumerate(_axes(new_index, table.dim())) if i is first)
    samples = whose.reshape([-1 if d == at else 1 for d in range(len(shape))])
    return samples.expand(shape)[tuple(new_index)]


def _width(i: Any) -> int:
    """Number of axes that an item of an index takes."""
    if i is None or i is Ellipsis:
        return 0
    return i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1


def _axes(index: list[Any], ndim: int) -> list[Any]:
    """The item of the index for each axis of a tensor."""
    found: list[Any] = []
    taken = sum(_width(i) for i in index)
    for i in index:
        found += [i] * (ndim - taken if i is Ellipsis else _width(i))
    return found


def united(samples: Any) -> Tensor | None:
    """Samples on which all tensors agree, nobody's entries being anybody's; ``None`` if they do not."""
    together = torch.stack(tuple(samples))
    high = together.amax(0)
    return high if bool(((together == high) | (together == FREE)).all()) else None


# --------------------------------------------------------------------------------------
# The table


def _strided(call: Call) -> Tensor | None:
    """``as_strided`` reads the memory of its argument, whatever that shows of it."""
    x = call.args[0]
    unknown = -1
    size = x.untyped_storage().nbytes() // x.element_size()
    memory = torch.full((size,), unknown, dtype=torch.float32, device=x.device)
    same = memory.as_strided(x.shape, x.stride(), x.storage_offset())
    same.copy_(call.samples(x))
    found = call.func(same, *call.args[1:], **call.kwargs)
    return None if bool((found == unknown).any()) else found


def _flat(call: Call) -> Tensor | None:
    """``view`` as a reshape: samples are laid out anew."""
    return call.samples(call.args[0]).reshape(call.shape)


moves_entries("transpose swapaxes swapdims t T H mT mH adjoint permute movedim moveaxis diagonal")
moves_entries("flatten unflatten ravel squeeze unsqueeze atleast_1d atleast_2d atleast_3d")
moves_entries("reshape view view_as reshape_as", run=_flat)
moves_entries("expand expand_as broadcast_to repeat tile select narrow chunk split")
moves_entries("tensor_split", index=(1, "tensor_indices_or_sections"))
moves_entries("split_with_sizes hsplit vsplit dsplit unbind unfold flip fliplr flipud rot90 roll")
moves_entries("diag diag_embed diagflat tril triu pixel_shuffle pixel_unshuffle channel_shuffle")
moves_entries("native_channel_shuffle stack cat concat concatenate hstack vstack dstack column_stack")
moves_entries("row_stack block_diag broadcast_tensors meshgrid cartesian_prod combinations")
moves_entries("select_copy select_scatter slice_scatter diagonal_scatter")
moves_entries("pad", fill=(3, "value"))
moves_entries("as_strided", run=_strided)
moves_entries("repeat_interleave", index=(1, "repeats"))
moves_entries("__getitem__", index=(1, "index"), lookup=_lookup_items)
moves_entries("gather", index=(2, "index"), lookup=_lookup(2))
moves_entries("take_along_dim", index=(1, "indices"), lookup=_lookup(1))
moves_entries("take", index=(1, "index"), lookup=_lookup(1))
moves_entries("index_select", index=(2, "index"), lookup=_lookup_select)
moves_entries("masked_select masked_scatter", index=(1, "mask"))
moves_entries("index_fill", index=(2, "index"), fill=(3, "value"))
