"""Kronecker factors by their eigenvectors, with eigenvalues of their own: what EKFAC saves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backpack.kronecker.block import KroneckerBlock
from backpack.kronecker.matrices import multiply, positive, reciprocal, rounding_of, transposed


class _Pair(NamedTuple):
    eigenvectors: list[Tensor]
    eigenvalues: Tensor


class KroneckerEigen(_Pair, KroneckerBlock):
    """A parameter's block ``F = Q diag(eigenvalues) Q^T`` with ``Q = kron(*eigenvectors)``.

    What ``p.ekfac`` and ``p.ekflr`` are, and the eigendecomposition of a :class:`KroneckerFactored`: a
    pair of ``eigenvectors`` and ``eigenvalues``, and algebra with them. With ``V`` the matrix that a
    vector is (see :class:`KroneckerBlock`), ``F v`` is ``Q_B (E * (Q_B^T V Q_A)) Q_A^T``; every
    function of ``F`` is that function of the eigenvalues ``E``.

    Args:
        eigenvectors: for a weight ``[Q_B, Q_A]``, in the order of its factors; for other parameters one
            matrix. Orthogonal.
        eigenvalues: ``[len(Q_B), len(Q_A)]``, or a vector.
        shape: the parameter's shape; by default that of ``V``.
        layout: see :class:`KroneckerBlock`.
    """

    def __new__(
        cls,
        eigenvectors: list[Tensor],
        eigenvalues: Tensor,
        shape: Iterable[int] | None = None,
        layout: str = "out_in",
    ) -> KroneckerEigen:
        self = super().__new__(cls, eigenvectors, eigenvalues)
        self._place(shape, layout)
        return self

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> KroneckerEigen:  # type: ignore[override]
        return cls(*iterable)

    def _replace(self, **changes: Any) -> KroneckerEigen:
        return KroneckerEigen(
            **{**self._asdict(), "shape": self.shape, "layout": self.layout, **changes}
        )

    def _sizes(self) -> list[int]:
        return list(self.eigenvalues.shape)

    def _tensors(self) -> list[Tensor]:
        return [*self.eigenvectors, self.eigenvalues]

    def _with(self, tensors: Sequence[Tensor]) -> KroneckerEigen:
        *bases, values = tensors
        return KroneckerEigen(bases, values, self.shape, self.layout)

    def _of(self, eigenvalues: Tensor) -> KroneckerEigen:
        return KroneckerEigen(self.eigenvectors, eigenvalues, self.shape, self.layout)

    def apply(self, vectors: Tensor) -> Tensor:
        return self._turned(self.rotate(vectors) * self.eigenvalues)

    def rotate(self, vectors: Tensor) -> Tensor:
        """``Q^T v``, coordinates in the eigenbasis, ``[*lead, *p] -> [*lead, *eigenvalues.shape]``."""
        return multiply([transposed(basis) for basis in self.eigenvectors], self._as_matrix(vectors))

    def _turned(self, coordinates: Tensor) -> Tensor:
        """``Q c``, with the parameter's shape."""
        return self._as_parameter(multiply(self.eigenvectors, coordinates))

    def eig(self) -> KroneckerEigen:
        return self

    def inverse(self, damping: float = 0.0) -> KroneckerEigen:
        return self._of(reciprocal(self.eigenvalues, damping))

    def sqrt(self) -> KroneckerEigen:
        return self._of(positive(self.eigenvalues).sqrt())

    def trace(self) -> Tensor:
        return self.eigenvalues.sum()

    def diagonal(self) -> Tensor:
        return self._as_parameter(multiply([q.square() for q in self.eigenvectors], self.eigenvalues))

    def logdet(self, damping: float = 0.0) -> Tensor:
        return positive(self.eigenvalues, damping).log().sum()

    def sample(self, count: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        return self._turned(self._normal(count, generator) * positive(self.eigenvalues).sqrt())

    def sample_inverse(
        self,
        count: int | None = None,
        damping: float = 0.0,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        precision = positive(self.eigenvalues, damping)
        least = 0.0 if damping else rounding_of(self.eigenvalues)
        if not bool((precision > least).all()):
            raise ValueError(
                f"the matrix is singular (its smallest eigenvalue is {float(precision.min()):.1e}), so "
                "that it is no inverse covariance; use damping, such as the prior's precision"
            )
        return self._turned(self._normal(count, generator) / precision.sqrt())

    def _normal(self, count: int | None, generator: torch.Generator | None) -> Tensor:
        lead = () if count is None else (count,)
        like = self.eigenvalues
        return torch.randn(
            (*lead, *like.shape), generator=generator, dtype=like.dtype, device=like.device
        )

    def scale(self, factor: float) -> KroneckerEigen:
        return self._of(self.eigenvalues * factor)

    def add(self, other: KroneckerEigen) -> KroneckerEigen:
        """The sum of both matrices.

        Raises:
            ValueError: if they have different eigenvectors; the sum has neither then.
        """
        self._check_same(other)
        pairs = zip(self.eigenvectors, other.eigenvectors, strict=True)
        if not all(a is b or torch.equal(a, b) for a, b in pairs):
            raise ValueError(
                "eigenvalues in different bases do not add up; compute them in one given basis "
                "(EKFAC(bases=...)), or let backpack.accumulate do so"
            )
        return self._of(self.eigenvalues + other.eigenvalues)

    def state_dict(self) -> dict[str, Any]:
        return {
            "eigenvectors": list(self.eigenvectors),
            "eigenvalues": self.eigenvalues,
            "shape": list(self.shape),
            "layout": self.layout,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> KroneckerEigen:
        """The object that a ``state_dict`` was made from."""
        return cls(**state)

    def __reduce__(self) -> tuple[Any, ...]:
        vectors = list(self.eigenvectors)
        return type(self), (vectors, self.eigenvalues, tuple(self.shape), self.layout)


# So that `torch.load` reads what `torch.save` wrote of it without being told that it may.
torch.serialization.add_safe_globals([KroneckerEigen])
