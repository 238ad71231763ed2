"""Losses with a rule: those that were noted, and those that are recognised on the graph.

A loss that is not extended and called outside of a model is noted by nobody; so are some in its head.

Autograd's nodes keep what a rule asks for. Two kinds are known:

* ``log_softmax``, with nothing but linear operations above: cross-entropy in all spellings (class
  weights, ``ignore_index``, smoothed and soft labels, distillation, sums over tokens). Of a loss
  ``sum_c g_c log p_c`` the Hessian in the logits is ``w (diag(p) - p p^T)`` with ``w = -sum_c g_c``:
  all that differs between the spellings is in the gradient ``g`` that arrives. Targets and weights are
  not needed.
* losses and functions of single entries. Torch's losses have the rules that they have when they are
  extended; for the others ``phi''(f) g`` is found by differentiating that one operation twice.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.graph.nodes import PRODUCTS, children_of, is_linear, kind_of, walk
from backpack.graph.outputs import LossRecord, ModelOutput
from backpack.graph.taps import LOSS, MODEL_OUTPUT, TAPS, notes
from backpack.graph.tracing import axis_at
from backpack.losses.base import LOSSES, LossHessian
from backpack.losses.elementwise import elementwise
from backpack.losses.softmax import softmax
from backpack.samples.axis import SampleAxis

_REDUCTIONS = ("none", "mean", "sum")
# Torch's losses of single entries: the function, and what nodes keep of its further arguments.
_LOSSES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "MseLoss": (F.mse_loss, ()),
    "HuberLoss": (F.huber_loss, ("delta",)),
    "SmoothL1Loss": (F.smooth_l1_loss, ("beta",)),
    "SoftMarginLoss": (F.soft_margin_loss, ()),
    "BinaryCrossEntropy": (F.binary_cross_entropy, ("weight",)),
    "BinaryCrossEntropyWithLogits": (F.binary_cross_entropy_with_logits, ("weight", "pos_weight")),
}
# Losses whose model output and target may change places.
_SYMMETRIC = frozenset({"MseLoss", "HuberLoss", "SmoothL1Loss"})
# Functions of single entries that losses are written with.
_ENTRIES = frozenset("Mul Pow Exp Log Softplus LogSigmoid Cosh Logcosh".split())


def recognised(node: Node) -> LossRecord | None:
    """The loss whose last curved operation a node is; ``None`` if it is none of those above."""
    kind = kind_of(node)
    if kind not in _LOSSES and kind not in _ENTRIES and kind not in ("LogSoftmax", "Logsumexp"):
        return None
    children = [(child, nr) for child, nr in node.next_functions if child is not None]
    if kind == "Mul":  # of a tensor with itself
        children = children[:1] if len(children) == 2 and children[0] == children[1] else []
    if len(children) != 1:
        return None
    edge = GradientEdge(*children[0])
    about = edge.node._input_metadata[edge.output_nr]
    if about.dtype.is_complex:
        return None
    if kind == "LogSoftmax":
        return _softmax(node, edge, node._saved_result, -1.0, about.device.type)  # type: ignore[attr-defined]
    if kind == "Logsumexp":
        return _logsumexp(node, edge, about.device.type)
    if kind in _LOSSES and node.next_functions[0][0] is None and kind not in _SYMMETRIC:
        return None
    if _is_of_logits(node):
        return _of_logits(node, edge.node)
    if kind in _ENTRIES and torch.Size(about.shape) != torch.Size(node._input_metadata[0].shape):
        return None
    return _of_entries(node, kind, edge, about)


def _widened(x: Any) -> Any:
    half = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if half else x


def _softmax(node: Any, edge: GradientEdge, f: Tensor, sign: float, device: str) -> LossRecord:
    dim = _signed(node._saved_dim) % max(f.dim(), 1)

    def rule(axis: SampleAxis) -> LossHessian | None:
        # Over the axis of the samples they are mixed.
        return None if not f.dim() or axis.dim == dim else softmax(_widened(f), axis, dim)

    def weigh(g: Tensor) -> Tensor:
        return sign * _widened(g).sum(dim, keepdim=True)

    return LossRecord(rule, edge, None, None, device, weigh)


def _logsumexp(node: Any, edge: GradientEdge, device: str) -> LossRecord | None:
    dims, f = node._saved_dim, node._saved_self
    if len(dims) != 1 or not f.dim():
        return None
    dim = _signed(dims[0]) % f.dim()

    def rule(axis: SampleAxis) -> LossHessian | None:
        return None if axis.dim == dim else softmax(_widened(f), axis, dim)

    def weigh(g: Tensor) -> Tensor:
        return _widened(g) if node._saved_keepdim else _widened(g).unsqueeze(dim)

    return LossRecord(rule, edge, None, None, device, weigh)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _of_entries(node: Any, kind: str, edge: GradientEdge, about: Any) -> LossRecord:
    zeros = torch.zeros((), dtype=about.dtype, device=about.device).expand(about.shape)
    by_rule: list[bool] = []

    def rule(axis: SampleAxis) -> LossHessian | None:
        found = _by_rule(node, kind, axis) if kind in _LOSSES else None
        by_rule[:] = [found is not None]
        if found is not None:
            return found
        return elementwise(_widened(zeros), axis, torch.ones_like)

    def weigh(g: Tensor) -> Tensor:
        if by_rule == [True]:
            return g
        found = second_derivative(node, g)
        return _widened(zeros if found is None else found[1])

    return LossRecord(rule, edge, None, None, about.device.type, weigh)


def _is_of_logits(node: Node) -> bool:
    """Whether it is the cross-entropy of probabilities that a sigmoid outside of the model makes."""
    below = node.next_functions[0][0] if kind_of(node) == "BinaryCrossEntropy" else None
    return below is not None and kind_of(below) == "Sigmoid" and MODEL_OUTPUT not in notes(below)


def _of_logits(node: Any, sigmoid: Any) -> LossRecord:
    """The two as one loss, of the sigmoid's input."""
    edge = GradientEdge(*sigmoid.next_functions[0])

    def rule(axis: SampleAxis) -> LossHessian | None:
        options = {"weight": node._saved_weight, "reduction": _REDUCTIONS[node._saved_reduction]}
        logits = _widened(sigmoid._saved_result).logit()
        function = F.binary_cross_entropy_with_logits
        return LOSSES[function](axis, logits, _widened(node._saved_target), **options)

    return LossRecord(rule, edge, None, None, sigmoid._saved_result.device.type)


