"""Algebra of Kronecker factors, under the name programs import (see :mod:`backpack.kronecker`)."""

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

__all__ = [
    "apply_inv_kfac_mat_prod",
    "apply_kfac_mat_prod",
    "inv_kfac_mat_prod",
    "inv_kfacs",
    "is_matrix",
    "is_vector",
    "kfac_mat_prod",
    "kfacs_to_mat",
    "two_kfacs_to_mat",
]
