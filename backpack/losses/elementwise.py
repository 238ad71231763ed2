"""Losses of single entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack._torch import shows
from backpack.losses.base import (
    LossHessian,
    NoCurvature,
    any_negative,
    fits_output,
    loss_rule,
    reduction_scale,
    root_of_curvature,
)
from backpack.losses.blocks import HessianBlocks
from backpack.samples.axis import SampleAxis


@dataclass(frozen=True, eq=False)
class _Elementwise(LossHessian):
    """Diagonal Hessian ``scale * second(f)``.

    Attributes:
        second: second derivative of one entry's loss.
        scale: weights and the reduction's factor, broadcastable to ``f``.
        noise: draws would-be gradients whose expected square is ``second(f)``.
        axis: axis of ``f`` over which the loss is summed even if not reduced.
    """

    second: Callable[[Tensor], Tensor]
    scale: Tensor | float
    noise: Callable[[Tensor, torch.Generator | None], Tensor] | None = None
    axis: int | None = None

    def _scale_root(self) -> Tensor | float:
        return (
            root_of_curvature(self.scale).to(self.f)
            if isinstance(self.scale, Tensor)
            else self.scale**0.5
        )

    def root(self) -> Tensor:
        return (root_of_curvature(self.second(self.f)) * self._scale_root()).unsqueeze(0)

    def blocks(self, grad: Tensor, signed: bool = False) -> HessianBlocks | None:
        curvature, grad = self.second(self.f) * self.scale, self.incoming(grad)
        if shows((curvature < 0).any()) or not (signed or shows((grad >= 0).all(), True)):
            return None
        return HessianBlocks((curvature * grad).expand(self.f.shape))

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        if self.noise is None:
            return super().draw(count, generator)
        draws = [self.noise(self.f, generator) for _ in range(count)]
        return torch.stack(draws) * self._scale_root()

    def incoming(self, grad: Tensor) -> Tensor:
        return grad if self.axis is None or grad.dim() == 0 else grad.unsqueeze(self.axis)


def elementwise(
    f: Tensor,
    batch: SampleAxis,
    second: Callable[[Tensor], Tensor],
    scale: Tensor | float = 1.0,
    noise: Callable[[Tensor, torch.Generator | None], Tensor] | None = None,
) -> LossHessian:
    """The Hessian of a loss that acts on each entry of the model output by itself.

    Args:
        f: the model output.
        batch: its sample axis.
        second: second derivative of one entry's loss.
        scale: weights and the reduction's factor, broadcastable to ``f``.
        noise: draws would-be gradients whose expected square is ``second(f)``; default standard normal
            numbers times its root.
    """
    return _Elementwise(f, batch, (), second, scale, noise)


def _logistic(f: Tensor) -> Tensor:
    return f.sigmoid() * (-f).sigmoid()  # not p (1 - p), which cancels


def _logistic_noise(f: Tensor, generator: torch.Generator | None) -> Tensor:
    p = f.sigmoid()
    return p - torch.bernoulli(p.detach(), generator=generator)


@loss_rule(F.mse_loss)
def mse_loss(
    batch: SampleAxis,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossHessian | None:
    """``H = 2 w``; "mean" divides by the number of entries, or by ``sum w`` if there are weights.

    Draws: targets from a normal distribution around ``f`` with variance 1/2.
    """
    if not fits_output(input, target, weight) or any_negative(weight):
        return None
    scale: Tensor | float = reduction_scale(reduction, input.shape)
    if weight is not None:
        scale = weight / weight.sum() if reduction == "mean" else weight
    return _Elementwise(input, batch, (), lambda f: torch.full_like(f, 2.0), scale)


@loss_rule(F.gaussian_nll_loss)
def gaussian_nll_loss(
    batch: SampleAxis,
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> LossHessian | None:
    """``H = 1 / max(var, eps)`` for given variances; "mean" divides by the number of entries.

    Where the variances depend on the model, they are a model output as well, and the loss is
    differentiated twice (it is not convex in both). Draws: targets from ``Normal(f, var)``.
    """
    variance = torch.as_tensor(var, dtype=input.dtype, device=input.device)
    if variance.dim() and variance.shape == input.shape[:-1] != input.shape:
        variance = variance.unsqueeze(-1)
    if not fits_output(input, target, variance):
        return None
    scale = reduction_scale(reduction, input.shape) / variance.clamp(min=eps)
    return _Elementwise(input, batch, (), torch.ones_like, scale)


@loss_rule(F.poisson_nll_loss)
def poisson_nll_loss(
    batch: SampleAxis,
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    eps: float = 1e-8,
    reduction: str = "mean",
) -> LossHessian | None:
    """``H = exp(f)``, or ``y / (f + eps)^2`` without ``log_input``; "mean" divides by the entries.

    Draws with ``log_input``: counts from ``Poisson(exp(f))``. Without it the Hessian depends on the
    targets, and drawn ones would have another one on average: normal numbers then.
    """
    if not fits_output(input, target):
        return None
    scale = reduction_scale(reduction, input.shape)
    if not log_input:
        return _Elementwise(input, batch, (), lambda f: target / (f + eps) ** 2, scale)

    def noise(f: Tensor, generator: torch.Generator | None) -> Tensor:
        rate = f.exp()
        return rate - torch.poisson(rate.detach(), generator=generator)

    return _Elementwise(input, batch, (), torch.exp, scale, noise)


@loss_rule(F.binary_cross_entropy_with_logits)
def binary_cross_entropy_with_logits(
    batch: SampleAxis,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> LossHessian | None:
    """``H = w (pos_weight y + 1 - y) s(f) s(-f)``; "mean" divides by the number of entries.

    Draws: labels from the Bernoulli distribution ``s(f)``.
    """
    if not fits_output(input, target, weight, pos_weight) or any_negative(weight, pos_weight):
        return None
    with torch.no_grad():
        scale: Tensor | float = reduction_scale(reduction, input.shape)
        if pos_weight is not None:
            scale = scale * (1 + (pos_weight - 1) * target)
        if weight is not None:
            scale = scale * weight
    return _Elementwise(input, batch, (), _logistic, scale, _logistic_noise)


@loss_rule(F.binary_cross_entropy)
def binary_cross_entropy(
    batch: SampleAxis,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> LossHessian | None:
    """``H = w (y / f^2 + (1 - y) / (1 - f)^2)`` for probabilities ``f``; "mean" divides by entries.

    It depends on the targets; Monte-Carlo columns are normal, as for Poisson without ``log_input``.
    With the sigmoid in the model the generalized Gauss-Newton is another one than that of logits.
    """
    if not fits_output(input, target, weight) or any_negative(weight):
        return None

    def second(f: Tensor) -> Tensor:
        return target / f.clamp(min=1e-12) ** 2 + (1 - target) / (1 - f).clamp(min=1e-12) ** 2

    scale: Tensor | float = reduction_scale(reduction, input.shape)
    return _Elementwise(input, batch, (), second, scale if weight is None else scale * weight)


@loss_rule(F.soft_margin_loss)
def soft_margin_loss(
    batch: SampleAxis, input: Tensor, target: Tensor, reduction: str = "mean"
) -> LossHessian | None:
    """``H = y^2 s(y f) s(-y f)``; "mean" divides by the number of entries.

    Draws: the sign of the target, positive with probability ``s(|y| f)``.
    """
    if not fits_output(input, target):
        return None
    with torch.no_grad():
        size = target.abs().to(input.dtype)
        scale = size**2 * reduction_scale(reduction, input.shape)
    return _Elementwise(
        input,
        batch,
        (),
        lambda f: _logistic(f * size),
        scale,
        lambda f, generator: _logistic_noise(f * size, generator),
    )


@loss_rule(F.multilabel_soft_margin_loss)
def multilabel_soft_margin_loss(
    batch: SampleAxis,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> LossHessian | None:
    """``H = w s(f) s(-f) / C``, ``C`` the length of the last axis; "mean" divides by all others.

    Draws: labels from the Bernoulli distribution ``s(f)``.
    """
    if not fits_output(input, target, weight) or any_negative(weight):
        return None
    scale: Tensor | float = 1 / input.shape[-1]
    if reduction == "mean":
        scale = reduction_scale(reduction, input.shape)
    if weight is not None:
        scale = scale * weight
    return _Elementwise(input, batch, (), _logistic, scale, _logistic_noise, axis=-1)


@loss_rule(F.huber_loss)
def huber_loss(
    batch: SampleAxis,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> LossHessian | None:
    """``H = w`` where ``|f - y| <= delta``, else 0; "mean" divides by the number of entries."""
    if not fits_output(input, target, weight) or any_negative(weight):
        return None

    def second(f: Tensor) -> Tensor:
        return ((f - target).abs() <= delta).to(f.dtype)

    scale: Tensor | float = reduction_scale(reduction, input.shape)
    return _Elementwise(input, batch, (), second, scale if weight is None else scale * weight)


@loss_rule(F.smooth_l1_loss)
def smooth_l1_loss(
    batch: SampleAxis, input: Tensor, target: Tensor, reduction: str = "mean", beta: float = 1.0
) -> LossHessian | None:
    """``H = 1 / beta`` where ``|f - y| < beta``, else 0; "mean" divides by the number of entries."""
    if beta == 0:
        return NoCurvature(input, batch, ())
    if not fits_output(input, target):
        return None

    def second(f: Tensor) -> Tensor:
        return ((f - target).abs() < beta).to(f.dtype) / beta

    return _Elementwise(input, batch, (), second, reduction_scale(reduction, input.shape))
