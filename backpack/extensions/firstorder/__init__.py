"""Quantities made of individual gradients."""

from backpack.quantities.first_order import BatchGrad, BatchL2Grad, SumGradSquared, Variance

__all__ = ["BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"]
