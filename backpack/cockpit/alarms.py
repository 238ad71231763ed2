"""Alarms: what a monitor notices by itself, and what it does then."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any, NamedTuple

from backpack.cockpit.history import History

# Steps with which the next is compared: the run has a trend.
NEAR = 5


class Finding(NamedTuple):
    """What an alarm has found.

    Attributes:
        kind: of alarm.
        message: in words, with the numbers.
        quantity: the key that it is about.
    """

    kind: str
    message: str
    quantity: str


class Alarm:
    """Looks at each tracked step.

    Args:
        then: a function of the monitor and the finding, called for each alarm.
        deeper: quantities to switch on, and for how many steps.
    """

    kind = ""

    def __init__(
        self,
        then: Callable[[Any, Finding], Any] | None = None,
        deeper: tuple[Any, int] | None = None,
    ) -> None:
        self.then, self.deeper = then, deeper
        self._since: dict[str, int] = {}

    def check(self, step: int, values: dict[str, Any], history: History) -> Finding | None:
        """What is to be said of a step, if anything; the same thing once until it is over."""
        found = self.find(step, values, history)
        if found is None:
            self._since.clear()
            return None
        fresh = found.quantity not in self._since
        self._since[found.quantity] = step
        return found if fresh else None

    def find(self, step: int, values: dict[str, Any], history: History) -> Finding | None:
        """What there is in these numbers."""
        raise NotImplementedError

    def _found(self, quantity: str, message: str) -> Finding:
        return Finding(self.kind, message, quantity)


class NonFinite(Alarm):
    """A loss, gradient or update that is not a finite number."""

    kind = "not finite"
    watched = ("loss", "grad_norm", "update_size")

    def find(self, step: int, values: dict[str, Any], history: History) -> Finding | None:
        for key in self.watched:
            value = values.get(key)
            if isinstance(value, float) and not math.isfinite(value):
                layers = [
                    name
                    for name in history.layers(key)
                    if not math.isfinite(values.get(f"{key}/{name}", 0.0))
                ]
                where = f", in {', '.join(layers[:3])}" if layers else ""
                return self._found(key, f"{key} is {value}{where}")
        return None


class Spike(Alarm):
    """The loss or the gradient is far above what it was lately.

    Args:
        z: how many deviations above the median of the last few steps, of logarithms.
        window: number of tracked steps from which deviations are estimated.
        least: number of them without which nothing is said.
        then: see :class:`Alarm`.
        deeper: see :class:`Alarm`.
    """

    kind = "spike"

    def __init__(
        self,
        z: float = 6.0,
        window: int = 30,
        least: int = 8,
        then: Callable[[Any, Finding], Any] | None = None,
        deeper: tuple[Any, int] | None = None,
    ) -> None:
        super().__init__(then, deeper)
        self.z, self.window, self.least = z, window, least

    def find(self, step: int, values: dict[str, Any], history: History) -> Finding | None:
        for key in ("loss", "grad_norm"):
            steps, before = history.column(key)
            logs = [
                math.log(v) for s, v in zip(steps, before, strict=True) if s < step and 0 < v < math.inf
            ]
            logs, value = logs[-self.window :], values.get(key)
            if len(logs) < max(self.least, NEAR + 1) or value is None or not 0 < value < math.inf:
                continue
            middle = median(logs[-NEAR:])
            apart = [logs[k] - median(logs[k - NEAR : k]) for k in range(NEAR, len(logs))]
            # No less than a twentieth: a quiet run has small deviations.
            spread = max(1.4826 * median(map(abs, apart)), 0.05)
            z = (math.log(value) - middle) / spread
            if z > self.z:
                return self._found(
                    key,
                    f"{key} is {value:.3g}, {value / math.exp(middle):.1f} times its median over the "
                    f"last {NEAR} tracked steps (z = {z:.1f})",
                )
        return None


class Vanishing(Alarm):
    """Gradients of a layer are far smaller than those of the others.

    Args:
        ratio: how far below the median over layers.
        then: see :class:`Alarm`.
        deeper: see :class:`Alarm`.
    """

    kind = "vanishing"

    def __init__(
        self,
        ratio: float = 1e-3,
        then: Callable[[Any, Finding], Any] | None = None,
        deeper: tuple[Any, int] | None = None,
    ) -> None:
        super().__init__(then, deeper)
        self.ratio = ratio

    def find(self, step: int, values: dict[str, Any], history: History) -> Finding | None:
        key = (
            "output_grad_rms" if any(k.startswith("output_grad_rms/") for k in values) else "grad_norm"
        )
        found = _layers(values, key)
        if len(found) < 2:
            return None
        largest = max(found.values())
        name, value = min(found.items(), key=lambda item: item[1])
        if largest > 0 and value < self.ratio * largest:
            return self._found(
                f"{key}/{name}",
                f"{key} of {name} is {value:.2g}, {value / largest:.1g} of the largest of all layers",
            )
        return None


class Exploding(Alarm):
    """Gradients grow from layer to layer, or activations of a layer do.

    Args:
        ratio: how far above the median over layers.
        then: see :class:`Alarm`.
        deeper: see :class:`Alarm`.
    """

    kind = "exploding"

    def __init__(
        self,
        ratio: float = 1e3,
        then: Callable[[Any, Finding], Any] | None = None,
        deeper: tuple[Any, int] | None = None,
    ) -> None:
        super().__init__(then, deeper)
        self.ratio = ratio

    def find(self, step: int, values: dict[str, Any], history: History) -> Finding | None:
        for key in ("activation_rms", "grad_norm"):
            found = _layers(values, key)
            middle = median(found.values()) if len(found) > 2 else 0.0
            if middle <= 0:
                continue
            name, value = max(found.items(), key=lambda item: item[1])
            if value > self.ratio * middle:
                return self._found(
                    f"{key}/{name}",
                    f"{key} of {name} is {value:.2g}, {value / middle:.0f} times the median of layers",
                )
        return None


class DeadUnits(Alarm):
    """Most inputs of a layer are zero for the whole batch.

    Args:
        share: of the layer's inputs.
        then: see :class:`Alarm`.
        deeper: see :class:`Alarm`.
    """

    kind = "dead units"

    def __init__(
        self,
        share: float = 0.9,
        then: Callable[[Any, Finding], Any] | None = None,
        deeper: tuple[Any, int] | None = None,
    ) -> None:
        super().__init__(then, deeper)
        self.share = share

    def find(self, step: int, values: dict[str, Any], history: History) -> Finding | None:
        for name, value in _layers(values, "dead_units").items():
            if value >= self.share:
                return self._found(
                    f"dead_units/{name}",
                    f"{100 * value:.0f} % of the inputs of {name} are zero for every sample",
                )
        return None


class AlphaRange(Alarm):
    """Steps are too large or too small, in the median over some tracked steps.

    Args:
        low: below it, steps are short.
        high: above it, steps end on the other side of the valley.
        window: number of steps.
        then: see :class:`Alarm`.
        deeper: see :class:`Alarm`.
    """

    kind = "step size"

    def __init__(
        self,
        low: float = -math.inf,
        high: float = 1.0,
        window: int = 5,
        then: Callable[[Any, Finding], Any] | None = None,
        deeper: tuple[Any, int] | None = None,
    ) -> None:
        super().__init__(then, deeper)
        self.low, self.high, self.window = low, high, window

    def find(self, step: int, values: dict[str, Any], history: History) -> Finding | None:
        _, found = history.column("alpha")
        if len(found) < self.window:
            return None
        middle = median(found[-self.window :])
        if self.low <= middle <= self.high:
            return None
        what = "beyond the far side of the valley" if middle > self.high else "short of the minimum"
        return self._found(
            "alpha", f"the median alpha of the last {self.window} is {middle:.2f}: steps end {what}"
        )


def _layers(values: dict[str, Any], name: str) -> dict[str, float]:
    start = f"{name}/"
    return {k[len(start) :]: v for k, v in values.items() if k.startswith(start) and math.isfinite(v)}


ALARMS: dict[str, type[Alarm]] = {
    "non_finite": NonFinite,
    "spike": Spike,
    "vanishing": Vanishing,
    "exploding": Exploding,
    "dead_units": DeadUnits,
    "alpha": AlphaRange,
}


def alarms_of(given: str | Alarm | Iterable[str | Alarm]) -> list[Alarm]:
    """Alarms by name, ``"all"`` of them, or as they are.

    Raises:
        KeyError: for a name that there is not.
    """
    if isinstance(given, Alarm):
        return [given]
    names: Iterable[str | Alarm] = given
    if isinstance(given, str):
        names = ALARMS if given == "all" else [given]
    found = []
    for each in names:
        if isinstance(each, str) and each not in ALARMS:
            raise KeyError(f"no alarm {each!r}; there are {list(ALARMS)}")
        found.append(ALARMS[each]() if isinstance(each, str) else each)
    return found
