"""Diagonals of the generalized Gauss-Newton matrix."""

from backpack.quantities.diagonal import BatchDiagGGNExact, BatchDiagGGNMC, DiagGGNExact, DiagGGNMC

__all__ = ["BatchDiagGGNExact", "BatchDiagGGNMC", "DiagGGNExact", "DiagGGNMC"]
