"""Algebra of Kronecker factors: products and inverses that never form the large matrix.

:class:`KroneckerFactored` and :class:`KroneckerEigen` are what quantities save: the list of a
parameter's factors, or its eigenvectors and eigenvalues, as an object that knows its parameter's shape.
The functions below them take lists of matrices of any number and shape.

Letters: ``m`` factors ``F_1, ..., F_m``; factor ``F_j`` is ``[o_j, i_j]``; ``O`` and ``I`` are the
products of the ``o_j`` and ``i_j``; ``K`` columns that are multiplied at once.

A list ``[F_1, ..., F_m]`` stands for the matrix ``F_1 (x) ... (x) F_m``, ``[O, I]``, whose rows and
columns are numbered row-major, the last factor fastest. The factors ``[B, A]`` of a weight
``[o, i]`` (``p.kfac`` and its like) therefore act on ``weight.flatten()``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from backpack.forms.products import spectrum

# Bound on the inverse of an eigenvalue: directions without curvature get a large but finite step.
LARGEST_INVERSE = 1e8


Shift = float | Sequence[float] | None


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
    def eig(self) -> KroneckerEigen:
        """The eigendecomposition ``F = Q diag(eigenvalues) Q^T``.

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
        values, bases = zip(*map(_eigen, self), strict=True)
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
            values, basis = _eigen(factor)
            inverses.append(_turned_back(basis, _reciprocal(values, shift)))
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
            values, basis = _eigen(factor)
            roots.append(_turned_back(basis, _positive(values).sqrt()))
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

    def _replace(self, **changes: Any) -> KroneckerEigen:  # type: ignore[override]
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
        return self._of(_reciprocal(self.eigenvalues, damping))

    def sqrt(self) -> KroneckerEigen:
        return self._of(_positive(self.eigenvalues).sqrt())

    def trace(self) -> Tensor:
        return self.eigenvalues.sum()

    def diagonal(self) -> Tensor:
        return self._as_parameter(multiply([q.square() for q in self.eigenvectors], self.eigenvalues))

    def logdet(self, damping: float = 0.0) -> Tensor:
        return _positive(self.eigenvalues, damping).log().sum()

    def sample(self, count: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        return self._turned(self._normal(count, generator) * _positive(self.eigenvalues).sqrt())

    def sample_inverse(
        self,
        count: int | None = None,
        damping: float = 0.0,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        precision = _positive(self.eigenvalues, damping)
        least = 0.0 if damping else _tolerance(self.eigenvalues)
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


# So that `torch.load` reads what `torch.save` wrote of them without being told that it may.
torch.serialization.add_safe_globals([KroneckerFactored, KroneckerEigen])


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
        return matrix.reshape(*matrix.shape[:lead], *shape)
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


def _turned_back(basis: Tensor, values: Tensor) -> Tensor:
    """``Q diag(values) Q^T``; a vector if ``Q`` is one."""
    return basis.square() * values if basis.dim() == 1 else (basis * values) @ basis.mT


def _eigen(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; without work for a diagonal matrix (frequencies of words)."""
    if factor.dim() == 1:
        return spectrum(factor)
    diagonal = factor.diagonal()
    if int(factor.count_nonzero()) == int(diagonal.count_nonzero()):
        return diagonal.clone(), torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return spectrum(factor)


def _tolerance(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues up to this are rounding errors of the largest."""
    if not eigenvalues.numel():
        return eigenvalues.new_zeros(())
    eps = torch.finfo(eigenvalues.dtype).eps
    return eigenvalues.abs().max() * max(eigenvalues.shape) * eps


def _positive(eigenvalues: Tensor, damping: float = 0.0) -> Tensor:
    """``eigenvalues + damping``, where rounding errors below zero are taken for zero first.

    Raises:
        ValueError: if some are negative.
    """
    noise = (eigenvalues < 0) & (eigenvalues >= -_tolerance(eigenvalues))
    damped = eigenvalues.masked_fill(noise, 0.0) + damping
    if damping < 0 or bool((damped < 0).any()):
        raise ValueError(
            f"the matrix is not positive: its smallest eigenvalue is {float(eigenvalues.min()):.1e}, "
            f"damping is {damping:.1e}; use more damping"
        )
    return damped


def _reciprocal(eigenvalues: Tensor, damping: float) -> Tensor:
    """``1 / (eigenvalues + damping)``; without damping zero where there is no curvature."""
    damped = _positive(eigenvalues, damping)
    none = damped == 0 if damping else damped <= _tolerance(eigenvalues)
    return damped.reciprocal().masked_fill(none, 0.0)
