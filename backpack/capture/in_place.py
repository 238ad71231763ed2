"""Operations in place: what they write, and what others who look at the same memory then hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from backpack._torch import SPACES
from backpack.capture import row_pairs
from backpack.capture.tracker import Tracker, note_own
from backpack.graph.making import View, make_tap
from backpack.samples.aliases import is_shared, places_of, wrote
from backpack.samples.axis import SampleAxis, mark, sample_axis_of
from backpack.samples.movers import MOVERS, spellings
from backpack.samples.propagate import ELEMENTWISE, POINTWISE, known, settled, traced
from backpack.samples.writes import assigned


def _functional_twins() -> dict[Any, Any]:
    """In-place functions and the out-of-place ones they correspond to."""
    twins: dict[Any, Any] = {Tensor.__setitem__: None, Tensor.data.__set__: None}  # type: ignore[attr-defined]
    for space in SPACES[:4]:
        for name in dir(space):
            if name.endswith("_") and not name.endswith("__"):
                func = getattr(space, name, None)
                if callable(func):
                    twins[func] = getattr(space, name[:-1], None)
    return twins


FUNCTIONAL_TWINS = _functional_twins()


# A tensor looks at other memory from then on.
_REPLACES = (Tensor.set_, Tensor.data.__set__)  # type: ignore[attr-defined]


# Operations after which a tensor looks at memory in another way, or at other memory.
_RELOOKS = frozenset(
    (
        *_REPLACES,
        *spellings(*"t_ transpose_ swapaxes_ swapdims_ squeeze_ unsqueeze_ as_strided_".split()),
    )
)


_LEAVES_VALUES = (Tensor.requires_grad_, Tensor.detach_)


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
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    own: SampleAxis | None
    marked: list[tuple[Tensor, SampleAxis]]
    rest: list[Tensor]
    inputs: tuple[Node, ...]
    lone: bool


class InPlaceTracker(Tracker):
    """Follows what is written to tensors that exist already."""

    def write_in_place(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
                self.touch(args, kwargs)
        except Exception as error:
            failed = error
        out = func(*args, **kwargs)
        try:
            if failed is not None:
                raise failed
            if write is not None:
                self._after(write)
        except Exception as error:
            self.give_up(func, target, error)
        return out

    def _before(
        self, func: Any, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Write | None:
        """What there is to know before an operation in place; ``None`` if it is no matter of data."""
        assigns = func == Tensor.__setitem__
        index = args[1] if assigns and isinstance(args[1], tuple) else ()
        marked, sources, faint = self.sort_arguments((*args, *index) if index else args, kwargs)
        note_own(target, sources, not marked and not faint)
        if not marked:
            if faint and sample_axis_of(target) is None and func not in _LEAVES_VALUES:
                self.adopt(target)
                self.lose(func, target, faint[0], fresh=False)
            return None
        inputs = tuple(t.grad_fn or get_gradient_edge(t).node for t, _ in marked if t.requires_grad)
        twin = FUNCTIONAL_TWINS[func]
        rest = [s for s in sources if s is not target]
        own, shared = sample_axis_of(target), is_shared(target)
        # What the target was before, for those who ask for its shape or, if it is tried out, values.
        op = func if twin is None or func in ELEMENTWISE else twin
        follows = assigns or op in MOVERS or known(op, marked[0][1], target, args)
        lone = len(rest) == len(sources)
        taken = not lone or (rest and twin is not None and twin not in (Tensor.add, Tensor.sub))
        old = target.clone() if taken else target.detach() if follows else target.detach().clone()
        if target.requires_grad and not taken:
            old.requires_grad_()
        row_pairs.keep_pairs(target, old)
        if own is not None:
            mark(old, own)
            marked = [(old if t is target else t, axis) for t, axis in marked]
        before = (old, *args[1:])
        return _Write(func, op, target, shared, before, kwargs, own, marked, rest, inputs, lone)

    def _after(self, write: _Write) -> None:
        """The axis of a tensor after an operation in place, and the tap, if it is one."""
        func, target, own, marked = write.func, write.target, write.own, write.marked
        if func in _REPLACES:
            batch = sample_axis_of(write.args[1])
        elif func == Tensor.__setitem__:
            batch = assigned(write.args[0], write.args[2], write.args[1])
        else:
            batch, _ = traced(write.op, write.args, write.kwargs, target, marked)
        if batch is None:
            batch = marked[0][1].losing("constants written to places that depend on data")
            batch = replace(batch, tentative=True)
        batch, whole = settled(func, target, batch, self.recording.batch_dim, marked)
        if batch.lost and not batch.tentative:
            assigns = func == Tensor.__setitem__
            op = row_pairs.assigned if assigns else FUNCTIONAL_TWINS[func] or write.op
            batch = row_pairs.axis_by_pairs(op, write.args, write.kwargs, target, marked) or batch
        if own is None:
            self.adopt(target)
        if batch.lost:
            self.lose(func, target, batch)
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

    def _written(self, write: _Write, batch: SampleAxis, whole: bool) -> None:
        """The tap of an operation in place: where the graph goes on from what was written to."""
        target, base = write.target, write.target._base
        func = write.func if write.func == Tensor.__setitem__ else FUNCTIONAL_TWINS[write.func]
        if func is None:
            return
        node, output_nr, view, inputs = target.grad_fn, target.output_nr, None, write.inputs
        if base is not None and base.grad_fn is not None:
            # Autograd notes it on what the target is a view of.
            axis, places = self.axis_of(base), places_of(target, base)
            if axis is None or places is None:
                batch = batch.losing("a view of memory of which nothing is known was written to")
            else:
                node, output_nr, view = base.grad_fn, base.output_nr, View(places, axis)
                before = node.next_functions[0][0]
                inputs = (*inputs, before) if before is not None else inputs
        assert node is not None
        sources = write.rest if write.lone else [write.args[0], *write.rest]
        make_tap(
            self.recording,
            func,
            write.args,
            write.kwargs,
            node,
            output_nr,
            0,
            batch,
            sources,
            inputs,
            None,
            whole,
            view,
        )

    def write_into(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Operations that write their results to given tensors."""
        out = func(*args, **kwargs)
        try:
            rest = {name: x for name, x in kwargs.items() if name != "out"}
            marked, _, faint = self.sort_arguments(args, rest)
            for place, each in enumerate(out if isinstance(out, tuple) else (out,)):
                if not isinstance(each, Tensor) or not (marked or faint):
                    continue
                own = sample_axis_of(each)
                batch = faint[0] if faint else marked[0][1]
                if marked:
                    batch, _ = traced(func, args, rest, each, marked, place)
                batch, _ = settled(func, each, batch, self.recording.batch_dim, marked)
                if own is None:
                    self.adopt(each)
                wrote(each, own, batch, is_shared(each))
        except Exception as error:
            self.give_up(func, out, error)
        return out
