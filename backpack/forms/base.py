"""Canonical forms of "Jacobian transposed times columns", and the algebra quantities need of them.

Letters: ``v`` columns, ``n`` samples, ``s`` shared positions (time, pixels, patches; one if none),
``q`` groups, ``o``/``i`` the two sides of a weight matrix, ``p`` a parameter's shape.

A form stands for the tensor ``G [v, n, *p]``: the transposed Jacobian of one parameter applied to
``v`` columns, sample by sample. It is rarely written out. A form supplies :meth:`Form.take` and
:meth:`Form.dense`; every contraction has a default that writes out one block at a time, and the
forms override those they can do without writing anything out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from backpack.forms.limits import BLOCK_BYTES, PATCH_BYTES, TILE_BYTES
from backpack.forms.products import gram, gram_matrix, row_products

# What is written out is reduced in one piece up to this many numbers.
SMALL = 2**18


# A Kronecker factor of more rows is kept as its diagonal, a vector.
LARGEST_FACTOR = 2**14
# So is the one factor of a parameter of several axes (positions, prototypes): its whole block.
LARGEST_BLOCK = 2**12


def largest_block(shape: torch.Size) -> int:
    """The largest size up to which the block of a parameter is written out, its one factor."""
    return min(LARGEST_BLOCK, LARGEST_FACTOR) if len(shape) > 1 else LARGEST_FACTOR


# How positions that share a weight enter its Kronecker factors; None: as in the original library.
Sharing = Literal["expand", "reduce"] | None


# Some columns and some samples of a form.
Tile = tuple[slice, slice]


Side = TypeVar("Side")


class Factor(NamedTuple):
    """One Kronecker factor; ``grows`` if contributions of further columns add to it."""

    matrix: Callable[[], Tensor]
    grows: bool


class Form(ABC):
    """``G [v, n, *p]``, in some factored shape."""

    # Whether the form has parts of its own.
    parted = False

    if TYPE_CHECKING:
        # Read only: a subclass has a field of that name or a property, and a field could not be set
        # where the base has a property.
        @property
        @abstractmethod
        def shape(self) -> torch.Size:
            """The parameter's, ``p``."""

        @property
        @abstractmethod
        def columns(self) -> int:
            """How many there are, ``v``."""

        @property
        @abstractmethod
        def samples(self) -> int:
            """How many there are, ``n``."""

    @property
    def projects(self) -> bool:
        """Whether :meth:`project` does without writing the form out."""
        return False

    @property
    def adds_up(self) -> bool:
        """Whether :meth:`total` is cheaper from ``G``, where that is there, than from the form."""
        return True

    def tallied(self) -> Form:
        """The form, which adds up ``G`` for :meth:`total` where it goes through all of it."""
        return self

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """Any tensor of the form's dtype and device."""

    @abstractmethod
    def take(self, columns: slice, samples: slice | Tensor) -> Form:
        """The form restricted to some columns and samples."""

    @abstractmethod
    def dense(self) -> Tensor:
        """``G [v, n, *p]``, written out."""

    def written(self) -> Form:
        """The form that holds ``G`` itself."""
        return Dense(self.dense())

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Pieces of ``G`` of one column and some samples each, small enough for the cache, or all."""
        like = self.like
        limit = BLOCK_BYTES[like.device.type]
        step = max(1, limit // max(1, self.shape.numel() * like.element_size()))
        if self.columns * self.samples <= step:
            if self.columns * self.samples:
                yield slice(0, self.columns), slice(0, self.samples), self.dense()
            return
        for v in range(self.columns):
            for n in range(0, self.samples, step):
                column, sample = slice(v, v + 1), slice(n, min(n + step, self.samples))
                yield column, sample, self.take(column, sample).dense()

    @property
    def room(self) -> int:
        """How many numbers may be written out at a time."""
        return PATCH_BYTES[self.like.device.type] // self.like.element_size()

    def tiles(self, rows: int | None = None) -> list[Tile]:
        """Columns and samples of pieces of so many rows; by default small enough to be written out."""
        rows = max(1, self.room // max(1, self.shape.numel()) if rows is None else rows)
        columns = min(max(self.columns, 1), rows)
        samples = max(1, rows // columns)
        return [
            (slice(v, min(v + columns, self.columns)), slice(n, min(n + samples, self.samples)))
            for n in range(0, self.samples, samples)
            for v in range(0, self.columns, columns)
        ]

    @property
    def row_size(self) -> float:
        """How many numbers are written out for a row of ``G``."""
        return self.shape.numel()

    def _small_tiles(self) -> list[Tile]:
        """Pieces whose rows are used once, no larger than is needed to be fast."""
        room = TILE_BYTES[self.like.device.type] // self.like.element_size()
        return self.tiles(int(room // max(1, self.row_size)))

    def rows(self, tile: Tile) -> Tensor:
        """A piece of ``G``, written out, ``[v n, p]``."""
        dense = self.take(*tile).dense()
        return dense.reshape(dense.shape[0] * dense.shape[1], self.shape.numel())

    def inner(self, other: Form) -> Tensor:
        """``<G_{vn}, W_{wm}>`` for all columns and samples of this form and another of the parameter.

        As all that a form computes, in grad mode it is part of a graph and takes more memory: outside
        of a backward pass, ask within ``torch.no_grad()``.

        Returns:
            ``[v N, w M]``, columns first.
        """
        if self.shape != other.shape:
            raise ValueError(f"forms of parameters {tuple(self.shape)} and {tuple(other.shape)}")
        if other is self:
            return by_tiles(self, self, None, lambda form, tile: form.rows(tile), row_products)
        if other.parted or (other.projects and not self.projects):
            return other.inner(self).mT
        result = room_for_pairs(self, other)
        for w, m in other.tiles():
            vectors = other.rows((w, m))
            products = self.project(vectors.reshape(len(vectors), *self.shape))
            result[:, :, w, m] = products.movedim(0, 2).reshape(result[:, :, w, m].shape)
        return result.flatten(2).flatten(0, 1)

    def project(self, vectors: Tensor) -> Tensor:
        """``<u_k, G_{vn}>`` for vectors ``u [k, *p]``, shape ``[k, v, n]``."""
        u = vectors.reshape(len(vectors), self.shape.numel()).to(self.like.dtype)
        result = u.new_zeros(len(u), self.columns, self.samples)
        for v, n in self._small_tiles():
            result[:, v, n] = (u @ self.rows((v, n)).mT).reshape(result[:, v, n].shape)
        return result

    def combine(self, weights: Tensor) -> Tensor:
        """``sum_{vn} w_{kvn} G_{vn}`` for weights ``w [k, v, n]``, shape ``[k, *p]``."""
        w = weights.to(self.like.dtype)
        result = w.new_zeros(len(w), self.shape.numel())
        for v, n in self._small_tiles():
            piece = w[:, v, n]
            result = result + piece.reshape(len(w), prod(piece.shape[1:])) @ self.rows((v, n))
        return result.reshape(len(w), *self.shape)

    def histogram(self, edges: Tensor) -> Tensor:
        """How many entries of ``G`` are in each bin.

        Bins are ``[e_j, e_{j+1})``, the last is closed. What is outside of all, or not a number, is not
        counted; first and last edges may be infinite.

        Args:
            edges: ``[bins + 1]``, increasing.

        Returns:
            Integers, ``[bins]``.
        """
        counts = torch.zeros(len(edges) - 1, dtype=torch.long, device=self.like.device)
        for tile in self.tiles():
            counts += bin_counts(self.rows(tile), edges)
        return counts

    def total(self) -> Tensor:
        """``sum_{v,n} G``, shape ``p``."""
        return sum((g.sum((0, 1)) for _, _, g in self.blocks()), self.like.new_zeros(self.shape))

    def square_sum(self, sign: Tensor | None = None) -> Tensor:
        """``sum_{v,n} sign_{vn} G^2``, shape ``p``."""
        result = self.like.new_zeros(self.shape)
        for v, n, g in self.blocks():
            result = result + apply_sign(g * g, sign, v, n).sum((0, 1))
        return result

    def centred_square_sum(self) -> tuple[Tensor | None, Tensor]:
        """A centre ``c`` (or ``None``: zero) and ``sum_{v,n} (G - c)^2``, shapes ``p``; a new tensor.

        The centre is a sample's gradient: squares of differences lose fewer digits than differences
        of squares.
        """
        if not self.samples:
            return None, self.like.new_zeros(self.shape)
        centre = self.take(slice(0, 1), slice(0, 1)).dense()[0, 0]
        result = self.like.new_zeros(self.shape)
        for _, _, g in self.blocks():
            g = g - centre
            result = result + (g * g).sum((0, 1))
        return centre, result

    def square_sum_per_sample(self, sign: Tensor | None = None) -> Tensor:
        """``sum_v sign_{vn} G^2``, shape ``[n, *p]``."""
        parts: dict[int, Tensor] = {}
        for v, n, g in self.blocks():
            part = sum_first(apply_sign(g * g, sign, v, n))
            parts[n.start] = parts[n.start] + part if n.start in parts else part
        none = self.like.new_zeros(0, *self.shape)
        return torch.cat([parts[start] for start in sorted(parts)] or [none])

    def squared_norms(self) -> Tensor:
        """``sum_{v,p} G^2``, shape ``[n]``."""
        parts: dict[int, Tensor] = {}
        for _, n, g in self.blocks():
            part = (g * g).reshape(*g.shape[:2], -1).sum((0, 2))
            parts[n.start] = parts[n.start] + part if n.start in parts else part
        return torch.cat([parts[start] for start in sorted(parts)] or [self.like.new_zeros(0)])

    def kronecker(self, sharing: Sharing = None) -> list[Factor]:
        """Factors whose Kronecker product is, or approximates, ``sum_{v,n} G G^T``.

        One of more than :data:`LARGEST_FACTOR` rows is its diagonal, a vector, and so is the block of a
        parameter of several axes of more than :data:`LARGEST_BLOCK`.
        """
        size = self.shape.numel()
        if size > largest_block(self.shape):
            return [Factor(lambda: self.square_sum().flatten(), True)]
        rows = self.columns * self.samples
        return [Factor(lambda: gram(self.dense().reshape(rows, size)), True)]

    def rotated_square_sum(self, bases: Sequence[Tensor]) -> Tensor:
        """``sum_{v,n} (Q_1^T G Q_2)^2``, ``G`` as the matrix that the factors of :meth:`kronecker` fit.

        Args:
            bases: for every factor a matrix of its size, with orthonormal columns; a vector stands for
                a diagonal one.

        Returns:
            One number for each pair of columns of the bases (each column, for one factor).
        """
        sizes = [len(basis) for basis in bases]
        if len(bases) == 1 and bases[0].dim() == 1:
            return (bases[0].square() * self.square_sum().flatten()).reshape(sizes)
        result = self.like.new_zeros(sizes)
        for _, _, g in self.blocks():
            result = result + rotate_columns(g.reshape(*g.shape[:2], *sizes), bases).square().sum(
                (0, 1)
            )
        return result


def room_for_pairs(form: Form, other: Form) -> Tensor:
    """Room for numbers of all pairs, ``[v, N, w, M]``."""
    return form.like.new_zeros(form.columns, form.samples, other.columns, other.samples)


def by_tiles(
    form: Form,
    other: Form,
    rows: int | None,
    side: Callable[[Any, Tile], Side],
    product: Callable[[Side, Side], Tensor],
) -> Tensor:
    """``[v N, w M]`` from products of pairs of tiles; of a form with itself, each pair is done once."""
    result, mine = room_for_pairs(form, other), form.tiles(rows)
    for j, (w, m) in enumerate(other.tiles(rows)):
        right = side(other, (w, m))
        for v, n in mine[: j + 1] if other is form else mine:
            same = other is form and (v, n) == (w, m)
            block = product(right if same else side(form, (v, n)), right)
            block = block.reshape(result[v, n, w, m].shape)
            result[v, n, w, m] = block
            if other is form and not same:
                result[w, m, v, n] = block.movedim((0, 1), (2, 3))
    return result.flatten(2).flatten(0, 1)


def bin_counts(values: Tensor, edges: Tensor) -> Tensor:
    values, edges = values.detach().reshape(-1).contiguous(), edges.to(values)
    places = torch.bucketize(values, edges, right=True)
    places = torch.where(values == edges[-1], len(edges) - 1, places)
    return torch.bincount(places, minlength=len(edges) + 1)[1 : len(edges)]


def rotate_columns(g: Tensor, bases: Sequence[Tensor]) -> Tensor:
    if len(bases) == 1:
        return turn(g, bases[0])
    g = turn(g, bases[1])
    return bases[0].unsqueeze(1) * g if bases[0].dim() == 1 else bases[0].mT @ g


def turn(x: Tensor, basis: Tensor) -> Tensor:
    """``x Q``; a vector stands for a diagonal matrix."""
    return x * basis if basis.dim() == 1 else x @ basis


def second_moment(x: Tensor, count: int | None = None) -> Tensor:
    """``x^T x / count``, or its diagonal if that is too large."""
    if x.shape[1] > LARGEST_FACTOR:
        return x.square().sum(0) / max(count or 1, 1)
    return gram(x) if count is None else gram_matrix(x, count)


def apply_sign(squares: Tensor, sign: Tensor | None, v: slice, n: slice) -> Tensor:
    if sign is None:
        return squares
    return squares * sign[v, n].reshape(sign[v, n].shape + (1,) * (squares.dim() - 2))


def squared_norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    if torch.is_grad_enabled():  # a norm is not smooth at zero
        return (x * x).sum(dims)
    return torch.linalg.vector_norm(x, dim=dims).square()


def sum_first(x: Tensor) -> Tensor:
    return x[0] if len(x) == 1 else x.sum(0)


class Positioned(Form):
    """A form whose samples meet the parameter at several positions, perhaps not equally many.

    Attributes:
        g: columns at the positions, ``[v, n, ..., s, o]``.
        counts: how many positions each sample has, ``[n]``, where they differ.
    """

    g: Tensor
    counts: Tensor | None

    @property
    def all_positions(self) -> int:
        """Number of positions of all samples together."""
        if self.counts is not None:
            return int(self.counts.sum())
        return self.samples * self.g.shape[-2]


@dataclass(frozen=True, eq=False)
class Dense(Form):
    """``G`` itself, ``[v, n, *p]``."""

    values: Tensor
    projects = True

    @property
    def shape(self) -> torch.Size:
        return self.values.shape[2:]

    @property
    def columns(self) -> int:
        return self.values.shape[0]

    @property
    def samples(self) -> int:
        return self.values.shape[1]

    @property
    def like(self) -> Tensor:
        return self.values

    def take(self, columns: slice, samples: slice | Tensor) -> Dense:
        return Dense(self.values[columns][:, samples])

    def dense(self) -> Tensor:
        return self.values

    def total(self) -> Tensor:
        return self.values.sum((0, 1))

    def square_sum(self, sign: Tensor | None = None) -> Tensor:
        if sign is not None or self.values.numel() > SMALL:
            return super().square_sum(sign)
        return squared_norm(self.values, (0, 1))

    def squared_norms(self) -> Tensor:
        if self.values.numel() > SMALL:
            return super().squared_norms()
        flat = self.values.reshape(*self.values.shape[:2], self.shape.numel())
        return squared_norm(flat, (0, 2))
