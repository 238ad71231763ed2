"""Backward: the walk over the graph below a loss: its taps, losses and model outputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack._torch import AccumulateGrad, leaf_of
from backpack.graph.above import Above, taps_above
from backpack.graph.differentiated import Differentiated, taps_in_derivatives
from backpack.graph.nodes import children_of, walk
from backpack.graph.outputs import LossRecord, ModelOutput
from backpack.graph.recognised import is_nonlinear, known_loss, outputs_at
from backpack.graph.residuals import residuals
from backpack.graph.scaling import Starts
from backpack.graph.taps import MIXES, MODEL_OUTPUT, TAPS, Recording, Tap, notes
from backpack.graph.transformed import differentiated, transformed
from backpack.graph.unseen import locate

# The node of reentrant checkpointing.
_REENTRANT = "CheckpointFunctionBackward"
# Where a parameter is met that no tap is about.
OWN_USE = "its use"


@dataclass(eq=False)
class Graph:
    """What lies below the root of a backward pass.

    Attributes:
        taps: taps with their nodes, those nearer to the root first.
        losses: losses with a known Hessian, with their nodes and the model outputs below them.
        outputs: model outputs that reach the root other than through such a loss.
        upper: losses with a known Hessian in their input, which is no linear function of model outputs.
        flat: those of which the root is a linear function, beside known losses.
        bent_by: the first operation above the outputs that is curved, and part of no known loss.
        bare: whether a tap reaches the root neither through a known loss nor a model output.
        unseen: parameters that enter the model at a place that is not a tap, with that place.
        outside: parameters that enter above all model outputs (weight decay in the loss, say).
        refused: parameters that meet data above the outputs in a way that is no tap, with the operation
            and the reason.
        uncovered: taps above the outputs that are below no known loss.
        mixing: why samples are mixed somewhere, if they are.
        nodes: all nodes seen.
        mixed: why a model output that has rows has samples no longer apart.
        recordings: the forward passes they belong to.
        within: whether the loss contains derivatives of a model, or other things from inside of it.
        starts: if so, where samples are last apart below the root.
        transformed: if so, forward passes that nobody has seen (inside of transforms), once for each
            such place that depends on no other pass.
        coupled: if so, whether a curved operation above couples samples.
        kinds: kinds of all nodes, in the order in which they were seen.
    """

    taps: list[tuple[Node, Tap]] = field(default_factory=list)
    losses: dict[Node, tuple[LossRecord, dict[Node, list[ModelOutput]]]] = field(default_factory=dict)
    outputs: dict[Node, list[ModelOutput]] = field(default_factory=dict)
    upper: dict[Node, LossRecord] = field(default_factory=dict)
    flat: dict[Node, list[ModelOutput]] = field(default_factory=dict)
    bent_by: str | None = None
    bare: bool = False
    unseen: list[tuple[Tensor, str]] = field(default_factory=list)
    outside: set[Tensor] = field(default_factory=set)
    refused: list[tuple[Tensor, str, str]] = field(default_factory=list)
    uncovered: set[Tap] = field(default_factory=set)
    mixing: str | None = None
    mixed: str | None = None
    within: bool = False
    starts: Starts = ()
    transformed: list[Recording] = field(default_factory=list)
    coupled: bool = False
    nodes: set[Node] = field(default_factory=set)
    recordings: list[Recording] = field(default_factory=list)
    kinds: list[Any] = field(default_factory=list)

    def signature(self) -> int:
        """The same number for graphs of the same operations, with the same taps and shapes."""
        taps = []
        for node, tap in self.taps:
            place, axis = tap.place, tap.own
            taps += [tap.func, place, axis.dim, axis.outer, axis.size, axis.inner, axis.solo]
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


def survey(roots: Sequence[Node], curvature: bool = True, anew: bool = False) -> Graph:
    """Walk the graph below ``roots``, where a backward pass starts or has arrived.

    Without ``curvature`` losses are not asked for their Hessian. With ``anew`` nothing is remembered of
    other graphs.
    """
    graph = Graph()
    kinds, nodes, recordings, tapped = graph.kinds, graph.nodes, graph.recordings, set[Node]()
    # (node, whether a known loss was passed, whether a curved operation was, the forward pass it
    # belongs to)
    stack: list[tuple[Node, bool, bool, Recording | None]] = [(r, False, False, None) for r in roots]
    seen: set[tuple[Node, bool, bool, int]] = set()
    unseen: list[tuple[Node, ModelOutput]] = []
    while stack:
        node, covered, bent, inside = stack.pop()
        if inside is not None and inside.entries and node in inside.entries:
            inside = None
        visit = node, covered, bent, id(inside)
        if visit in seen:
            continue
        seen.add(visit)
        nodes.add(node)
        # Kinds of nodes have types of their own, but for a few, all of one type.
        kind = type(node)
        kinds.append(kind)
        if kind is AccumulateGrad:
            if inside is None:
                graph.outside.add(leaf_of(node))
            else:
                graph.unseen.append((leaf_of(node), OWN_USE))
            continue
        data = notes(node)
        if covered and not data and inside is not None and kind.__name__ != _REENTRANT:
            # Nearly all nodes: an operation of the model that is no tap.
            for child, _ in node.next_functions:
                if child is not None:
                    stack.append((child, True, False, inside))
            continue
        if inside is not None and kind.__name__ == _REENTRANT:
            raise RuntimeError(
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=True) hides what happens inside "
                "it; pass use_reentrant=False"
            )
        outputs: list[ModelOutput] = []
        if data:  # what capture has noted; most nodes have nothing
            if MIXES in data:
                graph.mixing = data[MIXES]
            outputs = outputs_at(node) if MODEL_OUTPUT in data else []
            if outputs and curvature and not covered and not bent and _is_a_loss(node, outputs):
                outputs = []
        if not covered and not bent and (data or curvature):
            found = known_loss(node, bool(outputs), curvature)
            if found is not None and found.curved:
                graph.upper[node] = found.record
            elif found is not None:
                graph.losses[node], covered = (found.record, found.outputs), True
        if outputs and not covered:
            (graph.outputs if bent or not curvature else graph.flat)[node] = outputs
            covered = True
        for border in data.get(MODEL_OUTPUT, ()) if data else ():
            inside = border.recording
            recordings.append(inside)
            if border.mixed:
                graph.mixed = border.own.lost
            elif border.own is None and border.has_rows:
                unseen.append((node, border))
        # What is curved above a loss makes it part of one that no rule knows.
        if curvature and not covered and not bent and is_nonlinear(node):
            bent, graph.bent_by = True, graph.bent_by or node.name()
        bent = bent and not covered
        taps = data.get(TAPS) if data else None
        if taps is None:
            stack += [(child, covered, bent, inside) for child, _ in node.next_functions if child]
            continue
        graph.bare |= not covered
        inside = taps[0].recording
        recordings.append(inside)
        if node not in tapped:
            tapped.add(node)
            if taps[0].plain:
                taps[0].take_statistics(node)
            graph.taps += [(node, tap) for tap in taps]
            if len(taps) > 1 or taps[0].args is None:  # else a plain layer's sources are all there is
                graph.unseen += _inside_tap(node, taps)
        stack += [(below, covered, bent, inside) for tap in taps for below in tap.inputs]
    for _, tap in graph.taps:
        for source in tap.sources:
            if source.edge is not None and not tapped.isdisjoint(_below([source.edge.node])):
                graph.unseen += [(leaf, tap.op) for leaf in leaves_below(source.edge)]
    if graph.flat and graph.outputs:
        graph.flat = {node: found for node, found in graph.flat.items() if node not in graph.outputs}
    if not graph.losses and not graph.outputs:
        graph.outputs, graph.flat = graph.flat, {}
    if graph.unseen and any(recording.differentiated for recording in graph.recordings):
        _inside(graph, roots, curvature, anew)
    elif graph.outside:
        above: Above | Differentiated = taps_above(roots)
        if isinstance(above, Above) and (above.inner or _may_be_data(graph.outside)):
            within = taps_in_derivatives([GradientEdge(root, 0) for root in roots], anew)
            above = within if above.inner or within.taps or within.refused else above
        if isinstance(above, Differentiated):
            graph.within = True
            _of_residuals(graph, above, roots, curvature)
        else:
            open_to = _open(roots, graph)
            graph.uncovered = {tap for node, tap in above.taps if node in open_to}
        graph.taps = above.taps + graph.taps
        graph.refused = above.refused
    return survey(roots, curvature, anew) if unseen and locate(unseen, graph.taps) else graph


def _may_be_data(outside: Iterable[Tensor]) -> bool:
    """Whether parameters that enter above the outputs may meet data that nobody has seen."""
    return any(transformed(leaf) or differentiated(leaf) for leaf in outside)


def _inside(graph: Graph, roots: Sequence[Node], curvature: bool, anew: bool) -> None:
    """Forward takes derivatives itself: what these use of parameters."""
    found = taps_in_derivatives([GradientEdge(root, 0) for root in roots], anew)
    if not (found.taps or found.refused or graph.taps):
        return  # no data was found that parameters meet
    graph.unseen = [(leaf, where) for leaf, where in graph.unseen if where != OWN_USE]
    graph.within, graph.taps, graph.refused = True, found.taps + graph.taps, found.refused
    _of_residuals(graph, found, roots, curvature)


def _of_residuals(graph: Graph, found: Differentiated, roots: Sequence[Node], curvature: bool) -> None:
    """The losses of a graph that contains derivatives of a model are those of residuals."""
    graph.outputs, graph.flat, graph.losses, graph.upper, graph.bare = {}, {}, {}, {}, False
    graph.transformed = list(found.transformed)
    graph.recordings += graph.transformed
    graph.starts, graph.coupled = found.starts, found.coupled
    if curvature:
        graph.losses, graph.bent_by = residuals(found, [GradientEdge(root, 0) for root in roots])


def _is_a_loss(node: Node, outputs: Sequence[ModelOutput]) -> bool:
    """Whether the output of a model is its loss: of one sample, a number is no sign of that."""
    if any(border.shape for border in outputs):
        return False
    nodes = walk([node], lambda n: [] if TAPS in notes(n) else children_of(n))
    return any(known_loss(here, False, True) is not None for here in nodes)


def _open(roots: Sequence[Node], graph: Graph) -> set[Node]:
    """Nodes above the model's outputs that reach the root other than through a loss with a rule."""

    def further(node: Node) -> list[Node]:
        ends = node in graph.losses or node in graph.upper or outputs_at(node)
        return [] if ends else children_of(node)

    return set(walk(roots, further))


def _inside_tap(node: Node, taps: Sequence[Tap]) -> Iterator[tuple[Tensor, str]]:
    """Parameters that an operation reaches without being among its sources."""
    if any(tap.released for tap in taps) or all(tap.args is not None for tap in taps):
        return
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