def _by_rule(node: Any, kind: str, axis: SampleAxis) -> LossHessian | None:
    function, names = _LOSSES[kind]
    f, target = node._saved_self, node._saved_target
    if node.next_functions[0][0] is None:
        f, target = target, f
    options = {name: getattr(node, f"_saved_{name}") for name in names}
    options["reduction"] = _REDUCTIONS[node._saved_reduction]
    return LOSSES[function](axis, _widened(f), _widened(target), **options)


def second_derivative(node: Node, grad: Tensor) -> tuple[GradientEdge, Tensor] | None:
    """Where an operation ``phi`` on single entries has its input ``x``, and ``phi''(x) * grad``."""
    below = GradientEdge(*next((c, nr) for c, nr in node.next_functions if c is not None))
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        # A differentiable gradient is itself a function of x: it is multiplied on afterwards.
        weight = torch.ones_like(grad) if grad.requires_grad else grad
        (slope,) = torch.autograd.grad(
            [GradientEdge(node, 0)], [below], [weight], create_graph=True, retain_graph=True
        )
        if not slope.requires_grad:
            return None
        (found,) = torch.autograd.grad(
            slope.sum(), [below], retain_graph=True, create_graph=create, allow_unused=True
        )
    if found is None:
        return None
    return below, found * grad if grad.requires_grad else found


