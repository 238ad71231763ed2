"""What a run's numbers say, in words, with the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from backpack.cockpit.history import History
from backpack.cockpit.instruments import number

# From harmless to severe.
SEVERITIES = ("good", "note", "warning", "severe")


@dataclass(frozen=True)
class Statement:
    """A sentence about a run.

    Attributes:
        severity: one of :data:`SEVERITIES`.
        text: the sentence.
        evidence: the numbers that it rests on.
        advice: what to do, if anything.
    """

    severity: str
    text: str
    evidence: str
    advice: str = ""


def statements(history: History) -> list[Statement]:
    """All that can be said of a run, the most severe first.

    Example:
        >>> history = History()
        >>> for step in range(20):
        ...     history.add(step, {"loss": 2.0 * 0.9**step})
        >>> statements(history)[0].text
        'The loss falls.'
    """
    found = [statement for rule in _RULES for statement in rule(history)]
    if not found:
        return [Statement("note", "There is too little to say anything yet.", f"{len(history)} steps")]
    return sorted(found, key=lambda s: -SEVERITIES.index(s.severity))


_RULES: list[Callable[[History], Iterator[Statement]]] = []


def _rule(
    function: Callable[[History], Iterator[Statement]],
) -> Callable[[History], Iterator[Statement]]:
    _RULES.append(function)
    return function


def _late(history: History, key: str, least: int = 5) -> list[float]:
    """Finite values of the second half of a run; none if there are few."""
    _, values = history.column(key)
    values = values[len(values) // 2 :]
    values = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    return values if len(values) >= least else []


def _span(history: History) -> str:
    return f"steps {history.steps[0]} to {history.steps[-1]}" if len(history) else "no steps"


@_rule
def _finite(history: History) -> Iterator[Statement]:
    for key in ("loss", "grad_norm", "update_size"):
        steps, values = history.column(key)
        bad = [s for s, v in zip(steps, values, strict=True) if not math.isfinite(v)]
        if bad:
            yield Statement(
                "severe",
                f"The {key.replace('_', ' ')} is not a finite number.",
                f"first at step {bad[0]}, in {len(bad)} of {len(steps)} tracked steps",
                "Look at the batch of that step, at losses that take logarithms or roots, and at the "
                "learning rate; in half precision, at the gradient scaler.",
            )
            return


@_rule
def _loss(history: History) -> Iterator[Statement]:
    steps, values = history.column("loss")
    pairs = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    if len(pairs) < 8:
        return
    quarter = max(2, len(pairs) // 4)
    parts = [[v for _, v in pairs[k * quarter : (k + 1) * quarter]] for k in range(4)]
    first, third, last = median(parts[0]), median(parts[2]), median(parts[3])
    spread = median(abs(v - last) for v in parts[3])
    evidence = (
        f"median of the first quarter {number(first)}, of the third {number(third)}, of the last "
        f"{number(last)}; {_span(history)}"
    )
    if last < third - spread or last < 0.98 * third:
        yield Statement("good", "The loss falls.", evidence)
    elif last > 1.1 * first:
        yield Statement(
            "severe",
            "The loss is higher than at the start.",
            evidence,
            "Lower the learning rate, or look at what changed where it began to rise.",
        )
    elif last > third + 2 * spread:
        yield Statement(
            "warning", "The loss rises.", evidence, "Lower the learning rate, or stop here."
        )
    elif last < first:
        yield Statement(
            "note",
            "The loss has stopped falling.",
            evidence,
            "Decay the learning rate; if noise dominates (below), enlarge the batch.",
        )
    else:
        yield Statement(
            "warning",
            "The loss does not move.",
            evidence,
            "See whether steps are large enough, and whether gradients reach all layers.",
        )


@_rule
def _spikes(history: History) -> Iterator[Statement]:
    found = [e for e in history.events if e["event"] == "spike"]
    if found:
        where = ", ".join(str(e["step"]) for e in found[:6])
        yield Statement(
            "warning",
            "There is a spike." if len(found) == 1 else f"There are {len(found)} spikes.",
            f"at step {where}; {found[0]['message']}",
            "Clip gradients, or skip the batch; look whether it is the same data each time.",
        )


@_rule
def _alpha(history: History) -> Iterator[Statement]:
    values = _late(history, "alpha")
    if not values:
        return
    middle = median(values)
    right = sum(v > 0.5 for v in values) / len(values)
    left = sum(v < -0.5 for v in values) / len(values)
    evidence = (
        f"median alpha {middle:.2f} over the last {len(values)} tracked steps; "
        f"{100 * right:.0f} % above 0.5, {100 * left:.0f} % below -0.5"
    )
    if middle > 1:
        yield Statement(
            "severe",
            "Steps are too large: they end higher on the other side of the valley than they began.",
            evidence,
            "Lower the learning rate by a factor of 2 or more.",
        )
    elif middle > 0.5:
        yield Statement(
            "warning",
            "Steps are large: they cross the valley and climb the other side.",
            evidence,
            "Fine in the beginning; towards the end, decay the learning rate.",
        )
    elif middle < -0.8:
        yield Statement(
            "warning",
            "Steps are small: they end close to where they began.",
            evidence,
            "Raise the learning rate.",
        )
    else:
        yield Statement("good", "Steps end near the bottom of the valley that they cross.", evidence)


@_rule
def _ratio(history: History) -> Iterator[Statement]:
    values = _late(history, "update_ratio")
    if not values:
        return
    middle = median(values)
    evidence = f"median update over weight {number(middle)} over the last {len(values)} tracked steps"
    if middle > 1 / 30:
        yield Statement(
            "warning",
            "Each step changes the parameters by a large part of themselves.",
            evidence,
            "Lower the learning rate, or warm it up.",
        )
    elif middle < 1e-5:
        yield Statement(
            "warning",
            "Parameters hardly move.",
            evidence,
            "Raise the learning rate; in half precision, see whether updates are rounded away.",
        )


@_rule
def _noise(history: History) -> Iterator[Statement]:
    values = _late(history, "norm_test")
    if not values:
        return
    middle = median(values)
    share = min(middle**2, 1.0)
    evidence = (
        f"median norm test {middle:.2f} over the last {len(values)} tracked steps: "
        f"{100 * share:.0f} % of the gradient's squared norm is noise"
    )
    if middle > 0.9:
        yield Statement(
            "note",
            "The mini-batch gradient is mostly noise.",
            evidence,
            "Enlarge the batch (see the noise scale), or decay the learning rate.",
        )
    elif middle < 0.2:
        yield Statement(
            "note",
            "The mini-batch gradient has little noise: a smaller batch would do.",
            evidence,
            "Halve the batch, or raise the learning rate.",
        )


@_rule
def _dead(history: History) -> Iterator[Statement]:
    for layer in history.layers("dead_units"):
        value = history.last(f"dead_units/{layer}")
        if value is not None and value >= 0.5:
            _, values = history.column(f"dead_units/{layer}")
            yield Statement(
                "severe" if value > 0.95 else "warning",
                f"{100 * value:.0f} % of what layer {layer} is given is zero for every sample.",
                f"{100 * values[0]:.0f} % at the start",
                "Lower the learning rate, look at the biases of the layer before, or use an activation "
                "without a flat side.",
            )


@_rule
def _hard(history: History) -> Iterator[Statement]:
    values = _late(history, "hard_samples")
    mean = sum(values) / max(len(values), 1)
    if mean >= 0.06:
        yield Statement(
            "warning",
            f"{100 * mean:.0f} % of the samples stay hard, though most are learned.",
            f"losses far above the first step's, in the mean over {len(values)} tracked steps",
            "Look at the labels and inputs of samples with the largest losses.",
        )


@_rule
def _flow(history: History) -> Iterator[Statement]:
    key = "output_grad_rms"
    layers = history.layers(key)
    found = {layer: _late(history, f"{key}/{layer}", 1) for layer in layers}
    middle = {layer: median(values) for layer, values in found.items() if values}
    if len(middle) < 3 or max(middle.values()) <= 0:
        return
    low, high = min(middle, key=middle.__getitem__), max(middle, key=middle.__getitem__)
    ratio = middle[low] / middle[high]
    if ratio < 1e-3:
        yield Statement(
            "severe" if ratio < 1e-6 else "warning",
            f"Gradients vanish on the way to layer {low}.",
            f"output gradients there {number(middle[low])}, {number(middle[high])} at {high}",
            "Use an activation that does not saturate, skip connections, normalisation, or another "
            "initialisation.",
        )


@_rule
def _stopping(history: History) -> Iterator[Statement]:
    values = _late(history, "early_stopping")
    if values and median(values) > 0:
        yield Statement(
            "note",
            "Gradients can no longer be told from noise.",
            f"median early-stopping criterion {median(values):.2f} over the last {len(values)} tracked "
            "steps, above 0",
            "What is learnt from here on is the training set: stop, or decay the learning rate.",
        )


@_rule
def _stability(history: History) -> Iterator[Statement]:
    values, rates = _late(history, "hess_max_ev"), _late(history, "learning_rate")
    if not values or not rates or history.header.get("optimizer") != "SGD":
        return
    product = median(values) * median(rates)
    if product > 1.6:
        yield Statement(
            "note",
            "Training is at the edge of stability.",
            f"learning rate times largest eigenvalue: {product:.2f}; above 2 plain descent along that "
            "direction grows",
            "Usual with large learning rates; if the loss is restless, lower the rate.",
        )


@_rule
def _left_out(history: History) -> Iterator[Statement]:
    found = [e for e in history.events if e["event"] == "left out"]
    if found:
        names = ", ".join(dict.fromkeys(e["quantity"] for e in found))
        yield Statement("note", f"Not computed, or not always: {names}.", found[0]["message"])
