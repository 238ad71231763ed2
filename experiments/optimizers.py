"""The optimizers that are compared, and the hyper-parameters that are tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from backpack import optim

# The paper's grid (section 4).
LEARNING_RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Entry(NamedTuple):
    """An optimizer.

    Args:
        build: from the model, the learning rate, the damping and the factor of the L2 regularization.
        damped: whether it has a damping.
    """

    build: Callable[[nn.Module, float, Any, float], Optimizer]
    damped: bool

    def dampings(self, given: list[float] | None) -> list[float | None]:
        """The dampings to try."""
        return list(given or DAMPINGS) if self.damped else [None]


def _sgd(model: nn.Module, lr: float, damping: None, l2: float) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=l2)


def _adam(model: nn.Module, lr: float, damping: None, l2: float) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr, weight_decay=l2)


def _cg(model: nn.Module, lr: float, damping: float, l2: float) -> Optimizer:
    # Systems are solved roughly: the curvature is that of a mini-batch.
    return optim.CGNewton(model, lr, damping, l2, max_iter=20, tol=0.1)


# The paper's update, without momentum or averages over steps. Not among them is DPSGD, whose noise is
# the price of privacy and makes no comparison here.
OPTIMIZERS = {
    "SGD": Entry(_sgd, damped=False),
    "Adam": Entry(_adam, damped=False),
    **{
        each.__name__: Entry(each, damped=True)
        for each in (
            *(optim.DiagGGNExact, optim.DiagGGNMC, optim.DiagHessian, optim.SumGradSquared),
            *(optim.KFAC, optim.KFLR, optim.KFRA, optim.EKFAC, optim.EKFLR),
        )
    },
    "CGNewton": Entry(_cg, damped=True),
}