def outputs_at(node: Node) -> list[ModelOutput]:
    """The model outputs that a node computes; those of extended loss modules are none.

    A model whose parameters are frozen has no taps, but is a model.
    """
    found: dict[int, ModelOutput] = {}
    for border in notes(node).get(MODEL_OUTPUT, ()):
        if border.batch is not None and not border.batch.lost and border.recording.of_model:
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
            linear = is_linear(node) or (kind in PRODUCTS and _multiplies_once(node))
            stack += [(child, bent or not linear) for child in children]
    return found, curved


def _taps_below(node: Node) -> list[tuple[GradientEdge, SampleAxis]]:
    """The nearest operations with parameters that a node depends on, with their sample axes."""
    nodes = walk([node], lambda n: [] if TAPS in notes(n) else children_of(n))
    return [
        (GradientEdge(here, tap.place), tap.batch)
        for here in nodes
        for tap in notes(here).get(TAPS, ())
    ]


class KnownLoss(NamedTuple):
    """A loss with a known Hessian in its input.

    Attributes:
        record: the loss.
        outputs: the model outputs below it.
        curved: whether its input is no linear function of these, so that the Hessian is another there.
    """

    record: LossRecord
    outputs: dict[Node, list[ModelOutput]]
    curved: bool = False


def known_loss(node: Node, is_output: bool, curvature: bool) -> KnownLoss | None:
    """The loss with a known Hessian that a node computes."""
    noted = notes(node).get(LOSS)
    if not curvature:
        return None if noted is None else KnownLoss(noted, {})
    found = None if noted is None else _placed_loss(noted)
    if found is not None and found.curved and _is_of_logits(node):
        found = None
    if found is None and not is_output:
        # A loss that was not noted is one of the model's outputs only.
        record = recognised(node)
        found = None if record is None else _placed_loss(record)
        found = found if found is not None and _is_cheaper(found) else None
    return found


def _is_cheaper(loss: KnownLoss) -> bool:
    """Whether a recognised loss has not many more columns than there are numbers of the model output.

    All distances of an output from a table, say: then the sum of its terms is differentiated twice.
    """
    record, borders = loss.record, [border for found in loss.outputs.values() for border in found]
    outputs = sum(prod(border.shape) for border in borders)
    samples = max((border.batch.size for border in borders if border.batch), default=1)
    own = prod(record.edge.node._input_metadata[record.edge.output_nr].shape)
    return bool(borders) and (own <= 4 * outputs or outputs > 256 * max(samples, 1))


def _placed_loss(record: LossRecord) -> KnownLoss | None:
    below, curved = _outputs_below(record)
    if below:
        placed = [(GradientEdge(n, b.place), b.batch) for n, bs in below.items() for b in bs]
        record.locate(axis_at(record.edge, placed))  # type: ignore[arg-type]
    elif record.recording is None or record.recording.taps:
        record.locate_as_noted()
    elif taps := _taps_below(record.edge.node):
        # A loss of what is no output, or one whose samples are lost: its own guess does not count.
        record.locate(axis_at(record.edge, taps))
    return None if record.known is None else KnownLoss(record, below, curved)


def is_nonlinear(node: Node) -> bool:
    """Whether an operation between root and losses adds curvature."""
    if is_linear(node):
        return False
    return kind_of(node) not in PRODUCTS or not _multiplies_once(node)


def _multiplies_once(node: Node) -> bool:
    """Whether a product is linear in the data: only one of its arguments depends on it."""
    children = [child for child, _ in node.next_functions]
    known = [child is not None and _reaches_model(child) for child in children]
    return sum(known) <= 1 and (kind_of(node) != "Div" or known[0])


def _reaches_model(node: Node) -> bool:
    """Whether data lies at a node or below it; what is made from parameters only is small."""
    return any(not notes(here).keys().isdisjoint((TAPS, MODEL_OUTPUT, LOSS)) for here in walk([node]))
