"""Forward: find the taps, the operations in which parameters meet data.

While the outermost extended module runs, a torch-function mode sees every operation. A result
depends on the data if an argument does; the mark is :class:`~backpack.batch.Batch`. An operation
with a data-dependent result and an argument that requires grad but does not depend on the data is a
tap, noted on its autograd node.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from backpack.batch import MARK, Batch, batch_of, entered, mark, regular_axis
from backpack.factors import Dense
from backpack.losses import LOSSES, LossHessian
from backpack.moves import MOVERS
from backpack.opened import OPENED
from backpack.placing import assigned
from backpack.propagation import ELEMENTWISE, EXPANSIONS, FACTORIES, known, moved, propagate
from backpack.rules import SEVERAL_OUTPUTS, ToForm, recurrent_axis
from backpack.taps import (
    BORDER,
    CURVED,
    LAYERS,
    LOSS,
    MIXES,
    TAPS,
    Border,
    LossRecord,
    Recording,
    Tap,
    lost_form,
    make_tap,
    notes,
    store_tap,
)

# The engine listens here: called with the node that backward has reached.
reached: Callable[[Recording, LossRecord | None, Any], None] | None = None


class _State(threading.local):
    recorder: _Recorder | None = None
    enabled: bool = True


_state = _State()


# --------------------------------------------------------------------------------------
# The mode


def _functional_twins() -> dict[Any, Any]:
    """In-place functions and the out-of-place ones they correspond to."""
    twins: dict[Any, Any] = {Tensor.__setitem__: None}
    for space in (Tensor, torch, torch.nn.functional, torch._C._nn):
        for name in dir(space):
            if name.endswith("_") and not name.endswith("__"):
                func = getattr(space, name, None)
                if callable(func):
                    twins[func] = getattr(space, name[:-1], None)
    return twins


_INPLACE = _functional_twins()
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_TENSORS = (Tensor, nn.Parameter)
# Operations that curve each entry by itself.
_BENDS = frozenset(
    func
    for name in (
        "sigmoid tanh elu selu celu gelu silu mish softplus logsigmoid exp expm1 log log1p sqrt rsqrt "
        "reciprocal sin cos erf"
    ).split()
    for space in (torch, Tensor, torch.nn.functional, torch._C._nn)
    if (func := getattr(space, name, None)) is not None
)
_BATCH_NORMS = {torch.nn.functional.batch_norm, torch.batch_norm}


def _tensors(args: tuple | list) -> Iterator[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif type(a) in (tuple, list):
            yield from _tensors(a)


class _Recorder(TorchFunctionMode):
    """Sees every operation of one forward pass."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        # Cleared when a forward pass ended without its hook: then everything is passed on.
        self.live = True
        module = recording.module()
        assert module is not None
        # Modules extended by name have this hook; of the others only the outermost needs it.
        self.hook: Any = None
        if "_backpack_root" not in module.__dict__:
            self.hook = module.register_forward_hook(after_forward, always_call=True)

    def close(self) -> None:
        """See no more."""
        self.live = False
        if self.hook is not None:
            self.hook.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        route = _ROUTES.get(func)
        if route is not None and self.live:
            return route(self, func, args, kwargs or {})
        out = func(*args, **kwargs) if kwargs else func(*args)
        if not self.live:
            return out
        if type(out) is Tensor:
            # Nearly all calls: one argument depends on the data, the others are parameters or none.
            first, several, sources = None, False, False
            axes = entered.axes
            for a in (*args, *kwargs.values()) if kwargs else args:
                if isinstance(a, Tensor):
                    batch = getattr(a, MARK, None) or axes.get(id(a))
                    if batch is None:
                        sources = sources or a.requires_grad
                    elif first is None:
                        first, axis = a, batch
                    else:
                        several = True
                elif type(a) is list or type(a) is tuple:
                    several = several or not all(type(each) is int for each in a)
            if several or func in _WATCHED or func in LOSSES:
                self._look(func, args, kwargs or {}, out)
            elif first is None:
                if sources:
                    self._look(func, args, kwargs or {}, out)
                elif func in FACTORIES:
                    self._note(func, args, kwargs or {}, out, 0, [], [])
            elif axis.lost is not None:
                if sources:
                    self._look(func, args, kwargs or {}, out)
                elif first.requires_grad:
                    out._backpack_batch = axis  # type: ignore[attr-defined]
            else:
                mover = MOVERS.get(func)
                here = axis if mover is None else moved(mover, axis, first, out, args, kwargs or {})
                found: Batch | None = here
                unsure = here.lost or not here.fits(out.shape) or func in ELEMENTWISE
                if unsure or (mover is None and not known(func, axis, first, args)):
                    found, _ = propagate(func, args, kwargs or {}, out, [(first, axis)])
                if found is not None:
                    if sources and (kwargs or not self._layer(func, args, out, found, first)):
                        self._look(func, args, kwargs or {}, out)
                    else:
                        out._backpack_batch = found  # type: ignore[attr-defined]
                elif sources:
                    self._look(func, args, kwargs or {}, out)
        elif type(out) not in _PLAIN:
            self._look(func, args, kwargs or {}, out)
        return out

    def _layer(self, func: Any, args: tuple, out: Tensor, batch: Batch, input: Tensor) -> bool:
        """The usual tap, a layer with a weight of its own; ``False``: look closer."""
        node, places = out.grad_fn, LAYERS.get(func)
        if places is None or node is None or out._base is not None:
            return False
        at, *own = places
        if input is not args[at]:
            return False
        weight, bias = (args[j] if j < len(args) else None for j in own)
        if weight is None or not weight.requires_grad or weight.grad_fn is not None:
            return False
        if bias is not None and bias.grad_fn is not None:
            return False
        inputs: tuple[Node, ...] = ()
        if input.requires_grad:
            inputs = (input.grad_fn or get_gradient_edge(input).node,)
        recording = self.recording
        tap = Tap(func, 0, batch, inputs, recording, args=args)
        notes(node)[TAPS] = [tap]
        recording.taps.append(weakref.ref(tap))
        return True

    def _look(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Look at a call with all its arguments and results."""
        marked, sources = _sort_arguments(args, kwargs)
        if isinstance(out, Tensor):
            if marked or not sources:
                self._note(func, args, kwargs, out, 0, marked, sources)
            elif func in EXPANSIONS:
                self._expansion(func, args, kwargs, out, sources)
        elif isinstance(out, (tuple, list)) and marked:
            for place, each in enumerate(out):
                if isinstance(each, Tensor):
                    self._note(func, args, kwargs, each, place, marked, sources)

    def _data(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """``parameter.data``, which autograd does not see."""
        if args[0].requires_grad:
            self.recording.unseen.append(weakref.ref(args[0]))
        out = func(*args, **kwargs)
        if (axis := batch_of(args[0])) is not None:
            mark(out, axis)
        return out

    def _pack(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """``pack_padded_sequence``: steps of all samples one after the other, samples nowhere."""
        self.recording.packed = True
        return func(*args, **kwargs)

    def _note(
        self,
        func: Any,
        args: tuple,
        kwargs: dict[str, Any],
        out: Tensor,
        place: int,
        marked: list[tuple[Tensor, Batch]],
        sources: list[Tensor],
    ) -> None:
        recording = self.recording
        if not marked:
            size = recording.size
            if func in FACTORIES and size and out.dim() and out.shape[0] == size:
                mark(out, regular_axis(size, tentative=True))
            return
        batch, demoted = propagate(func, args, kwargs, out, marked, place)
        if batch is None:
            return
        mark(out, batch)
        if demoted:
            sources = sources + [t for t in demoted if t.requires_grad]
        node = out.grad_fn if out.requires_grad else None
        if node is None:
            return
        if func in LOSSES:
            f = kwargs.get("input", args[0] if args else None)
            axis = batch_of(f) if isinstance(f, Tensor) else None
            own = any(f is t for t in recording.arguments)
            module = recording.module() if own else None
            _note_loss(recording, func, axis, args, kwargs, node, module)
        elif func in _BATCH_NORMS and _trains(args, kwargs):
            notes(node)[MIXES] = "batch norm in training mode"
        elif func in _BENDS and len(marked) == 1 and not batch.lost:
            notes(node)[CURVED] = batch
        if sources:
            inputs = tuple(
                t.grad_fn or get_gradient_edge(t).node
                for t, _ in marked
                if t.requires_grad and not any(t is s for s in sources)
            )
            # F.linear may return a view of its result: in-place operations replace the view's node.
            base = out._base
            if base is not None and node.next_functions[0][0] is not base.grad_fn:
                base = None
            make_tap(
                recording, func, args, kwargs, node, out.output_nr, place, batch, sources, inputs, base
            )

    def _open(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Operations with parameters inside are done by operations that can be seen."""
        marked, sources = _sort_arguments(args, kwargs)
        if marked and sources and torch.is_grad_enabled():
            with self:
                out = OPENED[func](*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if func in SEVERAL_OUTPUTS and marked and isinstance(args[2], (list, tuple)):
            self._recurrent(func, args, out, marked, sources)
            return out
        for place, each in enumerate(out if isinstance(out, tuple) else (out,)):
            if marked and isinstance(each, Tensor):
                self._note(func, args, kwargs, each, place, marked, sources)
        return out

    def _recurrent(
        self,
        func: Any,
        args: tuple,
        out: tuple[Tensor, ...],
        marked: list[tuple[Tensor, Batch]],
        sources: list[Tensor],
    ) -> None:
        """A recurrent layer of one layer and direction, whose outputs are hidden and last states."""
        states = args[1] if isinstance(args[1], (list, tuple)) else (args[1],)
        axis, demoted = recurrent_axis(args[0], states, marked, bool(args[-1]))
        if axis.lost and axis.tentative:
            return
        sources = sources + [t for t in demoted if t.requires_grad]
        data = [t for t, _ in marked if t.requires_grad and not any(t is s for s in demoted)]
        inputs = tuple(t.grad_fn or get_gradient_edge(t).node for t in data)
        for place, each in enumerate(out):
            batch = axis.moved(1) if place else axis
            mark(each, batch)
            if each.grad_fn is not None and sources:
                pairs: list[tuple[Tensor, ToForm]] = [(s, lost_form) for s in sources]
                if not axis.lost:
                    found = SEVERAL_OUTPUTS[func](axis, place, out[0].detach(), *args)
                    pairs = [(t, f) for t, f in found if any(t is s for s in sources)]  # type: ignore[misc]
                store_tap(
                    *(self.recording, func, each.grad_fn, each.output_nr, batch),
                    *(pairs, inputs, False),
                )

    def _in_place(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """In-place operations: the node to remember is the one before."""
        marked, sources = _sort_arguments(args, kwargs)
        if not (args and isinstance(args[0], Tensor) and marked):
            return func(*args, **kwargs)
        target = args[0]
        inputs = tuple(t.grad_fn or get_gradient_edge(t).node for t, _ in marked if t.requires_grad)
        twin = _INPLACE[func]
        rest = [s for s in sources if s is not target]
        plain = list(args)
        own = batch_of(target)
        # What the target was before, for those who ask for its shape or, if it is tried out, values.
        assigns = func == Tensor.__setitem__
        op = func if twin is None or func in ELEMENTWISE else twin
        settled = assigns or op in MOVERS or known(op, marked[0][1], target, args)
        taken = rest and twin is not None and twin not in (Tensor.add, Tensor.sub)
        plain[0] = target.clone() if taken else target.detach() if settled else target.detach().clone()
        if own is not None:
            mark(plain[0], own)
            marked = [(plain[0] if t is target else t, axis) for t, axis in marked]
        out = func(*args, **kwargs)
        batch: Batch | None
        if assigns:
            batch = assigned(plain[0], args[2], args[1])
        else:
            batch, _ = propagate(op, tuple(plain), kwargs, target, marked)
        if batch is None:
            if own is not None:
                delattr(target, MARK)
            return out
        mark(target, batch)
        node = target.grad_fn
        # A parameter-made tensor that data was written into is left to the check at backward time.
        if rest and len(rest) == len(sources) and node is not None and twin is not None:
            make_tap(
                self.recording,
                *(twin, tuple(plain), kwargs, node, target.output_nr, 0, batch, rest, inputs),
            )
        return out

    def _expansion(
        self, func: Any, args: tuple, kwargs: dict[str, Any], out: Tensor, sources: list[Tensor]
    ) -> None:
        """A parameter expanded to one row per sample: the sample axis appears here."""
        size, node = self.recording.size, out.grad_fn
        old = args[0]
        grew = out.dim() > old.dim() or old.shape[0] == 1
        if size and size > 1 and node is not None and out.dim() and out.shape[0] == size and grew:
            batch = regular_axis(size, tentative=True)
            mark(out, batch)
            shape = old.shape
            repeats = _repeats(old, out)
            forms: list[tuple[Tensor, ToForm]] = [(old, lambda g: Dense(_unexpand(g, shape, repeats)))]
            store_tap(self.recording, func, node, out.output_nr, batch, forms, (), True)


def _note_loss(
    recording: Recording,
    func: Any,
    axis: Batch | None,
    args: tuple,
    kwargs: dict[str, Any],
    node: Node,
    module: nn.Module | None,
) -> None:
    """Remember how to find the Hessian of a loss."""
    f: Tensor = args[0] if args else kwargs["input"]
    if axis is None or axis.lost or not f.requires_grad:
        return
    rule = _without_logits(func, axis, args, kwargs, node)
    record = LossRecord(rule, get_gradient_edge(f), module, f.device.type)
    notes(node)[LOSS] = record
    node.register_prehook(lambda grads: _on_backward(recording, record, grads))


def _without_logits(
    func: Any, axis: Batch, args: tuple, kwargs: dict[str, Any], node: Node
) -> Callable[[], LossHessian | None]:
    """The rule of a loss, holding no more than autograd does.

    Cross-entropy saves log-probabilities and lets the logits go; they are as good for its Hessian.
    """
    logits_node = args[0].grad_fn if args else None
    below: Node | None = node if func is torch.nn.functional.cross_entropy else None
    while below is not None and below is not logits_node and below.name() != "LogSoftmaxBackward0":
        below = below.next_functions[0][0] if below.next_functions else None
    if below is None or below is logits_node or below.next_functions[0][0] is not logits_node:
        return lambda: LOSSES[func](axis, *map(_widened, args), **kwargs)
    logits, rest, saved = weakref.ref(args[0]), args[1:], below

    def rule() -> LossHessian | None:
        f = logits()
        f = saved._saved_result if f is None else f  # type: ignore[attr-defined]
        return LOSSES[func](axis, _widened(f), *rest, **kwargs)

    return rule


def _widened(x: Any) -> Any:
    """Half precision, in which autocast leaves model outputs, is too little for a Hessian."""
    return x.float() if isinstance(x, Tensor) and x.dtype in _HALVES else x


def _repeats(old: Tensor, out: Tensor) -> list[int]:
    padded = (1,) * (out.dim() - old.dim()) + tuple(old.shape)
    return [o // max(p, 1) for o, p in zip(out.shape, padded, strict=True)]


def _unexpand(g: Tensor, shape: torch.Size, repeats: list[int]) -> Tensor:
    """``[v, N, *expanded] -> [v, N, *shape]``: sum over everything but the sample axis."""
    split: list[int] = []
    for length, factor in zip(g.shape[2:], repeats[1:], strict=True):
        split += [factor, length // max(factor, 1)]
    g = g.reshape(*g.shape[:2], *split)
    g = g.sum(tuple(range(2, g.dim(), 2))) if split else g
    return g.reshape(*g.shape[:2], *shape)


def _sort_arguments(
    args: tuple, kwargs: dict[str, Any]
) -> tuple[list[tuple[Tensor, Batch]], list[Tensor]]:
    """Arguments that depend on the data, and those that require grad but do not.

    A tensor in which samples are mixed but through which no gradient flows is a constant.
    """
    marked: list[tuple[Tensor, Batch]] = []
    sources: list[Tensor] = []
    axes = entered.axes
    for a in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(a, Tensor):
            batch = getattr(a, MARK, None) or axes.get(id(a))
            if batch is not None:
                if batch.lost is None or a.requires_grad:
                    marked.append((a, batch))
            elif a.requires_grad:
                sources.append(a)
        elif type(a) in (tuple, list) and a and not isinstance(a[0], (int, slice)):
            more_marked, more_sources = _sort_arguments(tuple(_tensors(a)), {})
            marked += more_marked
            sources += more_sources
    return marked, sources


def _trains(args: tuple, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("training", args[5] if len(args) > 5 else False))


_HALVES = (torch.float16, torch.bfloat16)
# Functions whose results need a second look, and types of results that need none.
_WATCHED = _BATCH_NORMS | _BENDS | EXPANSIONS
_PLAIN = frozenset({torch.Size, int, float, bool, torch.dtype, torch.device, type(None)})
_ROUTES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_INPLACE, _Recorder._in_place),
    **dict.fromkeys(OPENED, _Recorder._open),
    _DATA: _Recorder._data,
    torch._VF._pack_padded_sequence: _Recorder._pack,
}


# --------------------------------------------------------------------------------------
# Hooks of extended modules


def _flatten(value: Any) -> Iterator[Tensor]:
    """Tensors in nested containers, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _flatten(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _flatten(each)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _flatten(getattr(value, name))


def before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of extended modules: the outermost call opens a recording."""
    recorder = _state.recorder
    if recorder is not None:
        recording = recorder.recording
        if recording.module() is module:
            if _calls_running(module) > 1:
                recording.depth += 1
                return
        elif "_backpack_root" not in module.__dict__ or _calls_running(recording.module()):
            return
        # A forward pass that ended without its hook (KeyboardInterrupt). Its mode may lie below
        # others on torch's stack: it stays there, and passes everything on.
        recorder.close()
        _state.recorder, entered.axes = None, {}
    if not _recordable():
        return
    batch_dim = module.__dict__.get("_backpack_batch_dim", 0)
    recording = Recording(weakref.ref(module), None, batch_dim)
    axes: dict[int, Batch] = {}
    tensors = list(_flatten((args, kwargs)))
    # A parameter may be the data (inputs that are trained), unless it is the module's or beside data.
    leaves = [t for t in tensors if type(t) is not Tensor and isinstance(t, nn.Parameter)]
    own = list(module.parameters()) if len(leaves) == len(tensors) else leaves
    for tensor in tensors:
        recording.arguments.append(tensor)
        if tensor.requires_grad:
            recording.entries.add(get_gradient_edge(tensor).node)
        batch = batch_of(tensor)
        if batch is None and tensor.dim() > batch_dim and not any(tensor is p for p in own):
            size = tensor.shape[batch_dim]
            first = recording.size is None
            if first or recording.size == size:
                axes[id(tensor)] = regular_axis(size, batch_dim, tentative=not first)
                recording.size = size if first else recording.size
        elif batch is not None:
            recording.size = recording.size or batch.size
    entered.axes = axes
    _state.recorder = _Recorder(recording)
    _state.recorder.__enter__()


def _recordable() -> bool:
    compiling = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return _state.enabled and torch.is_grad_enabled() and not compiling


def _calls_running(module: nn.Module | None) -> int:
    """How many calls of ``module`` are on this thread's stack."""
    if module is None:
        return 0
    frame, count = sys._getframe(1), 0
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count


def after_forward(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of extended modules (called also if forward raised): close the recording."""
    recorder = _state.recorder
    if recorder is None or recorder.recording.module() is not module:
        return
    recording = recorder.recording
    if recording.depth:
        recording.depth -= 1
        return
    _close()
    for tensor in _flatten(output):
        node = tensor.grad_fn
        if node is None:
            continue
        border, kept = Border(recording, tensor.output_nr, batch_of(tensor), tensor.shape), notes(node)
        kept.setdefault(BORDER, []).append(border)
        if LOSS not in kept:  # which is listened to
            node.register_prehook(lambda grads: _on_backward(recording, None, grads))


# Loss modules that do nothing but call one function: by their hook, without a mode.
LOSS_MODULES: dict[type[nn.Module], tuple[Any, tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (
        torch.nn.functional.cross_entropy,
        ("weight", "ignore_index", "reduction", "label_smoothing"),
    ),
    nn.MSELoss: (torch.nn.functional.mse_loss, ("reduction",)),
    nn.BCEWithLogitsLoss: (
        torch.nn.functional.binary_cross_entropy_with_logits,
        ("weight", "pos_weight", "reduction"),
    ),
}


def after_loss(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
    """Forward hook of extended loss modules in :data:`LOSS_MODULES`."""
    node = output.grad_fn
    if node is None or _state.recorder is not None or not _recordable():
        return
    func, names = LOSS_MODULES[type(module)]
    f = args[0] if args else kwargs["input"]
    axis, dim = batch_of(f), module.__dict__.get("_backpack_batch_dim", 0)
    if axis is None and f.dim() > dim:
        axis = regular_axis(f.shape[dim], dim)
    recording = Recording(weakref.ref(module), None, dim)
    options = {name: getattr(module, name) for name in names}
    _note_loss(recording, func, axis, args, {**kwargs, **options}, node, module)


def _close() -> None:
    recorder = _state.recorder
    assert recorder is not None
    _state.recorder = None
    recorder.close()
    recorder.__exit__(None, None, None)
    entered.axes = {}
    recorder.recording.arguments.clear()


def _on_backward(recording: Recording, loss: LossRecord | None, grads: Any) -> None:
    if reached is not None:
        reached(recording, loss, grads)
    elif not torch._C._autograd._get_current_graph_task_keep_graph():
        recording.release()


class disable:  # noqa: N801
    """Switch capture off: ``with disable(): model(X)`` records nothing.

    Class attribute ``store_io`` and :meth:`should_store_io` say whether capture is on, as in the
    original library.
    """

    store_io = True

    def __enter__(self) -> None:
        self._before = _state.enabled
        _state.enabled = False
        disable.store_io = False

    def __exit__(self, *exc: object) -> None:
        _state.enabled = self._before
        disable.store_io = self._before

    @staticmethod
    def should_store_io() -> bool:
        """Whether capture is on."""
        return _state.enabled
