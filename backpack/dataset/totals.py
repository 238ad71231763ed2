"""What batches have contributed so far, quantity by quantity."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backpack.engine.block import backpack
from backpack.engine.state import current_block
from backpack.forms.base import Form
from backpack.quantities.base import BackpropExtension, Context
from backpack.quantities.combining import Added, Rule
from backpack.quantities.parts import Entry, dtype_of

# Where values of single samples go: a function that is called after each batch, or a folder.
Individual = Callable[[slice], object] | str | Path | None


GRADIENT = "grad"


def refuse_processes(options: Mapping[str, Any]) -> None:
    """Refuse a ``process_group`` where passes are put together, as options of a block."""
    if options.get("process_group") is not None:
        raise NotImplementedError(
            "an optimizer takes the process_group when it is made, not for single passes; leave it out"
        )


class Totals:
    """Values of all batches so far.

    Attributes:
        entries: for each parameter and field.
        batches: number of backward passes.
        samples: number of samples.
        weight: the sum of weights of their losses.
    """

    def __init__(self) -> None:
        self.entries: dict[Tensor, dict[str, Entry]] = {}
        self.batches, self.samples, self.weight = 0, 0, 0.0

    def add(self, batch: Mapping[Tensor, Mapping[str, Entry]], samples: int, weight: float) -> None:
        """Put a batch's values to those of the batches before it."""
        for p, fields in batch.items():
            known = self.entries.setdefault(p, {})
            for field, entry in fields.items():
                if field not in known:
                    known[field] = self._late(entry)
                    continue
                known[field].part = entry.rule.add(known[field].part, entry.part)
                known[field].samples += entry.samples
        for p, known in self.entries.items():
            for field, entry in known.items():
                if field not in batch.get(p, {}):
                    entry.with_samples(samples)
        self.batches, self.samples, self.weight = (
            self.batches + 1,
            self.samples + samples,
            self.weight + weight,
        )

    def _late(self, entry: Entry) -> Entry:
        """The first value of a parameter that earlier batches did not reach."""
        part = entry.rule.absent(entry.part, entry.samples, self.samples) if self.samples else None
        if part is None:
            return entry
        both = entry.rule.add(part, entry.part)
        return Entry(entry.rule, both, self.samples + entry.samples, entry.dtype)

    def weigh(self, factor: float) -> None:
        """Multiply the loss with a factor."""
        for fields in self.entries.values():
            for entry in fields.values():
                entry.part = entry.rule.weigh(entry.part, factor)

    def values(self) -> Iterator[tuple[Tensor, str, Any]]:
        """Parameters, fields, and values to save."""
        for p, fields in self.entries.items():
            for field, entry in fields.items():
                yield p, field, entry.value()


class _Collecting(BackpropExtension):
    """A quantity whose values are noted when they are finished."""

    # Who notes them, held weakly: graphs and gradients are not to wait for the garbage collector.
    _for: weakref.ref[Batches]

    def _note(self, value: Any, context: Context) -> None:
        batches = self._for()
        assert batches is not None
        batches.take(self.savefield, value, context)

    def conclude(self, state: Any, context: Context, reached: bool) -> Any:
        value = super().conclude(state, context, reached)
        if not reached:
            context = context._replace(gradient=partial(torch.zeros_like, context.parameter))
        self._note(value, context)
        return value


@lru_cache(256)
def _collecting(cls: Any) -> Any:
    return type(cls.__name__, (_Collecting, cls), {})


class SampleCount(BackpropExtension):
    """The number of samples, where no quantity is asked for that would tell."""

    savefield = "_backpack_samples"
    needs_gradient = False
    combine = Added(0)

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        return torch.tensor(float(form.samples))

    def add(self, state: Any, other: Any) -> Any:
        return state

    def zero(self, context: Context) -> Any:
        return torch.tensor(float(context.samples))


class Batches:
    """Collects the quantities of backward passes in blocks; what to make of them is for subclasses.

    Args:
        extensions: the quantities, each with a rule of how values combine.
    """

    def __init__(self, extensions: Sequence[BackpropExtension], rules: Sequence[Rule]) -> None:
        self.rules = {ext.savefield: rule for ext, rule in zip(extensions, rules, strict=True)}
        self.extensions = [self._noting(ext) for ext in extensions]
        self.totals = Totals()
        # Values of the backward pass under way.
        self._batch: dict[Tensor, dict[str, Entry]] | None = None
        self.owner: backpack | None = None

    def _noting(self, ext: BackpropExtension) -> BackpropExtension:
        noting: Any = copy.copy(ext)
        cls: Any = type(ext)
        noting.__class__ = _collecting(cls)
        noting._for = weakref.ref(self)
        return noting

    def take(self, field: str, value: Any, context: Context) -> None:
        """Note a value of the backward pass under way."""
        if self._batch is None:
            self._unseen()
        assert self._batch is not None
        rule = self.rules[field]
        entry = Entry(rule, rule.take(value, context), context.samples, dtype_of(value))
        self._batch.setdefault(context.parameter, {})[field] = entry

    def _unseen(self) -> None:
        """A backward pass that was not seen to begin."""
        raise RuntimeError(
            "a backward pass whose values are to be combined must be a call of loss.backward(), not of "
            "a function of torch.autograd"
        )

    @contextmanager
    def block(self, *more: BackpropExtension, **options: Any) -> Iterator[backpack]:
        """A block whose backward passes are collected."""
        # Of two quantities with the same field the last one counts.
        owner = backpack(*more, *self.extensions, **options)
        owner.collects = True
        with owner as self.owner, NotingCalls(self):
            yield self.owner

    def backward(self, loss: Tensor, call: Callable[[], Any]) -> Any:
        """One backward pass."""
        self._batch = {}
        try:
            result = call()
        except BaseException:
            self._batch = None
            raise
        self._done()
        return result

    def _done(self) -> None:
        batch, self._batch = self._batch, None
        assert batch is not None
        with torch.no_grad():
            self.commit(batch)

    def commit(self, batch: dict[Tensor, dict[str, Entry]]) -> None:
        """A backward pass is over."""
        raise NotImplementedError


class NotingCalls(TorchFunctionMode):
    """Sees calls of ``loss.backward()`` in a block."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches = batches

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = partial(func, *args, **(kwargs or {}))
        if func is not Tensor.backward:
            return call()
        block = current_block()
        if block is None or block.owner is not self.batches.owner or block.nested or not block.listens:
            return call()
        return self.batches.backward(args[0], call)
