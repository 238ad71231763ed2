"""The instruments: what of a history belongs in one picture, and what to look for in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from backpack.cockpit.history import History

# Where instruments stand, in this order; each group has a colour.
GROUPS = ("performance", "step size", "gradients", "curvature", "layers")
SMOOTH = 0.2


@dataclass
class Series:
    """One line.

    Attributes:
        name: what it is.
        steps: where it has values.
        values: the values.
    """

    name: str
    steps: list[int]
    values: list[float]

    def smoothed(self) -> list[float]:
        """An exponential moving average, of logarithms where all are positive.

        Values that are not finite are passed over.
        """
        logs = all(v > 0 for v in self.values if math.isfinite(v))
        found: list[float] = []
        mean: float | None = None
        for value in self.values:
            if math.isfinite(value):
                value = math.log(value) if logs else value
                mean = value if mean is None else mean + SMOOTH * (value - mean)
            found.append(math.nan if mean is None else math.exp(mean) if logs else mean)
        return found


@dataclass
class Heat:
    """Layers over time.

    Attributes:
        layers: their names, in the order of the model.
        steps: columns.
        values: rows of values; ``nan`` where there is none.
    """

    layers: list[str]
    steps: list[int]
    values: list[list[float]]


@dataclass
class Panel:
    """One instrument.

    Attributes:
        title: its name.
        group: one of :data:`GROUPS`.
        caption: what to look for.
        series: lines.
        heat: a heat map, or none.
        bars: edges and counts of a histogram, or none.
        image: edges in both directions and counts, or none.
        log: whether values are on a logarithmic scale.
        lines: values at which a rule is drawn, with what it means.
        alphas: whether this is the parabola.
    """

    title: str
    group: str
    caption: str
    series: list[Series] = field(default_factory=list)
    heat: Heat | None = None
    bars: tuple[list[float], list[float]] | None = None
    image: tuple[list[float], list[float], list[list[float]]] | None = None
    log: bool = False
    lines: list[tuple[float, str]] = field(default_factory=list)
    alphas: bool = False

    @property
    def last(self) -> float | None:
        """The latest value of the first line."""
        values = self.series[0].values if self.series else []
        return values[-1] if values else None


@dataclass(frozen=True)
class _Kind:
    title: str
    group: str
    keys: tuple[str, ...]
    caption: str
    log: bool = False
    lines: tuple[tuple[float, str], ...] = ()


_LINES = (
    _Kind(
        "Loss",
        "performance",
        ("loss",),
        "Of the mini-batch. It should fall; a spike that does not come back within a few steps needs "
        "a smaller learning rate, or a look at the data of that step.",
        True,
    ),
    _Kind(
        "Accuracy",
        "performance",
        ("train_accuracy", "valid_accuracy", "test_accuracy"),
        "As it was logged. A training curve that leaves the others behind is learnt by heart.",
    ),
    _Kind(
        "Hard samples",
        "performance",
        ("hard_samples",),
        "The share of samples with a loss above 1.5 times the first step's, once most are learned. A "
        "tenth that stays has wrong labels, or damaged inputs.",
    ),
    _Kind(
        "Learning rate",
        "performance",
        ("learning_rate",),
        "As the optimizer had it. Changes elsewhere that come with a change here are its doing.",
    ),
    _Kind(
        "Update size",
        "step size",
        ("update_size", "distance"),
        "Length of each step, and the distance from where training began. A distance that grows like "
        "the number of steps is travel in one direction, like its root a random walk.",
        True,
    ),
    _Kind(
        "Update over weight",
        "step size",
        ("update_ratio",),
        "The size of a step relative to the parameters. About 1/1000 is usual; below 1/100000 nothing "
        "is learnt, above 1/30 what was learnt is overwritten.",
        True,
        ((1e-3, "usual"),),
    ),
    _Kind(
        "Critical sharpness",
        "step size",
        ("critical_sharpness",),
        "2 over the learning rate at which the step would no longer lower the loss.",
        True,
    ),
    _Kind(
        "Gradient norm",
        "gradients",
        ("grad_norm",),
        "Before clipping. Falling is fine; growth without a growing loss means sharper surroundings.",
        True,
    ),
    _Kind(
        "Gradient tests",
        "gradients",
        ("norm_test", "inner_test", "ortho_test"),
        "Standard deviation of the mini-batch gradient, relative to its norm: in all, along it, across "
        "it. Near 1 the gradient is all noise; a larger batch would help there.",
        True,
        ((1.0, "all noise"),),
    ),
    _Kind(
        "Noise scale",
        "gradients",
        ("noise_scale",),
        "The batch size at which noise and signal are equal. Batches far below it waste steps, batches "
        "far above it waste samples.",
        True,
    ),
    _Kind(
        "Signal to noise",
        "gradients",
        ("mean_gsnr",),
        "Of an entry of the gradient, on average. High and lasting values go with generalisation.",
        True,
    ),
    _Kind(
        "Early stopping",
        "gradients",
        ("early_stopping",),
        "Above 0, gradients can no longer be told from noise: what is learnt from then on is the "
        "training set.",
        False,
        ((0.0, "stop"),),
    ),
    _Kind(
        "CABS batch size",
        "gradients",
        ("cabs",),
        "The batch size that suits learning rate and noise. (Of plain SGD.)",
        True,
    ),
    _Kind(
        "Largest eigenvalue",
        "curvature",
        ("hess_max_ev",),
        "Of the Hessian. Gradient descent with a learning rate above 2 over this value does not "
        "descend along that direction.",
        True,
    ),
    _Kind(
        "Trace of the curvature",
        "curvature",
        ("hess_trace",),
        "The curvature of all directions together: how sharp the valley is.",
        True,
    ),
    _Kind(
        "TIC",
        "curvature",
        ("tic_diag", "tic_trace"),
        "Gradient noise over curvature, an estimate of the gap between training and test loss. What "
        "counts is whether it grows.",
        True,
    ),
    _Kind(
        "Largest attention logit",
        "layers",
        ("attention_logit",),
        "Growth without end comes before a divergence; above about 100 attention looks at one token.",
    ),
)
_HEATS = (
    ("grad_norm", "Gradient norm by layer", "A layer that stays dark is not trained."),
    (
        "update_ratio",
        "Update over weight by layer",
        "Layers should move at similar rates; one that stands out wants a learning rate of its own.",
    ),
    ("norm_test", "Noise by layer", "Bright layers are given noise, and gain most by larger batches."),
    (
        "output_grad_rms",
        "Output gradient by layer",
        "What arrives from above. Darker by a factor from layer to layer: vanishing gradients.",
    ),
    (
        "activation_rms",
        "Activations by layer",
        "What a layer is given. It should neither grow nor fade.",
    ),
    (
        "dead_units",
        "Silent inputs by layer",
        "The share of a layer's inputs that are zero for every sample: dead units of the layer below.",
    ),
    ("hess_trace", "Curvature by layer", "Bright layers limit the learning rate."),
)


def panels(history: History, named: Sequence[tuple[str, History]] = ()) -> list[Panel]:
    """The instruments for which a history has values, in order.

    Args:
        history: the history.
        named: several, to lay over each other instead, with their names.
    """
    runs = list(named) or [("", history)]
    found = [p for kind in _LINES if (p := _lines(kind, runs)) is not None]
    alpha = _alphas(runs)
    found += [alpha] if alpha else []
    if len(runs) == 1:
        found += _histogram(history) + _plane(history)
        found += [p for heat in _HEATS if (p := _heat(history, *heat)) is not None]
    return sorted(found, key=lambda panel: GROUPS.index(panel.group))


def _lines(kind: _Kind, runs: Sequence[tuple[str, History]]) -> Panel | None:
    series = []
    for run, history in runs:
        for key in kind.keys if len(runs) == 1 else kind.keys[:1]:
            steps, values = history.column(key)
            if steps:
                series.append(Series(run or words(key), steps, [float(v) for v in values]))
    if not series:
        return None
    values = [v for each in series for v in each.values if math.isfinite(v)]
    log = kind.log and bool(values) and min(values) > 0 and max(values) > 5 * min(values)
    return Panel(kind.title, kind.group, kind.caption, series, log=log, lines=list(kind.lines))


def _alphas(runs: Sequence[tuple[str, History]]) -> Panel | None:
    series = [Series(run or "alpha", *history.column("alpha")) for run, history in runs]
    series = [each for each in series if each.steps]
    if not series:
        return None
    caption = (
        "Where steps land in the valley that they cross: -1 where they began, 0 at its bottom, 1 as "
        "far up the other side. Filled dots are the last tenth. All left: the learning rate is small; "
        "all right: it is large."
    )
    return Panel("Alpha", "step size", caption, series, alphas=True)


def _histogram(history: History) -> list[Panel]:
    steps, values = history.column("grad_hist")
    if not steps:
        return []
    found = values[-1]
    caption = (
        f"Entries of individual gradients at step {steps[-1]}, by powers of ten. Much in the middle "
        "bin means layers without gradients; much in the outer ones, inputs or losses on a wrong scale."
    )
    bars = list(found["edges"]), [float(count) for count in found["counts"]]
    return [Panel("Individual gradients", "gradients", caption, bars=bars)]


def _plane(history: History) -> list[Panel]:
    steps, values = history.column("grad_hist_2d")
    if not steps:
        return []
    found = values[-1]
    caption = (
        f"Entries of individual gradients (across) against the values of their parameters (up) at step "
        f"{steps[-1]}. A tilt means that gradients pull large parameters back, or push them on."
    )
    image = (*map(list, found["edges"]), found["counts"])
    return [Panel("Gradients and parameters", "gradients", caption, image=image)]


def _heat(history: History, key: str, title: str, caption: str) -> Panel | None:
    layers = history.layers(key)
    if len(layers) < 2:
        return None
    columns = {layer: dict(zip(*history.column(f"{key}/{layer}"), strict=True)) for layer in layers}
    steps = sorted({step for column in columns.values() for step in column})
    values = [[float(columns[layer].get(step, math.nan)) for step in steps] for layer in layers]
    known = [v for row in values for v in row if math.isfinite(v) and v > 0]
    log = key != "dead_units" and bool(known) and max(known) > 5 * min(known)
    group = "layers"
    return Panel(title, group, caption, heat=Heat(layers, steps, values), log=log)


def words(key: str) -> str:
    """A key as it is read: ``grad_norm`` -> ``grad norm``.

    Example:
        >>> words("grad_norm")
        'grad norm'
    """
    return key.replace("_", " ")


def number(value: float | None) -> str:
    """A number in few digits.

    Example:
        >>> number(0.012345), number(12345.6), number(3.0), number(None)
        ('0.0123', '1.23e+04', '3', '-')
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between two.

    Example:
        >>> ticks(0.0, 10.0), ticks(0.13, 0.29)
        ([0.0, 2.5, 5.0, 7.5, 10.0], [0.15, 0.2, 0.25])
    """
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    first = math.ceil(low / step - 1e-9)
    found = [round((first + k) * step, 12) for k in range(count + 2)]
    return [t for t in found if t <= high + 1e-9 * step]
