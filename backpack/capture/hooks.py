"""Hooks of extended modules: they open and close the recording of a forward pass."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributions import Categorical
from torch.nn.utils.rnn import PackedSequence

from backpack._ambient import ambient
from backpack._torch import (
    called_compiled,
    fakes,
    in_transform,
    nested_parts,
    rows_in_transform,
    without_torch_function,
)
from backpack.capture.contest import contested
from backpack.capture.inputs import carriers, doubtful
from backpack.capture.loss_records import note_loss, on_backward
from backpack.capture.passages import passages
from backpack.capture.recorder import Recorder
from backpack.capture.said import Said, components_axis, nested_axis, packed_axis, said_axes
from backpack.capture.switch import disable
from backpack.capture.tracker import flatten, is_own, tensors_of, with_owners
from backpack.graph.nodes import kind_of
from backpack.graph.outputs import ModelOutput
from backpack.graph.taps import LOSS, MODEL_OUTPUT, Recording, notes
from backpack.graph.transformed import note_transformed
from backpack.rules.components import ROWS, rows_of
from backpack.samples.axis import MADE, SampleAxis, mark, regular_axis, sample_axis_of, solo_axis


def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of extended modules: the outermost call opens a recording."""
    if torch.compiler.is_compiling():  # first of all, so that nothing else is traced
        return
    recorder = ambient.recorder
    if recorder is not None and recorder.live and in_transform():
        return recorder.enter_transform()
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
        ambient.recorder = None
        _forget()
    if not _recordable():
        return
    if in_transform():
        root = "_backpack_root" in module.__dict__
        return _note_transformed(module if root else None, args, kwargs)
    _say_that_it_is_uncompiled(module)
    batch_dim = module.__dict__.get("_backpack_batch_dim", 0)
    recording = Recording(weakref.ref(module), None, batch_dim)
    said = module.__dict__.get("_backpack_samples")
    # No mode is asked for what is looked at, unless code of the user's is called.
    with nullcontext() if callable(said) else without_torch_function():
        axes = _axes_of_inputs(recording, module, args, kwargs)
    ambient.axes, ambient.written = axes, {}
    ambient.ids = frozenset(map(id, recording.arguments))
    ambient.recorder = Recorder(recording, after_forward)
    ambient.passages = passages(ambient.recorder, module)
    ambient.recorder.__enter__()


