"""Calls of ``backward``, seen from outside: while somebody listens, each opens a block around itself.

Nothing is open between the calls: no block, no mode, so that the user's own ``with`` statements nest as
they please, and an error leaves nothing behind. A block of the user's that is open goes on: its
quantities are computed beside the listeners'.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from backpack import backpack
from backpack.own import BackpropExtension

_SCALE = "_cockpit_scale"


@dataclass(frozen=True, eq=False)
class Call:
    """One call of ``backward``.

    Attributes:
        root: the tensor that it was called of.
        gradient: the gradient there; ``None``: one.
        scale: the factor that a gradient scaler has multiplied the loss by.
        finite: whether the loss is a finite number.
    """

    root: Tensor
    gradient: Tensor | None
    scale: float
    finite: bool

    @cached_property
    def loss(self) -> Tensor:
        """The number that is differentiated, without the scaler's factor."""
        value = self.root.detach()
        if self.gradient is not None:
            value = value * self.gradient.detach()
        return value.double().sum() / self.scale


class Listener(Protocol):
    """Who wants to know of backward passes."""

    @property
    def parameters(self) -> Collection[Tensor] | None:
        """The parameters it looks at; ``None``: all."""

    def begins(self, call: Call) -> list[BackpropExtension]:
        """Look at the graph before anything is freed, and say which quantities are wanted."""

    def refused(self, ext: BackpropExtension, error: Exception) -> None:
        """A quantity cannot be computed, for a reason found before the pass began."""

    def ended(self, call: Call) -> None:
        """The pass is over, quantities are on the parameters."""

    def failed(self) -> None:
        """The pass raised an error."""

    def broke(self, error: Exception) -> None:
        """An error of its own, which does not end the user's training."""


class _State(threading.local):
    inside = False


_state = _State()
# Not held: one that nobody holds any longer hears nothing.
_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


def listen(listener: Listener) -> None:
    """Tell a listener of all calls of ``backward`` from now on."""
    _listeners.add(listener)
    for owner, name, ours, _ in _PATCHES:
        if getattr(owner, name) is not ours:
            setattr(owner, name, ours)


def unlisten(listener: Listener) -> None:
    """Tell it no more."""
    _listeners.discard(listener)
    sweep()


def sweep() -> None:
    """Put back the functions that are listened to, if nobody listens any longer."""
    if not _listeners:
        for owner, name, ours, original in _PATCHES:
            # Where somebody else has wrapped ours since, it stays, and passes calls on.
            if getattr(owner, name) is ours:
                setattr(owner, name, original)


# --------------------------------------------------------------------------------------
# The functions that are listened to

_tensor_backward = Tensor.backward
_function_backward = torch.autograd.backward
_scaler_scale = torch.amp.GradScaler.scale


def _backward(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    if _state.inside or not _listeners:
        sweep()
        return _tensor_backward(self, *args, **kwargs)
    named = (
        dict(zip(("gradient", "retain_graph", "create_graph", "inputs"), args, strict=False)) | kwargs
    )
    gradient = named.get("gradient")
    return _heard(self, gradient, lambda **also: _tensor_backward(self, **{**named, **also}))


def _backward_function(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
    def original() -> Any:
        return _function_backward(tensors, grad_tensors, *args, **kwargs)

    lone = tensors if isinstance(tensors, Tensor) else None
    if lone is None and isinstance(tensors, (list, tuple)) and len(tensors) == 1:
        lone = tensors[0]
    if _state.inside or not _listeners or not isinstance(lone, Tensor) or len(args) > 2:
        return original()
    if isinstance(grad_tensors, (list, tuple)):
        grad_tensors = grad_tensors[0] if len(grad_tensors) == 1 else None
    # The engine sees calls of the method only.
    return _backward(lone, grad_tensors, *args, **kwargs)


def _scale(self: Any, outputs: Any) -> Any:
    scaled = _scaler_scale(self, outputs)
    for each in scaled if isinstance(scaled, (list, tuple)) else [scaled]:
        if isinstance(each, Tensor):
            setattr(each, _SCALE, self.get_scale())
    return scaled


_PATCHES: tuple[tuple[Any, str, Callable[..., Any], Callable[..., Any]], ...] = (
    (Tensor, "backward", _backward, _tensor_backward),
    (torch.autograd, "backward", _backward_function, _function_backward),
    (torch.amp.GradScaler, "scale", _scale, _scaler_scale),
)


# --------------------------------------------------------------------------------------
# One call


def _heard(root: Tensor, gradient: Tensor | None, original: Callable[..., Any]) -> Any:
    listeners = list(_listeners)
    _state.inside = True
    try:
        if root.grad_fn is None or torch.compiler.is_compiling():
            return original()
        scale = getattr(root, _SCALE, 1.0) or 1.0
        value = root.detach()
        finite = math.isfinite(value.item()) if value.numel() == 1 else bool(value.isfinite().all())
        call = Call(root, gradient, scale, finite)
        try:
            result = _with_quantities(call, listeners, original)
        except BaseException:
            for listener in listeners:
                listener.failed()
            raise
        for listener in listeners:
            _guarded(listener, lambda: listener.ended(call))  # noqa: B023
        return result
    finally:
        _state.inside = False


def _guarded(listener: Listener, function: Callable[[], Any]) -> Any:
    """What a function of a listener gives; ``None`` if it raises."""
    try:
        return function()
    except Exception as error:
        listener.broke(error)
        return None


def _with_quantities(call: Call, listeners: list[Listener], original: Callable[..., Any]) -> Any:
    asked = [
        (ext, each)
        for each in listeners
        for ext in _guarded(each, lambda: each.begins(call)) or ()  # noqa: B023
    ]
    # A loss that is not finite is an error of a block's; a monitor notes it, and lets training go on.
    if not asked or not call.finite:
        return original()
    wanted = [each.parameters for each in listeners]
    parameters = None if None in wanted else {p for some in wanted if some is not None for p in some}
    try:
        return _beside(asked, parameters, original)
    except Exception as error:
        if not _refused(error):
            raise
        reason = error
    left = []
    for ext, listener in asked:
        try:
            with backpack(ext, gradient=False, parameters=parameters):
                original(retain_graph=True)
            left.append((ext, listener))
        except Exception as error:
            listener.refused(ext, error)
    if left == asked:
        # Each can be computed, but not all of them together.
        for ext, listener in left:
            listener.refused(ext, reason)
        left = []
    return _beside(left, parameters, original) if left else original()


def _beside(
    asked: Sequence[tuple[BackpropExtension, Listener]],
    parameters: Collection[Tensor] | None,
    original: Callable[..., Any],
) -> Any:
    """The call, in a block."""
    block = backpack.beside(*(ext for ext, _ in asked), parameters=parameters)
    block.quiet = True  # a listener says itself what it misses
    with block:
        return original()


def _refused(error: Exception) -> bool:
    """Whether it was raised before anything was executed and freed: the pass can be begun again."""
    trace = error.__traceback__
    while trace is not None:
        code, module = trace.tb_frame.f_code, trace.tb_frame.f_globals.get("__name__")
        if (module, code.co_name) == ("backpack.engine.run", "begin"):
            return True
        trace = trace.tb_next
    return False
