"""Diagonals of the Hessian."""

from backpack.quantities.diagonal import BatchDiagHessian, DiagHessian

__all__ = ["BatchDiagHessian", "DiagHessian"]
