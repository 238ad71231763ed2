"""Matrices of pairs of rows, of which a mask leaves those within a sample.

Scores of an attention over packed sequences, or between the nodes of several graphs, are computed for
all pairs of rows, whosever they are: the samples of a batch are mixed in them. What a mask leaves of
them, and a product with it, has rows of single samples again. That an entry of a pair of different
samples is zero says little, for it may depend on both all the same; so the operation is asked for the
derivatives of those entries, which must be none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack._torch import has_values, leaf_of, tree_flatten, tree_unflatten, without_torch_function
from backpack.graph.nodes import kind_of
from backpack.graph.taps import notes
from backpack.graph.tracing import past
from backpack.samples.axis import Rows, SampleAxis, sample_axis_of
from backpack.samples.contractions import aligned, einsum_labels
from backpack.samples.movers import MOVERS, spellings
from backpack.samples.propagate import ELEMENTWISE, POINTWISE, moved
from backpack.samples.separability import generic

PAIRS = "_backpack_pairs"


def assigned(old: Tensor, index: Any, value: Any) -> Tensor:
    """``old[index] = value``, out of place."""
    new = old.clone()
    new[index] = value
    return new


_KEEPING = ELEMENTWISE | POINTWISE | set(spellings("softmax", "dropout", "dropout_")) | {assigned}
_PRODUCTS = frozenset(spellings("matmul", "__matmul__", "bmm", "mm"))
# Nodes that leave an entry zero, by the number of their arguments one of which must be.
_FACTORS = {"Mul": 2, **dict.fromkeys("Div Neg Clone ToCopy NativeDropout".split(), 1)}
# Nodes that move the two sides of pairs to other axes.
_MOVING = frozenset(
    "T Transpose Permute View UnsafeView ReshapeAlias Unsqueeze Squeeze Slice Select".split()
)

_MOST = 100


class RowPairs(NamedTuple):
    """Where the two rows of each pair are numbered."""

    rows: SampleAxis
    columns: SampleAxis

    def moved(self, by: int) -> RowPairs:
        return RowPairs(*(axis.moved(axis.dim + by) for axis in self))

    def agrees(self, other: RowPairs) -> bool:
        return all(a.agrees(b) for a, b in zip(self, other, strict=True))

    def fits(self, tensor: Tensor) -> bool:
        return all(axis.fits(tensor.shape) for axis in self)

    def apart(self, like: Tensor) -> Tensor:
        """Which entries are of rows of different samples, broadcast to the tensor."""
        ids = [
            axis.sample_ids(like.device).reshape(
                [-1 if d == axis.dim else 1 for d in range(like.dim())]
            )
            for axis in self
        ]
        return ids[0] != ids[1]


def axis_by_pairs(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Tensor,
    marked: list[tuple[Tensor, SampleAxis]],
) -> SampleAxis | None:
    """The axis of a result whose samples no rule finds; ``None`` if pairs say nothing of it.

    Args:
        func: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        out: its result, on which it is noted if its entries are pairs.
        marked: the arguments that have a sample axis.
    """
    data = [(tensor, axis) for tensor, axis in marked if tensor.requires_grad]
    usual = out.grad_fn is not None and out.layout == torch.strided and has_values(out) and data
    if not usual or any(axis.tentative or axis.bare or axis.size == 1 for _, axis in data):
        return None
    found = _product(func, args, out) or _summed(func, args, kwargs, out, data)
    if found is not None:
        return found
    pairs = (
        _kept(func, out, data)
        or _moved(func, args, kwargs, out, data)
        or _made(func, args, kwargs, out, data)
    )
    if pairs is None:
        return None
    setattr(out, PAIRS, pairs)
    if not _silent(func, args, kwargs, out, data, pairs):
        return None
    assert out.grad_fn is not None
    notes(out.grad_fn)[PAIRS] = pairs
    return _certified(pairs.rows)


def keep_pairs(old: Tensor, new: Tensor) -> None:
    """What is about to be written to in place, and the tensor that stands for it before."""
    if hasattr(old, PAIRS):
        setattr(new, PAIRS, getattr(old, PAIRS))
        delattr(old, PAIRS)


def _certified(rows: SampleAxis) -> SampleAxis:
    """The axis of picked rows, for which a pass through the graph shows each time that it is right."""
    ids = rows.picked or Rows(rows.sample_ids(torch.device("cpu")), rows.size)
    return SampleAxis(rows.size, rows.dim, picked=ids)


def _kept(func: Any, out: Tensor, data: list[tuple[Tensor, SampleAxis]]) -> RowPairs | None:
    """Pairs by an operation on single entries, or along the rows."""
    if func not in _KEEPING:
        return None
    pairs = [getattr(tensor, PAIRS, None) or _within_samples(tensor) for tensor, _ in data]
    found = [
        each.moved(out.dim() - tensor.dim())
        for each, (tensor, _) in zip(pairs, data, strict=True)
        if each is not None
    ]
    others = [
        aligned(axis, tensor, out)
        for each, (tensor, axis) in zip(pairs, data, strict=True)
        if each is None
    ]
    if not found or not found[0].fits(out) or not all(each.agrees(found[0]) for each in found):
        return None
    if not all(any(other.agrees(axis) for axis in found[0]) for other in others):
        return None
    return found[0]


def _moved(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Tensor,
    data: list[tuple[Tensor, SampleAxis]],
) -> RowPairs | None:
    """Pairs whose axes are moved, or summed up along another."""
    if len(data) != 1 or func not in MOVERS or not hasattr(data[0][0], PAIRS):
        return None
    tensor = data[0][0]
    pairs = RowPairs(
        *(moved(MOVERS[func], axis, tensor, out, args, kwargs) for axis in getattr(tensor, PAIRS))
    )
    lost = pairs.rows.lost or pairs.columns.lost or pairs.rows.dim == pairs.columns.dim
    return None if lost or not pairs.fits(out) else pairs


def _made(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Tensor,
    data: list[tuple[Tensor, SampleAxis]],
) -> RowPairs | None:
    """Pairs by a product or a sum of rows with rows."""
    places: dict[int, SampleAxis] = {}
    for tensor, axis in data:
        if axis.lost:
            return None
        if func in MOVERS:
            here = moved(MOVERS[func], axis, tensor, out, args, kwargs)
        elif func in ELEMENTWISE:
            here = aligned(axis, tensor, out)
        else:
            return None
        if here.lost or not here.fits(out.shape) or not places.setdefault(here.dim, here).agrees(here):
            return None
    return RowPairs(*(places[dim] for dim in sorted(places))) if len(places) == 2 else None


def _silent(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Tensor,
    data: list[tuple[Tensor, SampleAxis]],
    pairs: RowPairs,
) -> bool:
    """Whether entries of different samples are zero, and depend on nothing."""
    apart = pairs.apart(out)
    with without_torch_function(), torch.no_grad():
        if bool(((out != 0) & apart).any()):
            return False
    leaves, spec = tree_flatten((args, kwargs))
    ours = {id(tensor): _within_samples(tensor) for tensor, _ in data}
    copies: list[tuple[Tensor, RowPairs | None]] = []
    for j, x in enumerate(leaves):
        if isinstance(x, Tensor):
            leaves[j] = x.detach()
            if id(x) in ours:
                copies.append((leaves[j].requires_grad_(), ours[id(x)]))
    with without_torch_function(), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        new_args, new_kwargs = tree_unflatten(leaves, spec)
        again = func(*new_args, **new_kwargs)
        if not again.requires_grad:
            return True
        found = torch.autograd.grad(
            again, [x for x, _ in copies], generic(again.shape, again) * apart, allow_unused=True
        )
    # Entries that are silent already depend on nothing, whatever is made from them.
    return not any(
        bool(((g != 0) & (True if inside is None else ~inside.apart(g))).any())
        for g, (_, inside) in zip(found, copies, strict=True)
        if g is not None
    )


def _product(func: Any, args: tuple[Any, ...], out: Tensor) -> SampleAxis | None:
    """A product of the pairs within samples with the rows that are summed over."""
    if func is torch.einsum:
        operands = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
        if len(operands) != 2:
            return None
        terms, result = einsum_labels(args[0], [x.dim() for x in operands])
    elif func in _PRODUCTS and len(args) == 2:
        operands = args
        if not all(isinstance(x, Tensor) and x.dim() > 1 for x in operands):
            return None
        numbers = range(-out.dim(), -2)
        terms = [
            [*numbers[len(numbers) + 2 - x.dim() :], *("ij" if x is operands[0] else "jk")]
            for x in operands
        ]
        result = [*numbers, "i", "k"]
    else:
        return None
    for at in (0, 1):
        matrix, other = operands[at], operands[1 - at]
        pairs, axis = _within_samples(matrix), sample_axis_of(other)
        if pairs is None or axis is None or axis.lost or axis.bare or axis.tentative:
            continue
        for kept, summed in (pairs, reversed(pairs)):
            row, column = terms[at][kept.dim], terms[at][summed.dim]
            same = torch.equal(summed.sample_ids(out.device), axis.sample_ids(out.device))
            if same and terms[1 - at][axis.dim] == column and column not in result and row in result:
                return _certified(kept.moved(result.index(row)))
    return None


def _summed(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Tensor,
    data: list[tuple[Tensor, SampleAxis]],
) -> SampleAxis | None:
    """What is computed along one side of the pairs within samples, for each row of the other side."""
    pairs = _within_samples(data[0][0]) if len(data) == 1 and func in MOVERS else None
    if pairs is None:
        return None
    places = [moved(MOVERS[func], axis, data[0][0], out, args, kwargs) for axis in pairs]
    left = [axis for axis in places if not axis.lost and axis.fits(out.shape)]
    return _certified(left[0]) if len(left) == 1 else None


def _within_samples(matrix: Tensor) -> RowPairs | None:
    """The pairs of a matrix in which a mask has left those within samples."""
    axis = sample_axis_of(matrix)
    if axis is None or axis.lost or matrix.grad_fn is None:
        return None  # mixed with other rows since
    found = _noted(matrix.grad_fn)
    return found if found is not None and found.fits(matrix) else None


def _noted(node: Node, seen: set[Node] | None = None) -> RowPairs | None:
    """The pairs of a node's result; no node is asked twice, nor more than so many."""
    seen = set() if seen is None else seen
    if node in seen or len(seen) >= _MOST:
        return None
    seen.add(node)
    if PAIRS in notes(node):
        return notes(node)[PAIRS]
    places = [(child, number) for child, number in node.next_functions if child is not None]
    for child, number in places[: _FACTORS.get(kind_of(node), 0)]:
        found = _noted(child, seen)
        if found is not None:  # and may have been broadcast to further axes in front
            return found.moved(len(_shape(node, 0)) - len(_shape(child, number)))
    found = _noted(places[0][0], seen) if kind_of(node) in _MOVING else None
    sides = [] if found is None else [past(axis, node) for axis in found]
    rows, columns = sides or (None, None)
    return None if rows is None or columns is None else RowPairs(rows, columns)


def _shape(node: Node, number: int) -> torch.Size:
    leaf = leaf_of(node)
    return torch.Size(node._input_metadata[number].shape) if leaf is None else leaf.shape
