"""What the user says about samples: which input carries them, or which row belongs to which."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from backpack._ambient import ambient
from backpack._torch import nested_parts, without_torch_function
from backpack.graph.taps import Recording
from backpack.rules.components import Places, rows_of
from backpack.samples.aliases import Written
from backpack.samples.axis import (
    SampleAxis,
    axis_of,
    mark,
    memory_of,
    picked_axis,
    regular_axis,
    sample_axis_of,
    solo_axis,
)
from backpack.samples.movers import argument
from backpack.samples.packing import axis_of_packed

# An input by its name or position, or a function of the inputs.
Samples = str | int | Callable[..., Any]
Said = list[tuple[Tensor, SampleAxis]]


def axis_of_rows(
    x: Tensor, sample_of_row: Tensor | Sequence[int] | int, samples: int | None = None, dim: int = 0
) -> SampleAxis:
    """The sample axis of a tensor from the sample that each of its rows belongs to.

    Args:
        x: the tensor, with its rows on axis ``dim``.
        sample_of_row: ``[rows]``, numbers from 0; or one number for all of the tensor.
        samples: how many samples there are; by default one more than the largest number.
        dim: the axis of the rows.

    Raises:
        ValueError: if numbers and rows do not fit.
    """
    with without_torch_function():
        if isinstance(sample_of_row, int) and not isinstance(sample_of_row, bool):
            size = _count(sample_of_row, sample_of_row, samples)
            return solo_axis(sample_of_row, size, x.shape, x.device, dim=dim)
        rows = torch.as_tensor(sample_of_row, device=x.device)
        if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
            raise ValueError(
                f"sample_of_row holds numbers of samples, whole ones, but got {rows.dtype}"
            )
        dim = dim + x.dim() if dim < 0 else dim
        shape = tuple(rows.shape)
        if not shape or shape != tuple(x.shape[dim : dim + len(shape)]):
            raise ValueError(
                f"sample_of_row has shape {shape}, but what it is about has {tuple(x.shape)}: it has "
                f"one number for each row, of which there are {x.shape[dim] if x.dim() > dim else 0} "
                f"on axis {dim}"
            )
        rows = rows.long()
        least, largest = (int(rows.min()), int(rows.max())) if rows.numel() else (0, -1)
        size = _count(least, largest, samples)
        if len(shape) == 1:
            return picked_axis(rows, size, dim)
        axis = axis_of(rows, size)
    if axis is None:
        raise ValueError(
            f"sample_of_row of shape {shape} puts samples on more than one axis; make these axes one "
            "before any layer (x.flatten(0, 1)), and give one number for each row"
        )
    return axis.moved(axis.dim + dim)


def _count(least: int, largest: int, samples: int | None) -> int:
    size = largest + 1 if samples is None else samples
    if least < 0 or largest >= size:
        raise ValueError(f"samples are numbered from 0 to {size - 1}, but got {least} to {largest}")
    return size


def state(recording: Recording, x: Tensor, axis: SampleAxis) -> None:
    """From here on, ``x`` has this axis in a forward pass, and others no guessed one that disagrees."""
    recording.size, recording.stated = axis.size, True
    recording.inputs = []
    ambient.stated = (*ambient.stated, axis)
    axes = ambient.axes
    for given in recording.arguments:
        known = axes.get(id(given))
        if known is not None and known.size != axis.size:
            del axes[id(given)]
    memory = ambient.written.get(memory_of(x))  # type: ignore[arg-type]
    if isinstance(memory, Written):
        memory.write(x, axis)
    mark(x, axis)


def axis_of_bags(
    recording: Recording, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis | None:
    """The sample axis of the words of an ``embedding_bag`` whose offsets are an input of the model.

    Each bag is a sample: ``model(text, offsets)``. ``None`` where somebody has said otherwise, other
    inputs have another number of rows, or parameters have met the words already.
    """
    words = argument(args, kwargs, 0, "input")
    offsets = argument(args, kwargs, 2, "offsets")
    if recording.stated or recording.taps or recording.batch_dim or not isinstance(offsets, Tensor):
        return None
    known = sample_axis_of(words)
    if not any(offsets is given for given in recording.arguments) or words.dim() != 1:
        return None
    if known is not None and not (known.plain and known.size == len(words)):
        return None
    bags = len(offsets) - bool(argument(args, kwargs, 10, "include_last_offset"))
    if recording.size not in (len(words), bags):
        return None
    places = torch.arange(len(words), device=words.device)
    return picked_axis(torch.searchsorted(offsets[:bags].to(places), places, right=True) - 1, bags)


def packed_axis(packed: PackedSequence) -> SampleAxis:
    """The sample axis of a packed sequence's data: the first steps of all, the second steps, ..."""
    data, sizes, order, _ = packed
    with without_torch_function():
        size = int(sizes[0]) if len(sizes) else 0
        batch = regular_axis(size) if order is None else picked_axis(order.to(data.device), size)
        return axis_of_packed(batch, sizes, data.device)


