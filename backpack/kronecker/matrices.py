"""Kronecker factors as matrices: products, eigenvalues and damping, without the large matrix.

A vector in place of a factor stands for a diagonal matrix.

Letters: ``m`` factors ``F_1, ..., F_m``; factor ``F_j`` is ``[o_j, i_j]``; ``O`` and ``I`` are the
products of the ``o_j`` and ``i_j``; ``K`` columns that are multiplied at once.

A list ``[F_1, ..., F_m]`` stands for the matrix ``F_1 (x) ... (x) F_m``, ``[O, I]``, whose rows and
columns are numbered row-major, the last factor fastest. The factors ``[B, A]`` of a weight
``[o, i]`` (``p.kfac`` and its like) therefore act on ``weight.flatten()``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from backpack.forms.products import spectrum

# Bound on the inverse of an eigenvalue: directions without curvature get a large but finite step.
LARGEST_INVERSE = 1e8


Shift = float | Sequence[float] | None


def pi_damping(factors: Sequence[Tensor], gamma: float) -> list[float]:
    """What is added to the diagonals of the factors in place of ``gamma`` to that of the matrix.

    ``sqrt(gamma) / pi`` to ``B`` and ``pi sqrt(gamma)`` to ``A``, with
    ``pi^2 = (trace(A) / i) / (trace(B) / o)`` (Martens, Grosse, 2015, arXiv:1503.05671, section 6.3),
    which makes the two additions equally large in proportion to their factors; ``pi = 1`` where a trace
    is not positive. For one factor ``gamma`` itself.

    Args:
        factors: one or two; a vector stands for a diagonal matrix.
        gamma: ``damping + l2``.
    """
    if len(factors) == 1:
        return [gamma]
    b, a = (float(f.sum() if f.dim() == 1 else f.trace()) / max(len(f), 1) for f in factors)
    pi = math.sqrt(a / b) if a > 0 and b > 0 else 1.0
    return [math.sqrt(gamma) / pi, math.sqrt(gamma) * pi]


def multiply(factors: Sequence[Tensor], matrix: Tensor) -> Tensor:
    """The Kronecker product of one or two factors, times ``[*lead, o]`` or ``[*lead, o, i]``.

    Args:
        factors: matrices; a vector stands for a diagonal matrix.
        matrix: what they fit.
    """
    if len(factors) == 1:
        (factor,) = factors
        return factor * matrix if factor.dim() == 1 else matrix @ factor.mT
    first, second = factors
    matrix = first.unsqueeze(1) * matrix if first.dim() == 1 else first @ matrix
    return matrix * second if second.dim() == 1 else matrix @ second.mT


def as_matrix(tensor: Tensor, transposed: bool, sizes: Sequence[int], lead: int = 0) -> Tensor:
    """Tensors of a parameter's shape as the matrices (or vectors) that its factors fit.

    Args:
        tensor: ``[*lead, *p]``.
        transposed: whether they belong to a transposed convolution's ``weight.transpose(0, 1)``.
        sizes: of the factors.
        lead: number of axes in front.
    """
    if transposed:
        # [q * i, o, *kernel] -> [q * o, i * kernel], for q groups
        groups = sizes[0] // tensor.shape[lead + 1]
        tensor = tensor.unflatten(lead, (groups, -1)).transpose(lead + 1, lead + 2)
    return tensor.reshape(*tensor.shape[:lead], *sizes)


def as_parameter(matrix: Tensor, transposed: bool, shape: torch.Size, lead: int = 0) -> Tensor:
    """The inverse of :func:`as_matrix`."""
    if not transposed:
        return matrix.reshape((*matrix.shape[:lead], *shape))
    outputs, *kernel = shape[1:]
    groups = matrix.shape[lead] // outputs
    stored = matrix.reshape(*matrix.shape[:lead], groups, outputs, -1, *kernel)
    return stored.transpose(lead + 1, lead + 2).flatten(lead, lead + 1)


def working(factor: Tensor) -> Tensor:
    """In a precision in which matrices can be factorized."""
    return factor.to(torch.float64 if factor.dtype == torch.float64 else torch.float32)


def transposed(factor: Tensor) -> Tensor:
    """``F^T``; a vector stands for a diagonal matrix."""
    return factor if factor.dim() == 1 else factor.mT


def turned_back(basis: Tensor, values: Tensor) -> Tensor:
    """``Q diag(values) Q^T``; a vector if ``Q`` is one."""
    return basis.square() * values if basis.dim() == 1 else (basis * values) @ basis.mT


def eigen_of(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; without work for a diagonal matrix (frequencies of words)."""
    if factor.dim() == 1:
        return spectrum(factor)
    diagonal = factor.diagonal()
    if int(factor.count_nonzero()) == int(diagonal.count_nonzero()):
        return diagonal.clone(), torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return spectrum(factor)


def rounding_of(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues up to this are rounding errors of the largest."""
    if not eigenvalues.numel():
        return eigenvalues.new_zeros(())
    eps = torch.finfo(eigenvalues.dtype).eps
    return eigenvalues.abs().max() * max(eigenvalues.shape) * eps


def positive(eigenvalues: Tensor, damping: float = 0.0) -> Tensor:
    """``eigenvalues + damping``, where rounding errors below zero are taken for zero first.

    Raises:
        ValueError: if some are negative.
    """
    noise = (eigenvalues < 0) & (eigenvalues >= -rounding_of(eigenvalues))
    damped = eigenvalues.masked_fill(noise, 0.0) + damping
    if damping < 0 or bool((damped < 0).any()):
        raise ValueError(
            f"the matrix is not positive: its smallest eigenvalue is {float(eigenvalues.min()):.1e}, "
            f"damping is {damping:.1e}; use more damping"
        )
    return damped


def reciprocal(eigenvalues: Tensor, damping: float) -> Tensor:
    """``1 / (eigenvalues + damping)``; without damping zero where there is no curvature."""
    damped = positive(eigenvalues, damping)
    none = damped == 0 if damping else damped <= rounding_of(eigenvalues)
    return damped.reciprocal().masked_fill(none, 0.0)
