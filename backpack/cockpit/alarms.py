"""Alarms: what a monitor notices by itself, and what it does then."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any, NamedTuple

from backpack.cockpit.history import History

# Steps with which the next is compared: the run has a trend.
NEAR = 5
# What was noticed is over after so many tracked steps without it.
QUIET = 10
# Logarithms in a quiet run deviate less; but a loss that is not nearly twice as large is no spike, nor
# is a gradient of less than four times the size: near the edge of stability it swings.
SPREAD = {"loss": 0.1, "grad_norm": 0.25}
# Parameters whose norm has grown by more have not found their scale yet, if no alpha tells.
GROWTH = 1.5


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
        self._checks = 0
        self._raised: dict[str, int] = {}

    def check(self, step: int, values: dict[str, Any], history: History) -> Finding | None:
        """What is to be said of a step, if anything; the same thing once until it is over."""
        self._checks += 1
        found = self.find(step, values, history)
        if found is None:
            return None
        last = self._raised.get(found.quantity)
        self._raised[found.quantity] = self._checks
        return found if last is None or self._checks - last > QUIET else None

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
        for key, least in SPREAD.items():
            before = history.recent(key, self.window, before=step)
            logs = [math.log(v) for v in before if 0 < v < math.inf]
            value = values.get(key)
            if len(logs) < max(self.least, NEAR + 1) or value is None or not 0 < value < math.inf:
                continue
            middle = median(logs[-NEAR:])
            apart = [logs[k] - median(logs[k - NEAR : k]) for k in range(NEAR, len(logs))]
            spread = max(1.4826 * median(map(abs, apart)), least)
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
        window: int = 15,
        then: Callable[[Any, Finding], Any] | None = None,
        deeper: tuple[Any, int] | None = None,
    ) -> None:
        super().__init__(then, deeper)
        self.low, self.high, self.window = low, high, window

    def find(self, step: int, values: dict[str, Any], history: History) -> Finding | None:
        found = history.recent("alpha", self.window)
        if len(found) < self.window:
            return None
        middle = median(found)
        if self.low <= middle <= self.high:
            return None
        what = "beyond the far side of the valley" if middle > self.high else "short of the minimum"
        return self._found(
            "alpha", f"the median alpha of the last {self.window} is {middle:.2f}: steps end {what}"
        )


class UpdateRatio(Alarm):
    """Steps replace the parameters: the learning rate is several times too large.

    Steps that are large beside the parameters are right where these are small, as in the beginning;
    then they go downhill. So they must also end at the bottom of the valley or beyond (``alpha``).
    Where alpha is not tracked, nothing is said while the parameters' norm grows.

    Args:
        ratio: of an update's norm to the parameters', in the median over some tracked steps.
        window: number of tracked steps.
        then: see :class:`Alarm`.
        deeper: see :class:`Alarm`.
    """

    kind = "step size"

    def __init__(
        self,
        ratio: float = 0.1,
        window: int = 5,
        then: Callable[[Any, Finding], Any] | None = None,
        deeper: tuple[Any, int] | None = None,
    ) -> None:
        super().__init__(then, deeper)
        self.ratio, self.window = ratio, window

    def find(self, step: int, values: dict[str, Any], history: History) -> Finding | None:
        ratios = history.recent("update_ratio", self.window)
        norms = history.recent("param_norm", self.window)
        if min(len(ratios), len(norms)) < self.window:
            return None
        middle = median(ratios)
        if not middle > self.ratio:
            return None
        alphas = history.recent("alpha", self.window)
        grown = norms[-1] / norms[0] if norms[0] else math.inf
        # The last step's alpha is known when the next has been made.
        if (len(alphas) < self.window - 1 or median(alphas) < 0) if alphas else grown > GROWTH:
            return None
        return self._found(
            "update_ratio",
            f"the last {self.window} steps had {middle:.2g} times the parameters' norm in the median: "
            "the learning rate is too large",
        )


class HardSamples(Alarm):
    """Some samples contradict the others: wrong labels, damaged inputs.

    Args:
        share: of samples that have a large loss although most are learned (``hard_samples``).
        window: number of tracked steps over which that is averaged.
        then: see :class:`Alarm`.
        deeper: see :class:`Alarm`.
    """

    kind = "hard samples"

    def __init__(
        self,
        share: float = 0.06,
        window: int = 10,
        then: Callable[[Any, Finding], Any] | None = None,
        deeper: tuple[Any, int] | None = None,
    ) -> None:
        super().__init__(then, deeper)
        self.share, self.window = share, window

    def find(self, step: int, values: dict[str, Any], history: History) -> Finding | None:
        found = history.recent("hard_samples", self.window)
        mean = sum(found) / self.window
        if len(found) < self.window or mean < self.share:
            return None
        return self._found(
            "hard_samples",
            f"{100 * mean:.0f} % of the samples have a loss well above the first step's, though most "
            "are learned: look at their labels and inputs",
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
    "update_ratio": UpdateRatio,
    "hard_samples": HardSamples,
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
