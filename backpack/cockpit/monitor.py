"""The monitor: listens to a training run, and says what each tracked step was like."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backpack._torch import steps_running, uncompiled_calls
from backpack.cockpit import passes, terminal
from backpack.cockpit.alarms import Alarm, alarms_of
from backpack.cockpit.attention import AttentionLogits
from backpack.cockpit.budget import Clock
from backpack.cockpit.checking import check_arguments
from backpack.cockpit.concluding import Concluding
from backpack.cockpit.extending import Extension
from backpack.cockpit.grouping import Per, grouped, looked_at, trained
from backpack.cockpit.history import History
from backpack.cockpit.listening import Start
from backpack.cockpit.lossmodules import LossModules
from backpack.cockpit.measures import Measure
from backpack.cockpit.moves import Moves
from backpack.cockpit.processes import processes_of
from backpack.cockpit.report import show_in_notebook, show_window, write
from backpack.cockpit.sinks import Sink, sinks_of
from backpack.cockpit.utils.schedules import linear


class Monitor(Concluding):
    """Watches a training run; made by :func:`watch`, which says what its arguments mean.

    Attributes:
        step_count: number of the optimizer's steps so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        quantities: str | Sequence[str | Measure] = "economy",
        every: int | Callable[[int], bool] = 10,
        per: Per = "layer",
        include: str | None = None,
        log: Any = (),
        path: Any = None,
        budget: float | None = None,
        alarms: str | Alarm | Iterable[str | Alarm] = (),
        batch_dim: int = 0,
        hold: int = 2**30,
        closure: Callable[[], Any] | None = None,
        together: bool = False,
    ) -> None:
        wrapped = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        self.model: nn.Module = model.module if wrapped else model  # type: ignore[assignment]
        # Of a wrapper that calls another optimizer's step, the one inside.
        while isinstance(inside := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inside
        check_arguments(model, optimizer, every, hold)
        self.optimizer = optimizer
        self._nests = sum("step" in each.__dict__ for each in type(optimizer).__mro__) > 2
        self.per, self.batch_dim, self.hold, self.closure = per, batch_dim, hold, closure
        self.include = include
        self._look()
        self.processes = processes_of(model, together)
        self.attention: AttentionLogits | None = None
        self.loss_modules: LossModules | None = None
        self._refused: dict[str, str] = {}
        self._choose(quantities)
        self.clock = Clock(every if callable(every) else linear(every), budget)
        self.alarms = alarms_of(alarms)
        self.sinks: list[Sink] = sinks_of(log)
        self._history = History(path if self.processes.first else None)
        self._began = False
        self.left_out: dict[str, str] = {}
        self.step_count = 0
        self._memory: dict[str, Tensor] = {}
        self._moves = Moves(self._parameters)
        self._deeper: tuple[int, Any] | None = None
        self._field = f"_cockpit_{id(self)}"
        self._expected = 1
        self._keep = self._along = True
        self._full = False
        self._generator: torch.Generator | None = None
        self._start: Start | None = None
        self._without_step = 0
        self._reset()
        self._tracking = self._listening = False
        self._handles: list[Any] = []
        self._compiled_again: Callable[[], Any] = lambda: None
        self._extension = Extension(self.model, batch_dim)
        self._open, self._within = True, False
        if optimizer is not None:
            self._handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
            try:
                self._prepare()
            except BaseException:
                self.close()
                raise

    def _look(self) -> None:
        """Look at the parameters that are trained now."""
        named = looked_at(self.model, self.include)
        spread = [name for name, p in named.items() if hasattr(p, "placements")]
        if spread:
            raise NotImplementedError(
                f"parameter '{spread[0]}' is kept in parts by several processes (fully_shard, tensor "
                "parallelism), and a monitor looks at whole ones. Use DistributedDataParallel, or "
                "fields of a block backpack(...)"
            )
        self._trained = trained(self.model)
        self.names, self._parameters = list(named), list(named.values())
        self._among = frozenset(self._parameters)
        self.groups, self._rows = grouped(self.names, self.per)

    def _look_again(self) -> None:
        """Others may be trained now: layers were frozen, or released, or put in place of others."""
        now = trained(self.model)
        if len(now) == len(self._trained) and all(map(operator.is_, now, self._trained)):
            return
        before = dict(zip(self._parameters, self._moves.reference or (), strict=False))
        self._look()
        self._moves = Moves(self._parameters)
        if before:
            found = [before.get(p) for p in self._parameters]
            pairs = zip(found, self._parameters, strict=True)
            self._moves.reference = [p.detach().clone() if r is None else r for r, p in pairs]
        self._start = None
        self._memory.pop("noise_scale", None)
        self._refused.clear()
        self._begin_anew()
        if self._began:
            header = {key: value for key, value in self._header().items() if key != "began"}
            self._history.begin(self.step_count, **header)
            message = f"other parameters are trained than before: {len(now)} tensors from here on"
            self._history.event(self.step_count, "parameters", message)

    # ---------------------------------------------------------------------------------
    # Steps

    def _prepare(self) -> None:
        """Decide whether the step that begins now is tracked, and listen if so."""
        self._reset()
        deeper = self._deeper
        if deeper is not None and self.step_count >= deeper[0]:
            self._deeper = None
            self._choose(deeper[1])
        self._tracking = self.clock.tracks(self.step_count) or self._deeper is not None
        self._listen(self._tracking or self._start is not None)

    def _listen(self, on: bool) -> None:
        for listener in (self.attention, self.loss_modules):
            if listener is not None:
                listener.listen(on)
        if on:
            self._extension.on()
        if on == self._listening:
            return
        self._listening = on
        if on:
            passes.listen(self)
            # Also if it goes without being closed.
            self._compiled_again = weakref.finalize(self, uncompiled_calls())
        else:
            passes.unlisten(self)
            self._extension.off()
            self._compiled_again()

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step, where there is no optimizer to listen to.

        Forward and backward passes go inside, and the update, if there is one.

        Raises:
            RuntimeError: if the monitor listens to an optimizer.
        """
        if self.optimizer is not None:
            raise RuntimeError("this monitor listens to its optimizer; step() is for those without one")
        self._prepare()
        if self._tracking:
            self._note_parameters()
        try:
            yield
        except BaseException:
            self._reset()
            self._listen(False)
            raise
        try:
            self._finish()
        finally:
            self._listen(False)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        if not self._open or not self._listening or self._is_nested():
            return None
        if self._tracking:
            self._within = True
            self._guarded(self._note_parameters)
            self._within = False
        # Backward passes inside the optimizer's step are those of a closure.
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._closure(args[1]), *args[2:]), kwargs
        if kwargs and callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._closure(kwargs["closure"])}
        return None

    def _closure(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            self._inside = True
            try:
                return closure(*args, **kwargs)
            finally:
                self._inside = False

        return inside

    def _is_nested(self) -> bool:
        """Whether a ``step`` was called by that of a subclass, which is the one that counts."""
        return self._nests and self.optimizer is not None and steps_running(self.optimizer) > 1

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._open or self._is_nested():
            return
        self._within, self._without_step = True, 0
        try:
            self._finish()
        finally:
            if self._open:
                self._guarded(self._prepare)
            self._within = False

    def _guarded(self, function: Callable[[], None]) -> None:
        """An error of the monitor's ends its watch, and not the training run."""
        try:
            function()
        except Exception as error:
            self.broke(error)

    def _note_parameters(self) -> None:
        if self._start is not None and not self._all_held and not self._inside:
            if self._passes and all(passed.has("ends") for passed in self._passes):
                self._start.update = None  # it has been projected on
        if "update" in self.needs:
            self._moves.begin("reference" in self.needs)

    def _finish(self) -> None:
        """A step is over."""
        try:
            if self._listening:
                with torch.no_grad():
                    self._guarded(self._conclude)
        finally:  # also if the user interrupts
            self.clock.stepped(self._tracking, self._listening)
            self.step_count += 1

    # ---------------------------------------------------------------------------------
    # For the user

    def history(self) -> History:
        """What was seen so far."""
        return self._history

    def report(self, path: Any, title: str | None = None) -> Path:
        """Write a report: ``.html`` needs nothing else; ``.png``, ``.pdf``, ``.svg`` by matplotlib."""
        return write(self._history, path, title or type(self.model).__name__)

    def show(self, window: bool = False) -> None:
        """Show the run so far: the report in a notebook's cell, a table on a terminal.

        Args:
            window: open a window with the figure instead (matplotlib must be installed).
        """
        title = type(self.model).__name__
        if window:
            show_window(self._history, title)
        elif not show_in_notebook(self._history, title):
            terminal.show(self._history, title)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on after a restart: plain containers and tensors."""
        return {
            "step": self.step_count,
            "memory": {k: v.clone() for k, v in self._memory.items()},
            "reference": self._moves.reference,
            "history": self._history.state_dict(),
            "expected": self._expected,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called.

        Raises:
            ValueError: for a state of a model with other parameters.
        """
        reference = state["reference"]
        if reference is not None:
            shapes = [p.shape for p in self._parameters]
            if [r.shape for r in reference] != shapes:
                raise ValueError(
                    "the state is that of a monitor of other parameters: "
                    f"{len(reference)} tensors, first of all {tuple(reference[0].shape)}, and here "
                    f"{len(shapes)}, first of all {tuple(shapes[0])}"
                )
            reference = [r.to(p) for r, p in zip(reference, self._parameters, strict=True)]
        self.step_count = int(state["step"])
        self._memory = dict(state["memory"])
        self._moves.reference = reference
        self._history.load_state_dict(state["history"])
        self._expected = int(state["expected"])
        self._start, self._began = None, False
        if self.optimizer is not None:
            self._prepare()

    def start_at(self, step: int) -> None:
        """Go on at a step of a run that was interrupted, without the state of its monitor."""
        self.step_count, self._began = step, False
        if self.optimizer is not None:
            self._prepare()

    def close(self) -> None:
        """Take every hook off, and leave the model as it was. The history stays."""
        if not self._open:
            return
        self._open = False
        # Hooks that are being called cannot be removed; they do nothing any more.
        for handle in self._handles if not self._within else ():
            handle.remove()
        self._listen(False)
        self._collect()
        self._reset()
        self._start = self._moves.reference = None
        self._history.flush()
        for sink in self.sinks:
            getattr(sink, "close", lambda: None)()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
