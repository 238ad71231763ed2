"""The nodes below a loss that contains derivatives of a model, and what they depend on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from backpack._torch import leaf_of
from backpack.graph.nodes import PRODUCTS, children_of, is_linear, kind_of, upwards, walk
from backpack.graph.taps import TAPS, Recording, notes
from backpack.graph.transformed import differentiated, transformed
from backpack.samples.axis import MARK, SampleAxis, regular_axis

# Products, and the place of the first of the two among their arguments.
_PRODUCTS_OF_DATA = {"Mm": 0, "Bmm": 0, "Addmm": 1, "Baddbmm": 1, "Convolution": 0, "Mul": 0, "Div": 0}
# Rows of a table, picked by data.
_LOOKUPS = frozenset({"Embedding", "Index", "IndexSelect", "Gather"})
# A forward pass, by its place among those of the region, and a sample axis of it; or all, and an axis
# of all samples.
ALL = -1
Candidate = tuple[int, SampleAxis]


def _below(node: Node) -> list[Node]:
    """The nodes to go on to: at a tap those of the data."""
    taps = notes(node).get(TAPS)
    return [below for tap in taps for below in tap.inputs] if taps else children_of(node)


class Region:
    """What the nodes below the roots depend on.

    Attributes:
        order: all of them, those below first.
        index: their numbers in that order.
        shared: nodes through which taps reach parameters, which are their business.
        own: parameters that a node reaches other than through a tap.
        taps: the first taps below a node, its own if it has any, and other products of data.
        numbers: which outputs of a node are used.
        recordings: forward passes that number samples in ways of their own, and those below.
        transformed: those that nobody has seen, as far as is known of them.
    """

    def __init__(self, roots: Sequence[GradientEdge]) -> None:
        self.own: dict[Node, frozenset[Tensor]] = {}
        self.taps: dict[Node, frozenset[Node]] = {}
        self.numbers: dict[Node, set[int]] = {}
        for root in roots:
            self.numbers.setdefault(root.node, set()).add(root.output_nr)
        self.order = upwards((root.node for root in roots), _below)
        self.index = {node: j for j, node in enumerate(self.order)}
        self.inputs = _inputs(self.order)
        self.shared = _of_taps(self.order)
        for node in self.order:
            self._enter(node)
        found = {
            (tap.recording.size, tap.recording.place): tap.recording
            for node in self.order
            for tap in notes(node).get(TAPS, ())
        }
        self.recordings: list[Recording] = list(found.values())
        leaves = set[Tensor]().union(*self.own.values())
        passes = [p for leaf in leaves for p in (*transformed(leaf), *differentiated(leaf))]
        counted = any(recording.place is not None for recording in self.recordings)
        self.transformed = list({id(p): p for p in passes}.values())
        # Where samples are counted over several passes, those that are not cannot be among them.
        self.transformed = [p for p in self.transformed if not counted or p.place is not None]
        self.recordings += self.transformed
        for node in self.order:
            if TAPS not in notes(node):
                below = (self.taps[child] for child in children_of(node))
                self.taps[node] = frozenset([node] if self._product(node) else ()).union(*below)

    def _enter(self, node: Node) -> None:
        leaf = leaf_of(node)
        if TAPS in notes(node):
            self.own[node], self.taps[node] = frozenset(), frozenset([node])
            direct = dict(node.next_functions)
            for below in _below(node):
                self.numbers.setdefault(below, set()).add(direct.get(below, 0))
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

    def among_all(self, candidate: Candidate) -> SampleAxis:
        """An axis as one of the samples of all forward passes."""
        j, axis = candidate
        return axis if j == ALL else self.recordings[j].among_all(axis)

    def _product(self, node: Node) -> bool:
        """Whether parameters are multiplied with a constant that may have rows for the samples.

        Ones, in the derivative of a sum; the input of a forward pass inside of a transform.
        """
        kind = kind_of(node)
        if kind in _LOOKUPS and self.own[node]:
            return any(map(transformed, self.own[node]))
        if kind not in _PRODUCTS_OF_DATA or not self.own[node]:
            return False
        first = _PRODUCTS_OF_DATA[kind]
        children = [child for child, _ in node.next_functions[first : first + 2]]
        constant = [i for i, child in enumerate(children) if child is None]
        if len(children) < 2 or not constant:
            return False
        unseen = any(map(transformed, self.own[node]))
        if kind not in ("Mul", "Div"):
            return unseen or any(True for _ in self.axes(shape_at(node, 0)))
        other: Any = node._saved_other if constant[0] else node._saved_self  # type: ignore[attr-defined]
        return unseen and other is not None and other.numel() > 1

    def bends(self, node: Node) -> bool:
        """Whether an operation is no linear function of data and parameters."""
        kind = kind_of(node)
        if is_linear(node):
            return False
        data = [c is not None and bool(self.taps[c] or self.own[c]) for c, _ in node.next_functions]
        return kind not in PRODUCTS or sum(data) > 1 or (kind == "Div" and not data[0])

    def axes(self, shape: Sequence[int]) -> Iterator[Candidate]:
        """Sample axes that a tensor of that shape may have."""
        for j, recording in enumerate(self.recordings):
            size = recording.size or 0
            for dim, length in enumerate(shape):
                if length and size and length % size == 0:
                    for outer, inner in dict.fromkeys(((1, length // size), (length // size, 1))):
                        yield j, regular_axis(size, dim, outer, inner)


def _inputs(nodes: Sequence[Node]) -> set[Tensor]:
    """Inputs of the models that require grad, and what these were made from: data, no parameters.

    So are data that a forward pass has made leaves, to differentiate with respect to them.
    """
    taps = [tap for node in nodes for tap in notes(node).get(TAPS, ())]
    entries = set[Node]().union(*(tap.recording.entries for tap in taps))
    leaves = [leaf_of(node) for node in walk(entries, _below)]
    data = {leaf for leaf in leaves if leaf is not None and not isinstance(leaf, nn.Parameter)}
    return data | {leaf for node in nodes if hasattr(leaf := leaf_of(node), MARK)}


def _of_taps(nodes: Sequence[Node]) -> set[Node]:
    """Nodes between taps and their parameters."""
    found = set[Node]()
    for node in nodes:
        taps = notes(node).get(TAPS)
        if taps:
            data = {below for tap in taps for below in tap.inputs}
            stack = [child for child in children_of(node) if child not in data]
            while stack:
                here = stack.pop()
                if here not in found:
                    found.add(here)
                    stack += [child for child in children_of(here) if child not in data]
    return found


def shape_at(node: Node, number: int) -> torch.Size:
    """The shape of an output of a node."""
    return torch.Size(node._input_metadata[number].shape)
