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
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from backpack.aliases import is_shared, places_of, through_base, wrote
from backpack.batch import MARK, Batch, batch_of, entered, mark, regular_axis, solo_axis
from backpack.factors import Dense
from backpack.functions import Functions, is_custom, settle
from backpack.inputs import carriers, doubtful
from backpack.losses import LOSSES, LossHessian
from backpack.moves import LIKE, MOVERS, spellings
from backpack.opened import OPENED
from backpack.placing import assigned
from backpack.propagation import (
    ELEMENTWISE,
    EXPANSIONS,
    FACTORIES,
    POINTWISE,
    known,
    moved,
    name_of,
    settled,
    traced,
)
from backpack.rules import SEVERAL_OUTPUTS, ToForm, fallback, recurrent_axis
from backpack.taps import (
    BORDER,
    CURVED,
    ENDS,
    LAYERS,
    LOSS,
    MIXES,
    TAPS,
    Border,
    LossRecord,
    Recording,
    Tap,
    View,
    lost_form,
    make_tap,
    notes,
    of_sample,
    store_tap,
)


def _unheard(recording: Recording, loss: LossRecord | None, grads: Any) -> None:
    raise AssertionError("the engine is imported with the package")


# Called when backward has reached a loss or a model output. The engine, which comes later in the order
# of files, puts itself here when it is imported; nothing changes it afterwards.
reached: Callable[[Recording, LossRecord | None, Any], None] = _unheard


class _State(threading.local):
    recorder: _Recorder | None = None


_state = _State()
# How often each thread has switched capture off. Not a thread's own state: autograd's threads for
# devices ask for the thread that called backward.
_switched_off: dict[int, int] = {}


# --------------------------------------------------------------------------------------
# The mode


def _functional_twins() -> dict[Any, Any]:
    """In-place functions and the out-of-place ones they correspond to."""
    twins: dict[Any, Any] = {Tensor.__setitem__: None, Tensor.data.__set__: None}  # type: ignore[attr-defined]
    for space in (Tensor, torch, torch.nn.functional, torch._C._nn):
        for name in dir(space):
            if name.endswith("_") and not name.endswith("__"):
                func = getattr(space, name, None)
                if callable(func):
                    twins[func] = getattr(space, name[:-1], None)
    return twins


_INPLACE = _functional_twins()
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
# A tensor looks at other memory from then on.
_REPLACES = (Tensor.set_, Tensor.data.__set__)  # type: ignore[attr-defined]
# It looks at the same memory in another way.
_RELOOKS = frozenset(
    (
        *_REPLACES,
        *spellings(*"t_ transpose_ swapaxes_ swapdims_ squeeze_ unsqueeze_ as_strided_".split()),
    )
)
_LEAVES_VALUES = (Tensor.requires_grad_, Tensor.detach_)
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


class _Write(NamedTuple):
    """An operation in place.

    Attributes:
        func: the operation.
        op: its twin out of place, for those who ask what it does.
        target: what it writes to.
        shared: whether others look at the same memory.
        args: its arguments, with what the target was before.
        kwargs: its keyword arguments.
        own: the target's sample axis before.
        marked: arguments that depend on the data.
        rest: arguments other than the target that require grad but do not.
        inputs: nodes of the data.
        lone: whether the target is not made from parameters itself.
    """

    func: Any
    op: Any
    target: Tensor
    shared: bool
    args: tuple
    kwargs: dict[str, Any]
    own: Batch | None
    marked: list[tuple[Tensor, Batch]]
    rest: list[Tensor]
    inputs: tuple[Node, ...]
    lone: bool


