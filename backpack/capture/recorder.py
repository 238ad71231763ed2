"""Forward: find the taps, the operations in which parameters meet data.

While the outermost extended module runs, a torch-function mode sees every operation. A result
depends on the data if an argument does; the mark is a
:class:`~backpack.own.SampleAxis`. An operation with a data-dependent result and an argument that
requires grad but does not depend on the data is a tap, noted on its autograd node.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from backpack._ambient import ambient
from backpack._torch import (
    in_transform,
    mode_at,
    modes_open,
    pack_padded_sequence,
    packs_saved_tensors,
    pad_packed_sequence,
    uncompiled_calls,
    without_torch_function,
)
from backpack.capture.in_place import FUNCTIONAL_TWINS
from backpack.capture.said import axis_of_bags, state
from backpack.capture.sequences import SequenceTracker
from backpack.capture.tracker import (
    BATCH_NORMS,
    ELEMENTWISE_NONLINEAR,
    flatten,
    note_own,
    tensors_in,
)
from backpack.graph.taps import LAYERS, NONLINEAR, TAPS, UNBATCHED, Recording, Tap, notes
from backpack.graph.transformed import note_transformed
from backpack.losses.base import LOSSES
from backpack.rules.base import SEVERAL_OUTPUTS
from backpack.rules.decompositions import OPENED
from backpack.rules.jagged import opened, opens
from backpack.samples.axis import MARK, SampleAxis, mark, sample_axis_of
from backpack.samples.movers import MOVERS, argument, spellings
from backpack.samples.propagate import ELEMENTWISE, EXPANSIONS, FACTORIES, known, moved, name_of

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
# Functions whose results need a second look.
_WATCHED = BATCH_NORMS | EXPANSIONS
_LAYER_NORM = torch.nn.functional.layer_norm
_NORM_OPTIONS = {"weight", "bias", "eps"}
# Each result is made from one of the arguments, the one at the same place.
_EACH = frozenset(spellings("broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d"))
# Movers that ask for shapes and numbers only: where they have put an axis is kept, for calls alike.
_BY_SHAPES = frozenset(
    spellings(*"transpose swapaxes swapdims permute reshape view flatten unflatten squeeze".split())
    + spellings("unsqueeze")
)
# By function, axis, shapes and further arguments: the axis, and that of the result.
_places: dict[tuple[Any, ...], tuple[SampleAxis, SampleAxis]] = {}
_MOST_PLACES = 2**14
_NUMBERS = frozenset({int, tuple, torch.Size})
_PLAIN = frozenset({torch.Size, int, float, bool, torch.dtype, torch.device, type(None)})
# Functions not written in Python call nothing that a mode would see, but for what subclasses do.
_BUILT_IN = frozenset(map(type, (torch.relu, Tensor.add, Tensor.__getitem__, Tensor.shape.__get__)))  # type: ignore[attr-defined]
_KNOWN_TYPES: tuple[Any, ...] = ((), (Tensor,), (nn.Parameter,))


class Recorder(SequenceTracker, TorchFunctionMode):
    """Sees every operation of one forward pass; ``finish`` is the hook that ends it."""

    def __init__(self, recording: Recording, finish: Callable[..., None]) -> None:
        super().__init__(recording)
        # Cleared when a forward pass ended without its hook: then everything is passed on.
        self.live = True
        # Whether whatever else sees its calls has no interest in them (a block's watch).
        self.alone = all(hasattr(mode_at(j), "only_backward") for j in range(modes_open()))
        # Operations of compiled parts are seen as well.
        self.compile_again = uncompiled_calls()
        module = recording.module()
        assert module is not None
        # Modules extended by name have this hook; of the others only the outermost needs it.
        self.hook: Any = None
        if "_backpack_root" not in module.__dict__:
            self.hook = module.register_forward_hook(finish, always_call=True)

    def close(self) -> None:
        """See no more."""
        self.live = False
        self.compile_again()
        if self.hook is not None:
            self.hook.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.live:
            return func(*args, **kwargs) if kwargs else func(*args)
        if in_transform():
            self.enter_transform()
            return func(*args, **kwargs) if kwargs else func(*args)
        usual_types = types in _KNOWN_TYPES
        if not usual_types and any(each.__name__ == "NestedTensor" for each in types):
            return self._nested(func, args, kwargs or {})
        route = _ROUTES.get(func)
        if route is not None:
            out = route(self, func, args, kwargs or {})
            self.recording.made.note(out)
            self.recording.made.note_written(args)
            return out
        if kwargs and kwargs.get("out") is not None:
            return self.write_into(func, args, kwargs)
        if self.alone and usual_types and type(func) in _BUILT_IN and modes_open():
            with without_torch_function():
                out = func(*args, **kwargs) if kwargs else func(*args)
                self._note(func, args, kwargs, out)
            return out
        out = func(*args, **kwargs) if kwargs else func(*args)
        # Other modes are told nothing of what happens here.
        if modes_open():
            with without_torch_function():
                self._note(func, args, kwargs, out)
        else:
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, out: Any) -> None:
        """Look at a call that is over; the user's forward pass goes on, whatever happens here."""
        try:
            if type(out) is Tensor or type(out) not in _PLAIN:
                self.recording.made.note(out)
            self._see(func, args, kwargs or {}, out)
        except Exception as error:
            self.give_up(func, out, error)

    def enter_transform(self) -> None:
        """What a transform in forward uses of parameters is found on the graph."""
        recording = self.recording
        if not recording.differentiated:
            recording.differentiated = True
            module = recording.module()
            if module is not None:
                note_transformed(module, recording.size)

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Look at a call that is over."""
        if self.recording.rivals:
            self.met.look(func, args, kwargs, out)
        if not torch.is_grad_enabled():
            self.touch(args, kwargs)
        if type(out) is not Tensor and type(out) in _PLAIN:
            return
        usual = not (ambient.written or self.functions.touched or self.functions.read)
        if usual and func in LAYERS and self._layer(func, args, kwargs, out):
            return
        key = None
        if usual and func in _BY_SHAPES and not kwargs and out is not args[0]:
            axis = getattr(args[0], MARK, None)
            if axis is not None and axis.picked is None:
                key = (func, id(axis), args[0].shape, out.shape, *args[1:])
                try:
                    before = _places.get(key)
                except TypeError:  # a list, say
                    before = key = None
                if before is not None and before[0] is axis:
                    out._backpack_batch = before[1]
                    return
        # Nearly all calls: data at one place of the graph or several alike, beside parameters or none.
        data: list[tuple[Tensor, SampleAxis]] = []
        sources = nested = False
        axes = ambient.axes
        for a in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(a, Tensor):
                batch = getattr(a, MARK, None) or axes.get(id(a))
                if batch is not None:
                    data.append((a, batch))
                elif a.requires_grad:
                    sources = True
            elif type(a) is list or type(a) is tuple:
                nested = nested or not all(type(each) is int for each in a)
        if nested or not usual or func in _WATCHED or func in LOSSES:
            self._look(func, args, kwargs, out)
        elif data and not sources and self.one_sample(func, args, out, data):
            pass
        elif not data:
            if sources or func in FACTORIES or any(t._base is not None for t in tensors_in(args)):
                self._look(func, args, kwargs, out)
        elif sources or not self._follow(func, args, kwargs, out, data):
            self._look(func, args, kwargs, out)
        elif key is not None and all(type(each) in _NUMBERS for each in args[1:]):
            if len(_places) >= _MOST_PLACES:
                _places.clear()
            _places[key] = data[0][1], out._backpack_batch

    def _follow(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        data: list[tuple[Tensor, SampleAxis]],
    ) -> bool:
        """Results that meet no parameter, in usual calls; ``False``: look closer."""
        results = [out] if type(out) is Tensor else out
        if type(results) not in (list, tuple) or (func in _EACH and results is out):
            return False
        mover, elementwise = MOVERS.get(func), func in ELEMENTWISE
        if mover is None and (results is out or (len(data) > 1 and not elementwise)):
            return False
        found = []
        for each in results:
            if type(each) is not Tensor:
                return False
            here = None
            for old, axis in data:
                if axis.lost is not None or each is old:
                    return False
                if mover is not None:
                    there = moved(mover, axis, old, each, args, kwargs)
                elif (elementwise and each.dim() != old.dim()) or not known(func, axis, old, args):
                    return False
                else:
                    there = axis
                if len(data) > 1 and (axis.tentative or axis.picked is not None):
                    return False
                if here is not None and not here.agrees(there):
                    return False
                here = there
            if here is None or here.lost or not here.fits(each.shape):
                return False
            if here.picked is not None and (here.solo is not None or not each.requires_grad):
                return False
            found.append(here)
        if func in ELEMENTWISE_NONLINEAR and out.grad_fn is not None and not out.is_complex():
            notes(out.grad_fn)[NONLINEAR] = self.recording, found[0]
        for each, axis in zip(results, found, strict=True):
            each._backpack_batch = axis
        return True

    def _layer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
        """The usual tap, a layer with a weight of its own; ``False``: look closer."""
        node = out.grad_fn
        if node is None or out._base is not None:
            return False
        if kwargs:
            if func is not _LAYER_NORM or len(args) != 2 or not kwargs.keys() <= _NORM_OPTIONS:
                return False
            args = (*args, kwargs.get("weight"), kwargs.get("bias"), kwargs.get("eps", 1e-5))
        at, *own = LAYERS[func]
        input, axes = args[at], ambient.axes
        axis: SampleAxis | None = getattr(input, MARK, None) or axes.get(id(input))
        if axis is None or axis.lost is not None:
            return False
        if axis.picked is not None:  # what belongs to one sample is a batch of one
            if axis.solo is None or axis.size == 1 or axis.dim or axis.bare or not out.numel():
                return False
        weight, bias = (args[j] if j < len(args) else None for j in own)
        if weight is None or not weight.requires_grad:
            return False
        for each in (weight, bias):
            if each is not None and (
                each.grad_fn is not None or hasattr(each, MARK) or id(each) in axes
            ):
                return False
        # Layers mix their last axes, and no others.
        features = len(args[1]) if func is _LAYER_NORM else UNBATCHED.get(func, 1)
        if axis.dim >= input.dim() - features or not axis.fits(out.shape):
            return False
        inputs: tuple[Node, ...] = ()
        if input.requires_grad:
            inputs = (input.grad_fn or get_gradient_edge(input).node,)
        recording = self.recording
        tap = Tap(func, 0, axis, inputs, recording, args=args)
        tap.plain = func is _LAYER_NORM and not packs_saved_tensors()
        notes(node)[TAPS] = [tap]
        recording.taps.append(weakref.ref(tap))
        out._backpack_batch = axis  # type: ignore[attr-defined]
        return True

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Look at a call with all its arguments and results."""
        marked, sources, faint = self.sort_arguments(args, kwargs)
        if isinstance(out, Tensor):
            if not marked and sources and func in EXPANSIONS:
                self.note_expansion(func, args, kwargs, out, sources)
            elif marked or faint or not sources:
                self.note_result(func, args, kwargs, out, 0, marked, sources, faint)
            else:
                note_own(out, sources)
        elif isinstance(out, (tuple, list)) and (marked or faint):
            own = list(tensors_in(args)) if func in _EACH else []
            for place, each in enumerate(out):
                if own:
                    marked, sources, faint = self.sort_arguments((own[place],), {})
                if isinstance(each, Tensor) and (marked or faint):
                    self.note_result(func, args, kwargs, each, place, marked, sources, faint)

    def _data(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``parameter.data``, which autograd does not see."""
        out = func(*args, **kwargs)
        if args[0].requires_grad:
            self.recording.unseen.append(weakref.ref(args[0]))
        if (axis := sample_axis_of(args[0])) is not None:
            mark(out, axis)
        return out

    def _begins(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``x.requires_grad_()``: below data that begins to require a gradient, the graph ends."""
        out = func(*args, **kwargs)
        x = args[0]
        own = x.requires_grad and x.is_leaf and not isinstance(x, nn.Parameter)
        if own and (sample_axis_of(x) is not None or id(x) in ambient.axes):
            self.recording.entries.add(get_gradient_edge(x).node)
        return out

    def _differentiate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``torch.autograd.grad``: a gradient's rows are taken for those of what it is about.

        That is tried out when backward starts, with what it uses of parameters
        (:mod:`backpack.graph.differentiated`).
        """
        out = func(*args, **kwargs)
        self.recording.differentiated = True
        inputs = args[1] if len(args) > 1 else kwargs.get("inputs", ())
        inputs = [inputs] if isinstance(inputs, Tensor) else inputs
        outputs = {t: sample_axis_of(t) for t in flatten(args[0] if args else kwargs["outputs"])}
        samples = [axis.solo for axis in outputs.values() if axis is not None and axis.size > 1]
        for given, gradient in zip(inputs, out, strict=False):
            axis = sample_axis_of(given) if isinstance(given, Tensor) else None
            if axis is not None and isinstance(gradient, Tensor) and not axis.bare:
                mark(gradient, axis.moved(axis.dim + gradient.dim() - given.dim()))
            elif isinstance(gradient, Tensor) and None not in samples:
                note_own(gradient, [t for t in outputs if outputs[t] is None], samples=samples)
        return out

    def _alone(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``x.to(other)``, ``x.view_as(other)``: nothing of the other's entries is in the result."""
        out = func(*args, **kwargs)
        try:
            with without_torch_function():
                self._see(func, args[:1], {}, out)
        except Exception as error:
            self.give_up(func, out, error)
        return out

    def _bags(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Bags of words that begin where an input says: the samples of the model."""
        with without_torch_function():
            axis = axis_of_bags(self.recording, args, kwargs)
        if axis is not None:
            state(self.recording, argument(args, kwargs, 0, "input"), axis)
            self.recording.rivals.clear()
        out = func(*args, **kwargs)
        try:
            self._see(func, args, kwargs, out)
        except Exception as error:
            self.give_up(func, out, error)
        return out

    def _open(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Operations with parameters inside are done by operations that can be seen."""
        marked, sources, faint = self.sort_arguments(args, kwargs)
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
            if func in SEVERAL_OUTPUTS and marked:
                self._recurrent(func, args, kwargs, out, marked, sources, faint)
            elif marked or faint:
                for place, each in enumerate(out if isinstance(out, tuple) else (out,)):
                    if isinstance(each, Tensor):
                        self.note_result(func, args, kwargs, each, place, marked, sources, faint)
        except Exception as error:
            self.give_up(func, out, error)
        return out

    def _nested(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Operations on nested tensors are done on their rows."""
        out = NotImplemented
        try:
            if opens(func):
                with self:
                    out = opened(func, args, kwargs)
        except Exception:  # the user's mistake, which the operation itself reports, or ours
            out = NotImplemented
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        for each in flatten(out):
            self.give_up(func, each, _not_followed(func))
        return out


def _not_followed(func: Any) -> NotImplementedError:
    return NotImplementedError(
        f"{name_of(func)} of nested tensors; do it on their rows (x.values()), or on x.to_padded_tensor"
    )


_ROUTES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(FUNCTIONAL_TWINS, Recorder.write_in_place),
    **dict.fromkeys(OPENED, Recorder._open),
    _DATA: Recorder._data,
    **dict.fromkeys((Tensor.requires_grad_, Tensor.requires_grad.__set__), Recorder._begins),  # type: ignore[attr-defined]
    torch.autograd.grad: Recorder._differentiate,
    torch.nn.functional.embedding_bag: Recorder._bags,
    **dict.fromkeys((Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as), Recorder._alone),
    **dict.fromkeys((pack_padded_sequence, pad_packed_sequence), Recorder._pack),
}
