"""Each sample's own loss, read from the graph of the loss that was computed: no second loss is.

From the root down, operations are linear (sums, means, products with constants) until there is a node
whose result can be told from what autograd keeps: a loss function, a power, a logarithm of
probabilities. The gradient there weighs its entries, and each entry belongs to a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.own import Pass, SampleAxis, axis_at, kind_of, walk

_LINEAR = frozenset(
    """Add Sub Rsub Neg Mul Div Sum Mean View UnsafeView ReshapeAlias Expand Squeeze Unsqueeze Clone
    ToCopy Alias Select Slice""".split()
)
_SUMS = frozenset({"Add", "Sub", "Rsub"})


def _nll(n: Any) -> Tensor:
    return F.nll_loss(
        n._saved_self,
        n._saved_target,
        n._saved_weight,
        ignore_index=_signed(n._saved_ignore_index),
        reduction="none",
    )


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _bce_logits(n: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(
        n._saved_self,
        n._saved_target,
        n._saved_weight,
        pos_weight=n._saved_pos_weight,
        reduction="none",
    )


# The unreduced result of a node; for losses the reduction is left to their weights.
_LOSSES: dict[str, Callable[[Any], Tensor]] = {
    "NllLoss": _nll,
    "NllLoss2D": _nll,
    "MseLoss": lambda n: F.mse_loss(n._saved_self, n._saved_target, reduction="none"),
    "SmoothL1Loss": lambda n: F.smooth_l1_loss(
        n._saved_self, n._saved_target, reduction="none", beta=n._saved_beta
    ),
    "HuberLoss": lambda n: F.huber_loss(
        n._saved_self, n._saved_target, reduction="none", delta=n._saved_delta
    ),
    "BinaryCrossEntropy": lambda n: F.binary_cross_entropy(
        n._saved_self, n._saved_target, n._saved_weight, reduction="none"
    ),
    "BinaryCrossEntropyWithLogits": _bce_logits,
}
_VALUES: dict[str, Callable[[Any], Tensor]] = {
    "Pow": lambda n: n._saved_self**n._saved_exponent,
    "Abs": lambda n: n._saved_self.abs(),
    "Exp": lambda n: n._saved_result,
    "LogSoftmax": lambda n: n._saved_result,
    "Softmax": lambda n: n._saved_result,
    "Sigmoid": lambda n: n._saved_result,
    "Tanh": lambda n: n._saved_result,
    "Logsumexp": lambda n: n._saved_result,
    "LogSigmoid": lambda n: F.logsigmoid(n._saved_self),
    "Softplus": lambda n: F.softplus(n._saved_self, n._saved_beta, n._saved_threshold),
    "Square": lambda n: n._saved_self.square(),
}


class UnreadableError(Exception):
    """The graph of a loss does not tell each sample's own loss; the message says why."""


def individual_losses(given: Pass, samples: int) -> tuple[Tensor, bool]:
    """Each sample's share of the function that is differentiated, ``[N]``, in double precision.

    And whether there is a term without data besides (weight decay), which belongs to no sample.

    Args:
        given: the backward pass, before anything of it is freed.
        samples: number of samples.

    Raises:
        UnreadableError: if the graph does not tell.
    """
    if len(given.roots) != 1:
        raise UnreadableError("backward was called on several tensors at once")
    ((root, weight),) = given.roots
    total: Tensor | None = None
    found, rest = _parts(root.node, given)
    if not found:
        raise UnreadableError("no loss function was found between the model's output and the loss")
    edges = [GradientEdge(node, 0) for node in found]
    arriving: Sequence[Tensor | None] = [weight]
    if edges != [root]:
        arriving = torch.autograd.grad([root], edges, [weight], retain_graph=True, allow_unused=True)
    for node, edge, gradient in zip(found, edges, arriving, strict=True):
        if gradient is not None:
            shares = _shares(node, edge, gradient.detach(), given, samples)
            total = shares if total is None else total + shares
    if total is None:
        total = torch.zeros(samples, dtype=torch.float64, device=weight.device)
    return total, rest


def _parts(root: Node, given: Pass) -> tuple[list[Node], bool]:
    """Nodes of known value below linear operations, and whether there is a term without data."""
    found: list[Node] = []
    rest, seen, stack = False, set(), [root]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = kind_of(node)
        children = [child for child, _ in node.next_functions if child is not None]
        if kind in _LOSSES or (kind in _VALUES and _has_data(node, given)):
            found.append(node)
        elif not _has_data(node, given):
            rest = True
        elif kind in _LINEAR and _linear(kind, node, given):
            rest = rest or (kind in _SUMS and len(children) < 2)
            stack += children
        else:
            raise UnreadableError(f"the loss is made by an operation ({kind}) that keeps no values")
    return found, rest


