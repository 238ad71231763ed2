"""Kronecker factors as the list that quantities save, which is the matrix too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from backpack.kronecker.block import KroneckerBlock
from backpack.kronecker.eigen import KroneckerEigen
from backpack.kronecker.matrices import (
    eigen_of,
    multiply,
    pi_damping,
    positive,
    reciprocal,
    turned_back,
)


class KroneckerFactored(list[Tensor], KroneckerBlock):
    """A parameter's block ``F = kron(B, A)``: the list of its factors, and algebra with them.

    What ``p.kfac``, ``p.kflr``, ``p.kfra`` and ``p.kfac_empirical`` are. With ``V`` the matrix that a
    vector of the parameter's shape is (``layout`` of :class:`KroneckerBlock`), ``F v`` is ``B V A^T``.
    One factor, ``F = B``, belongs to any other parameter, flattened. A factor may be a vector, which
    stands for a diagonal matrix: the row frequencies of a large table, and the diagonal of a factor
    that would have more than 16,384 rows.

    Products, roots, traces and inverses without damping are those of the factors:
    ``kron(B, A)^{-1} = kron(B^{-1}, A^{-1})``, ``tr F = tr B tr A``. What is damped needs eigenvalues:
    ``(F + gamma I)^{-1} = Q (Lambda + gamma)^{-1} Q^T`` with ``Q = kron(Q_B, Q_A)`` and
    ``Lambda = lambda_B lambda_A^T``, see :meth:`KroneckerBlock.eig`.

    Args:
        factors: ``[B, A]``, ``[A, B]`` in the layout ``"in_out"``, or ``[B]``; square matrices, or
            vectors in place of diagonal ones.
        shape: the parameter's shape; by default that of ``V``.
        layout: see :class:`KroneckerBlock`.
        averaged_over: the number of rows that ``A`` is an average over, its weight in :meth:`add`.

    Example:
        >>> block = KroneckerFactored([torch.eye(2), 3 * torch.eye(1)], shape=(2, 1))
        >>> block.solve(torch.ones(2, 1), damping=1.0)
        tensor([[0.2500],
                [0.2500]])
        >>> B, A = block
    """

    def __init__(
        self,
        factors: Iterable[Tensor],
        shape: Iterable[int] | None = None,
        layout: str = "out_in",
        averaged_over: int = 1,
    ) -> None:
        super().__init__(factors)
        square = all(f.dim() == 1 or (f.dim() == 2 and f.shape[0] == f.shape[1]) for f in self)
        if len(self) not in (1, 2) or not square:
            raise ValueError(
                "expected one or two square matrices, or vectors in place of diagonal ones, got "
                f"shapes {[tuple(f.shape) for f in self]}"
            )
        self._place(shape, layout)
        self.averaged_over = averaged_over

    @classmethod
    def fitting(
        cls, factors: Sequence[Tensor], shape: torch.Size, layout: str, averaged_over: int
    ) -> KroneckerFactored:
        """The same, of factors that are known to fit."""
        block = cls.__new__(cls)
        list.__init__(block, factors)
        block.shape, block.layout, block.averaged_over = shape, layout, averaged_over
        return block

    @property
    def grows(self) -> int:
        """The place of the factor that is a sum over samples, and has the scale of the loss."""
        return 1 if self.layout == "in_out" and len(self) == 2 else 0

    def _sizes(self) -> list[int]:
        return [factor.shape[0] for factor in self]

    def _tensors(self) -> list[Tensor]:
        return list(self)

    def _with(self, tensors: Sequence[Tensor]) -> KroneckerFactored:
        return KroneckerFactored(tensors, self.shape, self.layout, self.averaged_over)

    def apply(self, vectors: Tensor) -> Tensor:
        return self._as_parameter(multiply(self, self._as_matrix(vectors)))

    def eig(self) -> KroneckerEigen:
        values, bases = zip(*map(eigen_of, self), strict=True)
        products = values[0] if len(values) == 1 else values[0].unsqueeze(1) * values[1]
        return KroneckerEigen(list(bases), products, self.shape, self.layout)

    def inverse(self, damping: float = 0.0, pi: bool = False) -> KroneckerBlock:
        """``(F + damping I)^{-1}``, or with ``pi`` the inverse of damped factors.

        Without damping the pseudo-inverse: directions without curvature stay zero.

        Args:
            damping: ``gamma``.
            pi: damp the factors instead, ``B`` with ``sqrt(gamma) / pi`` and ``A`` with
                ``pi sqrt(gamma)``, where ``pi`` is that of :func:`pi_damping`, as
                :class:`backpack.optim.KFAC` does. It is stronger than the same number on the matrix.

        Raises:
            ValueError: if what is to be inverted has negative eigenvalues.
        """
        if damping and not pi:
            return super().inverse(damping)
        inverses = []
        for factor, shift in zip(self, pi_damping(self, damping), strict=True):
            values, basis = eigen_of(factor)
            inverses.append(turned_back(basis, reciprocal(values, shift)))
        return self._with(inverses)

    def solve(self, vectors: Tensor, damping: float = 0.0, pi: bool = False) -> Tensor:
        """``(F + damping I)^{-1} v``, see :meth:`inverse`.

        Args:
            vectors: ``[*lead, *p]``.
            damping: ``gamma``.
            pi: damp the factors instead.
        """
        return self.inverse(damping, pi).apply(vectors)

    def sqrt(self) -> KroneckerFactored:
        roots = []
        for factor in self:
            values, basis = eigen_of(factor)
            roots.append(turned_back(basis, positive(values).sqrt()))
        return self._with(roots)

    def trace(self) -> Tensor:
        return reduce(torch.mul, (f.sum() if f.dim() == 1 else f.trace() for f in self))

    def diagonal(self) -> Tensor:
        parts = [factor if factor.dim() == 1 else factor.diagonal() for factor in self]
        return self._as_parameter(parts[0] if len(parts) == 1 else torch.outer(*parts))

    def scale(self, factor: float) -> KroneckerFactored:
        """``factor F``, by the factor that has the scale of the loss."""
        return self._with([f * factor if i == self.grows else f for i, f in enumerate(self)])

    def add(self, other: KroneckerFactored) -> KroneckerFactored:
        """The factors of both sets of samples together: ``B`` is added up, ``A`` is averaged.

        Both must have the scale of one loss; see :meth:`scale`. The sum of two Kronecker products is no
        Kronecker product: these are the factors that one pass over all the samples has.

        Raises:
            ValueError: if the other block is not of the same parameter.
        """
        self._check_same(other)
        if self._sizes() != other._sizes():
            raise ValueError(f"factors of sizes {self._sizes()} and {other._sizes()} do not add up")
        total = self.averaged_over + other.averaged_over
        part = other.averaged_over / total
        sums = [
            one + more if i == self.grows else one.lerp(more, part)
            for i, (one, more) in enumerate(zip(self, other, strict=True))
        ]
        return KroneckerFactored(sums, self.shape, self.layout, total)

    def state_dict(self) -> dict[str, Any]:
        return {
            "factors": list(self),
            "shape": list(self.shape),
            "layout": self.layout,
            "averaged_over": self.averaged_over,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> KroneckerFactored:
        """The object that a ``state_dict`` was made from."""
        return cls(**state)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self), tuple(self.shape), self.layout, self.averaged_over)


# So that `torch.load` reads what `torch.save` wrote of it without being told that it may.
torch.serialization.add_safe_globals([KroneckerFactored])