class _Recorder(TorchFunctionMode):
    """Sees every operation of one forward pass."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        # Cleared when a forward pass ended without its hook: then everything is passed on.
        self.live = True
        module = recording.module()
        assert module is not None
        self.functions = Functions()
        # Tensors that got an axis by an operation in place.
        self.adopted: list[weakref.ref[Tensor]] = []
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
        if not self.live:
            return func(*args, **kwargs) if kwargs else func(*args)
        route = _ROUTES.get(func)
        if route is not None:
            return route(self, func, args, kwargs or {})
        if kwargs and kwargs.get("out") is not None:
            return self._into(func, args, kwargs)
        out = func(*args, **kwargs) if kwargs else func(*args)
        # The user's forward pass goes on, whatever happens here.
        try:
            self._see(func, args, kwargs or {}, out)
        except Exception as error:
            self._give_up(func, out, error)
        return out

    def _see(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Look at a call that is over."""
        if not torch.is_grad_enabled():
            self._touch(args, kwargs)
        if type(out) is not Tensor:
            if type(out) not in _PLAIN:
                self._look(func, args, kwargs, out)
            return
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
        if several or func in _WATCHED or func in LOSSES or entered.written:
            self._look(func, args, kwargs, out)
        elif first is None:
            if sources or func in FACTORIES or any(t._base is not None for t in _tensors(args)):
                self._look(func, args, kwargs, out)
        elif axis.lost is not None or (self.functions.touched and is_custom(first)):
            self._look(func, args, kwargs, out)
        else:
            mover = MOVERS.get(func)
            found = axis if mover is None else moved(mover, axis, first, out, args, kwargs)
            unsure = found.lost or not found.fits(out.shape) or out is first
            unsure = unsure or (found.picked is not None and not out.requires_grad)
            if mover is None:
                grew = func in ELEMENTWISE and out.dim() != first.dim()
                unsure = unsure or grew or not known(func, axis, first, args)
            # A plain layer is a tap without a closer look.
            if unsure or (sources and (kwargs or not self._layer(func, args, out, found, first))):
                self._look(func, args, kwargs, out)
            else:
                out._backpack_batch = found  # type: ignore[attr-defined]

    def _give_up(self, func: Any, out: Any, error: Exception) -> None:
        """A call that could not be followed: nothing is known of its results."""
        why = f"a call that cannot be followed ({type(error).__name__}: {error})"
        for each in _flatten(out):
            lost = Batch(self.recording.size or 1, lost=why, tentative=not each.requires_grad)
            self._lose(func, each, lost)

    def _touch(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Data is read without grad: inside a custom Function, perhaps."""
        for a in _tensors((*args, *kwargs.values())):
            if a.requires_grad and (axis := self._axis(a)) is not None:
                self.functions.touch(a, axis)

    def _axis(self, tensor: Tensor) -> Batch | None:
        """The sample axis of a tensor, also where no operation that was seen has made it."""
        batch = batch_of(tensor)
        if is_custom(tensor):
            found = self.functions.axis(tensor, batch, self.recording.entries)
        elif batch is None and tensor._base is not None:
            found = through_base(tensor)
        else:
            return batch
        if found is not None and found is not batch:
            mark(tensor, found)
        return found

    def _sorted(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[list[tuple[Tensor, Batch]], list[Tensor], list[Batch]]:
        """Arguments that depend on the data, those that require grad but do not, faint ones' axes.

        Faint are tensors that count as constants although they depend on the data: the axis is lost,
        but no gradient flows through them, or none but that of parameters.
        """
        marked: list[tuple[Tensor, Batch]] = []
        sources: list[Tensor] = []
        faint: list[Batch] = []
        for a in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(a, Tensor):
                batch = self._axis(a)
                if batch is not None and (
                    batch.lost is None or (a.requires_grad and not batch.tentative)
                ):
                    marked.append((a, batch))
                    continue
                if batch is not None:
                    faint.append(batch)
                if a.requires_grad:
                    sources.append(a)
            elif type(a) in (tuple, list) and a and not isinstance(a[0], (int, slice)):
                more = self._sorted(tuple(_tensors(a)), {})
                marked, sources, faint = marked + more[0], sources + more[1], faint + more[2]
        return marked, sources, faint

    def _lose(self, func: Any, out: Tensor, lost: Batch, fresh: bool = True) -> None:
        """The axis of a result is not known; ``fresh``: that of its arguments was."""
        recording = self.recording
        where = f"{name_of(func)}: {lost.lost}" if fresh else str(lost.lost)
        if recording.lost is None and out.requires_grad:
            recording.lost = where
        # What counts as a constant may meet a parameter later, for whom the place is news.
        mark(out, replace(lost, lost=where) if lost.tentative else lost)

    def _layer(self, func: Any, args: tuple, out: Tensor, batch: Batch, input: Tensor) -> bool:
        """The usual tap, a layer with a weight of its own; ``False``: look closer."""
        node, places = out.grad_fn, LAYERS.get(func)
        if places is None or node is None or out._base is not None or batch.solo is not None:
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
        marked, sources, faint = self._sorted(args, kwargs)
        if isinstance(out, Tensor):
            if not marked and sources and func in EXPANSIONS:
                self._expansion(func, args, kwargs, out, sources)
            elif marked or faint or not sources:
                self._note(func, args, kwargs, out, 0, marked, sources, faint)
        elif isinstance(out, (tuple, list)) and (marked or faint):
            own = list(_tensors(args)) if func in _EACH else []
            for place, each in enumerate(out):
                if own:
                    marked, sources, faint = self._sorted((own[place],), {})
                if isinstance(each, Tensor) and (marked or faint):
                    self._note(func, args, kwargs, each, place, marked, sources, faint)

    def _data(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """``parameter.data``, which autograd does not see."""
        out = func(*args, **kwargs)
        if args[0].requires_grad:
            self.recording.unseen.append(weakref.ref(args[0]))
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
        faint: list[Batch],
    ) -> None:
        recording = self.recording
        if not marked:
            size = recording.size
            if faint:
                axis, _ = settled(func, out, faint[0], recording.batch_dim)
                if axis.lost:
                    self._lose(func, out, axis, fresh=False)
                else:
                    mark(out, axis)
            elif func in FACTORIES and size and out.dim() and out.shape[0] == size:
                mark(out, regular_axis(size, tentative=True))
            return
        batch, demoted = traced(func, args, kwargs, out, marked, place)
        batch, whole = settled(func, out, batch, recording.batch_dim, marked)
        fresh = True
        if batch.tentative and faint and not batch.lost and out.requires_grad:
            batch = self._doubted(func, batch, out, args, faint)
            fresh = not batch.lost
        if batch.lost and batch.tentative:
            if func not in LIKE:
                self._lose(func, out, batch, fresh)
            return
        if batch.lost:
            self._lose(func, out, batch)
            _note_end(recording, out, marked)
        elif any(out is t for t, _ in marked):
            return  # the argument itself
        else:
            mark(out, batch)
        if demoted:
            sources = sources + [t for t in demoted if t.requires_grad]
        node = out.grad_fn if out.requires_grad else None
        if node is None:
            return
        if func in LOSSES:
            f = kwargs.get("input", args[0] if args else None)
            at = batch_of(f) if isinstance(f, Tensor) else None
            own = any(f is t for t in recording.arguments)
            module = recording.module() if own else None
            _note_loss(recording, func, at, args, kwargs, node, module)
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
                *(recording, func, args, kwargs, node, out.output_nr, place, batch, sources, inputs),
                *(base, whole),  # type: ignore[arg-type]
            )
        if is_custom(out):
            settle(out, batch)

    def _doubted(self, func: Any, batch: Batch, out: Tensor, args: tuple, faint: list[Batch]) -> Batch:
        """A tentative axis meets data that has lost its own: they agree if all rows get the same."""
        for t in _tensors(args):
            axis = batch_of(t)
            if axis is not None and axis.lost:
                place = batch.dim - (out.dim() - t.dim())
                if func not in ELEMENTWISE or (place >= 0 and t.shape[place] != 1):
                    return faint[0]
        return batch

    def _open(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Operations with parameters inside are done by operations that can be seen."""
        marked, sources, faint = self._sorted(args, kwargs)
        if (marked or faint) and sources and torch.is_grad_enabled():
            try:
                with self:
                    out = OPENED[func](*args, **kwargs)
            except Exception:  # the user's mistake, which the operation itself reports, or ours
                out = NotImplemented
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        try:
            if func in SEVERAL_OUTPUTS and marked and isinstance(args[2], (list, tuple)):
                self._recurrent(func, args, kwargs, out, marked, sources, faint)
            elif marked or faint:
                for place, each in enumerate(out if isinstance(out, tuple) else (out,)):
                    if isinstance(each, Tensor):
                        self._note(func, args, kwargs, each, place, marked, sources, faint)
        except Exception as error:
            self._give_up(func, out, error)
        return out

    def _recurrent(
        self,
        func: Any,
        args: tuple,
        kwargs: dict[str, Any],
        out: tuple[Tensor, ...],
        marked: list[tuple[Tensor, Batch]],
        sources: list[Tensor],
        faint: list[Batch],
    ) -> None:
        """A recurrent layer of one layer and direction, whose outputs are hidden and last states."""
        states = args[1] if isinstance(args[1], (list, tuple)) else (args[1],)
        axis, demoted = recurrent_axis(args[0], states, marked, bool(args[-1]))
        sources = sources + [t for t in demoted if t.requires_grad]
        data = [t for t, _ in marked if t.requires_grad and not any(t is s for s in demoted)]
        inputs = tuple(t.grad_fn or get_gradient_edge(t).node for t in data)
        for place, each in enumerate(out):
            here = axis.moved(1) if place else axis
            batch, whole = settled(func, each, here, self.recording.batch_dim, marked)
            if batch.tentative and faint and not batch.lost and each.requires_grad:
                batch = self._doubted(func, batch, each, args, faint)
            if batch.lost:
                self._lose(func, each, batch)
                if batch.tentative:
                    continue
            else:
                mark(each, batch)
            if each.grad_fn is not None and sources:
                own = batch.single()
                if whole:
                    found = fallback(own, place, func, args, kwargs, sources, True)
                elif batch.lost:
                    found = [(s, lost_form) for s in sources]
                else:
                    found = SEVERAL_OUTPUTS[func](axis.single(), place, out[0].detach(), *args)
                pairs = [(t, f) for t, f in found if any(t is s for s in sources)]
                if own is not batch:
                    pairs = [(t, of_sample(f, batch)) for t, f in pairs]
                store_tap(
                    *(self.recording, func, each.grad_fn, each.output_nr, batch),
                    *(pairs, inputs, False, [t for t, _ in marked]),  # type: ignore[arg-type]
                )

    def _in_place(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """In-place operations: the node to remember is the one before."""
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {k: x for k, x in kwargs.items() if k != "input"}
        target = args[0] if args else None
        if not isinstance(target, Tensor):
            return func(*args, **kwargs)
        write: _Write | None = None
        failed: Exception | None = None
        try:
            if torch.is_grad_enabled() or not target.requires_grad:
                write = self._before(func, target, args, kwargs)
            else:  # autograd does not see it: for autograd rows stay where they are
                self._touch(args, kwargs)
        except Exception as error:
            failed = error
        out = func(*args, **kwargs)
        try:
            if failed is not None:
                raise failed
            if write is not None:
                self._after(write)
        except Exception as error:
            self._give_up(func, target, error)
        return out

    def _before(self, func: Any, target: Tensor, args: tuple, kwargs: dict[str, Any]) -> _Write | None:
        """What there is to know before an operation in place; ``None`` if it is no matter of data."""
        assigns = func == Tensor.__setitem__
        index = args[1] if assigns and isinstance(args[1], tuple) else ()
        marked, sources, faint = self._sorted((*args, *index) if index else args, kwargs)
        if not marked:
            if faint and batch_of(target) is None and func not in _LEAVES_VALUES:
                self._adopt(target)
                self._lose(func, target, faint[0], fresh=False)
            return None
        inputs = tuple(t.grad_fn or get_gradient_edge(t).node for t, _ in marked if t.requires_grad)
        twin = _INPLACE[func]
        rest = [s for s in sources if s is not target]
        own, shared = batch_of(target), is_shared(target)
        # What the target was before, for those who ask for its shape or, if it is tried out, values.
        op = func if twin is None or func in ELEMENTWISE else twin
        follows = assigns or op in MOVERS or known(op, marked[0][1], target, args)
        lone = len(rest) == len(sources)
        taken = not lone or (rest and twin is not None and twin not in (Tensor.add, Tensor.sub))
        old = target.clone() if taken else target.detach() if follows else target.detach().clone()
        if target.requires_grad and not taken:
            old.requires_grad_()
        if own is not None:
            mark(old, own)
            marked = [(old if t is target else t, axis) for t, axis in marked]
        before = (old, *args[1:])
        return _Write(func, op, target, shared, before, kwargs, own, marked, rest, inputs, lone)

    def _after(self, write: _Write) -> None:
        """The axis of a tensor after an operation in place, and the tap, if it is one."""
        func, target, own, marked = write.func, write.target, write.own, write.marked
        if func in _REPLACES:
            batch = batch_of(write.args[1])
        elif func == Tensor.__setitem__:
            batch = assigned(write.args[0], write.args[2], write.args[1])
        else:
            batch, _ = traced(write.op, write.args, write.kwargs, target, marked)
        if batch is None:
            batch = marked[0][1].losing("constants written to places that depend on data")
            batch = replace(batch, tentative=True)
        batch, whole = settled(func, target, batch, self.recording.batch_dim, marked)
        if own is None:
            self._adopt(target)
        if batch.lost:
            self._lose(func, target, batch)
        # A view that belongs to nobody in particular may be one of rows that belong to somebody.
        by_entries = write.op in ELEMENTWISE or write.op in POINTWISE
        as_before = own is not None and own.lost and len(marked) == 1 and by_entries
        if func in _RELOOKS or as_before:
            mark(target, batch)
        else:
            wrote(target, own, batch, write.shared)
        if (write.rest or not write.lone) and target.grad_fn is not None:
            if not (batch.lost and batch.tentative):
                self._written(write, batch, whole)

    def _written(self, write: _Write, batch: Batch, whole: bool) -> None:
        """The tap of an operation in place: where the graph goes on from what was written to."""
        target, base = write.target, write.target._base
        func = write.func if write.func == Tensor.__setitem__ else _INPLACE[write.func]
        if func is None:
            return
        node, output_nr, view, inputs = target.grad_fn, target.output_nr, None, write.inputs
        if base is not None and base.grad_fn is not None:
            # Autograd notes it on what the target is a view of.
            axis, places = self._axis(base), places_of(target, base)
            if axis is None or places is None:
                batch = batch.losing("a view of memory of which nothing is known was written to")
            else:
                node, output_nr, view = base.grad_fn, base.output_nr, View(places, axis)
                before = node.next_functions[0][0]
                inputs = (*inputs, before) if before is not None else inputs
        assert node is not None
        sources = write.rest if write.lone else [write.args[0], *write.rest]
        make_tap(
            *(self.recording, func, write.args, write.kwargs, node, output_nr, 0),
            *(batch, sources, inputs, None, whole, view),  # type: ignore[arg-type]
        )

    def _adopt(self, target: Tensor) -> None:
        """A tensor without an axis gets one, and may have been there before: not to be left on it."""
        self.adopted.append(weakref.ref(target))

    def _into(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Operations that write their results to given tensors."""
        out = func(*args, **kwargs)
        try:
            rest = {name: x for name, x in kwargs.items() if name != "out"}
            marked, _, faint = self._sorted(args, rest)
            for place, each in enumerate(out if isinstance(out, tuple) else (out,)):
                if not isinstance(each, Tensor) or not (marked or faint):
                    continue
                own = batch_of(each)
                batch = faint[0] if faint else marked[0][1]
                if marked:
                    batch, _ = traced(func, args, rest, each, marked, place)
                batch, _ = settled(func, each, batch, self.recording.batch_dim, marked)
                if own is None:
                    self._adopt(each)
                wrote(each, own, batch, is_shared(each))
        except Exception as error:
            self._give_up(func, out, error)
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


def _note_end(recording: Recording, out: Tensor, marked: list[tuple[Tensor, Batch]]) -> None:
    """Remember what a result was computed from in which samples are no longer apart."""
    if out.grad_fn is not None:
        ends = [(get_gradient_edge(t), axis) for t, axis in marked if t.requires_grad and not axis.lost]
        notes(out.grad_fn)[ENDS] = [(edge, axis, recording) for edge, axis in ends]


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
    if not f.requires_grad:
        return
    rule = _without_logits(func, args, kwargs, node)
    record = LossRecord(rule, get_gradient_edge(f), module, axis, f.device.type)
    notes(node)[LOSS] = record
    node.register_prehook(lambda grads: _on_backward(recording, record, grads))


def _without_logits(
    func: Any, args: tuple, kwargs: dict[str, Any], node: Node
) -> Callable[[Batch], LossHessian | None]:
    """The rule of a loss, holding no more than autograd does.

    Cross-entropy saves log-probabilities and lets the logits go; they are as good for its Hessian.
    """
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    versions = [t._version for t in tensors[1:]]
    logits_node = args[0].grad_fn if args else None
    below: Node | None = node if func is torch.nn.functional.cross_entropy else None
    while below is not None and below is not logits_node and below.name() != "LogSoftmaxBackward0":
        below = below.next_functions[0][0] if below.next_functions else None
    if below is None or below is logits_node or below.next_functions[0][0] is not logits_node:
        first = tensors[0]._version

        def by_arguments(axis: Batch) -> LossHessian | None:
            _refuse_changed(func, tensors, [first, *versions])
            return LOSSES[func](axis, *map(_widened, args), **kwargs)

        return by_arguments
    logits, rest, saved, version = weakref.ref(args[0]), args[1:], below, args[0]._version
    others = tensors[1:]

    def rule(axis: Batch) -> LossHessian | None:
        _refuse_changed(func, others, versions)
        f = logits()
        if f is None or f._version != version:
            f = saved._saved_result  # type: ignore[attr-defined]
        return LOSSES[func](axis, _widened(f), *rest, **kwargs)

    return rule


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


def _trains(args: tuple, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("training", args[5] if len(args) > 5 else False))


_HALVES = (torch.float16, torch.bfloat16)
# Functions whose results need a second look, and types of results that need none.
_WATCHED = _BATCH_NORMS | _BENDS | EXPANSIONS
# Each result is made from one of the arguments, the one at the same place.
_EACH = frozenset(spellings("broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d"))
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
        _state.recorder = None
        _forget()
    if not _recordable():
        return
    batch_dim = module.__dict__.get("_backpack_batch_dim", 0)
    recording = Recording(weakref.ref(module), None, batch_dim)
    entered.axes, entered.written = _axes_of_inputs(recording, module, args, kwargs), {}
    entered.ids = frozenset(map(id, recording.arguments))
    _state.recorder = _Recorder(recording)
    _state.recorder.__enter__()


def _axes_of_inputs(
    recording: Recording, module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> dict[int, Batch]:
    """The sample axes of a model's inputs, by ids: certain for the one that carries the batch."""
    dim = recording.batch_dim
    named: list[tuple[int | str, Tensor]] = [(j, t) for j, x in enumerate(args) for t in _flatten(x)]
    named += [(name, t) for name, x in kwargs.items() for t in _flatten(x)]
    tensors = [t for _, t in named]
    # A parameter may be the data (inputs that are trained), unless it is the module's or beside data.
    leaves = [t for t in tensors if type(t) is not Tensor and isinstance(t, nn.Parameter)]
    own = list(module.parameters()) if len(leaves) == len(tensors) else leaves
    for tensor in tensors:
        recording.arguments.append(tensor)
        if tensor.requires_grad:
            recording.entries.add(get_gradient_edge(tensor).node)
    marked = [axis for t in tensors if (axis := batch_of(t)) is not None]
    free = [
        (name, t)
        for name, t in named
        if t.dim() > dim and batch_of(t) is None and not any(t is p for p in own)
    ]
    given = [t for _, t in free]
    left = [] if marked else carriers(given, dim)
    sizes = [given[j].shape[dim] for j in left]
    recording.size = marked[0].size if marked else sizes[0] if sizes else None
    certain = set(left[:1])
    if left and doubtful(given[left[0]]):
        # Those that shapes do not tell from it are no guesses: where they disagree, no one is right.
        most = given[left[0]].dim()
        certain |= {j for j in left if given[j].dim() >= most}
        recording.doubted = len(left) > 1
    # With one sample its place is no sign that the right input was taken.
    others = sizes[1:] if recording.size != 1 else [t.shape[dim] for t in given]
    if recording.doubted or set(others) - {recording.size}:
        recording.inputs = [(name, t.shape) for name, t in free]
        recording.sizes = frozenset(others)
    return {
        id(t): regular_axis(t.shape[dim], dim, tentative=j not in certain)
        for j, t in enumerate(given)
        if t.shape[dim] == recording.size
    }


def _recordable() -> bool:
    compiling = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return disable.should_store_io() and torch.is_grad_enabled() and not compiling


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
    axes = {id(tensor): _last_axis(recorder, tensor) for tensor in _flatten(output)}
    _close()
    for tensor in _flatten(output):
        node = tensor.grad_fn
        if node is None:
            continue
        axis = axes[id(tensor)]
        if axis is not None:
            # What the loss takes is data, whatever its targets look like.
            axis = axis if axis.lost else axis.certain()
            mark(tensor, axis)
        recording.doubt = recording.doubt or _doubt(recording, tensor, axis)
        border, kept = Border(recording, tensor.output_nr, axis, tensor.shape), notes(node)
        kept.setdefault(BORDER, []).append(border)
        if LOSS not in kept:  # which is listened to
            node.register_prehook(lambda grads: _on_backward(recording, None, grads))


def _doubt(recording: Recording, output: Tensor, axis: Batch | None) -> torch.Size | None:
    """The shape of an output that speaks for another input as the one that carries the batch."""
    dim = recording.batch_dim
    if not recording.inputs or output.dim() <= dim or output.shape[dim] not in recording.sizes:
        return None
    if axis is None or axis.lost or not axis.fits(output.shape):
        return output.shape
    at_its_place = axis.dim == dim and output.shape[dim] == recording.size
    elsewhere = axis.plain and not recording.doubted
    return None if at_its_place or elsewhere else output.shape


def _last_axis(recorder: _Recorder, output: Tensor) -> Batch | None:
    """The sample axis of an output of the model, as its memory is now."""
    try:
        axis = recorder._axis(output)
        if recorder.recording.size != 1 or not output.dim():
            return axis
        known = axis is not None and axis.fits(output.shape)
        return axis if known else solo_axis(0, 1, output.shape, output.device)
    except Exception as error:
        recorder._give_up("the model's output", output, error)
        return batch_of(output)


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
    try:
        recorder.close()
        recorder.__exit__(None, None, None)
        for ref in recorder.adopted:
            tensor = ref()
            if tensor is not None and not tensor.requires_grad and hasattr(tensor, MARK):
                delattr(tensor, MARK)
    finally:
        _forget()
        recorder.recording.arguments.clear()


def _forget() -> None:
    """What is known of tensors in a forward pass goes with it."""
    entered.axes, entered.ids, entered.written = {}, frozenset(), {}


def _on_backward(recording: Recording, loss: LossRecord | None, grads: Any) -> None:
    reached(recording, loss, grads)


def captures(thread: int) -> bool:
    """Whether capture is on in a thread."""
    return thread not in _switched_off


class _StoreIO:
    """The attribute of that name, read from the class or an instance."""

    def __get__(self, instance: object, owner: object) -> bool:
        return captures(threading.get_ident())


class disable:  # noqa: N801
    """Switch capture off in this thread: ``with disable(): model(X)`` records nothing.

    Class attribute ``store_io`` and :meth:`should_store_io` say whether capture is on, as in the
    original library. Blocks may be nested, and one object be used again and by several threads.
    """

    store_io = _StoreIO()

    def __enter__(self) -> None:
        thread = threading.get_ident()
        _switched_off[thread] = _switched_off.get(thread, 0) + 1

    def __exit__(self, *exc: object) -> None:
        thread = threading.get_ident()
        _switched_off[thread] -= 1
        if not _switched_off[thread]:
            del _switched_off[thread]

    @staticmethod
    def should_store_io() -> bool:
        """Whether capture is on."""
        return captures(threading.get_ident())
