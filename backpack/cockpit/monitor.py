"""The monitor: listens to a training run, and says what each tracked step was like."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backpack import extend, unextend
from backpack._torch import leaf_of
from backpack.cockpit import passes, terminal
from backpack.cockpit.alarms import Alarm, Finding, alarms_of
from backpack.cockpit.alpha import End, alpha
from backpack.cockpit.attention import AttentionLogits
from backpack.cockpit.budget import Clock
from backpack.cockpit.collect import Curvature, FirstOrder, KeptColumns, Piece, Probe, Wish, projected
from backpack.cockpit.configurations import SPECIAL, chosen
from backpack.cockpit.eigenvalue import TopEigenvalue
from backpack.cockpit.grouping import Per, grouped, looked_at
from backpack.cockpit.histograms import symlog_edges
from backpack.cockpit.history import History
from backpack.cockpit.lossmodules import LossModules
from backpack.cockpit.measures import Measure, MissingError, Passed, Step
from backpack.cockpit.processes import processes_of
from backpack.cockpit.report import show_in_notebook, show_window, write
from backpack.cockpit.sharpness import critical_sharpness
from backpack.cockpit.sinks import Sink, sink_of
from backpack.cockpit.utils.schedules import linear
from backpack.own import BackpropExtension, walk

# Entries that are looked at for a histogram, and how many of a parameter at least.
ENTRIES, LEAST = 2**14, 2**9
_EXTENDED = "_backpack_extend"
# What is no matter of first-order forms.
# Quantities of which it is worth knowing that they are not a number.
_KEPT = {"loss", "grad_norm", "param_norm", "update_size"}
_OTHERS = {"gradient", "update", "reference", "products", "attention", "columns"}


@dataclass
class _Start:
    """The start of a step whose end is not yet known."""

    step: int
    end: End
    length: float
    update: dict[Tensor, Tensor]


class Monitor:
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
        self.optimizer = optimizer
        self.per, self.batch_dim, self.hold, self.closure = per, batch_dim, hold, closure
        named = looked_at(self.model, include)
        self.names, self._parameters = list(named), list(named.values())
        self._among = frozenset(self._parameters)
        self.groups, self._rows = grouped(self.names, per)
        self.processes = processes_of(model, together)
        self.attention: AttentionLogits | None = None
        self.loss_modules: LossModules | None = None
        self._refused: dict[str, str] = {}
        self._choose(quantities)
        self.clock = Clock(every if callable(every) else linear(every), budget)
        self.alarms = alarms_of(alarms)
        sinks = [log] if callable(log) or hasattr(log, "add_scalar") else list(log)
        self.sinks: list[Sink] = [sink_of(each) for each in sinks]
        self._history = History(path if self.processes.first else None)
        self._began = False
        self.left_out: dict[str, str] = {}
        self.step_count = 0
        self._memory: dict[str, Tensor] = {}
        self._before_all: list[Tensor] | None = None
        self._deeper: tuple[int, Any] | None = None
        self._field = f"_cockpit_{id(self)}"
        self._expected = 1
        self._keep = self._along = True
        self._full = False
        self._generator: torch.Generator | None = None
        self._reset()
        self._start: _Start | None = None
        self._tracking = self._listening = False
        self._handles: list[Any] = []
        self._marked = [each for each in self.model.modules() if _EXTENDED in each.__dict__]
        self._open, self._within = True, False
        if optimizer is not None:
            self._handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
            self._prepare()

    # ---------------------------------------------------------------------------------
    # What is wanted

    def _choose(self, quantities: str | Sequence[str | Measure]) -> None:
        self.quantities = quantities
        self.measures, self.special = chosen(quantities)
        self.needs = frozenset().union(
            *(measure.needs for measure in self.measures), *(SPECIAL[name] for name in self.special)
        )
        self._made: list[BackpropExtension] | None = None
        self._curvatures: dict[str, Curvature] = {}
        for listener in (self.attention, self.loss_modules):
            if listener is not None:
                listener.listen(False)
        second = any(m.matrix is not None for m in self.measures) or "columns" in self.needs
        self.loss_modules = LossModules() if second else None
        self.top = TopEigenvalue(self.processes) if "hess_max_ev" in self.special else None
        self.attention = AttentionLogits() if "attention_logit" in self.special else None

    def _make(self) -> list[BackpropExtension]:
        """The extensions, those of curvature first."""
        if self._made is None:
            device = self._parameters[0].device
            self._generator = torch.Generator(device).manual_seed(0)
            matrices: dict[str, bool] = {}
            for measure in self.measures:
                if measure.matrix is not None:
                    diagonal = "diagonal" in measure.needs
                    matrices[measure.matrix] = matrices.get(measure.matrix, False) or diagonal
            self._curvatures = {
                matrix: Curvature(f"{self._field}_{matrix}", matrix, diagonal, self._generator)
                for matrix, diagonal in matrices.items()
            }
            self._first = FirstOrder(self._field, self._part_failed)
            self._probe = Probe(f"{self._field}_probe")
            self._columns = KeptColumns(f"{self._field}_columns", self._generator)
            self._made = [*self._curvatures.values(), self._columns, self._probe, self._first]
        return self._made

    def _wish(self, share: float) -> Wish:
        ends = self._start.update if self._start else None
        needs = self.needs if self._tracking else frozenset[str]()
        entries = max(LEAST, ENTRIES // len(self._parameters)) if "counts" in needs else 0
        return Wish(
            norms=bool(needs & {"norms", "projections", "squares"}),
            squares="squares" in needs,
            projections="projections" in needs,
            activity="activity" in needs,
            keep=self._keep and bool(needs & {"projections", "ends"}),
            limit=self.hold,
            ends=ends,
            entries=entries,
            joint="grad_hist_2d" in self.special,
            share=share,
        )

    # ---------------------------------------------------------------------------------
    # Steps

    def _reset(self) -> None:
        """Forget what was seen of the current step."""
        self._passes: list[Passed] = []
        self._grad_norms: Tensor | None = None
        self._before: list[Tensor] | None = None
        self._inside = False
        self._passed_inside = False
        self._lost: dict[str, str] = {}
        self._versions: tuple[int, ...] = ()

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
        if on == self._listening:
            return
        self._listening = on
        if on:
            if _EXTENDED not in self.model.__dict__:
                extend(self.model, batch_dim=self.batch_dim)
            passes.listen(self)
        else:
            passes.unlisten(self)
            self._restore()

    def _restore(self) -> None:
        """Leave the model as extended as it was."""
        if self.model in self._marked:
            return
        unextend(self.model)
        for each in self._marked:
            extend(each, batch_dim=each.__dict__.get("_backpack_batch_dim", 0))

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
        self._finish()
        self._listen(False)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._open and self._tracking:
            # Backward passes inside the optimizer's step are those of a closure.
            given = args[1] if len(args) > 1 else (kwargs or {}).get("closure")
            self._inside = given is not None
            self._note_parameters()

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._open:
            return
        self._within = True
        try:
            self._finish()
            if self._open:
                self._prepare()
        finally:
            self._within = False

    def _note_parameters(self) -> None:
        if "update" in self.needs:
            self._before = [p.detach().clone() for p in self._parameters]
        if "reference" in self.needs and self._before_all is None:
            self._before_all = [p.detach().clone() for p in self._parameters]

    def _finish(self) -> None:
        """A step is over."""
        if self._listening:
            try:
                with torch.no_grad():
                    self._conclude()
            except Exception as error:
                self.broke(error)
        self.clock.stepped(self._tracking, self._listening)
        self.step_count += 1

    # ---------------------------------------------------------------------------------
    # Backward passes

    @property
    def parameters(self) -> Collection[Tensor]:
        """The parameters that are looked at."""
        return self._among

    def begins(self, call: passes.Call) -> list[BackpropExtension]:
        """A backward pass begins."""
        self._concerned = self._listening and not self._passed_inside and self._reached(call)
        if not self._concerned:
            return []
        if self._passes and self._was_zeroed():
            inside, before = self._inside, self._before
            self._reset()
            self._inside, self._before = inside, before
        share = 1.0 / (call.scale * self.processes.size)
        if self._tracking and self.top is not None and call.finite:
            self._try("hess_max_ev", lambda: self._top(call, share))
        made = self._make()
        self._first.prepare(self._wish(share))
        self._probe.prepare()
        wanted: list[BackpropExtension] = []
        if self._tracking:
            wanted += self._curvatures.values()
        if self._tracking and "columns" in self.needs:
            self._columns.prepare(self.hold)
            wanted.append(self._columns)
        ends, needs = self._start is not None, self.needs if self._tracking else frozenset()
        if ends or needs & {"losses", "activity"}:
            wanted.append(self._probe)
        if ends or needs - _OTHERS:
            wanted.append(self._first)
        return [ext for ext in made if ext in wanted and ext.savefield not in self._refused]

    def _top(self, call: passes.Call, share: float) -> None:
        assert self.top is not None
        self.top.look(call, self._parameters, share, first=not self._passes)

    def _reached(self, call: passes.Call) -> bool:
        """Whether the graph of a loss comes to the parameters that are looked at."""
        root = call.root.grad_fn
        leaves = map(leaf_of, walk([root] if root is not None else []))
        return any(leaf is not None and leaf in self._among for leaf in leaves)

    def _was_zeroed(self) -> bool:
        """Whether gradients were set to zero since the last pass: another step has begun.

        A scaler skips steps whose gradients overflow; an error may end one in the middle.
        """
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if self._inside:
            return False
        if not grads:
            return True
        if tuple(g._version for g in grads) == self._versions:
            return False
        return not any(bool((g.coalesce().values() if g.is_sparse else g).any()) for g in grads)

    def refused(self, ext: BackpropExtension, error: Exception) -> None:
        """A quantity cannot be computed on this model."""
        self._refused[ext.savefield] = str(error)

    def failed(self) -> None:
        """A backward pass raised an error."""
        self._collect()
        inside, before = self._inside, self._before
        self._reset()
        self._inside, self._before = inside, before

    def broke(self, error: Exception) -> None:
        """An error of the monitor's own: a warning, and training goes on unwatched."""
        reason = f"{type(error).__name__}: {error}"
        self._history.event(self.step_count, "left out", f"everything: {reason}", quantity="all")
        self.close()
        warnings.warn(f"cockpit: the monitor is closed, as it raised {reason}", stacklevel=2)

    def ended(self, call: passes.Call) -> None:
        """A backward pass is over."""
        if not self._concerned:
            return
        if not call.finite:
            self._lost["statistics"] = "the loss is not finite"
        share = 1.0 / (call.scale * self.processes.size)
        found = self._collect()
        pieces: dict[Tensor, Piece] = found.pop(self._field, {})
        passed = Passed(call.loss.cpu(), share, pieces)
        for matrix in self._curvatures:
            field = f"{self._field}_{matrix}"
            if field in found:
                passed.curvature[matrix] = found[field]
        if self._columns.savefield in found and not self._columns.full:
            passed.columns = found[self._columns.savefield]
        passed.losses, passed.unread = self._losses(call)
        passed.raw = self._probe.raw
        if pieces and self._first.held > self.hold:
            _settle(pieces, self._start.update if self._start else {})
            self._full = True
        self._passes.append(passed)
        self._passed_inside = self._inside
        with torch.no_grad():
            self._note_gradients(call.scale)

    def _losses(self, call: passes.Call) -> tuple[Tensor | None, Exception | None]:
        losses, probe = self._probe.losses, self._probe
        if losses is None:
            refused = self._refused.get(probe.savefield)
            return None, MissingError(refused) if refused else probe.reason
        total, whole = float(losses.sum()) / call.scale, float(call.loss)
        if probe.complete and abs(total - whole) > 1e-3 * max(abs(whole), float(losses.abs().sum())):
            return None, MissingError("what the graph tells does not add up to the loss")
        return losses, None

    def _collect(self) -> dict[str, dict[Tensor, Any]]:
        """Take from the parameters what extensions have left there."""
        found: dict[str, dict[Tensor, Any]] = {}
        for ext in self._made or ():
            for p in self._parameters:
                if ext.savefield in p.__dict__:
                    found.setdefault(ext.savefield, {})[p] = p.__dict__.pop(ext.savefield)
        return found

    def _note_gradients(self, scale: float) -> None:
        """Norms of the gradients as they are now, before anybody clips them."""
        grads = [p.grad for p in self._parameters if p.grad is not None]
        self._versions = tuple(g._version for g in grads)
        if "gradient" not in self.needs or not self._tracking or not grads:
            return
        self._grad_norms = _norms([p.grad for p in self._parameters]) / scale

    def _part_failed(self, part: str, error: Exception) -> None:
        self._lost[part] = str(error) or type(error).__name__

    # ---------------------------------------------------------------------------------
    # Conclusions

    def _conclude(self) -> None:
        """What the step that is over was like."""
        self._lost |= self._whole_parts()
        step = Step(self._parameters, self._rows, self._passes, self.processes, self._lost)
        step.memory = self._memory
        if self._tracking:
            step.grad_norms, step.plain = self._grad_norms, self._steps_along()
            self._add_update(step)
        if self._start is not None:
            step.last = self._start.update
            self._conclude_alpha(step, self._start)
        self._start = None
        if not self._tracking:
            return
        values: dict[str, Any] = {}
        for measure in self.measures:
            self._try(measure.name, lambda: self._measured(measure, step, values))  # noqa: B023
        for name in self.special:
            self._try(name, lambda: getattr(self, f"_{name}")(step, values))  # noqa: B023
        self._plan(step)
        self._add(self.step_count, values)
        for alarm in list(self.alarms):
            self._ask(alarm, values)

    def _whole_parts(self) -> dict[str, str]:
        found = {}
        if self._field in self._refused:
            found["statistics"] = self._refused[self._field]
        columns = self._refused.get(f"{self._field}_columns")
        if columns is not None:
            found["columns"] = columns
        for matrix in self._curvatures:
            reason = self._refused.get(f"{self._field}_{matrix}")
            if reason is not None:
                found[matrix] = reason
        return found

    def _measured(self, measure: Measure, step: Step, values: dict[str, Any]) -> None:
        self._put(measure.name, measure.value(step), values)

    def _put(self, name: str, numbers: Tensor, values: dict[str, Any]) -> None:
        for group, value in zip(self.groups, numbers.tolist(), strict=False):
            if value == value or name in _KEPT:
                values[f"{name}/{group}" if group else name] = value

    def _add_update(self, step: Step) -> None:
        """What the optimizer has done."""
        parameters = [p.detach() for p in self._parameters]
        if self._before is not None:
            update = torch._foreach_sub(parameters, self._before)
            step.update = dict(zip(self._parameters, update, strict=True))
            step.update_norms = _norms(update)
            step.parameter_norms = _norms(self._before)
            if self._before_all is not None:
                step.distances = _norms(torch._foreach_sub(self._before, self._before_all))
        if self.optimizer is not None:
            step.rates = [float(group["lr"]) for group in self.optimizer.param_groups if "lr" in group]

    def _plan(self, step: Step) -> None:
        """Say whether forms are kept in the next tracked step, or used at once."""
        if self._passes:
            self._expected = len(self._passes)
        several = self._expected > 1 or self.processes.size > 1
        wants = "alpha" in self.special and not self._steps_along()
        self._keep = (several or wants) and not self._full

    def _try(self, name: str, function: Callable[[], None]) -> None:
        """A quantity that cannot be computed is left out; the others go on."""
        try:
            function()
        except MissingError as reason:
            self._leave_out(name, str(reason))
        except Exception as error:
            self._leave_out(name, f"{type(error).__name__}: {error}")

    def _leave_out(self, name: str, reason: str) -> None:
        if name in self.left_out:
            return
        self.left_out[name] = reason
        self._begin()
        self._history.event(self.step_count, "left out", f"{name}: {reason}", quantity=name)
        warnings.warn(f"cockpit: {name} is left out at step {self.step_count}: {reason}", stacklevel=2)

    def _add(self, step: int, values: dict[str, Any]) -> None:
        """Keep numbers of a step, and pass them on."""
        self._begin()
        self._history.add(step, values, time.time())
        scalars = {key: value for key, value in values.items() if isinstance(value, float)}
        for sink in list(self.sinks) if self.processes.first else ():
            try:
                sink(values if getattr(sink, "takes_all", False) else scalars, step)
            except Exception as error:
                self.sinks.remove(sink)
                warnings.warn(f"cockpit: a sink is dropped, as it raised {error!r}", stacklevel=2)

    def _begin(self) -> None:
        if not self._began:
            self._began = True
            self._history.begin(self.step_count, **self._header())

    def _header(self) -> dict[str, Any]:
        names = [measure.name for measure in self.measures] + self.special
        return {
            "quantities": names,
            "model": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self._parameters),
            "optimizer": type(self.optimizer).__name__ if self.optimizer is not None else None,
            "per": self.per if isinstance(self.per, str) else "groups",
            "groups": self.groups[1:],
            "curvature": sorted({m.matrix for m in self.measures if m.matrix is not None}),
            "began": time.time(),
        }

    def _ask(self, alarm: Alarm, values: dict[str, Any]) -> None:
        """Whether there is reason for an alarm."""
        try:
            finding = alarm.check(self.step_count, values, self._history)
        except Exception as error:
            self.alarms.remove(alarm)
            warnings.warn(f"cockpit: an alarm is dropped, as it raised {error!r}", stacklevel=2)
            return
        if finding is not None:
            self._raise(alarm, finding)

    def _raise(self, alarm: Alarm, finding: Finding) -> None:
        self._history.event(self.step_count, finding.kind, finding.message, quantity=finding.quantity)
        if alarm.then is not None:
            try:
                alarm.then(self, finding)
            except Exception as error:
                warnings.warn(f"cockpit: an alarm's function raised {error!r}", stacklevel=2)
        if alarm.deeper is not None and self._deeper is None:
            quantities, steps = alarm.deeper
            self._deeper = self.step_count + 1 + steps, self.quantities
            self._choose(quantities)

    # ---------------------------------------------------------------------------------
    # Quantities that are no function of one step alone

    def _steps_along(self) -> bool:
        """Whether the optimizer steps along the negative gradient: plain SGD."""
        if type(self.optimizer) is not torch.optim.SGD or not self._along:
            return False
        names = ("momentum", "weight_decay", "dampening")
        groups = self.optimizer.param_groups
        return not any(g[name] for g in groups for name in (*names, "nesterov", "maximize"))

    def _slopes(self, step: Step) -> Tensor:
        """``G_n^T d`` at the start of the step, of each sample of this process."""
        assert step.update is not None
        if step.keeps or not self._steps_along():
            return step.along_update.sum(0)
        rates = {p: g["lr"] for g in self.optimizer.param_groups for p in g["params"]}  # type: ignore[union-attr]
        gradients = step.gradients
        expected = _norms([gradients.get(p) for p in self._parameters]).cpu()
        expected *= expected.new_tensor([rates.get(p, 0.0) for p in self._parameters])
        moved = _norms([step.update[p] for p in self._parameters]).cpu()
        # Clipped by its norm, the gradient has become shorter by one factor.
        factor = float(moved.norm() / expected.norm()) if float(expected.norm()) else 0.0
        if float((moved - factor * expected).norm()) > 1e-3 * float(moved.norm()):
            self._along = False
            raise MissingError("the gradient was changed before the optimizer's step")
        weights = [-factor * rates.get(p, 0.0) for p in self._parameters]
        along = step.along_gradient
        return along.new_tensor(weights) @ along

    def _alpha(self, step: Step, values: dict[str, Any]) -> None:
        if step.update is None or step.update_norms is None:
            raise MissingError("the optimizer's step was not seen")
        length = float(step.update_norms.double().norm())
        end = step.end(self._slopes(step), length)
        self._start = _Start(self.step_count, end, length, step.update)

    def _conclude_alpha(self, step: Step, start: _Start) -> None:
        def value() -> None:
            end = step.end(step.along_last.sum(0), start.length)
            found = alpha(start.end, end, start.length)
            if found is not None:
                self._add(start.step, {"alpha": found})

        self._try("alpha", value)

    def _alpha_ggn(self, step: Step, values: dict[str, Any]) -> None:
        if step.update is None:
            raise MissingError("the optimizer's step was not seen")
        gradients = step.gradients
        slope = sum(float((gradients[p] * d).sum()) for p, d in step.update.items() if p in gradients)
        if slope:
            values["alpha_ggn"] = -step.curvature_along(step.update) / slope - 1

    def _grad_hist(self, step: Step, values: dict[str, Any]) -> None:
        counts = step.counts().round().long().tolist()
        values["grad_hist"] = {"edges": symlog_edges(), "counts": counts}

    def _grad_hist_2d(self, step: Step, values: dict[str, Any]) -> None:
        counts = step.counts(joint=True).round().long().tolist()
        values["grad_hist_2d"] = {"edges": [symlog_edges()] * 2, "counts": counts}

    def _hess_max_ev(self, step: Step, values: dict[str, Any]) -> None:
        assert self.top is not None
        if self.top.value is None:
            if "hess_max_ev" in self.left_out:
                return
            raise MissingError("no backward call was seen")
        values["hess_max_ev"] = self.top.value

    def _attention_logit(self, step: Step, values: dict[str, Any]) -> None:
        assert self.attention is not None
        found = self.attention.take()
        if found is None:
            raise MissingError("no call of scaled_dot_product_attention was seen")
        values["attention_logit"] = found

    def _critical_sharpness(self, step: Step, values: dict[str, Any]) -> None:
        if self.closure is None:
            raise MissingError("it needs `closure`, which gives the loss of the last batch again")
        if step.update is None:
            raise MissingError("the optimizer's step was not seen")
        found = critical_sharpness(self.closure, step.update, step.rates)
        if found is not None:
            values["critical_sharpness"] = found

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
            "reference": self._before_all,
            "history": self._history.state_dict(),
            "expected": self._expected,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called."""
        self.step_count = int(state["step"])
        self._memory = dict(state["memory"])
        reference = state["reference"]
        if reference is not None:
            pairs = zip(reference, self._parameters, strict=True)
            reference = [r.to(p) for r, p in pairs]
        self._before_all = reference
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
        self._start = self._before_all = None
        for sink in self.sinks:
            getattr(sink, "close", lambda: None)()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _norms(tensors: Sequence[Tensor | None]) -> Tensor:
    """A norm for each tensor, zero where there is none."""
    dense = [t for t in tensors if t is not None and not t.is_sparse]
    if len(dense) == len(tensors) and len({t.dtype for t in dense}) == 1:
        return torch.stack(torch._foreach_norm(dense)).double()
    norms = iter(torch._foreach_norm(dense)) if dense else iter(())
    found = []
    like = next(t for t in tensors if t is not None) if any(t is not None for t in tensors) else None
    zero = torch.zeros(()) if like is None else torch.zeros((), device=like.device)
    for t in tensors:
        if t is None:
            found.append(zero.double())
        elif t.is_sparse:
            found.append(t.coalesce().values().norm().double())
        else:
            found.append(next(norms).double())
    return torch.stack(found)


def _settle(pieces: dict[Tensor, Piece], last: dict[Tensor, Tensor]) -> None:
    """Use kept forms at once, and let go of them."""
    for p, piece in pieces.items():
        if piece.form is not None and piece.gradient is not None:
            vectors = [piece.gradient, last.get(p, piece.gradient)]
            with torch.no_grad():
                piece.projections, piece.ends = projected(piece.form, vectors)
            piece.form = None


def watch(
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
) -> Monitor:
    """Watch a training run; the training loop is not touched.

    Example:
        >>> import torch
        >>> model, lossfunc = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = watch(model, optimizer, quantities=["loss", "grad_norm", "norm_test"], every=2)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     lossfunc(model(torch.rand(5, 4)), torch.tensor([0, 1, 2, 1, 0])).backward()
        ...     _ = optimizer.step()
        >>> monitor.close()
        >>> monitor.history().steps, monitor.history().names()[:3]
        ([0, 2], ['time', 'loss', 'grad_norm'])

    Args:
        model: the module that is called in training; of a parallel wrapper the module inside.
        optimizer: its steps are the run's steps. With none, write ``with monitor.step(): ...``.
        quantities: ``"economy"``, ``"business"``, ``"full"``, or a list of names and measures.
        every: an interval, or a function that says of a step whether it is tracked. The first is.
        per: numbers for the whole model and besides for each ``"layer"`` or ``"parameter"``, for the
            groups that a function of a parameter's name gives, or (``"model"``) for nothing else.
        include: look only at parameters whose names match this regular expression.
        log: functions ``log(dict, step)`` (``wandb.log``, ``mlflow.log_metrics``, a logger's
            ``log_metrics``), or a ``SummaryWriter``.
        path: a file of JSON lines to which each tracked step is added; ``History.read`` reads it.
        budget: the part of the time so far that tracking may take; the interval is stretched for it.
        alarms: ``"all"``, or names and instances of :mod:`backpack.cockpit.alarms`.
        batch_dim: the axis of the model's inputs that holds the samples.
        hold: number of bytes of layers' inputs and output gradients that may be kept until a step is
            over, where projections on its update are wanted.
        closure: gives the loss of the last batch again, for ``critical_sharpness`` only.
        together: whether all processes of torch's default group train the model, averaging gradients;
            needless where ``model`` is the parallel wrapper.

    Returns:
        The monitor.
    """
    return Monitor(
        *(model, optimizer),
        quantities=quantities,
        every=every,
        per=per,
        include=include,
        log=log,
        path=path,
        budget=budget,
        alarms=alarms,
        batch_dim=batch_dim,
        hold=hold,
        closure=closure,
        together=together,
    )
