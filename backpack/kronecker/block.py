"""What a parameter's matrix in Kronecker factors can do, whichever way it is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from backpack.kronecker.matrices import as_matrix, as_parameter

Self = TypeVar("Self", bound="KroneckerBlock")


LAYOUTS = ("out_in", "in_out", "convt")


class KroneckerBlock(ABC):
    """A symmetric matrix ``F [P, P]`` for a parameter of ``P`` entries: what both objects share.

    Vectors have the parameter's shape ``p``, or ``[*lead, *p]`` for several at once.

    Attributes:
        shape: the parameter's shape ``p``.
        layout: how the matrix ``V`` that the factors fit is stored in the parameter. ``"out_in"``: it
            is the parameter, its later axes flattened (linear layers, convolutions; for one factor all
            of the parameter flattened). ``"in_out"``: the same, with the inputs first (a matrix that
            multiplies from the right, an embedding), so that the factors are ``[A, B]``. ``"convt"``:
            it is ``weight.transpose(0, 1)`` of a transposed convolution, group by group.
    """

    shape: torch.Size
    layout: str

    def _place(self, shape: Iterable[int] | None, layout: str) -> None:
        shape = self._sizes() if shape is None else shape
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
        self.shape, self.layout = torch.Size(shape), layout
        if prod(self._sizes()) != self.shape.numel():
            raise ValueError(
                f"matrices of sizes {self._sizes()} do not fit a parameter of shape {tuple(self.shape)}"
            )

    @abstractmethod
    def _sizes(self) -> list[int]:
        """The shape of ``V``."""

    @abstractmethod
    def _tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""

    @abstractmethod
    def _with(self: Self, tensors: Sequence[Tensor]) -> Self:
        """The same block with other tensors."""

    @abstractmethod
    def apply(self, vectors: Tensor) -> Tensor:
        """The product ``F v``.

        Args:
            vectors: ``[*lead, *p]``.

        Returns:
            The same shape.
        """

    @abstractmethod
    def eig(self) -> Any:
        """The eigendecomposition ``F = Q diag(eigenvalues) Q^T``, a ``KroneckerEigen``.

        Compute it once where several functions of one block are wanted: all that need eigenvalues
        (solutions with several dampings, samples, determinants) are cheap on the result.
        """

    @abstractmethod
    def trace(self) -> Tensor:
        """``tr F``."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """``diag F``, shape ``p``."""

    @abstractmethod
    def scale(self: Self, factor: float) -> Self:
        """``factor F``."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings, from which ``from_state_dict`` makes the object again."""

    def inverse(self, damping: float = 0.0) -> KroneckerBlock:
        """``(F + damping I)^{-1}``.

        Without damping the pseudo-inverse: directions without curvature stay zero.

        Raises:
            ValueError: if ``F + damping I`` has negative eigenvalues.
        """
        return self.eig().inverse(damping)

    def solve(self, vectors: Tensor, damping: float = 0.0) -> Tensor:
        """``(F + damping I)^{-1} v``, see :meth:`inverse`.

        Args:
            vectors: ``[*lead, *p]``.
            damping: ``gamma``.
        """
        return self.inverse(damping).apply(vectors)

    def sqrt(self) -> KroneckerBlock:
        """The symmetric square root, ``F^{1/2} F^{1/2} = F``."""
        return self.eig().sqrt()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """``log det(F + damping I)``; minus infinity for a singular matrix."""
        return self.eig().logdet(damping)

    def sample(self, count: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws from ``N(0, F)``.

        Args:
            count: how many; ``None``: one, without an axis for it.
            generator: source of randomness.

        Returns:
            ``[count, *p]``, or ``p``.
        """
        return self.eig().sample(count, generator=generator)

    def sample_inverse(
        self,
        count: int | None = None,
        damping: float = 0.0,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws from ``N(0, (F + damping I)^{-1})``, such as a Laplace posterior.

        Args:
            count: how many; ``None``: one, without an axis for it.
            damping: ``gamma``, a prior's precision.
            generator: source of randomness.

        Returns:
            ``[count, *p]``, or ``p``.

        Raises:
            ValueError: if ``F + damping I`` is singular.
        """
        return self.eig().sample_inverse(count, damping, generator=generator)

    def to_dense(self) -> Tensor:
        """``F [P, P]``, rows and columns numbered as ``parameter.flatten()``."""
        like = self._tensors()[0]
        size = self.shape.numel()
        eye = torch.eye(size, dtype=like.dtype, device=like.device)
        return self.apply(eye.reshape(size, *self.shape)).reshape(size, size)

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """On another device, or in another precision; arguments as of ``Tensor.to``."""
        return self._with([each.to(*args, **kwargs) for each in self._tensors()])

    def detach(self: Self) -> Self:
        """Without a graph."""
        return self._with([each.detach() for each in self._tensors()])

    def _as_matrix(self, vectors: Tensor) -> Tensor:
        """``[*lead, *p] -> [*lead, *V]``."""
        lead = vectors.dim() - len(self.shape)
        if lead < 0 or vectors.shape[lead:] != self.shape:
            raise ValueError(
                f"expected a tensor of the parameter's shape {tuple(self.shape)}, or several, stacked, "
                f"but got {tuple(vectors.shape)}"
            )
        return as_matrix(vectors, self.layout == "convt", self._sizes(), lead)

    def _as_parameter(self, matrix: Tensor) -> Tensor:
        """``[*lead, *V] -> [*lead, *p]``."""
        lead = matrix.dim() - len(self._sizes())
        return as_parameter(matrix, self.layout == "convt", self.shape, lead)

    def _check_same(self, other: KroneckerBlock) -> None:
        if type(other) is not type(self) or (other.shape, other.layout) != (self.shape, self.layout):
            raise ValueError(f"{other!r} is not of the same parameter as {self!r}")
