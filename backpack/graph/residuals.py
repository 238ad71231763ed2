"""Losses of residuals that contain derivatives of a model: what their Hessian is taken in.

Of ``sum_n l(r_n)`` with ``r_n`` a function of the model and its derivatives, the generalized
Gauss-Newton is ``sum_n J_n^T l''(r_n) J_n`` with the Jacobian of the residual in the parameters: ``l``
is the outermost curved operation that has a rule (a square, ``mse_loss``, ...), and ``r_n`` its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch.autograd.graph import GradientEdge, Node

from backpack.graph.differentiated import Differentiated
from backpack.graph.followed import axis_named
from backpack.graph.nodes import children_of
from backpack.graph.outputs import LossRecord, ModelOutput
from backpack.graph.recognised import outputs_at, recognised
from backpack.graph.taps import LOSS, TAPS, notes

Losses = dict[Node, tuple[LossRecord, dict[Node, list[ModelOutput]]]]


class Residuals(NamedTuple):
    """What was found.

    Attributes:
        losses: losses with a known Hessian, with their nodes, as :class:`~backpack.graph.survey.Graph`
            has them.
        bent_by: a curved operation above the residuals that has no rule.
    """

    losses: Losses
    bent_by: str | None


def residuals(found: Differentiated, roots: Sequence[GradientEdge]) -> Residuals:
    """The losses below the roots of a backward pass whose graph contains derivatives of a model.

    What the roots are linear in, down to a model's output or an operation with a parameter, adds none.
    """
    region, ends = found.region, {node for node, _ in found.taps}
    losses: Losses = {}
    stack, seen = [root.node for root in roots], set[Node]()
    while stack:
        node = stack.pop()
        if node in seen or not region.taps[node] or node in ends or TAPS in notes(node):
            continue
        seen.add(node)
        record = notes(node).get(LOSS) or recognised(node)
        if record is not None and region.taps[record.edge.node]:
            record.locate(axis_named(region, record.edge))
            if record.known is not None:
                losses[node] = record, {}
                continue
        if outputs_at(node):
            continue
        if region.bends(node):
            return Residuals({}, node.name())
        stack += children_of(node)
    return Residuals(losses, None)