def components_axis(x: Tensor) -> SampleAxis:
    """The sample axis of a nested tensor's components: each is a sample, unless they are marked."""
    return sample_axis_of(x) or regular_axis(len(nested_parts(x).offsets) - 1)


def nested_axis(x: Tensor) -> SampleAxis:
    """The sample axis of a nested tensor's rows."""
    axis, component = components_axis(x), Places.of(x).component
    with without_torch_function():
        ids = axis.sample_ids(component.device)[component]
        return picked_axis(ids, axis.size, nested_parts(x).axis)


def said_axes(
    samples: Samples, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dim: int
) -> Said:
    """The sample axes of inputs that the user spoke of.

    Raises:
        ValueError: if there is no such input, or it cannot carry a batch.
    """
    if not callable(samples):
        return _carried(*_named(samples, module, args, kwargs), dim)
    found = samples(*args, **kwargs)
    several = isinstance(found, list) and any(type(each) is tuple for each in found)
    said = [each for part in (found if several else [found]) for each in _stated(part, dim)]
    size = max((axis.size for _, axis, _ in said), default=0)
    # Rows may belong to the first samples only.
    pairs = [(x, axis if rows is None else axis_of_rows(x, rows, size)) for x, axis, rows in said]
    other = next((axis.size for _, axis in pairs if axis.size != size), None)
    if other is not None:
        raise ValueError(f"samples=... speaks of {other} samples, and of {size}")
    return pairs


def _stated(part: Any, dim: int) -> list[tuple[Tensor, SampleAxis, Any]]:
    """What a function of the inputs says: an input, or an input and the sample of each of its rows.

    The last entries are rows of which it is not said how many samples there are.
    """
    what = "what samples=... returns"
    if type(part) is not tuple:
        return [(x, axis, None) for x, axis in _carried(what, part, dim)]
    if len(part) not in (2, 3) or not isinstance(part[0], Tensor):
        raise ValueError(
            f"{what} is an input, a pair (input, sample_of_row), a triple with the number of "
            f"samples, or a list of these, but got a tuple of {len(part)}"
        )
    x, sample_of_row, *count = part
    if x.is_nested:  # of each component
        component = Places.of(x).component
        x, sample_of_row = rows_of(x), torch.as_tensor(sample_of_row).to(component.device)[component]
    return [(x, axis_of_rows(x, sample_of_row, *count), None if count else sample_of_row)]


def _carried(what: str, value: Any, dim: int) -> Said:
    """The sample axes of an input that carries the batch."""
    if isinstance(value, PackedSequence):
        return [(value.data, packed_axis(value))]
    if isinstance(value, Tensor) and value.is_nested:
        return [(rows_of(value), nested_axis(value))]
    if isinstance(value, Tensor):
        axis = sample_axis_of(value)
        if axis is None and value.dim() <= dim:
            raise ValueError(
                f"{what} has shape {tuple(value.shape)}, without an axis {dim} for samples"
            )
        return [(value, axis or regular_axis(value.shape[dim], dim))]
    parts = list(value) if isinstance(value, (list, tuple)) else []
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(
            f"{what} is a {type(value).__name__}; the samples are on a tensor, in a packed sequence or "
            "are tensors of a list. Name a part of it (samples='data.x'), or use a function of the "
            "inputs (samples=lambda data: (data.x, data.batch))"
        )
    return [(part, axis_of_rows(part, n, len(parts))) for n, part in enumerate(parts)]


def _named(
    samples: str | int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any]:
    """An input by its name, with dots to parts of it, or by its position."""
    try:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        given = {**{str(j): x for j, x in enumerate(args)}, **kwargs}
    given = {name: x for name, x in {**given, **kwargs}.items() if name not in ("args", "kwargs")}
    if isinstance(samples, int):
        values = [*args, *[x for name, x in given.items() if not any(x is each for each in args)]]
        if not -len(values) <= samples < len(values):
            raise ValueError(f"samples={samples}, but the model was given {len(values)} inputs")
        return f"input {samples}", values[samples]
    first, *rest = samples.split(".")
    if first not in given:
        raise ValueError(
            f"samples={samples!r}, but the model was given no input of that name; it has "
            f"{', '.join(given) or 'none'}"
        )
    value = given[first]
    for name in rest:
        try:
            value = value[name] if isinstance(value, dict) else getattr(value, name)
        except (KeyError, AttributeError) as error:
            raise ValueError(f"samples={samples!r}, but there is no {name!r} in that input") from error
    return f"input {samples!r}", value
