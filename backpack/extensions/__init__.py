"""The quantities, under the names users import."""

from backpack.extensions._absent import HBP
from backpack.quantities.base import BackpropExtension
from backpack.quantities.diagonal import (
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchDiagHessianMC,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    DiagHessianMC,
)
from backpack.quantities.first_order import BatchGrad, BatchL2Grad, SumGradSquared, Variance
from backpack.quantities.kronecker import EKFAC, EKFLR, KFAC, KFLR, KFRA, EmpiricalKFAC
from backpack.quantities.matrix_products import GGNMP, HMP, PCHMP
from backpack.quantities.square_root import SqrtGGNExact, SqrtGGNMC

__all__ = [
    "EKFAC",
    "EKFLR",
    "GGNMP",
    "HBP",
    "HMP",
    "KFAC",
    "KFLR",
    "KFRA",
    "PCHMP",
    "BackpropExtension",
    "BatchDiagGGNExact",
    "BatchDiagGGNMC",
    "BatchDiagHessian",
    "BatchDiagHessianMC",
    "BatchGrad",
    "BatchL2Grad",
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagHessian",
    "DiagHessianMC",
    "EmpiricalKFAC",
    "SqrtGGNExact",
    "SqrtGGNMC",
    "SumGradSquared",
    "Variance",
]
