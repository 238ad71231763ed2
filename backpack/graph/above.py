"""Parameters above a model's outputs, between these and the loss: a temperature, prototypes, a head.

Nobody sees the operations there. When backward starts they are read from the graph: where a tensor made
from parameters only meets what depends on a model's output there is a tap, if the samples are apart in
the result. What is added to the loss without meeting data (weight decay) is no use of that kind: no
sample's share depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack._torch import leaf_of
from backpack.graph.node_rules import source_of
from backpack.graph.nodes import PRODUCTS, children_of, is_linear, kind_of, upwards, walk
from backpack.graph.outputs import ModelOutput
from backpack.graph.recognised import outputs_at
from backpack.graph.taps import TAPS, Tap, notes
from backpack.graph.tracing import axis_at, cut
from backpack.samples.axis import SampleAxis, regular_axis
from backpack.samples.separability import generic

_CONVOLUTIONS = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}


class Above(NamedTuple):
    """What was found.

    Attributes:
        taps: taps, with their nodes.
        refused: parameters whose use cannot be one, with the operation and the reason.
        inner: whether parameters meet what lies inside of a model, by a derivative of it.
    """

    taps: list[tuple[Node, Tap]]
    refused: list[tuple[Tensor, str, str]]
    inner: bool = False


class _Walk:
    """What nodes between the roots and the model's outputs depend on."""

    def __init__(self, roots: Sequence[Node]) -> None:
        self.leaves: dict[Node, set[Tensor]] = {}
        self.model: dict[Node, bool] = {}
        self.numbers: dict[Node, set[int]] = {root: {0} for root in roots}
        self.outputs: dict[Node, list[ModelOutput]] = {}
        self.order: list[Node] = []  # those below first
        self.inner: set[Node] = set()  # which depend on the model's inside other than by its outputs
        for node in upwards(roots, self._enter):
            if node not in self.leaves:
                self._leave(node)

    def _enter(self, node: Node) -> list[Node]:
        """Note what ends the way down; the nodes to go on to elsewhere."""
        leaf, found = leaf_of(node), outputs_at(node)
        self.model[node] = bool(found) or TAPS in notes(node)
        if found:
            self.outputs[node] = found
        elif self.model[node]:
            self.inner.add(node)
        if self.model[node] or leaf is not None:
            self.leaves[node] = set() if leaf is None else {leaf}
            return []
        for child, number in node.next_functions:
            if child is not None:
                self.numbers.setdefault(child, set()).add(number)
        return children_of(node)

    def _leave(self, node: Node) -> None:
        children = children_of(node)
        self.leaves[node] = set().union(*(self.leaves[child] for child in children))
        self.model[node] = any(self.model[child] for child in children)
        if any(child in self.inner for child in children):
            self.inner.add(node)
        self.order.append(node)

    def meetings(self) -> dict[Node, list[int]]:
        """Nodes at which parameters meet data, with the places of what is made from parameters only."""
        bent: set[Node] = set()
        found: dict[Node, list[int]] = {}
        for node in reversed(self.order):
            if not self.model[node]:
                continue
            kind = kind_of(node)
            children = [child for child, _ in node.next_functions]
            for i, child in enumerate(children):
                if child is None:
                    continue
                others = (c for j, c in enumerate(children) if j != i and c is not None)
                meets = not is_linear(node) and (
                    kind not in PRODUCTS or any(self.model[other] for other in others)
                )
                if node in bent or meets:
                    if self.leaves[child] and not self.model[child]:
                        found.setdefault(node, []).append(i)
                    bent.add(child)
        return found

    def inputs(self) -> set[Tensor]:
        """Inputs of the models that require grad."""
        recordings = {id(b.recording): b.recording for found in self.outputs.values() for b in found}
        entries = set[Node]().union(*(recording.entries for recording in recordings.values()))
        return {leaf for leaf in map(leaf_of, entries) if leaf is not None}

    def below(self, node: Node) -> list[tuple[Node, ModelOutput]]:
        """The model outputs that a node depends on."""

        def further(here: Node) -> list[Node]:
            return [] if here in self.outputs or not self.model.get(here) else children_of(here)

        return [(here, b) for here in walk([node], further) for b in self.outputs.get(here, ())]


