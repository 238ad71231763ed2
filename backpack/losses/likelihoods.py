"""Likelihoods whose Fisher information is known, though the loss is not convex in its arguments.

The Hessian of a negative log-likelihood may depend on the targets, and be indefinite for some. Its mean
over targets drawn from the model is the Fisher information, which is not: random columns are gradients
for drawn targets (Martens, 2014, arXiv:1412.1193).

Letters: ``m`` means, ``s`` variances, ``e`` standard normal numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.losses.base import incoming_root, normal_draws, reduction_scale
from backpack.samples.axis import SampleAxis


@dataclass(frozen=True, eq=False)
class Likelihood:
    """A negative log-likelihood with several arguments that depend on the model.

    Attributes:
        arguments: those.
        scores: gradients in the arguments for drawn targets, ``[count, *argument.shape]`` each, times a
            factor; their expected outer product is the Fisher information of a loss that is a sum.
        scale: the reduction's factor.
    """

    arguments: Sequence[Tensor]
    scores: Callable[[int, torch.Generator | None, Tensor], list[Tensor]]
    scale: float


@dataclass(frozen=True, eq=False)
class Fisher:
    """The Fisher information of a likelihood in its arguments: there are random columns only.

    Attributes:
        likelihood: the likelihood.
        axes: the sample axis of each argument.
    """

    likelihood: Likelihood
    axes: list[SampleAxis]

    def sampled(self, grad: Tensor, count: int, generator: torch.Generator | None) -> list[Tensor]:
        """``count`` Monte-Carlo columns for the incoming gradient ``grad``, at every argument."""
        root = incoming_root(grad * self.likelihood.scale) / count**0.5
        return self.likelihood.scores(count, generator, root)


def gaussian(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Likelihood | None:
    """``y ~ Normal(m, s)`` with ``s = max(var, eps)``: scores ``-e / sqrt(s)`` and ``(1 - e^2) / 2s``.

    Their second moment is ``1 / s`` and ``1 / 2s^2``, nothing between the two. A variance that several
    means share has the sum of its scores.
    """
    if not isinstance(var, Tensor) or torch.broadcast_shapes(input.shape, target.shape) != input.shape:
        return None
    shared = var.dim() == input.dim() - 1 and var.shape == input.shape[:-1]
    whole = var.unsqueeze(-1) if shared else var
    if whole.dim() > input.dim() or torch.broadcast_shapes(input.shape, whole.shape) != input.shape:
        return None

    def scores(count: int, generator: torch.Generator | None, weight: Tensor) -> list[Tensor]:
        noise = normal_draws((count, *input.shape), input, generator)
        # In torch the lower bound has no part in the derivative.
        s = whole + (whole.detach().clamp(min=eps) - whole.detach())
        variances = weight * (1 - noise.square()) / (2 * s)
        lead = (1,) * (input.dim() - whole.dim())
        variances = variances.sum_to_size(count, *lead, *whole.shape).reshape(count, *var.shape)
        return [-weight * noise / s.sqrt(), variances]

    return Likelihood((input, var), scores, reduction_scale(reduction, input.shape))


LIKELIHOODS: dict[Any, Callable[..., Likelihood | None]] = {F.gaussian_nll_loss: gaussian}