def _linear(kind: str, node: Node, given: Pass) -> bool:
    """Whether an operation adds nothing of its own that depends on the sample."""
    with_data = [child is not None and _has_data(child, given) for child, _ in node.next_functions]
    if kind in ("Mul", "Div"):
        return sum(with_data) == 1 and (kind == "Mul" or with_data[0])
    if kind in _SUMS:
        # A constant that is no number may differ from sample to sample.
        shape = node._input_metadata[0].shape
        return all(with_data) or not len(shape) or len(node.next_functions) == 1
    return True


def _has_data(node: Node, given: Pass) -> bool:
    """Whether the model's results lie below a node."""
    stops = {edge.node for edge, _ in given.model_outputs} | {edge.node for edge in given.taps}
    return any(here in stops or here in given.graph.losses for here in walk([node]))


def _shares(node: Node, edge: GradientEdge, gradient: Tensor, given: Pass, samples: int) -> Tensor:
    kind = kind_of(node)
    with torch.no_grad():
        try:
            values = (_LOSSES.get(kind) or _VALUES[kind])(node).detach()
        except (AttributeError, RuntimeError, TypeError) as error:
            raise UnreadableError(f"what {kind} keeps cannot be read ({error})") from None
        weights = _weights(kind, node, gradient, values)
        axis = _axis(kind, node, edge, given, samples)
        if not axis.fits(values.shape):
            raise UnreadableError("samples of the loss are not where they are expected")
        shares = (values.double() * weights.double()).movedim(axis.dim, 0)
        shares = shares.flatten(1).sum(1) if shares.dim() > 1 else shares
        if axis.plain:
            return shares
        ids = axis.sample_ids(values.device)
        return shares.new_zeros(samples).index_add(0, ids, shares)


def _weights(kind: str, node: Any, gradient: Tensor, values: Tensor) -> Tensor:
    """The weight of each entry in the loss."""
    reduction = getattr(node, "_saved_reduction", 0) if kind in _LOSSES else 0
    if reduction == 0:
        return gradient
    if reduction == 2:
        return gradient.expand(values.shape)
    count: Any = values.numel()
    if kind.startswith("NllLoss"):
        count = node._saved_total_weight
    return (gradient / count).expand(values.shape)


def _below_softmax(place: GradientEdge) -> tuple[GradientEdge, set[int], bool]:
    """Where probabilities come from, and the axes over which they add up to one.

    And whether there are views in between that keep the first axis, as torch's of positions: the axis
    of samples is the same then if it is the first.
    """
    dims: set[int] = set()
    viewed = False
    while True:
        node: Any = place.node
        shape = node._input_metadata[0].shape
        if kind_of(node) in ("LogSoftmax", "Softmax"):
            dims.add(_signed(node._saved_dim) % len(shape))
        elif kind_of(node) in ("View", "UnsafeView") and shape[:1] == _shape_below(node)[:1]:
            viewed = True
        else:
            return place, dims, viewed
        place = GradientEdge(*node.next_functions[0])


def _shape_below(node: Any) -> torch.Size:
    below, number = node.next_functions[0]
    return below._input_metadata[number].shape


def _axis(kind: str, node: Node, edge: GradientEdge, given: Pass, samples: int) -> SampleAxis:
    """Where samples are in the unreduced result."""
    place = edge
    reduced = kind in _LOSSES and not len(node._input_metadata[0].shape)
    if kind in _LOSSES and (reduced or kind.startswith("NllLoss")):
        below, number = node.next_functions[0]
        assert below is not None
        place = GradientEdge(below, number)
    axis: SampleAxis | None = None
    record = given.graph.losses.get(node)
    if record is not None and record[0].axis is not None and record[0].axis.lost is None:
        axis = record[0].axis
    if axis is None or axis.size != samples:
        outputs = given.model_outputs
        below_softmax, normalised, viewed = _below_softmax(place)
        axis = axis_at(below_softmax, outputs) if outputs else None
        if viewed and (axis is None or axis.lost or axis.dim or axis.outer * axis.inner != 1):
            axis = axis_at(place, outputs) if outputs else None
        if axis is not None and not axis.lost and axis.dim in normalised:
            axis = None
    if axis is None or axis.lost or axis.size != samples:
        raise UnreadableError("it is not known which rows of the loss belong to which sample")
    if kind.startswith("NllLoss") and axis.dim:
        raise UnreadableError("samples are not on the first axis of the loss")
    return axis
