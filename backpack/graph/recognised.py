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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.graph.taps import LossRecord
from backpack.graph.tracing import kind_of
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
_ENTRIES = frozenset("Pow Exp Log Softplus LogSigmoid Cosh Logcosh".split())


def recognised(node: Node) -> LossRecord | None:
    """The loss whose last curved operation a node is; ``None`` if it is none of those above."""
    kind = kind_of(node)
    if kind not in _LOSSES and kind not in _ENTRIES and kind not in ("LogSoftmax", "Logsumexp"):
        return None
    children = [(child, nr) for child, nr in node.next_functions if child is not None]
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
