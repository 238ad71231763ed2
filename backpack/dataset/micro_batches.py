"""Passes of micro-batches, put together before an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd import Variable

from backpack._torch import current_task
from backpack.dataset.totals import Batches, Totals
from backpack.engine.block import backpack
from backpack.quantities.base import BackpropExtension, Context
from backpack.quantities.combining import Never
from backpack.quantities.parts import Entry, exchanged, rule_of
from backpack.quantities.processes import Processes


class MicroBatches(Batches):
    """Micro-batches of one step: the loss is the sum of those whose ``backward`` was called.

    After each pass the parameters hold the values of all passes so far. A rule that does not combine
    values is an error with the second pass only.
    """

    def __init__(self, extension: BackpropExtension) -> None:
        rule = rule_of(extension)
        if rule is None:
            rule = Never(f"{extension!r} does not say how values of several backward passes combine")
        super().__init__([extension], [rule])
        self.field = extension.savefield
        # The pass under way, if it was not seen to begin.
        self._task: int | None = None

    def refuse_more(self) -> str | None:
        """Why there can be no further pass."""
        (rule,) = self.rules.values()
        return rule.why if self.totals.batches and isinstance(rule, Never) else None

    def backward(self, loss: Tensor, call: Callable[[], Any]) -> Any:
        try:
            return super().backward(loss, call)
        except BaseException:
            self.drop()
            raise

    def take(self, field: str, value: Any, context: Context) -> None:
        if self._task is not None and self._task != current_task():
            self.drop()  # it raised
        super().take(field, value, context)

    def _unseen(self) -> None:
        """Begin it with its first value; the engine says when it has ended, if it does not raise."""
        self._batch, self._task = {}, current_task()
        Variable._execution_engine.queue_callback(self._done)

    def _done(self) -> None:
        self._task = None
        super()._done()

    @contextmanager
    def block(self, *more: BackpropExtension, **options: Any) -> Iterator[backpack]:
        with super().block(*more, **options) as block:
            yield block
        if self._task is not None:
            self.drop()

    def commit(self, batch: dict[Tensor, dict[str, Entry]]) -> None:
        samples = max((e.samples for f in batch.values() for e in f.values()), default=0)
        if self.totals.batches and (why := self.refuse_more()):
            self.drop()
            raise NotImplementedError(why)
        alone = not self.totals.batches
        self.totals.add(batch, samples, 1.0)
        for p, field, value in () if alone else self.totals.values():
            setattr(p, field, value)

    def of_all(self, processes: Processes, order: Mapping[Tensor, str]) -> dict[Tensor, Any]:
        """Values of all processes' passes, for the mean of their losses.

        Args:
            processes: all of them call this function.
            order: parameters that may have values, with names.
        """
        share = 1 / processes.size
        entries = {
            p: {
                field: Entry(e.rule, e.rule.weigh(e.part, share), e.samples, e.dtype)
                for field, e in fields.items()
            }
            for p, fields in self.totals.entries.items()
        }
        found = exchanged(entries, order, self.rules, self.totals.samples, processes).entries
        return {p: fields[self.field].value() for p, fields in found.items()}

    def drop(self) -> None:
        """Delete the values from the parameters."""
        for p in self.totals.entries:
            p.__dict__.pop(self.field, None)
        self.totals, self._batch, self._task = Totals(), None, None
