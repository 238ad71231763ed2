"""What is known of tensors while a model runs: their sample axes, and the taps that follow."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.distributions import Distribution, Transform

from backpack._torch import SPACES
from backpack.capture.contest import Met, makes_pairs
from backpack.capture.functions import Functions, is_custom, settle
from backpack.capture.loss_records import note_loss
from backpack.capture.row_pairs import axis_by_pairs
from backpack.forms.base import Dense
from backpack.graph.making import make_tap, store_tap
from backpack.graph.taps import ENDS, MIXES, NONLINEAR, Recording, notes
from backpack.losses.base import LOSSES
from backpack.rules.base import ToForm
from backpack.samples.aliases import through_base
from backpack.samples.axis import (
    MADE,
    MARK,
    NOBODY,
    SampleAxis,
    mark,
    regular_axis,
    sample_axis_of,
    solo_axis,
)
from backpack.samples.movers import LIKE, spellings
from backpack.samples.propagate import ELEMENTWISE, FACTORIES, name_of, settled, traced

# Operations that curve each entry by itself.
ELEMENTWISE_NONLINEAR = frozenset(
    func
    for name in (
        "sigmoid tanh elu selu celu gelu silu mish softplus logsigmoid exp expm1 log log1p sqrt rsqrt "
        "reciprocal sin cos erf"
    ).split()
    for space in SPACES[:4]
    if (func := getattr(space, name, None)) is not None
)


BATCH_NORMS = {torch.nn.functional.batch_norm, torch.batch_norm}


# Operations that give one sample an axis, of which nothing is lost.
_IN_FRONT = frozenset((Tensor.__getitem__, *spellings("unsqueeze")))
_DISTRIBUTIONS = (Distribution, Transform)


# On tensors that are computed from parameters alone, or from a sample's data too: whose.
_OWN = "_backpack_own"


def is_own(tensor: Tensor) -> bool:
    """Whether it was computed from a model's parameters, and no data, while it was looked at."""
    return getattr(tensor, _OWN, None) == NOBODY


def note_own(
    out: Tensor, sources: Sequence[Tensor], own: bool = True, samples: Collection[int | None] = ()
) -> None:
    """Note of a result without an axis whether all that it was computed from is known, too.

    ``samples``: whose data has come in by derivatives with respect to parameters.
    """
    owners = {getattr(t, _OWN, None) for t in sources if not t.is_leaf} | set(samples)
    known = owners - {NOBODY}
    if own and None not in owners and len(known) < 2:
        setattr(out, _OWN, next(iter(known), NOBODY))
    elif hasattr(out, _OWN):
        delattr(out, _OWN)


def _hides(source: Tensor, marked: Sequence[tuple[Tensor, SampleAxis]]) -> bool:
    """Whether a tensor without an axis may hold data of other samples than those that it meets."""
    owner = NOBODY if source.grad_fn is None else getattr(source, _OWN, None)
    return owner is None or owner != NOBODY and any(axis.solo != owner for _, axis in marked)


