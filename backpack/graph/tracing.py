"""Where the samples of a model's outputs sit further up in the graph: at the input of a loss.

Between a model's output and a loss no operation is seen: logits are flattened, shifted, masked, joined.
What the nodes in between do to the sample axis is read from them where they only reshape and transpose.
Otherwise it is tried out. A Jacobian-vector product whose tangent vanishes at some samples vanishes
at the entries that belong to them, and is the full one at all others. A subset of the samples for each
binary digit of their numbers tells all of them apart; an entry that does neither belongs to several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.graph.nodes import kind_of
from backpack.samples.axis import NOBODY, SampleAxis, axis_of, owners_of
from backpack.samples.movers import reshaped
from backpack.samples.separability import generic

Placed = Sequence[tuple[GradientEdge, SampleAxis]]


@contextmanager
def cut(nodes: Iterable[Node]) -> Iterator[None]:
    """Nothing flows on below these nodes: what is differentiated depends on them as such only."""
    handles = [node.register_prehook(_nothing) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nothing(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else torch.zeros_like(g) for g in grads)


def axis_at(edge: GradientEdge, outputs: Placed) -> SampleAxis | None:
    """The sample axis of a tensor that is a function of model outputs.

    Args:
        edge: the tensor's place in the graph.
        outputs: the model outputs that it depends on, with their sample axes.

    Returns:
        ``None`` if its samples are mixed, or on no axis.
    """
    sizes = {axis.size for _, axis in outputs}
    if len(sizes) != 1:
        return None
    axis = _moved(edge, {(place.node, place.output_nr): axis for place, axis in outputs})
    if axis is not None:
        return axis
    (size,) = sizes
    with torch.enable_grad(), cut(place.node for place, _ in outputs):
        owners = _owners(edge, outputs, size)
    return None if owners is None else axis_of(owners, size)


# --------------------------------------------------------------------------------------
# Read from the nodes


def _signed(value: int) -> int:
    """An axis as nodes keep it: negative ones as large unsigned numbers."""
    return value - 2**64 if value >= 2**63 else value


def _reshape(axis: SampleAxis, node: Node, old: torch.Size, new: torch.Size) -> SampleAxis | None:
    return reshaped(axis, old, new)


def _same(axis: SampleAxis, node: Node, old: torch.Size, new: torch.Size) -> SampleAxis | None:
    return axis


def _transpose(axis: SampleAxis, node: Node, old: torch.Size, new: torch.Size) -> SampleAxis | None:
    first, second = (_signed(d) % len(new) for d in (node._saved_dim0, node._saved_dim1))  # type: ignore[attr-defined]
    return axis.moved({first: second, second: first}.get(axis.dim, axis.dim))


def _permute(axis: SampleAxis, node: Node, old: torch.Size, new: torch.Size) -> SampleAxis | None:
    dims = [_signed(d) % len(new) for d in node._saved_dims]  # type: ignore[attr-defined]
    return axis.moved(dims.index(axis.dim))


def _slice(axis: SampleAxis, node: Node, old: torch.Size, new: torch.Size) -> SampleAxis | None:
    dim = _signed(node._saved_dim) % len(new)  # type: ignore[attr-defined]
    return axis if dim != axis.dim or old == new else None


def _select(axis: SampleAxis, node: Node, old: torch.Size, new: torch.Size) -> SampleAxis | None:
    dim = _signed(node._saved_dim) % len(old)  # type: ignore[attr-defined]
    return axis.moved(axis.dim - (dim < axis.dim)) if dim != axis.dim else None


_STEPS: dict[str, Callable[[SampleAxis, Node, torch.Size, torch.Size], SampleAxis | None]] = {
    **dict.fromkeys("View UnsafeView ReshapeAlias Unsqueeze Squeeze".split(), _reshape),
    **dict.fromkeys(
        "Clone Alias ToCopy Neg Tanh Sigmoid Exp NestedGetValues NestedViewFromJagged".split(), _same
    ),
    "T": lambda axis, node, old, new: axis.moved(len(new) - 1 - axis.dim),
    "Transpose": _transpose,
    "Permute": _permute,
    "Slice": _slice,
    "Select": _select,
}


def past(axis: SampleAxis, node: Node, number: int = 0) -> SampleAxis | None:
    """An axis of a node's only input in its output, if it tells where that is moved to."""
    step, children = _STEPS.get(kind_of(node)), [c for c in node.next_functions if c[0] is not None]
    if step is None or len(children) != 1:
        return None
    below, place = children[0]
    old = torch.Size(below._input_metadata[place].shape)  # type: ignore[union-attr]
    moved = step(axis, node, old, torch.Size(node._input_metadata[number].shape))
    return None if moved is None or moved.lost else moved


def _moved(edge: GradientEdge, outputs: dict[tuple[Node, int], SampleAxis]) -> SampleAxis | None:
    """The axis after a chain of operations that nodes tell about; ``None`` if there are others."""
    chain, node, number = [], edge.node, edge.output_nr
    while (node, number) not in outputs:
        children = [(child, nr) for child, nr in node.next_functions if child is not None]
        if kind_of(node) not in _STEPS or len(children) != 1:
            return None
        chain.append((node, number))
        node, number = children[0]
    axis: SampleAxis | None = outputs[node, number]
    for each in reversed(chain):
        axis = None if axis is None else past(axis, *each)
    return axis


# --------------------------------------------------------------------------------------
# Tried out


def _owners(edge: GradientEdge, outputs: Placed, size: int) -> Tensor | None:
    """The sample of each entry; ``None`` if some depend on several samples, or it cannot be tried."""
    about = edge.node._input_metadata[edge.output_nr]
    if about.dtype.is_complex:
        return None
    weights = generic(about.shape, torch.empty(0, dtype=about.dtype, device=about.device))
    weights.requires_grad_()
    try:
        pulled = torch.autograd.grad(
            [edge],
            [place for place, _ in outputs],
            [weights],
            create_graph=True,
            retain_graph=True,
            allow_unused=True,
        )
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        return None
    reached = [(p, axis) for p, (_, axis) in zip(pulled, outputs, strict=True) if p is not None]
    reached = [(p, axis) for p, axis in reached if p.requires_grad]
    owners = torch.full(weights.shape, NOBODY, device=weights.device)
    if not reached or not weights.numel():
        return owners
    tangents = [generic(p.shape, p) for p, _ in reached]
    samples = [owners_of(axis, p.shape, p.device) for p, axis in reached]

    def product(tangents: Sequence[Tensor]) -> Tensor:
        (found,) = torch.autograd.grad(
            [p for p, _ in reached], weights, tangents, retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(weights) if found is None else found.detach()

    try:
        whole = product(tangents)
    except NotImplementedError:  # an operation that cannot be differentiated twice
        return None
    largest = whole.abs().amax()
    if not bool(torch.isfinite(largest)):
        return None
    rounding = torch.finfo(whole.dtype).eps ** 0.5 * largest
    there, number = whole.abs() > rounding, torch.zeros_like(owners)
    for digit in range((size - 1).bit_length()):
        masked = [t * ((ids >> digit) & 1) for t, ids in zip(tangents, samples, strict=True)]
        part = product(masked)
        absent, full = part.abs() <= rounding, (part - whole).abs() <= rounding
        if not bool((absent | (full & there)).all()):
            return None
        number += (full & there).long() << digit
    return torch.where(there, number, owners)
