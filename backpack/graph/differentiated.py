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

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack._torch import leaf_of
from backpack.graph.followed import Followed, follow, starts_of
from backpack.graph.node_rules import source_of
from backpack.graph.nodes import children_of, kind_of, walk
from backpack.graph.region import Region
from backpack.graph.scaling import Starts
from backpack.graph.taps import TAPS, Recording, Tap, notes

Refused = list[tuple[Tensor, str, str]]


class Differentiated(NamedTuple):
    """What was found.

    Attributes:
        taps: taps, with their nodes.
        refused: parameters whose use cannot be one, with the operation and the reason.
        region: the nodes below the roots.
        starts: where samples are last apart.
        coupled: whether that is below a curved operation, which couples samples.
        transformed: forward passes inside of transforms, of those that depend on no other.
    """

    taps: list[tuple[Node, Tap]]
    refused: Refused
    region: Region
    starts: Starts = ()
    coupled: bool = False
    transformed: Sequence[Recording] = ()


def taps_in_derivatives(roots: Sequence[GradientEdge], anew: bool = False) -> Differentiated:
    """The taps that no forward pass has noted, from where a backward pass starts.

    With ``anew`` samples are followed whatever is known of graphs of this kind.
    """
    region = Region(roots)
    known = follow(region, roots, anew)
    starts = starts_of(region, known)
    coupled = any(j in known.bent for j, _ in known.starts)
    unseen = [region.recordings[known.starts[place][0]] for place in known.unseen]  # type: ignore[index]
    found = Differentiated([], [], region, starts, coupled, unseen)
    if not starts:
        data = [node for node in region.order if region.taps[node]]
        every = {leaf for node in data for leaf in region.own[node]}
        found.refused.extend((leaf, "its use", "where samples are not apart") for leaf in every)
        return found
    apart = _apart(region, known)
    for node in region.order:
        if leaf_of(node) is None and TAPS not in notes(node) and region.own[node]:
            _look(region, known, apart, node, found)
    for j, number in known.mixed:
        for tap in notes(region.order[j])[TAPS]:
            if tap.place == number:
                why = "whose samples are mixed between it and the loss"
                leaves = [source.leaf for source in tap.sources if source.leaf is not None]
                found.refused.extend((leaf, tap.op, why) for leaf in leaves)
    return found


def _apart(region: Region, known: Followed) -> set[Node]:
    """Nodes at which samples are apart, and that are no part of what a tap is about as a whole.

    A tensor made from parameters only is a tap's, with all below it, where samples are not apart in it.
    """
    found = {region.order[j] for (j, _), axis in known.axes.items() if axis is not None}
    covered = region.shared
    while True:
        found = {node for node in found if region.taps[node] or node not in covered}
        uses = [node for node in region.order if region.taps[node] or node in found]
        whole = {child for node in uses if TAPS not in notes(node) for child in children_of(node)}
        whole = {child for child in whole if not region.taps[child] and child not in found}
        if whole <= covered:
            return found
        covered = covered.union(walk(whole))


def _look(region: Region, known: Followed, apart: set[Node], node: Node, found: Differentiated) -> None:
    """Note the taps at a node, or why there can be none."""
    places = [
        i
        for i, (child, _) in enumerate(node.next_functions)
        if child is not None and region.own[child] and not region.taps[child] and child not in apart
    ]
    if not places:
        return
    j, numbers = region.index[node], sorted(region.numbers[node])
    if not any((j, number) in known.arrived for number in numbers):
        # What is added to the loss without meeting data is no sample's.
        if region.taps[node] and (j in known.bent or region.bends(node)):
            _refuse(region, node, places, "where samples are summed up or mixed", found)
        return
    if not region.taps[node] and node not in apart:
        return  # made from parameters: what uses it is the tap
    for number in numbers:
        candidate = known.axes.get((j, number))
        if candidate is not None:
            axis = region.among_all(candidate)
            sources = [source_of(node, number, i, axis) for i in places]
            recording = region.recordings[candidate[0]]
            tap = Tap(kind_of(node), number, axis, (), recording, sources)
            tap.above = tap.within = True
            found.taps.append((node, tap))
        elif (j, number) in known.arrived:
            _refuse(region, node, places, "where samples are mixed, or on no axis", found)


def _refuse(region: Region, node: Node, places: Sequence[int], why: str, found: Differentiated) -> None:
    for i in places:
        child = node.next_functions[i][0]
        found.refused.extend((leaf, node.name(), why) for leaf in region.own[child])  # type: ignore[index]
