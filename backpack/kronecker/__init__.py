"""Algebra of Kronecker factors: blocks as objects, and lists of matrices.

In: factors. Out: products, inverses, roots, samples, determinants, without the matrix itself.
"""

from backpack.kronecker.block import KroneckerBlock
from backpack.kronecker.eigen import KroneckerEigen
from backpack.kronecker.factored import KroneckerFactored
from backpack.kronecker.lists import (
    apply_inv_kfac_mat_prod,
    apply_kfac_mat_prod,
    inv_kfac_mat_prod,
    inv_kfacs,
    is_matrix,
    is_vector,
    kfac_mat_prod,
    kfacs_to_mat,
    two_kfacs_to_mat,
)
from backpack.kronecker.matrices import multiply, pi_damping

__all__ = [
    "KroneckerBlock",
    "KroneckerEigen",
    "KroneckerFactored",
    "apply_inv_kfac_mat_prod",
    "apply_kfac_mat_prod",
    "inv_kfac_mat_prod",
    "inv_kfacs",
    "is_matrix",
    "is_vector",
    "kfac_mat_prod",
    "kfacs_to_mat",
    "multiply",
    "pi_damping",
    "two_kfacs_to_mat",
]