def tensors_in(args: tuple[Any, ...] | list[Any]) -> Iterator[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif type(a) in (tuple, list):
            yield from tensors_in(a)


def flatten(value: Any) -> Iterator[Tensor]:
    """Tensors in nested containers and distributions, in order."""
    return (tensor for tensor, _ in with_owners(value))


def tensors_of(value: Any) -> list[tuple[Tensor, Any]]:
    """Tensors of inputs or outputs, in order, each with the object whose attribute it is (or ``None``).

    If there are none in containers, attributes of other objects are taken: of batches and results.
    Beside tensors such an object is rather a state, or settings.
    """
    return list(with_owners(value)) or list(with_owners(value, objects=True))


def with_owners(value: Any, owner: Any = None, objects: bool = False) -> Iterator[tuple[Tensor, Any]]:
    """Tensors in nested containers and distributions, in order, each with its distribution.

    With ``objects``, those that are attributes of other objects too, but of none inside of these, which
    may lead anywhere.
    """
    parts: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value, owner
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    elif hasattr(value, "__dataclass_fields__"):
        parts = (getattr(value, name) for name in value.__dataclass_fields__)
    elif callable(getattr(type(value), "keys", None)) and hasattr(type(value), "__getitem__"):
        # Batches of graphs or of words.
        parts = (value[name] for name in value.keys())  # noqa: SIM118
    elif isinstance(value, _DISTRIBUTIONS) or (objects and owner is None and not callable(value)):
        found = with_owners(list(getattr(value, "__dict__", {}).values()), value)
        yield from {id(tensor): (tensor, at) for tensor, at in found}.values()
    for each in parts:
        yield from with_owners(each, owner, objects)


class Tracker:
    """Follows the sample axis from arguments to results, and notes what is found on the graph."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        self.functions = Functions(recording)
        self.met = Met(recording.rivals)
        # Tensors that got an axis by an operation in place.
        self.adopted: list[weakref.ref[Tensor]] = []

    def axis_of(self, tensor: Tensor) -> SampleAxis | None:
        """The sample axis of a tensor, also where no operation that was seen has made it."""
        batch = sample_axis_of(tensor)
        if is_custom(tensor):
            found = self.functions.axis(tensor, batch)
        elif batch is None and tensor._base is not None:
            found = through_base(tensor)
        else:
            return batch
        if found is not None and found is not batch:
            mark(tensor, found)
        return found

    def sort_arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[tuple[Tensor, SampleAxis]], list[Tensor], list[SampleAxis]]:
        """Arguments that depend on the data, those that require grad but do not, faint ones' axes.

        Faint are tensors that count as constants although they depend on the data: the axis is lost,
        but no gradient flows through them, or none but that of parameters.
        """
        marked: list[tuple[Tensor, SampleAxis]] = []
        sources: list[Tensor] = []
        faint: list[SampleAxis] = []
        for a in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(a, Tensor):
                batch = self.axis_of(a)
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
                more = self.sort_arguments(tuple(tensors_in(a)), {})
                marked, sources, faint = marked + more[0], sources + more[1], faint + more[2]
        return marked, sources, faint

    def note_result(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Tensor,
        place: int,
        marked: list[tuple[Tensor, SampleAxis]],
        sources: list[Tensor],
        faint: list[SampleAxis],
    ) -> None:
        recording = self.recording
        if not marked:
            size = recording.size
            if faint:
                axis, _ = settled(func, out, faint[0], recording.batch_dim)
                if axis.lost:
                    self.lose(func, out, axis, fresh=False)
                else:
                    mark(out, axis)
            elif func in FACTORIES and size and out.dim() and out.shape[0] == size:
                mark(out, regular_axis(size, tentative=MADE))
            return
        batch, demoted = traced(func, args, kwargs, out, marked, place)
        if demoted and not batch.tentative and makes_pairs(func, out, batch, marked, demoted):
            recording.contest = f"{name_of(func)} pairs each row of one with each of another"
        batch, whole = settled(func, out, batch, recording.batch_dim, marked)
        if batch.lost and not batch.tentative:
            batch = axis_by_pairs(func, args, kwargs, out, marked) or batch
        fresh = True
        if batch.tentative and faint and not batch.lost and out.requires_grad:
            batch = self.settle_doubt(func, batch, out, args, faint)
            fresh = not batch.lost
        if batch.lost and batch.tentative:
            if func not in LIKE:
                self.lose(func, out, batch, fresh)
            return
        if batch.lost:
            self.lose(func, out, batch)
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
        if func in LOSSES and not any(t.is_complex() for t in tensors_in((args, kwargs))):
            f = kwargs.get("input", args[0] if args else None)
            at = sample_axis_of(f) if isinstance(f, Tensor) else None
            own = any(f is t for t in recording.arguments)
            module = recording.module() if own else None
            note_loss(recording, func, at, args, kwargs, node, module)
        elif func in BATCH_NORMS and _trains(args, kwargs) and (batch.lost or batch.dim != 1):
            # Samples among the channels, each of which has statistics of its own, are not mixed.
            notes(node)[MIXES] = "batch norm in training mode"
        elif (
            func in ELEMENTWISE_NONLINEAR and len(marked) == 1 and not (batch.lost or out.is_complex())
        ):
            # Of complex numbers the two parts are bent together.
            notes(node)[NONLINEAR] = recording, batch
        # What derivatives and transforms have made may hold data, which is looked for at backward.
        hidden = [s for s in sources if recording.differentiated and _hides(s, marked)]
        recording.hides |= bool(hidden)
        sources = [s for s in sources if not any(s is h for h in hidden)]
        if sources:
            data = [t for t, _ in marked if t.requires_grad and not any(t is s for s in sources)]
            inputs = tuple(t.grad_fn or get_gradient_edge(t).node for t in (*data, *hidden))
            # F.linear may return a view of its result: in-place operations replace the view's node.
            base = out._base
            if base is not None and node.next_functions[0][0] is not base.grad_fn:
                base = None
            make_tap(
                recording,
                func,
                args,
                kwargs,
                node,
                out.output_nr,
                place,
                batch,
                sources,
                inputs,
                base,
                whole,
            )
        if is_custom(out):
            settle(out, batch)

    def one_sample(
        self, func: Any, args: tuple[Any, ...], out: Any, data: list[tuple[Tensor, SampleAxis]]
    ) -> bool:
        """The result of an operation on data of one sample, of several: it is all that sample's."""
        first = data[0][1]
        sample, tentative = first.solo, first.tentative
        if sample is None or type(out) is not Tensor or func in LIKE:
            return False
        if not out.requires_grad:  # nobody's own as yet
            if func not in _IN_FRONT or (func is Tensor.__getitem__ and args[1] is not None):
                return False
            tentative = max(1, tentative)
        for old, axis in data:
            if axis is not first and (axis.solo != sample or axis.tentative != first.tentative):
                return False
            if axis.lost is not None or axis.size == 1 or out is old:
                return False
        if not out.numel() or is_custom(out):
            return False
        axis = solo_axis(sample, first.size, out.shape, out.device, tentative)
        if len(data) == 1 and func in ELEMENTWISE_NONLINEAR and not out.is_complex():
            notes(out.grad_fn)[NONLINEAR] = self.recording, axis  # type: ignore[arg-type]
        out._backpack_batch = axis  # type: ignore[attr-defined]
        return True

    def settle_doubt(
        self, func: Any, batch: SampleAxis, out: Tensor, args: tuple[Any, ...], faint: list[SampleAxis]
    ) -> SampleAxis:
        """A tentative axis meets data that has lost its own: they agree if all rows get the same."""
        for t in tensors_in(args):
            axis = sample_axis_of(t)
            if axis is not None and axis.lost:
                place = batch.dim - (out.dim() - t.dim())
                if func not in ELEMENTWISE or (place >= 0 and t.shape[place] != 1):
                    return faint[0]
        return batch

    def lose(self, func: Any, out: Tensor, lost: SampleAxis, fresh: bool = True) -> None:
        """The axis of a result is not known; ``fresh``: that of its arguments was."""
        recording = self.recording
        where = f"{name_of(func)}: {lost.lost}" if fresh else str(lost.lost)
        # A loss adds its samples up: that is no place where they were lost.
        if recording.lost is None and out.requires_grad and func not in LOSSES:
            recording.lost = where
        # What counts as a constant may meet a parameter later, for whom the place is news.
        mark(out, replace(lost, lost=where) if lost.tentative else lost)

    def give_up(self, func: Any, out: Any, error: Exception) -> None:
        """A call that could not be followed: nothing is known of its results."""
        why = f"a call that cannot be followed ({type(error).__name__}: {error})"
        for each in flatten(out):
            lost = SampleAxis(self.recording.size or 1, lost=why, tentative=not each.requires_grad)
            self.lose(func, each, lost)

    def touch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Data is read without grad: inside a custom Function, perhaps."""
        for a in tensors_in((*args, *kwargs.values())):
            if a.requires_grad:
                axis = self.axis_of(a)
                if axis is not None:
                    self.functions.touch(a, axis)
                else:
                    self.functions.read = True

    def forget_adopted(self) -> None:
        """Tensors that are not the model's alone are left as they were found."""
        for ref in self.adopted:
            tensor = ref()
            if tensor is not None and not tensor.requires_grad and hasattr(tensor, MARK):
                delattr(tensor, MARK)

    def adopt(self, target: Tensor) -> None:
        """A tensor without an axis gets one, and may have been there before: not to be left on it."""
        self.adopted.append(weakref.ref(target))

    def note_expansion(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Tensor,
        sources: list[Tensor],
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


def _note_end(recording: Recording, out: Tensor, marked: list[tuple[Tensor, SampleAxis]]) -> None:
    """Remember what a result was computed from in which samples are no longer apart."""
    if out.grad_fn is not None:
        ends = [(get_gradient_edge(t), axis) for t, axis in marked if t.requires_grad and not axis.lost]
        notes(out.grad_fn)[ENDS] = [(edge, axis, recording) for edge, axis in ends]


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


def _trains(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("training", args[5] if len(args) > 5 else False))
