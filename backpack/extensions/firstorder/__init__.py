"""Quantities made of individual gradients."""

from backpack.quantities import BatchGrad, BatchL2Grad, SumGradSquared, Variance

__all__ = ["BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"]
