"""The other half of a monitor: what a step that is over was like."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backpack.cockpit.alarms import Alarm, Finding
from backpack.cockpit.alpha import alpha
from backpack.cockpit.grouping import Per
from backpack.cockpit.histograms import symlog_edges
from backpack.cockpit.listening import Listening, Start
from backpack.cockpit.measures import Measure, Numbers
from backpack.cockpit.norms import norms_of
from backpack.cockpit.passed import MissingError
from backpack.cockpit.sharpness import critical_sharpness
from backpack.cockpit.sinks import Sink
from backpack.cockpit.step import Step

# Quantities of which it is worth knowing that they are not a number.
_KEPT = {"loss", "grad_norm", "param_norm", "update_size"}


class Concluding(Listening):
    """Draws conclusions; :class:`~backpack.cockpit.monitor.Monitor` is the whole."""

    alarms: list[Alarm]
    sinks: list[Sink]
    left_out: dict[str, str]
    per: Per
    _memory: dict[str, Tensor]
    _deeper: tuple[int, Any] | None
    _began: bool
    _along: bool
    _expected: int

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
            self._try(name, lambda: CONCLUSIONS[name](self, step, values))  # noqa: B023
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

    def _put(self, name: str, numbers: Numbers, values: dict[str, Any]) -> None:
        listed = numbers.tolist() if isinstance(numbers, Tensor) else numbers
        for group, value in zip(self.groups, listed, strict=False):
            if value == value or name in _KEPT:
                values[f"{name}/{group}" if group else name] = value

    def _add_update(self, step: Step) -> None:
        """What the optimizer has done."""
        moves = self._moves
        moves.end()
        if moves.update is not None and moves.norms is not None:
            step.update = dict(zip(self._parameters, moves.update, strict=True))
            norms = [norms_of(moves.update), moves.norms]
            found = [*norms, *([moves.distances] if moves.distances is not None else ())]
            step.update_norms, step.parameter_norms, *rest = torch.stack(found).cpu()
            step.distances = rest[0] if rest else None
        if self.optimizer is not None:
            step.rates = [float(group["lr"]) for group in self.optimizer.param_groups if "lr" in group]

    def _plan(self, step: Step) -> None:
        """Say whether forms are kept in the next tracked step, or used at once."""
        if self._passes:
            self._expected = max(1, sum(bool(passed.pieces) for passed in self._passes))
        wants = "alpha" in self.special
        if wants and step.keeps and self._steps_along() and step.update_norms is not None:
            self._factor(step)  # the next step is to know if that is not so
        self._keep = (self._several() or (wants and not self._steps_along())) and not self._full

    def _several(self) -> bool:
        return self._expected > 1 or self.processes.size > 1

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
        assert step.update is not None and step.update_norms is not None
        if step.keeps or not self._steps_along():
            return step.along_update.sum(0)
        factor, rates = self._factor(step)
        if not self._along:
            raise MissingError(
                "the optimizer's step is not along the gradient of the data's loss: that was clipped "
                "by its values, or the loss has a term without data"
            )
        along = step.along_gradient
        return along.new_tensor([-factor * rate for rate in rates]) @ along

    def _factor(self, step: Step) -> tuple[float, list[float]]:
        """What the gradient was multiplied with besides rates; notes if it was changed otherwise.

        Clipped by its norm it has become shorter by one factor.
        """
        assert step.update_norms is not None
        given = {p: g["lr"] for g in self.optimizer.param_groups for p in g["params"]}  # type: ignore[union-attr]
        rates = [float(given.get(p, 0.0)) for p in self._parameters]
        moved = step.update_norms.tolist()
        expected = [norm * rate for norm, rate in zip(step.gradient_norms.tolist(), rates, strict=True)]
        length, full = math.hypot(*moved), math.hypot(*expected)
        factor = length / full if full else 0.0
        if math.dist(moved, [factor * e for e in expected]) > 1e-3 * length:
            self._along = False
        return factor, rates

    def _alpha(self, step: Step, values: dict[str, Any]) -> None:
        if step.update is None or step.update_norms is None:
            raise MissingError("the optimizer's step was not seen")
        length = math.hypot(*step.update_norms.tolist())
        end = step.end(self._slopes(step), length)
        self._start = Start(self.step_count, end, length, step.update)

    def _conclude_alpha(self, step: Step, start: Start) -> None:
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


# What computes those of `configurations.SPECIAL`.
CONCLUSIONS: dict[str, Callable[[Concluding, Step, dict[str, Any]], None]] = {
    "alpha": Concluding._alpha,
    "alpha_ggn": Concluding._alpha_ggn,
    "grad_hist": Concluding._grad_hist,
    "grad_hist_2d": Concluding._grad_hist_2d,
    "hess_max_ev": Concluding._hess_max_ev,
    "attention_logit": Concluding._attention_logit,
    "critical_sharpness": Concluding._critical_sharpness,
}
