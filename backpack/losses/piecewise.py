"""Losses without curvature."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from backpack.losses.base import LossHessian, NoCurvature, loss_rule
from backpack.samples.axis import SampleAxis


@loss_rule(
    F.l1_loss,
    F.nll_loss,
    F.kl_div,
    F.margin_ranking_loss,
    F.hinge_embedding_loss,
    F.multilabel_margin_loss,
)
def piecewise_linear(batch: SampleAxis, input: Tensor, *args: Any, **kwargs: Any) -> LossHessian:
    """``H = 0``: all generalized Gauss-Newton quantities are zero, Monte-Carlo ones too.

    ``nll_loss`` and ``kl_div`` are linear in the log-probabilities that they take, so that all
    curvature is in the ``log_softmax`` before them. Where it is the model's last operation, use
    ``cross_entropy`` of the logits instead; its generalized Gauss-Newton is the Fisher information.
    """
    return NoCurvature(input, batch, ())