def taps_above(roots: Sequence[Node]) -> Above:
    """The taps above the model's outputs, from where a backward pass starts."""
    walk, found = _Walk(roots), Above([], [])
    inputs, meetings = walk.inputs(), walk.meetings()
    if not walk.inner.isdisjoint(meetings):
        return Above([], [], True)
    for node, places in meetings.items():
        axis, why = _axis(walk, node)
        if axis is None:
            below = [walk.leaves[node.next_functions[i][0]] - inputs for i in places]  # type: ignore[index]
            found.refused.extend((p, node.name(), why) for p in set().union(*below))
            continue
        (number,) = walk.numbers[node]
        recording = walk.below(node)[0][1].recording
        own = [i for i in places if walk.leaves[node.next_functions[i][0]] - inputs]  # type: ignore[index]
        if not own:
            continue
        sources = [source_of(node, number, i, axis) for i in own]
        tap = Tap(node.name(), number, axis, (), recording, sources)
        tap.above = tap.by_node = True
        found.taps.append((node, tap))
    return found


def _axis(walk: _Walk, node: Node) -> tuple[SampleAxis | None, str]:
    borders = walk.below(node)
    if not borders:
        return None, "with data inside of the model, where backpack cannot see it"
    if len(walk.numbers[node]) > 1:
        return None, "in an operation of several results"
    (number,) = walk.numbers[node]
    sizes = {border.batch.size for _, border in borders if border.batch is not None}
    shape = node._input_metadata[number].shape
    if len(sizes) == 1 and prod(shape) == 0 and len(shape):
        return regular_axis(0), ""
    placed = [(GradientEdge(each, border.place), border.batch) for each, border in borders]
    axis = axis_at(GradientEdge(node, number), placed)  # type: ignore[arg-type]
    if axis is None or axis.lost:
        (size,) = sizes if len(sizes) == 1 else (0,)
        axis = (
            _by_scaling(GradientEdge(node, number), torch.Size(shape), placed, size) if size else None
        )
    if axis is None:
        return None, "where samples are summed up or mixed"
    return axis, ""


def _by_scaling(
    edge: GradientEdge, shape: torch.Size, outputs: Sequence[tuple[GradientEdge, Any]], size: int
) -> SampleAxis | None:
    """The axis whose rows depend on their own sample's outputs only, where torch cannot tell forwards.

    A cotangent with a factor for each sample must reach every output with the factor of its sample.
    """
    about = edge.node._input_metadata[edge.output_nr]
    weights = generic(shape, torch.empty(0, dtype=about.dtype, device=about.device))
    places = [place for place, _ in outputs]

    def pulled(cotangent: Tensor) -> list[Tensor | None]:
        with cut(place.node for place in places):
            return list(
                torch.autograd.grad([edge], places, [cotangent], retain_graph=True, allow_unused=True)
            )

    def scaled(axis: SampleAxis, x: Tensor) -> Tensor:
        factors = torch.pow(2.0, axis.sample_ids(x.device) * 7 % 13 - 6).to(x.dtype)
        return x * factors.reshape([-1 if d == axis.dim else 1 for d in range(x.dim())])

    plain = pulled(weights)
    for d, length in enumerate(shape):
        axis = regular_axis(size, d, 1, length // size) if length % size == 0 else None
        if axis is None or not length:
            continue
        pairs = zip(plain, pulled(scaled(axis, weights)), outputs, strict=True)
        known = [(a, b, own) for a, b, (_, own) in pairs if a is not None and b is not None]
        if known and all(torch.allclose(scaled(own, a), b, rtol=1e-3) for a, b, own in known):
            return axis
    return None
