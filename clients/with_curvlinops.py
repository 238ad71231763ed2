"""curvlinops, which takes Hessian-vector products from the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import record
import torch
from curvlinops.experimental import ActivationHessianLinearOperator
from torch import nn


def activation_hessian(lossfunc: nn.Module, outputs: int) -> torch.Tensor:
    """The Hessian of the loss in a layer's output, column by column."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs), nn.Sigmoid())
    y = torch.rand(2, outputs) if isinstance(lossfunc, nn.MSELoss) else torch.randint(outputs, (2,))
    hessian = ActivationHessianLinearOperator(
        model, lossfunc, ("0", "output", 0), [(torch.rand(2, 3), y)]
    )
    return hessian @ torch.eye(hessian.shape[1])


def cases() -> dict[str, Callable[[], Any]]:
    """Names and functions."""
    return {
        "activation Hessian, cross-entropy": lambda: activation_hessian(nn.CrossEntropyLoss(), 3),
        "activation Hessian, squared error": lambda: activation_hessian(nn.MSELoss(), 2),
    }


if __name__ == "__main__":
    record.main(cases())
