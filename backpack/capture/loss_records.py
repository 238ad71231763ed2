"""Losses, noted on the graph: how to find the Hessian when backward comes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.graph.outputs import LossRecord
from backpack.graph.taps import LIKELIHOOD, LOSS, Recording, notes
from backpack.graph.transformed import note_differentiated
from backpack.losses.base import LOSSES, LossHessian
from backpack.losses.likelihoods import LIKELIHOODS, Likelihood
from backpack.samples.axis import SampleAxis


def _unheard(recording: Recording, loss: LossRecord | None, grads: Any) -> None:
    raise AssertionError("the engine is imported with the package")


# Called when backward has reached a loss or a model output. The engine, which comes later in the order
# of files, puts itself here when it is imported; nothing changes it afterwards.
reached: Callable[[Recording, LossRecord | None, Any], None] = _unheard


_HALVES = (torch.float16, torch.bfloat16)


def note_loss(
    recording: Recording,
    func: Any,
    axis: SampleAxis | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    node: Node,
    module: nn.Module | None,
) -> None:
    """Remember how to find the Hessian of a loss."""
    f: Tensor = args[0] if args else kwargs["input"]
    if not f.requires_grad:
        return
    rule, first = _without_logits(func, args, kwargs, node)
    record = LossRecord(rule, get_gradient_edge(f), module, axis, f.device.type, recording=recording)
    if module is not None:
        named = [kwargs[name] for name in ("input", "target") if name in kwargs]
        _, *others = [t for t in (*args, *named) if isinstance(t, Tensor)]
        record.inputs = lambda: (first(), *others)
    if func in LIKELIHOODS:
        note_likelihood(func, args, kwargs, node)
    recording.made.note(f)
    notes(node)[LOSS] = record
    node.register_prehook(lambda grads: on_backward(recording, record, grads))


def _without_logits(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: Node
) -> tuple[Callable[[SampleAxis], LossHessian | None], Callable[[], Tensor]]:
    """The rule of a loss and its first argument, holding no more than autograd does.

    Cross-entropy saves log-probabilities and lets the logits go; they are as good for the loss.
    """
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    versions = [t._version for t in tensors[1:]]
    logits_node = args[0].grad_fn if args else None
    below: Node | None = node if func is torch.nn.functional.cross_entropy else None
    while below is not None and below is not logits_node and below.name() != "LogSoftmaxBackward0":
        below = below.next_functions[0][0] if below.next_functions else None
    if below is None or below is logits_node or below.next_functions[0][0] is not logits_node:
        all_versions = [tensors[0]._version, *versions]

        def by_arguments(axis: SampleAxis) -> LossHessian | None:
            _refuse_changed(func, tensors, all_versions)
            return LOSSES[func](axis, *map(_widened, args), **kwargs)

        return by_arguments, lambda: tensors[0]
    logits, rest, saved, version = weakref.ref(args[0]), args[1:], below, args[0]._version
    others = tensors[1:]

    def first() -> Tensor:
        f = logits()
        if f is None or f._version != version:
            return saved._saved_result  # type: ignore[attr-defined]
        return f

    def rule(axis: SampleAxis) -> LossHessian | None:
        _refuse_changed(func, others, versions)
        return LOSSES[func](axis, _widened(first()), *rest, **kwargs)

    return rule, first


def note_likelihood(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: Node) -> None:
    """Remember how to find a likelihood, and the places of its arguments."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    versions = [t._version for t in tensors]

    def likelihood() -> tuple[Likelihood, list[GradientEdge]] | None:
        _refuse_changed(func, tensors, versions)
        found = LIKELIHOODS[func](*map(_widened, args), **kwargs)
        if found is None or not all(argument.requires_grad for argument in found.arguments):
            return None
        return found, [get_gradient_edge(argument) for argument in found.arguments]

    notes(node)[LIKELIHOOD] = likelihood


def _refuse_changed(func: Any, tensors: list[Tensor], versions: list[int]) -> None:
    if any(t._version != version for t, version in zip(tensors, versions, strict=True)):
        raise RuntimeError(
            f"an argument of the loss {func.__name__} was modified by an in-place operation after the "
            "loss was computed, so that its Hessian is not known; use the out-of-place version of that "
            "operation, or call backward before it"
        )


def _widened(x: Any) -> Any:
    """Half precision, in which autocast leaves model outputs, is too little for a Hessian."""
    return x.float() if isinstance(x, Tensor) and x.dtype in _HALVES else x


def on_backward(recording: Recording, loss: LossRecord | None, grads: Any) -> None:
    if torch.is_grad_enabled() and recording.taps:
        note_differentiated(recording)
    reached(recording, loss, grads)
