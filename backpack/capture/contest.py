"""Whether two inputs of a model may both carry the batch: then the user is asked.

Shapes do not tell users from items, or a state that all share from a batch of one. Where inputs have
different lengths, both meet parameters, and the model's output does not speak for one of them, or
where the model pairs each row of one with each row of another, either could hold the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from backpack._torch import without_torch_function
from backpack.graph.taps import Recording
from backpack.samples.axis import SampleAxis, sample_axis_of
from backpack.samples.movers import spellings
from backpack.samples.propagate import ELEMENTWISE

_RIVAL = "_backpack_rival"
_PRODUCTS = frozenset(
    spellings(*"matmul mm bmm einsum tensordot inner outer ger cdist __matmul__ __rmatmul__".split())
)
_PICKS = frozenset(spellings(*"index_select gather take take_along_dim __getitem__ embedding".split()))

_LOOKUPS, _BRACKETS = frozenset(spellings("embedding")), frozenset(spellings("__getitem__"))


class Met:
    """Where inputs that speak of another number of samples meet parameters, or pick rows of data.

    Args:
        rivals: ids of these inputs.
    """

    def __init__(self, rivals: set[int]) -> None:
        self.rivals = rivals
        # Results of the first meetings, with their lengths.
        self.places: list[tuple[GradientEdge, torch.Size]] = []
        # Whether an index made from a rival has picked rows of the input that counts.
        self.picks = False

    def look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Look at a call: what is computed from a rival is one too, until a parameter meets it."""
        found = _tensors((out,))
        given = _tensors((*args, *kwargs.values())) if found else []
        rivals = [a for a in given if id(a) in self.rivals or hasattr(a, _RIVAL)]
        if not rivals:
            return
        if func in _PICKS and any(not a.is_floating_point() for a in rivals):
            for a in given:
                axis = sample_axis_of(a)
                # From one sample all rows are its own.
                if axis is not None and axis.size > 1:
                    self.picks |= _indexed(func, args, kwargs, a, rivals) in (axis.dim, None)
        for each in found:
            if not each.requires_grad:
                setattr(each, _RIVAL, True)
            elif not any((axis := sample_axis_of(a)) is not None and not axis.tentative for a in given):
                self.places.append((get_gradient_edge(each), each.shape))


def _indexed(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], data: Tensor, rivals: Sequence[Tensor]
) -> int | None:
    """The axis of data that one of these indices picks from; ``None`` if that is not plain to see."""
    if func in _LOOKUPS:
        return 0
    if func not in _BRACKETS:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return dim % data.dim() if isinstance(dim, int) else None
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    place = next((j for j, each in enumerate(index) if any(each is r for r in rivals)), None)
    before = index[:place]
    if place is None or any(isinstance(each, Tensor) and each.dtype == torch.bool for each in before):
        return None
    if any(each is ... for each in before):
        after = index[place:]
        return None if any(each is None for each in after) else data.dim() - len(after)
    return sum(each is not None for each in before)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """Those among arguments or results, and in their lists."""
    found: list[Tensor] = []
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, (tuple, list)):
            found += _tensors(each)
    return found


def contested(
    met: Met, recording: Recording, outputs: Sequence[Tensor], axes: Sequence[SampleAxis | None]
) -> str | None:
    """How two inputs of different lengths may both carry the batch, if they may."""
    if met.picks:
        return "rows of one are picked by the other"
    if not met.places:
        return None
    speaks = False
    dim = recording.batch_dim
    for output, axis in zip(outputs, axes, strict=True):
        if not output.requires_grad or output.dim() <= dim or axis is None or axis.lost:
            continue
        if not axis.fits(output.shape) or axis.dim != dim or axis.tentative:
            continue
        if recording.size == 1 and output.shape[dim] != 1:
            continue
        if any(_is_row(output, axis, place) for place in met.places):
            return "an output has the rows of both"
        speaks = True
    return None if speaks else "no output speaks for one of them, while parameters meet both"


def _is_row(output: Tensor, axis: SampleAxis, place: tuple[GradientEdge, torch.Size]) -> bool:
    """Whether places of another axis of an output belong to rows of a rival."""
    edge, shape = place
    length = shape[axis.dim] if len(shape) > axis.dim else 1
    for dim in range(output.dim()):
        if dim == axis.dim or output.shape[dim] != length or length < 2:
            continue
        column = torch.zeros_like(output)
        column.select(dim, 0).fill_(1)
        with without_torch_function():
            (found,) = torch.autograd.grad(
                [output], [edge], [column], retain_graph=True, allow_unused=True
            )
        if found is not None and not bool(found.narrow(axis.dim, 1, length - 1).any()):
            return True
    return False


def makes_pairs(
    func: Any,
    new: Tensor,
    batch: SampleAxis,
    marked: Sequence[tuple[Tensor, SampleAxis]],
    demoted: Sequence[Tensor],
) -> bool:
    """Whether rows of a second input, as many as samples, are paired with each of the samples."""
    if batch.lost or batch.size == 1 or not (func in _PRODUCTS or func in ELEMENTWISE):
        return False
    data = [t for t, axis in marked if not any(t is d for d in demoted) and not axis.lost]
    for old, axis in marked:
        guess = axis.tentative == 1 and not axis.lost and axis.picked is None
        if not guess or not old.requires_grad or not any(old is d for d in demoted):
            continue
        if func in _PRODUCTS:
            return True
        place = axis.dim - old.dim()
        if all(-place > t.dim() or t.shape[place] == 1 for t in data):
            return True
    return False
