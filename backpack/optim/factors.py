"""Factors of an optimizer's curvature: averaged, damped, inverted."""

from __future__ import annotations

import torch
from torch import Tensor

from backpack.forms.products import spectrum

# A factor that is not positive definite after this many doublings of its damping is an error.
DOUBLINGS = 10


def overlap(new: Tensor, old: Tensor) -> Tensor:
    """``(Q_new^T Q_old)^2``, squared entries."""
    return (new * old if new.dim() == 1 else new.mT @ old).square()


def thinned(factor: Tensor) -> Tensor:
    """The diagonal, if there is nothing else: row frequencies of an embedding, above all."""
    if factor.dim() == 1:
        return factor
    diagonal = factor.diagonal()
    alone = len(factor) > 1 and int(factor.count_nonzero()) == int(diagonal.count_nonzero())
    return diagonal.clone() if alone else factor


def mixed(old: Tensor, new: Tensor, decay: float) -> Tensor:
    if old.dim() != new.dim():
        old, new = (torch.diag(each) if each.dim() == 1 else each for each in (old, new))
    return old.lerp(new, 1 - decay)


def rounding(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues up to this are rounding errors of the largest."""
    return eigenvalues.abs().max() * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps


def damped_inverse(factor: Tensor, shift: float, name: str) -> Tensor:
    """``(F + shift I)^{-1}``; the pseudo-inverse if ``shift`` is zero."""
    if not shift:
        return _pseudo_inverse(factor, name)
    for _ in range(DOUBLINGS + 1):
        if factor.dim() == 1:
            if bool((factor + shift > 0).all()):
                return 1 / (factor + shift)
        else:
            shifted = factor.clone()
            shifted.diagonal().add_(shift)
            root, failed = torch.linalg.cholesky_ex(shifted)
            if not bool(failed):
                return torch.cholesky_inverse(root)
        shift *= 2
    raise ValueError(
        f"a Kronecker factor of parameter {name} is not positive definite, even with {shift / 2:.1e} "
        "on its diagonal; use more damping"
    )


def _pseudo_inverse(factor: Tensor, name: str) -> Tensor:
    eigenvalues, basis = (factor, None) if factor.dim() == 1 else spectrum(factor)
    tolerance = rounding(eigenvalues)
    if bool((eigenvalues < -tolerance).any()):
        raise ValueError(
            f"a Kronecker factor of parameter {name} has negative eigenvalues; use damping"
        )
    inverses = eigenvalues.reciprocal().masked_fill(eigenvalues <= tolerance, 0.0)
    return inverses if basis is None else (basis * inverses) @ basis.mT
