"""Optimizers that use what this library computes beside the gradient.

optimizer = KFAC(model, lr=0.1, damping=1e-2)
loss = lossfunc(model(X), y)
with optimizer.backpack():
loss.backward()
optimizer.step()
"""

from backpack.optim.accounting import epsilon
from backpack.optim.base import BackpackOptimizer
from backpack.optim.curvature import CurvatureOptimizer
from backpack.optim.diagonal import DiagGGNExact, DiagGGNMC, DiagHessian, SumGradSquared
from backpack.optim.gram import GramNewton
from backpack.optim.kronecker import EKFAC, EKFLR, KFAC, KFLR, KFRA
from backpack.optim.newton import CGNewton, conjugate_gradients
from backpack.optim.private import DPSGD

__all__ = [
    "BackpackOptimizer",
    "CGNewton",
    "CurvatureOptimizer",
    "DPSGD",
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagHessian",
    "EKFAC",
    "EKFLR",
    "GramNewton",
    "KFAC",
    "KFLR",
    "KFRA",
    "SumGradSquared",
    "conjugate_gradients",
    "epsilon",
]
