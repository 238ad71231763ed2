"""Leading eigenpairs and spectral densities of symmetric matrices that are known by their products.

Letters: ``D`` size of the matrix, ``K`` eigenpairs, ``m`` steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Map(Protocol):
    """What is asked of a matrix: an :class:`~backpack.vivit.Operator`, or a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(D, D)``."""

    def __matmul__(self, x: Tensor) -> Tensor: ...


class Ritz(NamedTuple):
    """Approximate eigenpairs.

    Attributes:
        values: largest first, ``[K]``.
        vectors: orthonormal, ``[K, D]``.
        residuals: ``|A v - value v|`` for each: how far an eigenvalue of ``A`` is at most.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class Density(NamedTuple):
    """An estimated spectrum: a sum of weighted points.

    Attributes:
        values: places, ``[draws * m]``.
        weights: they sum to one.
        size: ``D``.
    """

    values: Tensor
    weights: Tensor
    size: int

    def on(self, grid: Tensor, width: float | Tensor | None = None) -> Tensor:
        """The density at the points of a grid, each point made a Gaussian.

        Args:
            grid: points.
            width: standard deviation; by default a hundredth of the spectrum's range.
        """
        if width is None:
            width = (self.values.max() - self.values.min()).clamp(min=1e-30) / 100
        scaled = (grid.unsqueeze(1) - self.values) / width
        return (-0.5 * scaled.square()).exp() @ self.weights / (width * (2 * torch.pi) ** 0.5)

    def trace(self, function: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """Estimate of ``trace f(A)``: log determinants, effective dimensions."""
        return self.size * (function(self.values) * self.weights).sum()


class _Basis:
    """Lanczos' iteration, with vectors that are kept orthogonal.

    ``A Q = Q T + beta q e^T``; where an invariant space is complete, a new direction is begun.
    """

    def __init__(
        self, matrix: Map, start: Tensor, steps: int, generator: torch.Generator | None
    ) -> None:
        self.matrix, self.generator = matrix, generator
        self.vectors = start.new_empty(steps + 1, len(start))
        self.vectors[0] = start / start.norm()
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.scale = 0.0
        self.eps = torch.finfo(start.dtype).eps

    def step(self) -> None:
        j = len(self.alpha)
        known, q = self.vectors[: j + 1], self.vectors[j]
        w = self.matrix @ q
        self.alpha.append(float(q @ w))
        for _ in range(2):
            w = w - known.mT @ (known @ w)
        beta = float(w.norm())
        self.scale = max(self.scale, abs(self.alpha[-1]), beta)
        if beta <= 10 * self.eps * self.scale:
            beta = 0.0
            w = _random(w, self.generator)
            for _ in range(2):
                w = w - known.mT @ (known @ w)
        self.beta.append(beta)
        norm = float(w.norm())
        self.vectors[j + 1] = w / norm if norm else w

    @property
    def tridiagonal(self) -> Tensor:
        alpha = torch.tensor(self.alpha, dtype=torch.float64)
        beta = torch.tensor(self.beta[:-1], dtype=torch.float64)
        return torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1)


def _random(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator).to(like)


def _like(matrix: Map) -> Tensor:
    return matrix if isinstance(matrix, Tensor) else getattr(matrix, "like", torch.zeros(()))


def lanczos(
    matrix: Map,
    k: int,
    *,
    iterations: int | None = None,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> Ritz:
    """Leading eigenpairs of a symmetric matrix, by Lanczos' iteration from a random vector.

    Stops once all residuals are small. Of a multiple eigenvalue fewer copies may be found than exist.

    Args:
        matrix: an operator, or a tensor.
        k: how many.
        iterations: products at most; by default ``D``, or 300 if that is less.
        tolerance: residual, as part of the largest eigenvalue; by default 1000 times the precision.
        generator: source of randomness.

    Returns:
        Eigenvalues, vectors and residuals.

    Warns:
        UserWarning: if residuals are larger than ``tolerance`` at the end.
    """
    size, like = matrix.shape[0], _like(matrix).detach()
    k = min(k, size)
    steps = min(size, max(300, k + 1) if iterations is None else max(iterations, k))
    accepted = 1e3 * torch.finfo(like.dtype).eps if tolerance is None else tolerance
    start = _random(like.new_zeros(size), generator)
    basis = _Basis(matrix, start, steps, generator)
    for j in range(steps):
        basis.step()
        if j + 1 < k or ((j + 1) % 5 and j + 1 < steps):
            continue
        values, vectors = torch.linalg.eigh(basis.tridiagonal)
        values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
        residuals = (vectors[-1] * basis.beta[-1]).abs()
        if j + 1 == size:
            residuals = torch.zeros_like(residuals)
        # An invariant space may leave out directions with larger eigenvalues.
        if basis.beta[-1] and bool((residuals <= accepted * basis.scale).all()):
            break
    if bool((residuals > accepted * basis.scale).any()):
        warnings.warn(
            f"Lanczos' iteration has residuals of up to {float(residuals.max()):.1e} after "
            f"{len(basis.alpha)} products; allow more iterations, or ask for fewer eigenpairs",
            stacklevel=2,
        )
    found = vectors.mT.to(like) @ basis.vectors[: len(vectors)]
    return Ritz(values.to(like), found.to(like), residuals.to(like))


def spectral_density(
    matrix: Map, *, steps: int = 64, draws: int = 4, generator: torch.Generator | None = None
) -> Density:
    """The spectrum of a symmetric matrix, estimated by stochastic Lanczos quadrature.

    From random vectors, each ``steps`` products (Ghorbani, Krishnan, Xiao, 2019). Moments up to the
    ``2 steps - 1``-th are those of the random vectors.

    Args:
        matrix: an operator, or a tensor.
        steps: number of products for each random vector.
        draws: number of random vectors.
        generator: source of randomness.
    """
    size, like = matrix.shape[0], _like(matrix).detach()
    places, weights = [], []
    for _ in range(draws):
        start = _random(like.new_zeros(size), generator).sign()
        basis = _Basis(matrix, start, min(steps, size), generator)
        while len(basis.alpha) < min(steps, size):
            basis.step()
            if not basis.beta[-1]:
                break
        values, vectors = torch.linalg.eigh(basis.tridiagonal)
        places.append(values)
        weights.append(vectors[0].square() / draws)
    return Density(torch.cat(places).to(like), torch.cat(weights).to(like), size)
