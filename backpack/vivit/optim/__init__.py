"""Computations of steps, under the name that they have in vivit-for-pytorch."""

from backpack.vivit.computations import (
    DirectionalDampedNewtonComputation,
    DirectionalDerivativesComputation,
)

__all__ = ["DirectionalDampedNewtonComputation", "DirectionalDerivativesComputation"]
