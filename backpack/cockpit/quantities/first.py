"""The original's quantities of the gradient and of individual gradients."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backpack.cockpit.context import get_optimizer
from backpack.cockpit.quantities import forms
from backpack.cockpit.quantities.forms import KeptForm
from backpack.cockpit.quantities.quantity import (
    ByproductQuantity,
    Schedule,
    SingleStepQuantity,
    TwoStepQuantity,
)
from backpack.own import BackpropExtension


class Loss(ByproductQuantity):
    """The loss of the mini-batch."""

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        return None if batch_loss is None else batch_loss.item()


class Parameters(ByproductQuantity):
    """The parameters themselves, as nested lists."""

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        return [p.detach().tolist() for p in params]


class Time(ByproductQuantity):
    """Seconds since the epoch."""

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        return time.time()


class GradNorm(ByproductQuantity):
    """Norm of each parameter's gradient."""

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        return [0.0 if p.grad is None else p.grad.detach().norm().item() for p in params]


class Distance(SingleStepQuantity):
    """Distance of each parameter from where it was at step 0."""

    def track(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> None:
        if global_step == 0:
            self._start = [p.detach().clone() for p in params]
        super().track(global_step, params, batch_loss)

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        if not hasattr(self, "_start"):
            raise KeyError("distances are those from step 0, which was not tracked")
        pairs = zip(params, self._start, strict=True)
        return [(p.detach() - start).norm().item() for p, start in pairs]


class UpdateSize(TwoStepQuantity):
    """Norm of what the optimizer adds to each parameter."""

    SAVE_SHIFT = 1

    def _compute_start(
        self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None
    ) -> Any:
        return [p.detach().clone() for p in params]

    def _compute_end(
        self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None
    ) -> Any:
        before = self._cache[global_step - 1]
        return [(p.detach() - q).norm().item() for p, q in zip(params, before, strict=True)]


class _OfSamples(SingleStepQuantity):
    """One that looks at individual gradients, through forms."""

    def extensions(self, global_step: int) -> Sequence[BackpropExtension]:
        return [KeptForm()] if self.should_compute(global_step) else []

    def compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        with torch.no_grad():
            return self._compute(global_step, params, batch_loss)


class NormTest(_OfSamples):
    """``sqrt((sum ||g_n||^2 / ||g||^2 - B) / (B (B - 1)))`` (Byrd et al., 2012)."""

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        B, total = forms.samples(global_step, params), forms.squared_norm(params)
        ratio = B**2 * forms.squared_norms(params).sum() / total
        return ((ratio - B) / (B * (B - 1))).sqrt().item()


class InnerTest(_OfSamples):
    """``sqrt((sum (g_n^T g)^2 / ||g||^4 - B) / (B (B - 1)))`` (Bollapragada et al., 2017)."""

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        B, total = forms.samples(global_step, params), forms.squared_norm(params)
        ratio = (B * forms.projections(params)).square().sum() / total**2
        return ((ratio - B) / (B * (B - 1))).sqrt().item()


class OrthoTest(_OfSamples):
    """``sqrt(sum (||g_n||^2 / ||g||^2 - (g_n^T g)^2 / ||g||^4) / (B (B - 1)))``."""

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        B, total = forms.samples(global_step, params), forms.squared_norm(params)
        norms = B**2 * forms.squared_norms(params) / total
        dots = (B * forms.projections(params)).square() / total**2
        return ((norms - dots).sum() / (B * (B - 1))).sqrt().item()


def _learning_rate(name: str, global_step: int) -> float:
    """The rate of plain SGD.

    Raises:
        ValueError: for any other optimizer.
    """
    optimizer = get_optimizer(global_step)
    off = ("momentum", "weight_decay", "dampening", "nesterov")
    plain = type(optimizer) is torch.optim.SGD
    groups = optimizer.param_groups if plain else []
    if not plain or any(group[key] for group in groups for key in off):
        raise ValueError(f"{name} is defined for plain SGD only, not for {optimizer!r}")
    return float(groups[0]["lr"])


class CABS(_OfSamples):
    """``eta (sum ||g_n||^2 - B ||g||^2) / (B L)`` (Balles et al., 2017); of plain SGD."""

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        rate = _learning_rate("CABS", global_step)
        if batch_loss is None:
            return None
        B = forms.samples(global_step, params)
        spread = B**2 * forms.squared_norms(params).sum() - B * forms.squared_norm(params)
        return (rate * spread / (B * batch_loss.item())).item()


class EarlyStopping(_OfSamples):
    """``1 - B mean(g^2 / (sigma^2 + eps))``: stop if positive (Mahsereci et al., 2017); of plain SGD.

    Args:
        track_schedule: says of a step whether it is tracked.
        verbose: print what is stored.
        epsilon: added to the variance.
    """

    def __init__(self, track_schedule: Schedule, verbose: bool = False, epsilon: float = 1e-5) -> None:
        super().__init__(track_schedule, verbose)
        self._epsilon = epsilon

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        _learning_rate("EarlyStopping", global_step)
        B, total = forms.samples(global_step, params), 0.0
        for second, g in forms.entries(params, B):
            variance = (second - g * g) * (B / (B - 1))
            total += (g * g / (variance + self._epsilon)).sum().item()
        return 1 - B * total / sum(p.numel() for p in params)


class MeanGSNR(_OfSamples):
    """``mean(g^2 / (1/B sum g_n^2 - g^2 + eps))`` (Liu et al., 2020).

    Args:
        track_schedule: says of a step whether it is tracked.
        verbose: print what is stored.
        epsilon: added to the variance.
    """

    def __init__(self, track_schedule: Schedule, verbose: bool = False, epsilon: float = 1e-5) -> None:
        super().__init__(track_schedule, verbose)
        self._epsilon = epsilon

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        B, total = forms.samples(global_step, params), 0.0
        for second, g in forms.entries(params, B):
            total += (g * g / (second - g * g + self._epsilon)).sum().item()
        return total / sum(p.numel() for p in params)
