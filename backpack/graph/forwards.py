"""Several forward passes below one backward pass: whether row n of each is sample n, or a new sample.

Forward passes whose rows are the same samples make a *group*: an extended model that takes the output
of another, or the same model called step after step with a state. The rows of several groups are the
same samples (two views of an image) or further ones (one pass for each episode), as the user says.
Nothing needs to be said where row ``n`` of a tensor is computed from row ``n`` of both
(``f(a) - f(b)``), or where a model was called with the same tensors again: these belong together. Nor
does it matter where groups have no parameter in common. Where rows are only put beside each other
(``torch.cat``), each compared with each, or the losses of several passes added up, it may be meant
either way.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.autograd.graph import GradientEdge, Node

from backpack.graph.nodes import children_of, kind_of, upwards, walk
from backpack.graph.outputs import ModelOutput
from backpack.graph.survey import Graph, leaves_below
from backpack.graph.taps import MODEL_OUTPUT, TAPS, Recording, notes
from backpack.graph.tracing import axis_at
from backpack.samples.axis import SampleAxis

Group = list[Recording]
# So many sizes are written out.
SHOWN = 8
# Operations that put entries beside each other.
_JOINS = frozenset({"Cat", "Stack", "CopySlices", "IndexPut", "Scatter", "SliceScatter", "IndexCopy"})

# Operations that compute from entries at the same place of two tensors, and losses that reduce this.
_ENTRYWISE = frozenset(
    """Add Sub Mul Div Maximum Minimum MseLoss SmoothL1Loss HuberLoss BinaryCrossEntropy
    BinaryCrossEntropyWithLogits KlDiv Dot""".split()
)


class _Groups:
    """Forward passes, those with the same samples together."""

    def __init__(self) -> None:
        self.of: dict[int, Group] = {}

    def add(self, recording: Recording) -> None:
        self.of.setdefault(id(recording), [recording])

    def unite(self, first: Recording, second: Recording) -> None:
        left, right = self.of[id(first)], self.of[id(second)]
        if left is not right:
            left += right
            for each in right:
                self.of[id(each)] = left

    def all(self) -> list[Group]:
        """The groups, in the order of their first calls."""
        groups = list({id(group): group for group in self.of.values()}.values())
        return sorted(groups, key=lambda group: min(each.number for each in group))


def _kind(node: Node) -> str:
    return kind_of(node).rpartition("::")[2]


def _borders(node: Node) -> list[ModelOutput]:
    return [each for each in notes(node).get(MODEL_OUTPUT, ()) if each.recording.taps]


def groups_below(roots: Sequence[Node]) -> list[Group]:
    """Forward passes with parameters below the roots of a backward pass, by their samples."""
    groups = _Groups()
    stack: list[tuple[Node, Recording | None]] = [(root, None) for root in roots]
    seen: set[tuple[Node, int]] = set()
    while stack:
        node, inside = stack.pop()
        if (node, id(inside)) in seen:
            continue
        seen.add((node, id(inside)))
        data = notes(node)
        for border in _borders(node):
            groups.add(border.recording)
            if inside is not None:
                groups.unite(inside, border.recording)
            inside = border.recording
        taps = data.get(TAPS, ())
        if taps:
            inside = taps[0].recording
            groups.add(inside)
        below = [child for tap in taps for child in tap.inputs]
        below = below or [child for child, _ in node.next_functions if child]
        stack += [(child, inside) for child in below]
    return groups.all()


def several_forwards(graph: Graph) -> bool:
    """Whether several forward passes with parameters take part."""
    return len({id(recording) for recording in graph.recordings if recording.taps}) > 1


def unseen_group(graph: Graph) -> list[Group]:
    """The forward passes inside of a transform as a group.

    Raises:
        RuntimeError: if several terms depend on such passes, of which none can be told from another.
    """
    if len(graph.transformed) > 1:
        raise RuntimeError(
            "with forwards='further' the samples of several terms whose forward passes are inside of "
            "transforms (torch.func.jvp, grad, vmap, ...) cannot be counted: join their points in one "
            "call, take the derivatives of others with torch.autograd.grad(..., create_graph=True), "
            "or call backward for each"
        )
    return [[recording] for recording in graph.transformed]


def number_further(groups: Sequence[Group]) -> None:
    """Samples of all groups one after the other, in the order in which the models were called.

    Raises:
        RuntimeError: if passes of a group have other numbers of samples.
    """
    for group in groups:
        if len({recording.size for recording in group}) > 1:
            raise RuntimeError(
                f"with forwards='further', models for {sorted({r.size or 0 for r in group})} samples "
                "depend on each other, so that these cannot be numbered; let one extended module do "
                "all of it"
            )
    groups = sorted(groups, key=lambda group: min(each.number for each in group))
    sizes = [group[0].size or 0 for group in groups]
    start = 0
    for group, size in zip(groups, sizes, strict=True):
        for recording in group:
            recording.put((start, sum(sizes)))
        start += size


def number_alike(groups: Sequence[Group]) -> None:
    """Each forward pass has its own samples, from the first on."""
    for group in groups:
        for recording in group:
            recording.put(None)


def refuse_open(roots: Sequence[Node], groups: Sequence[Group], graph: Graph) -> None:
    """Ask for what the user has not said, where it can mean either."""
    why = what_is_open(roots, groups, graph) if len(groups) > 1 else None
    if why is not None:
        sizes = ", ".join(str(group[0].size) for group in groups[:SHOWN])
        more = ", ..." if len(groups) > SHOWN else ""
        raise RuntimeError(
            f"the loss depends on {len(groups)} forward passes, of {sizes}{more} samples, and {why}: "
            "row n of each may be the same sample, or each pass may have samples of its own. Say "
            "which, backpack(..., forwards='same') or backpack(..., forwards='further')"
        )


def what_is_open(roots: Sequence[Node], groups: Sequence[Group], graph: Graph) -> str | None:
    """How rows of several groups may be the same samples or further ones, if they may."""
    rows = _Rows(roots, groups, graph)
    for node in rows.joins:
        if _joins_rows(node, groups, rows):
            return f"{_kind(node)} puts their rows beside each other"
        rows.meet(node)
    rows.unite_same_data()
    pair = _share_parameters(rows.united, graph)
    if pair is None:
        return None
    if all(each.size == 1 for each in pair):
        return "each has one row"
    return "row n of one never meets row n of another (their losses are added up, or all rows compared)"


def _share_parameters(groups: _Groups, graph: Graph) -> tuple[Recording, Recording] | None:
    """Forward passes of two groups that meet the same parameter."""
    first: dict[int, Recording] = {}
    for _, tap in graph.taps:
        here = groups.of.get(id(tap.recording))
        if here is None or tap.recording.size is None:
            continue
        for source in tap.sources:
            leaves = [source.leaf] if source.leaf is not None else leaves_below(source.edge)
            for leaf in leaves:
                other = first.setdefault(id(leaf), tap.recording)
                if groups.of[id(other)] is not here:
                    return other, tap.recording
    return None


class _Rows:
    """What lies above the outputs of the models: where rows of several groups come together."""

    def __init__(self, roots: Sequence[Node], groups: Sequence[Group], graph: Graph) -> None:
        self.all = groups
        self.groups = {id(each): j for j, group in enumerate(groups) for each in group}
        self.united = _Groups()
        for group in groups:
            for each in group:
                self.united.add(each)
                self.united.unite(group[0], each)
        self.outputs: dict[Node, list[ModelOutput]] = {}
        # Which groups a node depends on, and the model outputs.
        self.below: dict[Node, frozenset[int]] = {}
        self.joins: list[Node] = []
        # Derivatives of a model, inside of the loss.
        self.within = {node: tap.recording for node, tap in graph.taps if tap.within}
        for node in upwards(roots, self._enter):
            if node not in self.below:
                self._leave(node)

    def _enter(self, node: Node) -> list[Node]:
        borders = [each for each in _borders(node) if each.batch is not None]
        if borders:
            self.outputs[node] = borders
        met = [each.recording for each in borders or notes(node).get(TAPS, ())]
        if not met:
            return children_of(node)
        self.below[node] = self._groups_of(met)
        return []

    def _groups_of(self, met: Sequence[Recording]) -> frozenset[int]:
        return frozenset(self.groups[id(each)] for each in met if id(each) in self.groups)

    def _leave(self, node: Node) -> None:
        found = [self.below[child] for child, _ in node.next_functions if child is not None]
        if node in self.within:
            found.append(self._groups_of([self.within[node]]))
        self.below[node] = frozenset().union(*found)
        if len(set(found)) < 2 or len(self.below[node]) < 2:
            return
        if _kind(node) in _JOINS:
            self.joins.append(node)
        else:
            self.meet(node)

    def meet(self, node: Node) -> None:
        """If row ``n`` of a result is computed from row ``n`` of each group, these are one sample."""
        first, *others = (self.all[j][0] for j in self.below[node])
        apart = [each for each in others if self.united.of[id(each)] is not self.united.of[id(first)]]
        if apart and self._row_by_row(node, one_row=all(r.size == 1 for r in (first, *others))):
            for other in apart:
                self.united.unite(first, other)

    def _row_by_row(self, node: Node, one_row: bool) -> bool:
        """Whether a result has rows, each of which is computed from the same row of all groups."""
        edges = [GradientEdge(child, nr) for child, nr in node.next_functions if child is not None]
        edges = [edge for edge in edges if self.below[edge.node]]
        shapes = {len(edge.node._input_metadata[edge.output_nr].shape) for edge in edges}
        scalar = not any(len(about.shape) for about in node._input_metadata)
        if scalar and (_kind(node) not in _ENTRYWISE or shapes == {0}):
            return False
        seen = {self.groups[id(b.recording)] for _, b in self.outputs_below(node)}
        # Of one sample, everything is row 0. What comes from inside of a model, as its derivatives do,
        # tells nothing about its rows here.
        if one_row or seen != self.below[node]:
            return True
        if _kind(node) in _ENTRYWISE:
            axes = {axis_at(edge, self.placed_below(edge.node)) for edge in edges}
            if scalar or (len(shapes) == len(axes) == 1 and all(axis is not None for axis in axes)):
                return len(axes) == 1 and all(axis is not None and not axis.lost for axis in axes)
        places = self.placed_below(node)
        found = [axis_at(GradientEdge(node, j), places) for j in range(len(node._input_metadata))]
        return any(axis is not None and not axis.lost for axis in found)

    def unite_same_data(self) -> None:
        """Calls with the very same tensors, unchanged since, are about the same samples."""
        seen: dict[tuple[int, ...], Recording] = {}
        for group in self.all:
            for each in group:
                tensors = each.same_data()
                if tensors:
                    self.united.unite(seen.setdefault(tensors, each), each)

    def placed_below(self, node: Node) -> list[tuple[GradientEdge, SampleAxis]]:
        """The model outputs below, with their axes."""
        below = [(GradientEdge(n, b.place), b.batch) for n, b in self.outputs_below(node)]
        return [(edge, axis) for edge, axis in below if axis is not None]

    def outputs_below(self, node: Node) -> list[tuple[Node, ModelOutput]]:

        def further(here: Node) -> list[Node]:
            ends = here in self.outputs
            return [] if ends else [child for child in children_of(here) if self.below.get(child)]

        return [(here, b) for here in walk([node], further) for b in self.outputs.get(here, ())]


def _joins_rows(node: Node, groups: Sequence[Group], rows: _Rows) -> bool:
    """Whether all rows of a result are rows of one sample each, if groups have samples of their own."""
    if _kind(node) in ("Cat", "Stack") and all(group[0].size == 1 for group in groups):
        # Of one sample all axes are as good as another.
        dim, shape = node._saved_dim, node._input_metadata[0].shape  # type: ignore[attr-defined]
        dim = dim - 2**64 if dim >= 2**63 else dim
        return dim % len(shape) == groups[0][0].batch_dim
    number_further(groups)
    try:
        axis = axis_at(GradientEdge(node, 0), rows.placed_below(node))
    finally:
        number_alike(groups)
    return axis is not None and not axis.lost