def _note_transformed(module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A call inside of a transform of ``torch.func``: only the number of samples is noted."""
    if module is None:
        return
    data = next((tensor for tensor, _ in tensors_of((*args, *kwargs.values()))), None)
    dim = module.__dict__.get("_backpack_batch_dim", 0)
    size = None if data is None else rows_in_transform(data)
    if data is not None and size is None and data.dim() > dim:
        size = data.shape[dim]
    note_transformed(module, size)


def _axes_of_inputs(
    recording: Recording, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[int, SampleAxis]:
    """The sample axes of a model's inputs, by ids: certain for the one that carries the batch."""
    dim, samples = recording.batch_dim, module.__dict__.get("_backpack_samples")
    if len(args) == 1 and type(args[0]) is Tensor and not kwargs and samples is None:
        # Nearly all calls: one tensor, which carries the batch.
        (only,) = args
        recording.arguments.append(only)
        if only.requires_grad:
            recording.entries.add(get_gradient_edge(only).node)
        axis = sample_axis_of(only)
        if axis is None and only.dim() > dim:
            recording.size = only.shape[dim]
            return {id(only): regular_axis(recording.size, dim)}
        recording.size = None if axis is None else axis.size
        ambient.stated = () if axis is None else (axis,)
        return {}
    objects = not any(True for _ in flatten((*args, *kwargs.values())))
    inputs: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    named = [(name, t) for name, x in inputs for t, _ in with_owners(x, objects=objects)]
    nested = [t for _, t in named if t.is_nested]
    if nested:
        _note_rows(nested)
        named = [(name, rows_of(t) if t.is_nested else t) for name, t in named]
    tensors = [t for _, t in named]
    # A parameter may be the data (inputs that are trained), unless it is the module's or beside data.
    leaves = [t for t in tensors if type(t) is not Tensor and isinstance(t, nn.Parameter)]
    own = list(module.parameters()) if len(leaves) == len(tensors) else leaves
    for tensor in tensors:
        recording.arguments.append(tensor)
        if tensor.requires_grad:
            recording.entries.add(get_gradient_edge(tensor).node)
    if samples is not None:
        said = said_axes(samples, module, args, kwargs, dim)
    else:
        said = [(x.data, packed_axis(x)) for x in (*args, *kwargs.values()) if _is_packed(x)]
        said += [(rows_of(x), nested_axis(x)) for x in nested if sample_axis_of(rows_of(x)) is None]
    if said:
        axes = _beside(said, recording, tensors)
        # What is made of a component without rows is that component's.
        ambient.stated += tuple(components_axis(x) for x in nested)
        return axes
    marked = [axis for t in tensors if (axis := sample_axis_of(t)) is not None]
    ambient.stated = tuple(marked)
    free = [
        (name, t)
        for name, t in named
        if t.dim() > dim and sample_axis_of(t) is None and not any(t is p for p in own)
    ]
    given = [t for _, t in free]
    left = [] if marked else carriers(given, dim)
    sizes = [given[j].shape[dim] for j in left]
    recording.size = marked[0].size if marked else sizes[0] if sizes else None
    certain = set(left[:1])
    if left and doubtful(given[left[0]]):
        # Inputs that shapes do not tell from it are no guesses: where they disagree, none is right.
        most = given[left[0]].dim()
        certain |= {j for j in left if given[j].dim() >= most}
        recording.doubted = len(left) > 1
    # With one sample its place is no sign that the right input was taken.
    others = sizes[1:] if recording.size != 1 else [t.shape[dim] for t in given]
    if len(left) > 1 or set(others) - {recording.size}:
        recording.inputs = [(name, t.shape) for name, t in free]
    if recording.doubted or set(others) - {recording.size}:
        recording.sizes = frozenset(others)
    recording.rivals = {id(given[j]) for j in left if given[j].shape[dim] != recording.size}
    # What a larger input explains is no more than a guess, as positions made by the model are.
    guesses = {j: MADE if j not in left else 1 for j in range(len(given)) if j not in certain}
    return {
        id(t): regular_axis(t.shape[dim], dim, tentative=guesses.get(j, 0))
        for j, t in enumerate(given)
        if t.shape[dim] == recording.size
    }


def _note_rows(nested: Sequence[Tensor]) -> None:
    """For the time of this forward pass, nested tensors are their rows."""
    fresh = tuple(x for x in nested if not hasattr(x, ROWS) and not nested_parts(x).holes)
    for x in fresh:
        setattr(x, ROWS, rows_of(x))
    ambient.nested = fresh


def _is_packed(x: Any) -> bool:
    return isinstance(x, PackedSequence) and sample_axis_of(x.data) is None


def _beside(said: Said, recording: Recording, tensors: list[Tensor]) -> dict[int, SampleAxis]:
    """The axes that the user has stated; other inputs of as many rows as samples are guesses."""
    dim, size = recording.batch_dim, said[0][1].size
    recording.size, recording.stated = size, True
    ambient.stated = tuple(axis for _, axis in said)
    own = [t for t in tensors if isinstance(t, nn.Parameter) and type(t) is not Tensor]
    axes = {
        id(t): regular_axis(size, dim, tentative=True)
        for t in tensors
        if t.dim() > dim and t.shape[dim] == size and not any(t is p for p in own)
    }
    for tensor, axis in said:
        if not any(tensor is t for t in recording.arguments):
            recording.arguments.append(tensor)
            if tensor.requires_grad:
                recording.entries.add(get_gradient_edge(tensor).node)
        axes[id(tensor)] = axis
    return axes


def current_recorder() -> Recorder | None:
    """What sees the forward pass of an extended module that runs in this thread."""
    recorder = ambient.recorder
    return recorder if recorder is not None and recorder.live else None


def _recordable() -> bool:
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return disable.should_store_io() and torch.is_grad_enabled() and not tracing and not fakes()


# Compiled models of which was said that they run uncompiled.
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _say_that_it_is_uncompiled(module: nn.Module) -> None:
    if module not in _told and called_compiled(within=8):
        _told.add(module)
        warnings.warn(
            f"a compiled {type(module).__name__} runs uncompiled inside of backpack(...) blocks, where "
            "every operation is looked at; outside of them it is compiled",
            stacklevel=2,
        )


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


def forward_runs() -> bool:
    """Whether the forward pass of an extended module is under way in this thread."""
    recorder = ambient.recorder
    return recorder is not None and recorder.live and _calls_running(recorder.recording.module()) > 0


def after_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of extended modules (called also if forward raised): close the recording."""
    if torch.compiler.is_compiling():
        return
    recorder = ambient.recorder
    if recorder is None or recorder.recording.module() is not module:
        return
    recording = recorder.recording
    if recording.depth:
        recording.depth -= 1
        return
    ambient.recorder = None
    with without_torch_function():  # no mode is asked for what is looked at
        _close(recorder, output)


def _close(recorder: Recorder, output: Any) -> None:
    """Note on the graph what the model gave, and forget the forward pass."""
    recording = recorder.recording
    try:
        recorder.close()
        recorder.__exit__(None, None, None)
        found = [(output, None)] if type(output) is Tensor else tensors_of(output)
        found = [(rows_of(x) if x.is_nested else x, owner) for x, owner in found]
        outputs = [tensor for tensor, _ in found]
        axes = [_last_axis(recorder, tensor) for tensor in outputs]
        known = [sample_axis_of(tensor) for tensor in outputs]
        recording.contest = recording.contest or contested(recorder.met, recording, outputs, known)
        recorder.forget_adopted()
    finally:
        _forget()
        # Inference tensors count no versions: theirs are not known to be the same.
        if not any(t.is_inference() for t in recording.arguments):
            recording.data = [(weakref.ref(t), t._version) for t in recording.arguments]
        recording.arguments.clear()
    for (tensor, owner), axis in zip(found, axes, strict=True):
        if tensor.grad_fn is None:
            continue
        edge = _given(tensor, owner)
        node, place = edge.node, edge.output_nr
        if axis is not None:
            # What the loss takes is data, whatever its targets look like.
            axis = axis if axis.lost else axis.certain()
            mark(tensor, axis)
        elif recording.contest is None and _is_penalty(recording, tensor):
            continue
        recording.doubt = recording.doubt or _doubt(recording, tensor, axis)
        border, kept = ModelOutput(recording, place, axis, tensor.shape), notes(node)
        kept.setdefault(MODEL_OUTPUT, []).append(border)
        if LOSS not in kept:  # which is listened to
            node.register_prehook(lambda grads: on_backward(recording, None, grads))


def _given(output: Tensor, owner: Any) -> GradientEdge:
    """Where an output is in the graph: of a distribution over classes, what the model has made it from.

    Its logits are normalised, so that the loss is linear in them and its Hessian nothing.
    """
    edge = get_gradient_edge(output)
    if isinstance(owner, Categorical) and kind_of(edge.node) == "Sub":
        (below, place), (normaliser, _) = edge.node.next_functions
        if below is not None and normaliser is not None and kind_of(normaliser) == "Logsumexp":
            if normaliser.next_functions[0] == (below, place):
                return GradientEdge(below, place)
    return edge


def _is_penalty(recording: Recording, output: Tensor) -> bool:
    """Whether this is no output, but a term of the loss without data."""
    return bool(recording.taps) and is_own(output) and recording.size not in output.shape


def _doubt(recording: Recording, output: Tensor, axis: SampleAxis | None) -> torch.Size | None:
    """The shape of an output that speaks for another input as the one that carries the batch."""
    dim = recording.batch_dim
    if not recording.inputs:
        return None
    if recording.size == 1 and axis is not None and not axis.lost and axis.fits(output.shape):
        # The rows of one sample, wherever they lie, may be the other input's samples.
        if not axis.bare and output.shape[axis.dim] in recording.sizes - {1}:
            return output.shape
    if output.dim() <= dim or output.shape[dim] not in recording.sizes:
        return None
    if axis is None or axis.lost or not axis.fits(output.shape):
        return output.shape
    at_its_place = axis.dim == dim and output.shape[dim] == recording.size
    elsewhere = axis.plain and not recording.doubted
    return None if at_its_place or elsewhere else output.shape


def _last_axis(recorder: Recorder, output: Tensor) -> SampleAxis | None:
    """The sample axis of an output of the model, as its memory is now."""
    try:
        axis = recorder.axis_of(output)
        if recorder.recording.size != 1 or not output.dim():
            return axis
        known = axis is not None and axis.fits(output.shape)
        return axis if known else solo_axis(0, 1, output.shape, output.device)
    except Exception as error:
        recorder.give_up("the model's output", output, error)
        return sample_axis_of(output)


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


def after_loss(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """Forward hook of extended loss modules in :data:`LOSS_MODULES`."""
    if torch.compiler.is_compiling():
        return
    node = output.grad_fn
    if node is None or ambient.recorder is not None or not _recordable():
        return
    func, names = LOSS_MODULES[type(module)]
    f = args[0] if args else kwargs["input"]
    axis, dim = sample_axis_of(f), module.__dict__.get("_backpack_batch_dim", 0)
    if axis is None and f.dim() > dim:
        axis = regular_axis(f.shape[dim], dim)
    recording = Recording(weakref.ref(module), None, dim)
    options = {name: getattr(module, name) for name in names}
    note_loss(recording, func, axis, args, {**kwargs, **options}, node, module)


def _forget() -> None:
    """What is known of tensors in a forward pass goes with it."""
    if ambient.passages is not None:
        ambient.passages.close()
        ambient.passages = None
    for x in ambient.nested:
        delattr(x, ROWS)
    ambient.nested = ()
    ambient.forget_forward()
