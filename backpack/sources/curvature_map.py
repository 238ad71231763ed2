"""Which operations between loss and taps are curved, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.graph.nodes import (
    BATCH_NORMS,
    PRODUCTS,
    children_of,
    is_linear,
    kind_of,
    upwards,
    walk,
)
from backpack.graph.outputs import LossRecord, loss_at
from backpack.graph.taps import NONLINEAR, TAPS, notes
from backpack.samples.axis import SampleAxis
from backpack.sources.columns import Leaf


class CurvatureMap:
    """What lies between the starts and the taps.

    Attributes:
        losses: losses with a known Hessian, with their nodes.
        outputs: model outputs, with their sample axes.
        nonlinear: nodes that curve each entry by itself, with their sample axes.
        bent_above: nodes below such a node.
        curved_above: nodes below an operation that is curved in another way.
    """

    def __init__(
        self,
        starts: list[Node],
        outputs: Sequence[tuple[GradientEdge, SampleAxis]] = (),
        known: Mapping[Node, tuple[LossRecord, Any]] | None = None,
    ) -> None:
        self.known = known or {}
        self.losses: list[tuple[Node, LossRecord]] = []
        self.nonlinear: list[tuple[Node, SampleAxis]] = []
        self.bent_above: set[Node] = set()
        self.curved_above: set[Node] = set()
        order = self._order(starts)
        self.outputs = list(outputs)
        active: dict[Node, bool] = {}
        for node in reversed(order):
            children = self._children(node)
            active[node] = TAPS in notes(node) or any(active.get(c, False) for c in children)
        below_loss = {record.edge.node for _, record in self.losses}
        unknown_loss = not self.losses
        for node in order:
            if self._loss(node) is not None:
                curved = node in self.curved_above
                bent = False
            else:
                curved, bent = node in self.curved_above or unknown_loss, node in self.bent_above
                inputs = [c for c, _ in node.next_functions if c is not None and active.get(c)]
                if not curved and inputs:
                    kind = kind_of(node)
                    if NONLINEAR in notes(node) and len(inputs) == 1:
                        recording, axis = notes(node)[NONLINEAR]
                        self.nonlinear.append((node, recording.among_all(axis)))
                        bent = True
                    elif kind in PRODUCTS:
                        divides = kind == "Div" and node.next_functions[0][0] not in inputs
                        curved = len(inputs) > 1 or divides
                    elif kind in BATCH_NORMS:
                        curved = bool(getattr(node, "_saved_training", True))
                    elif not is_linear(node):
                        curved = True
            for child in self._children(node):
                if curved:
                    self.curved_above.add(child)
                if bent and child not in below_loss:
                    self.bent_above.add(child)

    def _loss(self, node: Node) -> LossRecord | None:
        """The loss that a node computes: noted there, or recognised."""
        return self.known[node][0] if node in self.known else loss_at(node)

    def _children(self, node: Node) -> list[Node]:
        record = self._loss(node)
        if record is not None:
            return [record.edge.node]
        return [child for child, _ in node.next_functions if child is not None]

    def _order(self, starts: list[Node]) -> list[Node]:
        """Nodes, each before those below it."""
        order = upwards(starts, self._children)[::-1]
        for node in order:
            record = self._loss(node)
            if record is not None:
                self.losses.append((node, record))
        return order

    def linear_in(self, leaf: Leaf) -> bool:
        """Whether a parameter enters linearly, and not on top of another use of it."""
        linear = all(s.linear and s.edge is None for _, _, s in leaf.uses)
        return linear and not (len(leaf.uses) > 1 and self.nested({node for node, _, _ in leaf.uses}))

    def enters_linearly(self, leaf: Leaf) -> bool:
        """Whether what meets data is linear in a parameter, and not on top of another use."""
        linear = all(s.linear for _, _, s in leaf.uses)
        linear &= all(_linear_below(s.edge.node, leaf) for _, _, s in leaf.uses if s.edge is not None)
        return linear and not (len(leaf.uses) > 1 and self.nested({node for node, _, _ in leaf.uses}))

    def nested(self, nodes: set[Node]) -> bool:
        """Whether one of the nodes lies below another."""
        return any(not nodes.isdisjoint(walk(children_of(node))) for node in nodes)

    def entries(self) -> int:
        """Curved entries per sample."""
        return sum(
            prod(node._input_metadata[0].shape) // max(batch.size, 1) for node, batch in self.nonlinear
        )


def _linear_below(node: Node, leaf: Leaf) -> bool:
    """Whether what is made from a parameter, and no data, is linear in it."""
    end = get_gradient_edge(leaf.parameter).node
    made = upwards([node])
    holds = {end}
    for each in made:  # each after those below it
        inputs = [child for child, _ in each.next_functions if child in holds]
        if each is end or not inputs:
            continue
        holds.add(each)
        kind = kind_of(each)
        product = kind in PRODUCTS and len(inputs) == 1
        if kind == "Div":
            product &= each.next_functions[0][0] in holds
        if not (is_linear(each) or product or kind == "Embedding"):
            return False
    return True
