"""The quantities of a monitor: functions of what passes have left, for the model and for its layers.

Letters: ``B`` samples of a step, ``g`` the gradient that the optimizer is given (before clipping),
``g_n = B G_n`` each sample's gradient as a mean over samples has it, ``S = sum_n ||g_n||^2``,
``r_n = g_n^T g``, ``d`` the update. Several backward passes before one step are one step: samples of
all of them together.

A measure asks a :class:`Step` for what it needs. What is not there raises :class:`MissingError`, and
the measure is left out; the others are not affected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from backpack.cockpit.passed import MissingError
from backpack.cockpit.step import Step

DECAY = 0.9
# Of the first step's loss: samples above are hard, samples below are learned. Where losses of samples
# differ by nature, hard ones are so many standard deviations above that mean too.
HARD, LEARNED, DEVIATIONS = 1.5, 0.25, 3.0
EPSILON = {"mean_gsnr": 1e-5, "early_stopping": 1e-5, "tic_diag": 1e-7, "tic_trace": 1e-7}


Numbers = Tensor | Sequence[float]
Value = TypeVar("Value", bound="Callable[[Step], Numbers]")


@dataclass(frozen=True)
class Measure:
    """One quantity.

    Attributes:
        name: its key.
        needs: what it is made from: ``norms``, ``projections``, ``squares``, ``activity``, ``update``,
            ``reference``, ``losses``, ``ends``, ``counts``, or ``trace`` or ``diagonal`` of a matrix.
        value: a step -> a number for each group.
        layered: whether it has values for layers.
        matrix: the curvature matrix, where one is needed.
    """

    name: str
    needs: frozenset[str]
    value: Callable[[Step], Numbers]
    layered: bool = True
    matrix: str | None = None


MEASURES: dict[str, Measure] = {}


def _measure(
    needs: str = "", layered: bool = True, matrix: str | None = None
) -> Callable[[Value], Value]:
    def register(function: Value) -> Value:
        name = function.__name__
        MEASURES[name] = Measure(name, frozenset(needs.split()), function, layered, matrix)
        return function

    return register


def _divided(numerator: float, denominator: float) -> float:
    """A quotient; not a number where the denominator is zero."""
    return numerator / denominator if denominator else math.nan


def _root(x: float) -> float:
    return math.sqrt(x) if x >= 0 else math.nan


@_measure(layered=False)
def loss(step: Step) -> list[float]:
    return [step.loss]


@_measure("update", layered=False)
def learning_rate(step: Step) -> list[float]:
    if not step.rates:
        raise MissingError("there is no optimizer")
    return [step.rates[0]]


@_measure("gradient")
def grad_norm(step: Step) -> list[float]:
    if step.grad_norms is None:
        raise MissingError("no backward call was seen")
    return step.sizes("grad_norms")


@_measure("update")
def param_norm(step: Step) -> list[float]:
    return step.sizes("parameter_norms")


@_measure("update")
def update_size(step: Step) -> list[float]:
    return step.sizes("update_norms")


@_measure("update")
def update_ratio(step: Step) -> list[float]:
    return [_divided(d, p) for d, p in zip(update_size(step), param_norm(step), strict=True)]


@_measure("update reference")
def distance(step: Step) -> list[float]:
    return step.sizes("distances")


@_measure("losses", layered=False)
def hard_samples(step: Step) -> list[float]:
    """The share of samples with a large loss, once most have a small one; not a number before."""
    losses = step.losses * step.samples
    first = step.memory.get("first_losses")
    if first is None:
        sums = step.group.sum(torch.stack([losses.sum(), losses.square().sum()])).cpu() / step.samples
        spread = (sums[1] - sums[0].square()).clamp(min=0).sqrt()
        first = step.memory["first_losses"] = torch.stack([sums[0], spread])
    mean, deviation = first.tolist()
    hard = max(HARD * mean, mean + DEVIATIONS * deviation)
    counted = torch.stack([losses > hard, losses < LEARNED * mean]).sum(1)
    share, learned = (step.group.sum(counted.double()) / step.samples).tolist()
    return [share if learned > 0.5 else math.nan]


@_measure("norms")
def norm_test(step: Step) -> list[float]:
    pairs = zip(step.noise, step.numbers("squared_norm"), strict=True)
    return [_root(_divided(noise, step.samples * square)) for noise, square in pairs]


@_measure("norms")
def grad_noise(step: Step) -> list[float]:
    return step.noise


@_measure("norms")
def grad_signal(step: Step) -> list[float]:
    pairs = zip(step.noise, step.numbers("squared_norm"), strict=True)
    return [square - noise / step.samples for noise, square in pairs]


@_measure("norms")
def noise_scale(step: Step) -> list[float]:
    """Numerator and denominator are smoothed over steps, each by itself (arXiv:1812.06162)."""
    parts = torch.tensor([grad_noise(step), grad_signal(step)], dtype=torch.float64)
    if bool(parts.isfinite().all()):
        before = step.memory.get("noise_scale")
        step.memory["noise_scale"] = (
            parts if before is None else before + (1 - DECAY) * (parts - before)
        )
    smoothed = step.memory.get("noise_scale", parts).tolist()
    # Where the estimate of the signal is negative there is none to speak of.
    return [noise / signal if signal > 0 else math.nan for noise, signal in zip(*smoothed, strict=True)]


@_measure("norms update", layered=False)
def cabs(step: Step) -> list[float]:
    if not step.plain or not step.rates or len(set(step.rates)) != 1:
        return [math.nan]  # it is defined for plain SGD with one learning rate
    count, square = step.samples, step.numbers("squared_norm")[0]
    noise = count**2 * step.numbers("norms")[0] - count * square
    return [_divided(step.rates[0] * noise, count * step.loss)]


def _aligned(step: Step) -> list[tuple[float, float]]:
    """``S / ||g||^2`` and ``sum_n r_n^2 / ||g||^4`` of each group."""
    count, found = step.samples, []
    names = "norms", "projections", "squared_norm"
    for norms, projections, square in zip(*map(step.numbers, names), strict=True):
        found.append((_divided(count**2 * norms, square), _divided(projections, square * square)))
    return found


@_measure("norms projections")
def inner_test(step: Step) -> list[float]:
    count = step.several()
    return [_root(max(along - count, 0.0) / (count * (count - 1))) for _, along in _aligned(step)]


@_measure("norms projections")
def ortho_test(step: Step) -> list[float]:
    count = step.several()
    return [_root(max(all_ - along, 0.0) / (count * (count - 1))) for all_, along in _aligned(step)]


@_measure("squares")
def mean_gsnr(step: Step) -> list[float]:
    epsilon = EPSILON["mean_gsnr"]
    total = step.over_entries(lambda p, second, g: g * g / (second - g * g + epsilon))
    return list(map(_divided, total.tolist(), step.numbers("entries")))


@_measure("squares")
def early_stopping(step: Step) -> list[float]:
    count, epsilon = step.several(), EPSILON["early_stopping"]

    def value(p: Tensor, second: Tensor, g: Tensor) -> Tensor:
        return g * g / ((second - g * g) * (count / (count - 1)) + epsilon)

    means = map(_divided, step.over_entries(value).tolist(), step.numbers("entries"))
    return [1 - count * mean for mean in means]


@_measure("trace", matrix="ggn_mc")
def hess_trace(step: Step) -> Tensor:
    return step.trace("ggn_mc")


@_measure("norms trace", matrix="ggn_mc")
def tic_trace(step: Step) -> list[float]:
    return over_trace(step, "ggn_mc")


def over_trace(step: Step, matrix: str) -> list[float]:
    """``(S / B) / (tr C + epsilon)``."""
    traces = step.trace(matrix).tolist()
    pairs = zip(step.numbers("norms"), traces, strict=True)
    return [_divided(step.samples * norms, trace + EPSILON["tic_trace"]) for norms, trace in pairs]


@_measure("squares diagonal", matrix="ggn_mc")
def tic_diag(step: Step) -> Tensor:
    epsilon = EPSILON["tic_diag"]
    return step.over_entries(
        lambda p, second, g: second / (step.diagonal("ggn_mc", p).to(second.dtype) + epsilon)
    )


def _activity(step: Step, sums: int, counts: int) -> list[float]:
    return [_divided(row[sums], row[counts]) for row in step.numbers("activity")]


@_measure("activity")
def activation_rms(step: Step) -> list[float]:
    return [_root(x) for x in _activity(step, 0, 3)]


@_measure("activity")
def dead_units(step: Step) -> list[float]:
    return _activity(step, 1, 4)


@_measure("activity")
def output_grad_rms(step: Step) -> list[float]:
    return [_root(x) for x in _activity(step, 2, 5)]
