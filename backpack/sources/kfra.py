"""A matrix averaged over the batch goes down a chain of operations (KFRA).

Letters: ``N`` samples, ``d`` numbers per sample at a place of the graph.

``M [d, d]`` starts as ``sum_n H_n`` and is ``1/N sum_n J_n^T M J_n`` below an operation with Jacobians
``J_n`` (Botev, Ritter, Barber, 2017). A graph that branches would need products of its branches too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack._torch import shows
from backpack.forms.products import spectrum
from backpack.graph.carry import carry
from backpack.graph.nodes import children_of, upwards
from backpack.graph.taps import TAPS, Tap, notes
from backpack.samples.axis import SampleAxis

LARGEST_MATRIX = 2**13


def averaged(
    start: GradientEdge, samples: int, columns: Iterable[Tensor], wanted: Collection[Tap]
) -> dict[int, Tensor]:
    """Columns at taps whose sum of outer products is the averaged matrix there.

    Args:
        start: the model output.
        samples: number of samples ``N``.
        columns: square root of the loss Hessian there, ``[v, *output.shape]`` at a time.
        wanted: taps.

    Returns:
        By the taps' ids, ``[d, *tap output.shape]``.

    Raises:
        NotImplementedError: if operations do not form a chain, or change where the samples are.
        ValueError: if the matrix would be too large.
    """
    if not samples:
        return {}
    _shape(start, samples)  # before a matrix is made that is too large
    matrix = sum(torch.einsum("vnc,vnd->cd", s, s) for s in (_rows(c, samples) for c in columns))
    arrived: dict[int, Tensor] = {}
    active = _with_taps(start.node, wanted)
    place: GradientEdge | None = start
    while place is not None and isinstance(matrix, Tensor):
        for tap in notes(place.node).get(TAPS, ()):
            if tap in wanted and tap.place == place.output_nr:
                in_front(tap.batch, place)
                arrived[id(tap)] = _spread(matrix, place, samples)
        below = [GradientEdge(n, nr) for n, nr in place.node.next_functions if n in active]
        if len(below) > 1:
            raise NotImplementedError(_refusal(f"{_name(place)} joins branches"))
        if below:
            matrix = _through(matrix, place, below[0], samples)
        place = below[0] if below else None
    return arrived


def in_front(axis: SampleAxis, place: GradientEdge) -> None:
    """All that follows takes rows one after the other as those of the first sample, the second, ...

    Raises:
        NotImplementedError: if they lie otherwise.
    """
    if axis.size > 1 and axis.picked is not None:
        raise NotImplementedError(_refusal(f"rows are not in the order of samples at {_name(place)}"))
    if axis.size > 1 and not (axis.dim == 0 and axis.outer == 1):
        raise NotImplementedError(_refusal(f"the samples are not in front at {_name(place)}"))


def _name(place: GradientEdge) -> str:
    return place.node.name().rstrip("0123456789").removesuffix("Backward")


def _refusal(why: str) -> str:
    return (
        f"kfra: its recursion is defined for chains of operations only, but {why}; use KFLR (exact "
        "columns, any architecture) or KFAC"
    )


def _rows(columns: Tensor, samples: int) -> Tensor:
    """``[v, *shape] -> [v, N, d]``."""
    return columns.reshape(len(columns), samples, -1)


def _with_taps(start: Node, wanted: Collection[Tap]) -> set[Node]:
    """Nodes from which a tap is reached."""
    active: set[Node] = set()
    for node in upwards([start]):
        here = any(tap in wanted for tap in notes(node).get(TAPS, ()))
        if here or not active.isdisjoint(children_of(node)):
            active.add(node)
    return active


def _shape(place: GradientEdge, samples: int) -> torch.Size:
    at = place.node._input_metadata[place.output_nr]
    shape = at.shape
    if at.dtype.is_complex:
        raise NotImplementedError(_refusal(f"{_name(place)} gives complex numbers"))
    if not shape or shape[0] % samples:
        raise NotImplementedError(_refusal(f"the samples are not in front below {_name(place)}"))
    size = prod(shape) // samples
    if size > LARGEST_MATRIX:
        raise ValueError(
            f"kfra: {_name(place)} has {size} outputs per sample, and a dense matrix of that size is "
            "needed; use KFLR or KFAC"
        )
    return torch.Size(shape)


def _through(matrix: Tensor, above: GradientEdge, below: GradientEdge, samples: int) -> Tensor:
    """``1/N sum_n J_n^T M J_n``."""
    shape = _shape(above, samples)
    _shape(below, samples)
    probe = matrix.new_zeros(1, samples, len(matrix))
    probe[:, 0] = torch.linspace(1, 2, len(matrix)).to(matrix)
    (moved,) = carry(above, [below], probe.reshape(1, *shape))
    if moved is not None and shows((_rows(moved, samples)[:, 1:] != 0).any()):
        raise NotImplementedError(_refusal(f"{_name(above)} moves the samples"))
    rows = matrix.unsqueeze(1).expand(-1, samples, -1)
    (once,) = carry(above, [below], rows.reshape(len(rows), *shape))
    assert once is not None
    back = _rows(once, samples).permute(2, 1, 0)  # (M J_n)^T, [d below, N, d above]
    (twice,) = carry(above, [below], back.reshape(len(back), *shape))
    assert twice is not None
    return _rows(twice, samples).mean(1)


def _spread(matrix: Tensor, place: GradientEdge, samples: int) -> Tensor:
    """Columns ``[d, *shape]``, the same for each sample, whose outer products sum to the matrix."""
    values, vectors = spectrum((matrix + matrix.mT) / 2)
    columns = (vectors * (values.clamp(min=0) / samples).sqrt()).mT
    columns = columns.unsqueeze(1).expand(-1, samples, -1)
    return columns.reshape(len(columns), *_shape(place, samples))
