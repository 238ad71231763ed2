"""Diagonals of the Hessian."""

from backpack.quantities import BatchDiagHessian, DiagHessian

__all__ = ["BatchDiagHessian", "DiagHessian"]
