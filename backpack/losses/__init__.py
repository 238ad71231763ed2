"""Losses: from a loss to columns whose outer products sum to its Hessian in the model's output.

In: a loss function's arguments. Out: a Hessian, with its exact and sampled square roots.
"""

# Importing the package fills its table.
from backpack.losses import elementwise, piecewise, softmax

__all__ = ["elementwise", "piecewise", "softmax"]
