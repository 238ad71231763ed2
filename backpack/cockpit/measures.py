"""The quantities of a monitor: functions of what passes have left, for the model and for its layers.

Letters: ``B`` samples of a step, ``g`` the gradient that the optimizer is given (before clipping),
``g_n = B G_n`` each sample's gradient as a mean over samples has it, ``S = sum_n ||g_n||^2``,
``r_n = g_n^T g``, ``d`` the update. Several backward passes before one step are one step: samples of
all of them together.

A measure asks a :class:`Step` for what it needs. What is not there raises :class:`MissingError`, and
the measure is left out; the others are not affected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from backpack.cockpit.passed import MissingError
from backpack.cockpit.step import Step

DECAY = 0.9
# Of the first step's loss: samples above are hard, samples below are learned. Where losses of samples
# differ by nature, hard ones are so many standard deviations above that mean too.
HARD, LEARNED, DEVIATIONS = 1.5, 0.25, 3.0
EPSILON = {"mean_gsnr": 1e-5, "early_stopping": 1e-5, "tic_diag": 1e-7, "tic_trace": 1e-7}


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
    value: Callable[[Step], Tensor]
    layered: bool = True
    matrix: str | None = None


MEASURES: dict[str, Measure] = {}


def _measure(
    needs: str = "", layered: bool = True, matrix: str | None = None
) -> Callable[[Callable[[Step], Tensor]], Callable[[Step], Tensor]]:
    def register(function: Callable[[Step], Tensor]) -> Callable[[Step], Tensor]:
        name = function.__name__
        MEASURES[name] = Measure(name, frozenset(needs.split()), function, layered, matrix)
        return function

    return register


def _one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A quotient; not a number where the denominator is zero."""
    return (numerator / denominator).masked_fill(denominator == 0, torch.nan)


@_measure(layered=False)
def loss(step: Step) -> Tensor:
    return _one(step.loss)


@_measure("update", layered=False)
def learning_rate(step: Step) -> Tensor:
    if not step.rates:
        raise MissingError("there is no optimizer")
    return _one(step.rates[0])


@_measure("gradient")
def grad_norm(step: Step) -> Tensor:
    if step.grad_norms is None:
        raise MissingError("no backward call was seen")
    return step.need_update(step.grad_norms).sqrt()


@_measure("update")
def param_norm(step: Step) -> Tensor:
    return step.need_update(step.parameter_norms).sqrt()


@_measure("update")
def update_size(step: Step) -> Tensor:
    return step.need_update(step.update_norms).sqrt()


@_measure("update")
def update_ratio(step: Step) -> Tensor:
    return _divided(update_size(step), param_norm(step))


@_measure("update reference")
def distance(step: Step) -> Tensor:
    return step.need_update(step.distances).sqrt()


@_measure("losses", layered=False)
def hard_samples(step: Step) -> Tensor:
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
    return _one(share if learned > 0.5 else torch.nan)


@_measure("norms")
def norm_test(step: Step) -> Tensor:
    return _divided(step.noise, step.samples * step.squared_norm).sqrt()


@_measure("norms")
def grad_noise(step: Step) -> Tensor:
    return step.noise


@_measure("norms")
def grad_signal(step: Step) -> Tensor:
    return step.squared_norm - step.noise / step.samples


@_measure("norms")
def noise_scale(step: Step) -> Tensor:
    """Numerator and denominator are smoothed over steps, each by itself (arXiv:1812.06162)."""
    parts = torch.stack([grad_noise(step), grad_signal(step)])
    if bool(parts.isfinite().all()):
        before = step.memory.get("noise_scale")
        step.memory["noise_scale"] = (
            parts if before is None else before + (1 - DECAY) * (parts - before)
        )
    noise_, signal = step.memory.get("noise_scale", parts)
    # Where the estimate of the signal is negative there is none to speak of.
    return torch.where(signal > 0, noise_ / signal, torch.nan)


@_measure("norms update", layered=False)
def cabs(step: Step) -> Tensor:
    if not step.plain or not step.rates or len(set(step.rates)) != 1:
        return _one(torch.nan)  # it is defined for plain SGD with one learning rate
    count = step.samples
    value = step.rates[0] * (step.S - count * step.squared_norm) / (count * step.loss)
    return value[:1]


@_measure("norms projections")
def inner_test(step: Step) -> Tensor:
    count = step.several()
    ratio = _divided(step.projections, step.squared_norm**2)
    return ((ratio - count).clamp(min=0) / (count * (count - 1))).sqrt()


@_measure("norms projections")
def ortho_test(step: Step) -> Tensor:
    count = step.several()
    ratio = _divided(step.S, step.squared_norm) - _divided(step.projections, step.squared_norm**2)
    return (ratio.clamp(min=0) / (count * (count - 1))).sqrt()


@_measure("squares")
def mean_gsnr(step: Step) -> Tensor:
    epsilon = EPSILON["mean_gsnr"]
    total = step.over_entries(lambda p, second, g: g * g / (second - g * g + epsilon))
    return _divided(total, step.entries)


@_measure("squares")
def early_stopping(step: Step) -> Tensor:
    count, epsilon = step.several(), EPSILON["early_stopping"]

    def value(p: Tensor, second: Tensor, g: Tensor) -> Tensor:
        return g * g / ((second - g * g) * (count / (count - 1)) + epsilon)

    return 1 - count * _divided(step.over_entries(value), step.entries)


@_measure("trace", matrix="ggn_mc")
def hess_trace(step: Step) -> Tensor:
    return step.trace("ggn_mc")


@_measure("norms trace", matrix="ggn_mc")
def tic_trace(step: Step) -> Tensor:
    return _divided(step.S / step.samples, step.trace("ggn_mc") + EPSILON["tic_trace"])


@_measure("squares diagonal", matrix="ggn_mc")
def tic_diag(step: Step) -> Tensor:
    epsilon = EPSILON["tic_diag"]
    return step.over_entries(
        lambda p, second, g: second / (step.diagonal("ggn_mc", p).to(second.dtype) + epsilon)
    )


@_measure("activity")
def activation_rms(step: Step) -> Tensor:
    return _divided(step.activity[:, 0], step.activity[:, 3]).sqrt()


@_measure("activity")
def dead_units(step: Step) -> Tensor:
    return _divided(step.activity[:, 1], step.activity[:, 4])


@_measure("activity")
def output_grad_rms(step: Step) -> Tensor:
    return _divided(step.activity[:, 2], step.activity[:, 5]).sqrt()
