"""Backward: the walk over the graph below a loss: its taps, losses and model outputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack._torch import AccumulateGrad, leaf_of
from backpack.graph.recognised import recognised
from backpack.graph.taps import (
    LOSS,
    MIXES,
    MODEL_OUTPUT,
    TAPS,
    LossRecord,
    ModelOutput,
    Recording,
    Tap,
    notes,
)
from backpack.graph.tracing import axis_at, kind_of

# What a loss module may do to the model output before it calls a loss with a known Hessian without
# adding curvature: linear and piecewise linear operations, by the names of their nodes, and products
# with constants.
_LINEAR = frozenset(
    """Add Sub Rsub Neg View UnsafeView ReshapeAlias Reshape Permute Transpose T Expand Squeeze
    Unsqueeze Sum Mean Cat Stack Split SplitWithSizes Unbind Select Slice Narrow Index IndexSelect
    Gather Clone Copy ToCopy AsStrided Alias Flip Roll Repeat Unfold Relu LeakyRelu Threshold Hardtanh
    Clamp ClampMin ClampMax Abs Where MaskedFill Diagonal Tril Triu Cumsum Movedim NllLoss
    NllLoss2D ConstantPadNd MaskedSelect Take""".split()
)
_PRODUCTS = frozenset({"Mul", "Div", "Mm", "Bmm", "Mv", "Dot", "Addmm"})


@dataclass(eq=False)
class Graph:
    """What lies below the root of a backward pass.

    Attributes:
        taps: taps with their nodes, those nearer to the root first.
        losses: losses with a known Hessian, with their nodes and the model outputs below them.
        outputs: model outputs that reach the root other than through such a loss.
        flat: those of which the root is a linear function, beside known losses.
        bent_by: the first operation above the outputs that is curved, and part of no known loss.
        bare: whether a tap reaches the root neither through a known loss nor a model output.
        unseen: parameters that enter the model at a place that is not a tap, with that place.
        outside: parameters that enter above all model outputs (weight decay in the loss, say).
        mixing: why samples are mixed somewhere, if they are.
        nodes: all nodes seen.
        mixed: why a model output that has one row for each sample has them no longer apart.
        recordings: the forward passes they belong to.
        kinds: kinds of all nodes, in the order in which they were seen.
    """

    taps: list[tuple[Node, Tap]] = field(default_factory=list)
    losses: dict[Node, tuple[LossRecord, dict[Node, list[ModelOutput]]]] = field(default_factory=dict)
    outputs: dict[Node, list[ModelOutput]] = field(default_factory=dict)
    flat: dict[Node, list[ModelOutput]] = field(default_factory=dict)
    bent_by: str | None = None
    bare: bool = False
    unseen: list[tuple[Tensor, str]] = field(default_factory=list)
    outside: set[Tensor] = field(default_factory=set)
    mixing: str | None = None
    mixed: str | None = None
    nodes: set[Node] = field(default_factory=set)
    recordings: list[Recording] = field(default_factory=list)
    kinds: list[Any] = field(default_factory=list)

    def signature(self) -> int:
        """The same number for graphs of the same operations, with the same taps and shapes."""
        taps = []
        for node, tap in self.taps:
            place, axis = tap.place, tap.batch
            taps += [tap.func, place, axis.dim, axis.outer, axis.size, axis.inner]
            taps += node._input_metadata[place].shape
        return hash((*self.kinds, *taps))

    def take(self, other: Graph) -> list[tuple[Node, Tap]]:
        """Add what lies below another root; the taps that are new here."""
        fresh = other.taps
        if self.taps:
            known = {id(tap) for _, tap in self.taps}
            fresh = [(node, tap) for node, tap in fresh if id(tap) not in known]
        self.taps += fresh
        self.losses |= other.losses
        self.outputs |= other.outputs
        self.recordings += other.recordings
        self.outside |= other.outside
        self.nodes |= other.nodes
        return fresh

    def joint(self, further: Collection[Node] = ()) -> tuple[dict[Node, list[ModelOutput]], set[Node]]:
        """The model outputs whose Hessian no rule gives, and the known losses that add to it.

        ``further`` are known losses whose rules are not to be used.
        """
        outputs, absorbed, size = dict(self.outputs), set[Node](), -1
        for node in further:
            outputs |= self.losses[node][1]
        while len(outputs) > size:
            size = len(outputs)
            for node, (_, below) in self.losses.items():
                if not outputs.keys().isdisjoint(below):
                    absorbed.add(node)
                    outputs |= below
        return outputs, absorbed


def outputs_at(node: Node) -> list[ModelOutput]:
    """The model outputs that a node computes (extended loss modules have outputs, but no taps)."""
    borders = notes(node).get(MODEL_OUTPUT)
    if borders is None:
        return []
    found: dict[int, ModelOutput] = {}
    for border in borders:
        if border.batch is not None and not border.batch.lost and border.recording.taps:
            found[border.place] = border
    return list(found.values())


def _outputs_below(record: LossRecord) -> tuple[dict[Node, list[ModelOutput]], bool]:
    """The model outputs that a known loss depends on, and whether by way of a curved function.

    In that case its Hessian is not the one in the outputs.
    """
    found: dict[Node, list[ModelOutput]] = {}
    curved = False
    stack, seen = [(record.edge.node, False)], set()
    while stack:
        node, bent = stack.pop()
        if (node, bent) in seen:
            continue
        seen.add((node, bent))
        borders = outputs_at(node)
        if borders:
            found[node] = borders
            curved |= bent
        elif TAPS not in notes(node):
            children = [child for child, _ in node.next_functions if child is not None]
            kind = kind_of(node)
            product = kind in _PRODUCTS and len(children) == 1
            product &= kind != "Div" or node.next_functions[0][0] is not None
            stack += [(child, bent or not (product or kind in _LINEAR)) for child in children]
    return found, curved


def _known_loss(
    node: Node, is_output: bool, curvature: bool
) -> tuple[LossRecord, dict[Node, list[ModelOutput]]] | None:
    """The loss with a known Hessian that a node computes, and the model outputs below it."""
    noted = notes(node).get(LOSS)
    if not curvature:
        return None if noted is None else (noted, {})
    found = None if noted is None else _placed_loss(noted)
    if found is None and not is_output:
        # A loss that was not noted is one of the model's outputs only.
        record = recognised(node)
        found = None if record is None else _placed_loss(record)
        found = found if found is not None and _is_cheaper(*found) else None
    return found


def _is_cheaper(record: LossRecord, below: dict[Node, list[ModelOutput]]) -> bool:
    """Whether a recognised loss has not many more columns than there are numbers of the model output.

    All distances of an output from a table, say: then the sum of its terms is differentiated twice.
    """
    borders = [border for found in below.values() for border in found]
    outputs = sum(prod(border.shape) for border in borders)
    samples = max((border.batch.size for border in borders if border.batch), default=1)
    own = prod(record.edge.node._input_metadata[record.edge.output_nr].shape)
    return bool(borders) and (own <= 4 * outputs or outputs > 256 * max(samples, 1))


def _placed_loss(record: LossRecord) -> tuple[LossRecord, dict[Node, list[ModelOutput]]] | None:
    below, curved = _outputs_below(record)
    if below:
        placed = [(GradientEdge(n, b.place), b.batch) for n, bs in below.items() for b in bs]
        record.locate(axis_at(record.edge, placed))  # type: ignore[arg-type]
    return None if curved or record.known is None else (record, below)


def survey(roots: Sequence[Node], curvature: bool = True) -> Graph:
    """Walk the graph below ``roots``, where a backward pass starts or has arrived.

    Without ``curvature`` losses are not asked for their Hessian.
    """
    graph = Graph()
    tapped: set[Node] = set()
    # (node, whether a known loss was passed, whether a curved operation was, the forward pass it
    # belongs to)
    stack: list[tuple[Node, bool, bool, Recording | None]] = [(r, False, False, None) for r in roots]
    seen: set[tuple[Node, bool, bool, int]] = set()
    while stack:
        node, covered, bent, inside = stack.pop()
        if inside is not None and inside.entries and node in inside.entries:
            inside = None
        visit = node, covered, bent, id(inside)
        if visit in seen:
            continue
        seen.add(visit)
        # Kinds of nodes have types of their own, but for a few, all of one type.
        kind = type(node)
        graph.kinds.append(kind)
        if kind is AccumulateGrad:
            if inside is None:
                graph.outside.add(leaf_of(node))
            else:
                graph.unseen.append((leaf_of(node), "its use"))
            continue
        data = notes(node)
        if inside is not None and kind.__name__ == "CheckpointFunctionBackward":
            raise RuntimeError(
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=True) hides what happens inside "
                "it; pass use_reentrant=False"
            )
        if MIXES in data:
            graph.mixing = data[MIXES]
        outputs = outputs_at(node) if MODEL_OUTPUT in data else []
        if not covered and not bent:
            found = _known_loss(node, bool(outputs), curvature)
            if found is not None:
                graph.losses[node], covered = found, True
        if outputs and not covered:
            (graph.outputs if bent or not curvature else graph.flat)[node] = outputs
            covered = True
        for border in data.get(MODEL_OUTPUT, ()):
            inside = border.recording
            graph.recordings.append(inside)
            if border.mixed:
                graph.mixed = border.batch.lost
        # What is curved above a loss makes it part of one that no rule knows.
        if curvature and not covered and not bent and _is_nonlinear(node):
            bent, graph.bent_by = True, graph.bent_by or node.name()
        bent = bent and not covered
        taps = data.get(TAPS)
        if taps is None:
            stack += [(child, covered, bent, inside) for child, _ in node.next_functions if child]
            continue
        graph.bare |= not covered
        inside = taps[0].recording
        graph.recordings.append(inside)
        if node not in tapped:
            tapped.add(node)
            graph.taps += [(node, tap) for tap in taps]
            graph.unseen += _inside_tap(node, taps)
        stack += [(below, covered, bent, inside) for tap in taps for below in tap.inputs]
    for _, tap in graph.taps:
        for source in tap.sources:
            if source.edge is not None and not tapped.isdisjoint(_below([source.edge.node])):
                graph.unseen += [(leaf, tap.op) for leaf in leaves_below(source.edge)]
    graph.nodes = {node for node, *_ in seen}
    graph.flat = {node: found for node, found in graph.flat.items() if node not in graph.outputs}
    if not graph.losses and not graph.outputs:
        graph.outputs, graph.flat = graph.flat, {}
    if graph.outside:
        used = {source.leaf for _, tap in graph.taps for source in tap.sources}
        graph.unseen += [(p, where) for p, where in _entangled(roots) if p in used]
    return graph


def _is_nonlinear(node: Node) -> bool:
    """Whether an operation between root and losses adds curvature."""
    kind = kind_of(node)
    if kind in _LINEAR:
        return False
    children = [child for child, _ in node.next_functions]
    known = [child is not None and _reaches_model(child) for child in children]
    return kind not in _PRODUCTS or sum(known) > 1 or (kind == "Div" and not known[0])


def _reaches_model(node: Node) -> bool:
    found = (notes(below) for below in _below([node]))
    return any(TAPS in data or MODEL_OUTPUT in data or LOSS in data for data in found)


def _entangled(roots: Sequence[Node]) -> list[tuple[Tensor, str]]:
    """Parameters that meet the model's results above its outputs, other than in a sum.

    The penalty of a gradient in the loss, say: its graph goes through the parameters once more, where
    there are no taps.
    """
    found: list[tuple[Tensor, str]] = []
    leaves: dict[Node, set[Tensor]] = {}
    model: dict[Node, bool] = {}
    stack = [(root, False) for root in roots]
    while stack:
        node, leaving = stack.pop()
        if not leaving:
            if node in leaves:
                continue
            data, leaf = notes(node), leaf_of(node)
            leaves[node] = set() if leaf is None else {leaf}
            model[node] = TAPS in data or MODEL_OUTPUT in data
            if not model[node] and leaf is None:
                stack.append((node, True))
                stack += [(child, False) for child, _ in node.next_functions if child]
            continue
        children = {child for child, _ in node.next_functions if child}
        kind = kind_of(node)
        for child in children if kind not in _LINEAR else ():
            if any(model[other] for other in children - {child}):
                found += [(leaf, node.name()) for leaf in leaves[child]]
        leaves[node] = set().union(*(leaves[child] for child in children))
        model[node] = any(model[child] for child in children)
    return found


def _inside_tap(node: Node, taps: Sequence[Tap]) -> Iterator[tuple[Tensor, str]]:
    """Parameters that an operation reaches without being among its sources."""
    if any(tap.released for tap in taps) or all(tap.args is not None for tap in taps):
        return  # a plain layer's sources are all there is
    stops = {below for tap in taps for below in tap.inputs}
    known: set[Tensor] = set()
    for tap in taps:
        for source in tap.sources:
            known |= {source.leaf} if source.leaf is not None else set(leaves_below(source.edge))
    for leaf in _leaves(_below([child for child, _ in node.next_functions if child], stops)):
        if leaf not in known:
            yield leaf, taps[0].op


def leaves_below(edge: GradientEdge | None) -> list[Tensor]:
    """The leaf tensors a derived tensor was made from."""
    return _leaves(_below([edge.node])) if edge is not None else []


def _leaves(nodes: Iterable[Node]) -> list[Tensor]:
    leaves = [leaf_of(node) for node in nodes]
    return [leaf for leaf in leaves if leaf is not None]


def _below(nodes: list[Node], stops: Collection[Node] = ()) -> dict[Node, None]:
    """Nodes and all that lie below them, up to ``stops``."""
    seen: dict[Node, None] = {}
    while nodes:
        node = nodes.pop()
        if node not in seen and node not in stops:
            seen[node] = None
            nodes += [child for child, _ in node.next_functions if child]
    return seen
