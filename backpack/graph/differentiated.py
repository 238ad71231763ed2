"""Parameters in derivatives of a model that the loss contains: ``grad(..., create_graph=True)``.

The graph of a derivative reaches into the model's own graph, and uses its parameters again, in
operations that nobody has seen: those of a backward pass. Where samples are is found from above.
First, where they are last apart below the loss: rows there are named after those of the model's taps on
which they depend. From there a cotangent is pulled through the graph twice, the second time multiplied
by a number of its own for each sample; a row that comes out multiplied by it belongs to that sample. A
tap is an operation at which samples are apart, while in what it uses of a parameter they are not.

Anything else that uses what lies inside of a model is followed in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from backpack._torch import leaf_of
from backpack.graph.node_rules import source_of
from backpack.graph.nodes import LINEAR, PRODUCTS, children_of, kind_of, upwards, walk
from backpack.graph.scaling import Starts, agree, along, powers, pulled
from backpack.graph.taps import TAPS, Recording, Tap, notes
from backpack.graph.transformed import transformed
from backpack.samples.axis import MARK, SampleAxis, regular_axis

# Products, and the place of the first of the two among their arguments.
_PRODUCTS_OF_DATA = {"Mm": 0, "Bmm": 0, "Addmm": 1, "Baddbmm": 1, "Convolution": 0, "Mul": 0, "Div": 0}
Refused = list[tuple[Tensor, str, str]]
Key = tuple[Node, int]


def _below(node: Node) -> list[Node]:
    """The nodes to go on to: at a tap those of the data."""
    taps = notes(node).get(TAPS)
    return [below for tap in taps for below in tap.inputs] if taps else children_of(node)


class Region:
    """What the nodes below the roots depend on.

    Attributes:
        own: parameters that a node reaches other than through a tap.
        taps: the first taps below a node, its own if it has any, and other products of data.
        numbers: which outputs of a node are used.
        recordings: forward passes that number samples in ways of their own.
        transformed: passes inside of transforms, by their ids.
    """

    def __init__(self, roots: Sequence[GradientEdge]) -> None:
        self.own: dict[Node, frozenset[Tensor]] = {}
        self.taps: dict[Node, frozenset[Node]] = {}
        self.numbers: dict[Node, set[int]] = {}
        for root in roots:
            self.numbers.setdefault(root.node, set()).add(root.output_nr)
        self.order = upwards((root.node for root in roots), _below)
        self.inputs = _inputs(self.order)
        for node in self.order:
            self._enter(node)
        found = {
            (tap.recording.size, tap.recording.place): tap.recording
            for node in self.order
            for tap in notes(node).get(TAPS, ())
        }
        passes = (transformed(leaf) for leaf in set[Tensor]().union(*self.own.values()))
        self.transformed = {id(each): each for each in passes if each is not None}
        if any(recording.place is not None for recording in found.values()):
            self.transformed = {}  # whose samples cannot be among those of all passes
        found |= {(each.size, None): each for each in self.transformed.values()}
        self.recordings: list[Recording] = list(found.values())
        for node in self.order:
            if TAPS not in notes(node):
                below = (self.taps[child] for child in children_of(node))
                self.taps[node] = frozenset([node] if self._product(node) else ()).union(*below)

    def _enter(self, node: Node) -> None:
        leaf = leaf_of(node)
        if TAPS in notes(node):
            self.own[node], self.taps[node] = frozenset(), frozenset([node])
        elif leaf is not None:
            self.own[node] = frozenset() if leaf in self.inputs else frozenset([leaf])
            self.taps[node] = frozenset()
        else:
            children = children_of(node)
            self.own[node] = frozenset().union(*(self.own[child] for child in children))
            self.taps[node] = frozenset()
            for child, number in node.next_functions:
                if child is not None:
                    self.numbers.setdefault(child, set()).add(number)

    def _product(self, node: Node) -> bool:
        """Whether parameters are multiplied with a constant that may have rows for the samples.

        Ones, in the derivative of a sum; the input of a forward pass inside of a transform.
        """
        kind = kind_of(node)
        if kind not in _PRODUCTS_OF_DATA or not self.own[node]:
            return False
        first = _PRODUCTS_OF_DATA[kind]
        children = [child for child, _ in node.next_functions[first : first + 2]]
        constant = [i for i, child in enumerate(children) if child is None]
        if len(children) < 2 or not constant:
            return False
        unseen = any(map(transformed, self.own[node]))
        if kind not in ("Mul", "Div"):
            return unseen or any(True for _ in self.axes(_shape(node, 0)))
        other: Any = node._saved_other if constant[0] else node._saved_self  # type: ignore[attr-defined]
        return unseen and other is not None and other.numel() > 1

    def bends(self, node: Node) -> bool:
        """Whether an operation is no linear function of data and parameters."""
        kind = kind_of(node)
        if kind in LINEAR:
            return False
        data = [c is not None and bool(self.taps[c] or self.own[c]) for c, _ in node.next_functions]
        return kind not in PRODUCTS or sum(data) > 1 or (kind == "Div" and not data[0])

    def axes(self, shape: Sequence[int]) -> Iterator[SampleAxis]:
        """Sample axes that a tensor of that shape may have."""
        for recording in self.recordings:
            size = recording.size or 0
            for dim, length in enumerate(shape):
                if length and size and length % size == 0:
                    for outer, inner in dict.fromkeys(((1, length // size), (length // size, 1))):
                        yield recording.among_all(regular_axis(size, dim, outer, inner))


def _inputs(nodes: Sequence[Node]) -> set[Tensor]:
    """Inputs of the models that require grad, and what these were made from: data, no parameters.

    So are data that a forward pass has made leaves, to differentiate with respect to them.
    """
    taps = [tap for node in nodes for tap in notes(node).get(TAPS, ())]
    entries = set[Node]().union(*(tap.recording.entries for tap in taps))
    leaves = [leaf_of(node) for node in walk(entries, _below)]
    data = {leaf for leaf in leaves if leaf is not None and not isinstance(leaf, nn.Parameter)}
    return data | {leaf for node in nodes if hasattr(leaf := leaf_of(node), MARK)}


def _shape(node: Node, number: int) -> torch.Size:
    return torch.Size(node._input_metadata[number].shape)


class Differentiated(NamedTuple):
    """What was found.

    Attributes:
        taps: taps, with their nodes.
        refused: parameters whose use cannot be one, with the operation and the reason.
        region: the nodes below the roots.
        starts: where samples are last apart.
        coupled: whether that is below a curved operation, which couples samples.
    """

    taps: list[tuple[Node, Tap]]
    refused: Refused
    region: Region
    starts: Starts = ()
    coupled: bool = False


def taps_in_derivatives(roots: Sequence[GradientEdge]) -> Differentiated:
    """The taps that no forward pass has noted, from where a backward pass starts."""
    region = Region(roots)
    found = Differentiated([], [], region)
    starts, bent = _starts(region, roots)
    # Gradients there: at what reaches parameters by itself, and at all taps.
    places = [
        (node, number)
        for node in region.order
        if leaf_of(node) is None and (region.own[node] or TAPS in notes(node))
        for number in sorted(region.numbers.get(node, ()))
    ]
    if not starts:
        every = {leaf for node in region.order for leaf in region.own[node]}
        found.refused.extend((leaf, "its use", "where samples are not apart") for leaf in every)
        return found
    edges = [GradientEdge(*place) for place in places]
    plain = dict(zip(places, pulled(starts, edges, None), strict=True))
    scaled = dict(zip(places, pulled(starts, edges, powers), strict=True))
    axes = _Axes(region, plain, scaled)
    for node in region.order:
        if leaf_of(node) is not None or TAPS in notes(node) or not region.own[node]:
            continue
        _look(region, axes, node, node in bent, found)
    _check(region, plain, scaled, found)
    coupled = any(edge.node in bent for edge, _ in starts)
    return found._replace(starts=starts, coupled=coupled)


class _Axes:
    """Sample axes of places in the graph, from how cotangents arrive there."""

    def __init__(
        self, region: Region, plain: dict[Key, Tensor | None], scaled: dict[Key, Tensor | None]
    ) -> None:
        self.region, self.plain, self.scaled = region, plain, scaled
        self.known: dict[Key, SampleAxis | None] = {}

    def reached(self, node: Node) -> bool:
        """Whether a node lies below the places at which samples are last apart."""
        return any(self.plain.get((node, k)) is not None for k in self.region.numbers.get(node, ()))

    def at(self, node: Node, number: int) -> SampleAxis | None:
        """The axis; ``None`` if samples are not apart there."""
        key = node, number
        if key not in self.known:
            self.known[key] = self._found(key)
        return self.known[key]

    def _found(self, key: Key) -> SampleAxis | None:
        before, after = self.plain.get(key), self.scaled.get(key)
        if before is None or after is None:
            return None
        constant = not self.region.taps[key[0]]
        if constant and (max(r.size or 0 for r in self.region.recordings) <= 1 or not before.any()):
            return None  # made from parameters only, of whose entries nothing tells that they are rows
        for axis in self.region.axes(before.shape):
            if agree(before, after, along(axis, before, powers)):
                return axis
        return None

    def apart(self, node: Node) -> bool:
        """Whether samples are apart in what a parameter (or what is made from some) is used for."""
        if leaf_of(node) is not None:
            return False
        return any(self.at(node, number) is not None for number in self.region.numbers[node])


def _starts(region: Region, roots: Sequence[GradientEdge]) -> tuple[Starts, set[Node]]:
    """Where samples are last apart, on every way down from the roots; curved ways to there."""
    found: dict[Key, tuple[GradientEdge, SampleAxis]] = {}
    stack, seen, bent = [(root, False) for root in roots], set[tuple[Key, bool]](), set[Node]()
    while stack:
        edge, curved = stack.pop()
        node, key = edge.node, (edge.node, edge.output_nr)
        if (key, curved) in seen or not region.taps[node]:
            continue
        seen.add((key, curved))
        if curved:
            bent.add(node)
        taps = [tap for tap in notes(node).get(TAPS, ()) if tap.place == edge.output_nr]
        axis = taps[0].batch if taps and not taps[0].batch.lost else None
        if key not in found and TAPS not in notes(node):
            axis = named(region, edge)
        if axis is not None:
            found[key] = edge, axis
        elif key not in found and TAPS not in notes(node):
            curved = curved or region.bends(node)
            below = [(child, nr) for child, nr in node.next_functions if child is not None]
            stack += [(GradientEdge(*each), curved) for each in below]
    return list(found.values()), bent


def named(region: Region, edge: GradientEdge) -> SampleAxis | None:
    """The axis on which a tensor's rows depend on rows of the same samples at all taps below.

    At a product with constants these may be on any axis.
    """
    shape = _shape(edge.node, edge.output_nr)
    candidates = list(region.axes(shape)) if prod(shape) else []
    places: list[tuple[GradientEdge, list[SampleAxis]]] = []
    for node in region.taps[edge.node]:
        taps = [tap for tap in notes(node).get(TAPS, ()) if not tap.batch.lost]
        places += [(GradientEdge(node, tap.place), [tap.batch]) for tap in taps]
        if TAPS not in notes(node):
            places.append((GradientEdge(node, 0), list(region.axes(_shape(node, 0)))))
    if not candidates or not places:
        return None
    targets = [place for place, _ in places]
    plain = pulled([(edge, candidates[0])], targets, None)
    for axis in candidates:
        scaled = pulled([(edge, axis)], targets, powers)
        reached = [
            any(agree(before, after, along(own, before, powers)) for own in axes)
            for before, after, (_, axes) in zip(plain, scaled, places, strict=True)
            if before is not None and after is not None
        ]
        if reached and all(reached):
            return axis
    return None


def _look(region: Region, axes: _Axes, node: Node, bent: bool, found: Differentiated) -> None:
    """Note the taps at a node, or why there can be none."""
    places = [
        i
        for i, (child, _) in enumerate(node.next_functions)
        if child is not None and region.own[child] and not region.taps[child] and not axes.apart(child)
    ]
    if not places:
        return
    if not axes.reached(node):
        # What is added to the loss without meeting data is no sample's.
        if region.taps[node] and (bent or region.bends(node)):
            _refuse(region, node, places, "where samples are summed up or mixed", found)
        return
    if not region.taps[node] and not axes.apart(node):
        return  # made from parameters: what uses it is the tap
    for number in sorted(region.numbers[node]):
        axis = axes.at(node, number)
        if axis is None and axes.plain[node, number] is not None:
            _refuse(region, node, places, "where samples are mixed, or on no axis", found)
        elif axis is not None:
            sources = [source_of(node, number, i, axis) for i in places]
            tap = Tap(kind_of(node), number, axis, (), region.recordings[0], sources)
            tap.above = tap.within = True
            found.taps.append((node, tap))


def _check(
    region: Region,
    plain: dict[Key, Tensor | None],
    scaled: dict[Key, Tensor | None],
    found: Differentiated,
) -> None:
    """Samples are apart at the model's own taps."""
    for (node, number), before in plain.items():
        after = scaled[node, number]
        for tap in notes(node).get(TAPS, ()):
            if tap.place != number or tap.batch.lost or before is None or after is None:
                continue
            if not agree(before, after, along(tap.batch, before, powers)):
                leaves = [source.leaf for source in tap.sources if source.leaf is not None]
                why = "whose samples are mixed between it and the loss"
                found.refused.extend((leaf, tap.op, why) for leaf in leaves)


def _refuse(region: Region, node: Node, places: Sequence[int], why: str, found: Differentiated) -> None:
    for i in places:
        child = node.next_functions[i][0]
        found.refused.extend((leaf, node.name(), why) for leaf in region.own[child])  # type: ignore[index]
