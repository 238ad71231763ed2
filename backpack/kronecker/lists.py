"""Lists of Kronecker factors, as the original library has them: matrices, products, inverses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

from backpack.forms.products import spectrum
from backpack.kronecker.matrices import LARGEST_INVERSE, Shift


def is_vector(tensor: Tensor) -> bool:
    """Whether a tensor has exactly one axis."""
    return tensor.ndim == 1


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor has exactly two axes."""
    return tensor.ndim == 2


def two_kfacs_to_mat(A: Tensor, B: Tensor) -> Tensor:
    """Write out ``A (x) B``.

    Args:
        A: ``[o_1, i_1]``.
        B: ``[o_2, i_2]``.

    Returns:
        ``[o_1 * o_2, i_1 * i_2]``.

    Raises:
        ValueError: if a factor is not a matrix.
    """
    return kfacs_to_mat([A, B])


def kfacs_to_mat(factors: Sequence[Tensor]) -> Tensor:
    """Write out ``F_1 (x) ... (x) F_m``.

    For looking at small examples; products and inverses need no written-out matrix.

    Args:
        factors: matrices ``[o_j, i_j]``.

    Returns:
        ``[O, I]``.

    Raises:
        ValueError: if there is no factor, or one is not a matrix.

    Example:
        >>> kfacs_to_mat([torch.tensor([[1.0, 2.0]]), torch.eye(2)])
        tensor([[1., 0., 2., 0.],
                [0., 1., 0., 2.]])
    """
    return reduce(torch.kron, _checked(factors, "kfacs_to_mat"))


def kfac_mat_prod(factors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Function that multiplies a vector or matrix by ``F_1 (x) ... (x) F_m``.

    Args:
        factors: matrices ``[o_j, i_j]``.

    Returns:
        Function ``[I] -> [O]`` and ``[I, K] -> [O, K]``, see :func:`apply_kfac_mat_prod`.

    Raises:
        ValueError: if there is no factor, or one is not a matrix.
    """
    checked = _checked(factors, "kfac_mat_prod")

    def mat_prod(mat: Tensor) -> Tensor:
        return _multiply(checked, mat, "kfac_mat_prod")

    return mat_prod


def apply_kfac_mat_prod(factors: Sequence[Tensor], mat: Tensor) -> Tensor:
    """Multiply a vector or matrix by ``F_1 (x) ... (x) F_m``.

    One factor at a time: ``O(K I sum_j o_j)`` operations for square factors, no ``[O, I]`` matrix.

    Args:
        factors: matrices ``[o_j, i_j]``.
        mat: ``[I]`` or ``[I, K]``.

    Returns:
        ``[O]`` or ``[O, K]``.

    Raises:
        ValueError: if there is no factor, one is not a matrix, or ``mat`` does not fit.

    Example:
        >>> B, A, V = torch.rand(3, 3), torch.rand(2, 2), torch.rand(3, 2)
        >>> result = apply_kfac_mat_prod([B, A], V.flatten()).reshape(3, 2)
        >>> torch.allclose(result, B @ V @ A.T)
        True
    """
    return kfac_mat_prod(factors)(mat)


def inv_kfacs(factors: Sequence[Tensor], shift: Shift = None) -> list[Tensor]:
    r"""Invert every factor: ``(F_j + \delta_j I)^{-1}`` for symmetric ``F_j``.

    By eigendecomposition. An eigenvalue's inverse is clamped to ``[-1e8, 1e8]``, so that singular
    factors have an answer too. The list of inverses stands for the inverse of the Kronecker product
    of the shifted factors.

    Args:
        factors: symmetric matrices ``[d_j, d_j]``; only their lower triangles are read.
        shift: added to the diagonal first: ``None`` for nothing, one number for all factors, or one
            number per factor.

    Returns:
        One symmetric ``[d_j, d_j]`` per factor.

    Raises:
        ValueError: if there is no factor, one is not square, or the number of shifts is wrong.

    Example:
        >>> inv_kfacs([2.0 * torch.eye(2), torch.zeros(1, 1)], shift=[2.0, 0.1])
        [tensor([[0.2500, 0.0000],
                [0.0000, 0.2500]]), tensor([[10.]])]
    """
    checked = _checked(factors, "inv_kfacs")
    for position, factor in enumerate(checked):
        if factor.shape[0] != factor.shape[1]:
            raise ValueError(
                f"inv_kfacs: factor {position} has shape {list(factor.shape)}, but only square "
                "(symmetric) matrices have an inverse."
            )
    return [
        _inverse(factor, each)
        for factor, each in zip(checked, _shifts(shift, len(checked)), strict=True)
    ]


def inv_kfac_mat_prod(factors: Sequence[Tensor], shift: Shift = None) -> Callable[[Tensor], Tensor]:
    """Function that multiplies a vector or matrix by the inverse of the Kronecker product.

    The factors are inverted once, here.

    Args:
        factors: symmetric matrices ``[d_j, d_j]``.
        shift: see :func:`inv_kfacs`.

    Returns:
        Function ``[D] -> [D]`` and ``[D, K] -> [D, K]``.

    Raises:
        ValueError: see :func:`inv_kfacs`.
    """
    return kfac_mat_prod(inv_kfacs(factors, shift=shift))


def apply_inv_kfac_mat_prod(factors: Sequence[Tensor], mat: Tensor, shift: Shift = None) -> Tensor:
    """Multiply a vector or matrix by the inverse of the Kronecker product.

    Args:
        factors: symmetric matrices ``[d_j, d_j]``.
        mat: ``[D]`` or ``[D, K]``.
        shift: see :func:`inv_kfacs`.

    Returns:
        The shape of ``mat``.

    Raises:
        ValueError: see :func:`inv_kfacs` and :func:`apply_kfac_mat_prod`.
    """
    return inv_kfac_mat_prod(factors, shift=shift)(mat)


def _checked(factors: Sequence[Tensor], caller: str) -> list[Tensor]:
    """The factors as a list, if they are matrices."""
    listed = list(factors)
    if not listed:
        raise ValueError(f"{caller}: expected at least one Kronecker factor, but got none.")
    for position, factor in enumerate(listed):
        if not is_matrix(factor):
            raise ValueError(
                f"{caller}: factor {position} has shape {list(factor.shape)}, but Kronecker "
                "factors are matrices; pass a list of two-dimensional tensors."
            )
    return listed


def _multiply(factors: list[Tensor], mat: Tensor, caller: str) -> Tensor:
    """Product with the Kronecker product of matrices, ``[I] -> [O]`` or ``[I, K] -> [O, K]``."""
    size = prod(factor.shape[1] for factor in factors)
    if not (is_vector(mat) or is_matrix(mat)) or mat.shape[0] != size:
        raise ValueError(
            f"{caller}: factors of shapes {[list(factor.shape) for factor in factors]} multiply "
            f"vectors [{size}] and matrices [{size}, K], but got {list(mat.shape)}; flatten the "
            "parameter's axes first."
        )
    # K leads; every factor takes the last axis and puts its result in front: no copies in between.
    result = mat.reshape(size, mat.shape[1:].numel()).T
    for factor in reversed(factors):
        width = factor.shape[1]
        result = factor @ result.reshape(result.numel() // max(width, 1), width).T
    return result.reshape(prod(factor.shape[0] for factor in factors), *mat.shape[1:])


def _shifts(shift: Shift, count: int) -> list[float]:
    """One shift per factor."""
    if shift is None:
        return [0.0] * count
    if not isinstance(shift, Sequence):
        return [shift] * count
    if len(shift) != count:
        raise ValueError(
            f"inv_kfacs: got {len(shift)} shifts for {count} factors; pass one number for all "
            "factors or one per factor."
        )
    return list(shift)


def _inverse(factor: Tensor, shift: float) -> Tensor:
    """Inverse of ``factor + shift * I``, its eigenvalues clamped."""
    eigenvalues, eigenvectors = spectrum(factor)
    inverses = (eigenvalues + shift).reciprocal().clamp(-LARGEST_INVERSE, LARGEST_INVERSE)
    inverse: Tensor = (eigenvectors * inverses) @ eigenvectors.T
    return inverse
