"""Canonical forms of "Jacobian transposed times columns", and the algebra quantities need of them.

Letters: ``v`` columns, ``n`` samples, ``s`` shared positions (time, pixels, patches; one if none),
``q`` groups, ``o``/``i`` the two sides of a weight matrix, ``p`` a parameter's shape.

A form stands for the tensor ``G [v, n, *p]``: the transposed Jacobian of one parameter applied to
``v`` columns, sample by sample. It is rarely written out. A form supplies :meth:`Form.take` and
:meth:`Form.dense`; every contraction has a default that writes out one block at a time, and the
forms override those they can do without writing anything out.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isqrt, prod
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from backpack import kernels
from backpack.memory import fresh, fresh_zeros

# A block of G is squared and summed while it is in the processor's cache.
BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**28}
# Patches written out for a product over all samples.
PATCH_BYTES = {"cpu": 2**24, "cuda": 2**28}
# On a CPU, products of matrices that are squared at once are written into the same memory each time, up
# to so many bytes of them; all at once if they take no more than the lesser number.
PRODUCT_BYTES, SMALL_BYTES = 2**20, 2**17
# On a CPU, products of a matrix with itself of so many multiplications are done by halves.
MIRRORED = 2**26
# Rows of a form, written out for some outputs at a time, of which scalar products are taken.
ROWS_BYTES = 2**26
# What is written out is reduced in one piece up to this many numbers.
SMALL = 2**18
LARGEST_FACTOR = 2**14
# Where positive and negative terms of a norm leave less than this part, it is computed otherwise.
CANCELLED = 1e-3
# Products that may serve a weight and its bias are kept up to this size.
LARGEST_KEPT = 2**11


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

    shape: torch.Size
    columns: int
    samples: int
    # Whether `project` does without writing the form out.
    projects = False

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
        limit = BLOCK_BYTES.get(like.device.type, 2**20)
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
        return PATCH_BYTES.get(self.like.device.type, 2**24) // self.like.element_size()

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
            return _by_tiles(self, self, None, lambda form, tile: form.rows(tile), _row_products)
        if isinstance(other, Sum) or (other.projects and not self.projects):
            return other.inner(self).mT
        result = _pairs(self, other)
        for w, m in other.tiles():
            vectors = other.rows((w, m))
            products = self.project(vectors.reshape(len(vectors), *self.shape))
            result[:, :, w, m] = products.movedim(0, 2).reshape(result[:, :, w, m].shape)
        return result.flatten(2).flatten(0, 1)

    def project(self, vectors: Tensor) -> Tensor:
        """``<u_k, G_{vn}>`` for vectors ``u [k, *p]``, shape ``[k, v, n]``."""
        u = vectors.reshape(len(vectors), self.shape.numel()).to(self.like.dtype)
        result = u.new_zeros(len(u), self.columns, self.samples)
        for v, n in self.tiles():
            result[:, v, n] = (u @ self.rows((v, n)).mT).reshape(result[:, v, n].shape)
        return result

    def combine(self, weights: Tensor) -> Tensor:
        """``sum_{vn} w_{kvn} G_{vn}`` for weights ``w [k, v, n]``, shape ``[k, *p]``."""
        w = weights.to(self.like.dtype)
        result = w.new_zeros(len(w), self.shape.numel())
        for v, n in self.tiles():
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
            counts += _counts(self.rows(tile), edges)
        return counts

    def total(self) -> Tensor:
        """``sum_{v,n} G``, shape ``p``."""
        return sum((g.sum((0, 1)) for _, _, g in self.blocks()), self.like.new_zeros(self.shape))

    def square_sum(self, sign: Tensor | None = None) -> Tensor:
        """``sum_{v,n} sign_{vn} G^2``, shape ``p``."""
        result = self.like.new_zeros(self.shape)
        for v, n, g in self.blocks():
            result = result + _signed(g * g, sign, v, n).sum((0, 1))
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
            part = _sum_first(_signed(g * g, sign, v, n))
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
        """Factors whose Kronecker product is, or approximates, ``sum_{v,n} G G^T``."""
        size = self.shape.numel()
        if size > LARGEST_FACTOR:
            raise ValueError(
                f"a Kronecker factor for a parameter of shape {tuple(self.shape)} would be a dense "
                f"{size} x {size} matrix; leave the parameter out (requires_grad_(False)) or use a "
                "diagonal quantity"
            )
        rows = self.columns * self.samples
        return [Factor(lambda: gram(self.dense().reshape(rows, size)), True)]

    def rotated_square_sum(self, bases: Sequence[Tensor]) -> Tensor:
        """``sum_{v,n} (Q_1^T G Q_2)^2``, ``G`` as the matrix that the factors of :meth:`kronecker` fit.

        Args:
            bases: for every factor a matrix of its size, with orthonormal columns.

        Returns:
            One number for each pair of columns of the bases (each column, for one factor).
        """
        sizes = [len(basis) for basis in bases]
        result = self.like.new_zeros(sizes)
        for _, _, g in self.blocks():
            result = result + _rotated(g.reshape(*g.shape[:2], *sizes), bases).square().sum((0, 1))
        return result


class _Grams(threading.local):
    """Products already made of columns at one place, while they are reduced for several parameters."""

    known: list[tuple[Tensor, Tensor]] | None = None


_grams = _Grams()


@contextmanager
def products_kept() -> Iterator[None]:
    """Within the block, :func:`gram` of the same entries is computed once."""
    outer, _grams.known = _grams.known, []
    try:
        yield
    finally:
        _grams.known = outer


def gram(x: Tensor) -> Tensor:
    """``x^T x``, a new tensor."""
    known = _grams.known if x.shape[1] <= LARGEST_KEPT and not torch.is_grad_enabled() else None
    for y, product in known or ():
        if (y.data_ptr(), y.shape, y.stride()) == (x.data_ptr(), x.shape, x.stride()):
            return product.clone()
    product = _gram(x)
    if known is not None:
        known.append((x, product))
    return product


def _gram(x: Tensor, count: int = 1) -> Tensor:
    """``x^T x / count``; on a CPU by blocks, of which those above the diagonal are mirrored."""
    rows, size = x.shape
    if torch.is_grad_enabled():
        return x.mT @ x / count
    product, count = fresh(x, (size, size)), max(count, 1)
    parts = 1 if x.device.type != "cpu" or rows * size**2 < MIRRORED else 3
    step = max(1, -(-size // parts))
    for i in range(0, size, step):
        strip = product[i : i + step, : i + step]
        torch.addmm(strip, x[:, i : i + step].mT, x[:, : i + step], beta=0, alpha=1 / count, out=strip)
        product[:i, i : i + step] = strip[:, :i].mT
    return product


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices, found in double precision.

    On matrices of low rank, LAPACK in single precision may give up, or return NaN and say nothing.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix), vectors.to(matrix)


def _pairs(form: Form, other: Form) -> Tensor:
    """Room for numbers of all pairs, ``[v, N, w, M]``."""
    return form.like.new_zeros(form.columns, form.samples, other.columns, other.samples)


def _by_tiles(
    form: Form,
    other: Form,
    rows: int | None,
    side: Callable[[Any, Tile], Side],
    product: Callable[[Side, Side], Tensor],
) -> Tensor:
    """``[v N, w M]`` from products of pairs of tiles; of a form with itself, each pair is done once."""
    result, mine = _pairs(form, other), form.tiles(rows)
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


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    return _gram(left.mT) if left is right else left @ right.mT


def _counts(values: Tensor, edges: Tensor) -> Tensor:
    values, edges = values.detach().reshape(-1).contiguous(), edges.to(values)
    places = torch.bucketize(values, edges, right=True)
    places = torch.where(values == edges[-1], len(edges) - 1, places)
    return torch.bincount(places, minlength=len(edges) + 1)[1 : len(edges)]


def _rotated(g: Tensor, bases: Sequence[Tensor]) -> Tensor:
    return g @ bases[0] if len(bases) == 1 else bases[0].mT @ g @ bases[1]


def _signed(squares: Tensor, sign: Tensor | None, v: slice, n: slice) -> Tensor:
    if sign is None:
        return squares
    return squares * sign[v, n].reshape(sign[v, n].shape + (1,) * (squares.dim() - 2))


def _squared_norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    if torch.is_grad_enabled():  # a norm is not smooth at zero
        return (x * x).sum(dims)
    return torch.linalg.vector_norm(x, dim=dims).square()


def _sum_first(x: Tensor) -> Tensor:
    return x[0] if len(x) == 1 else x.sum(0)


@dataclass(frozen=True)
class Layout:
    """How matrices ``[*lead, q, o, i]`` are stored in a parameter.

    ``kind`` is ``"rows"`` (row-major ``[q * o, i]``: linear, convolution), ``"columns"``
    (``[i, o]``: a matrix that multiplies from the right) or ``"convt"`` (``[q * i, o, *kernel]``
    with the kernel flattened into ``i``: transposed convolution).
    """

    shape: torch.Size
    kind: str = "rows"

    def store(self, matrix: Tensor) -> Tensor:
        """``[*lead, q, o, i] -> [*lead, *p]``."""
        lead = matrix.shape[:-3]
        if self.kind == "columns":
            matrix = matrix.mT
        elif self.kind == "convt":
            matrix = matrix.unflatten(-1, (-1, *self.shape[2:])).movedim(len(lead) + 2, len(lead) + 1)
        return matrix.reshape(*lead, *self.shape)

    def load(self, stored: Tensor, groups: int, outputs: int) -> Tensor:
        """``[*lead, *p] -> [*lead, q, o, i]``, the inverse of :meth:`store`."""
        lead = stored.shape[: stored.dim() - len(self.shape)]
        size = self.shape.numel() // max(groups * outputs, 1)
        if self.kind == "columns":
            return stored.reshape(*lead, groups, size, outputs).mT
        if self.kind == "convt":
            inputs = self.shape[0] // groups
            split = stored.reshape(*lead, groups, inputs, outputs, *self.shape[2:])
            stored = split.movedim(len(lead) + 2, len(lead) + 1)
        return stored.reshape(*lead, groups, outputs, size)

    def transposed(self) -> Layout:
        """The layout of the parameter this one is the transpose of."""
        kind = {"rows": "columns", "columns": "rows"}[self.kind]
        return Layout(torch.Size(reversed(self.shape)), kind)


@dataclass(eq=False)
class Patches:
    """Inputs ``[n, q, s, i]`` that overlap, written out when they are used, and as far as they are.

    Attributes:
        windows: a view of the padded input, ``[n, q, channels, *kernel, *positions]``.
        ndim: number of axes of the kernel, and of the positions.
        keep: whether what was written out is kept, because it is used again. In grad mode it is kept in
            any case, as the graph holds on to it: once, and not once for each use.
    """

    windows: Tensor
    ndim: int
    keep: bool = False
    _kept: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        n, q, *features = self.windows.shape
        positions, inside = features[-self.ndim :], features[: -self.ndim]
        return torch.Size((n, q, prod(positions), prod(inside)))

    def __getitem__(self, samples: slice | Tensor) -> Tensor | Patches:
        if self.keep or torch.is_grad_enabled():
            return self.written()[samples]
        return Patches(self.windows[samples], self.ndim)

    def written(self) -> Tensor:
        """``[n, q, s, i]``."""
        differentiable = torch.is_grad_enabled()
        known = self._kept
        if known is not None and (
            known.requires_grad or not (differentiable and self.windows.requires_grad)
        ):
            return known
        written = self.windows.flatten(-self.ndim).flatten(2, -2).mT
        if self.keep or differentiable:
            self._kept = written
        return written

    def write(self, place: Tensor) -> None:
        """Write them to a place ``[n, q, s, i]``."""
        if self._kept is not None:
            place.copy_(self._kept)
            return
        inside, positions = self.windows.shape[2 : -self.ndim], self.windows.shape[-self.ndim :]
        split = place.unflatten(3, inside).unflatten(2, positions)
        split.movedim(tuple(range(2, 2 + self.ndim)), tuple(range(-self.ndim, 0))).copy_(self.windows)

    def step(self, limits: dict[str, int]) -> int:
        """Number of samples whose patches take about that much memory."""
        size = self.shape[1:].numel() * self.windows.element_size()
        return max(1, limits.get(self.windows.device.type, 2**24) // max(1, size))

    def gram(self) -> Tensor:
        """``sum_{n,q,s} a a^T``, written out piece by piece."""
        total = self.windows.new_zeros(self.shape[-1], self.shape[-1])
        for part in self.windows.split(self.step(PATCH_BYTES)):
            together = part.movedim((0, 1), (-self.ndim - 2, -self.ndim - 1))
            total = total + _gram(together.reshape(self.shape[-1], -1).mT)
        return total


@dataclass(frozen=True, eq=False)
class Outer(Form):
    """``G = sum_s g a^T``: a weight matrix that meets its input at ``s`` positions.

    Attributes:
        inputs: ``[n, q, s, i]``, written out or not.
        g: columns at the outputs, ``[v, n, q, s, o]``.
        layout: where the matrix entries are stored in the parameter.
        counts: how many positions each sample has, ``[n]``, where they differ; the rest is zero.
    """

    inputs: Tensor | Patches
    g: Tensor
    layout: Layout
    counts: Tensor | None = None
    projects = True

    @property
    def a(self) -> Tensor:
        """Inputs ``[n, q, s, i]`` written out, in the precision of ``g`` (after autocast)."""
        a = self.inputs.written() if isinstance(self.inputs, Patches) else self.inputs
        return a if a.dtype == self.g.dtype else a.to(self.g.dtype)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.layout.shape

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.g.shape[0]

    @property
    def samples(self) -> int:  # type: ignore[override]
        return self.g.shape[1]

    @property
    def like(self) -> Tensor:
        return self.g

    @property
    def positions(self) -> int:
        """Number of shared positions."""
        return self.g.shape[3]

    def take(self, columns: slice, samples: slice | Tensor) -> Outer:
        counts = None if self.counts is None else self.counts[samples]
        return Outer(self.inputs[samples], self.g[columns][:, samples], self.layout, counts)

    def dense(self) -> Tensor:
        if torch.is_grad_enabled():
            return self.layout.store(self._differentiable())
        swapped = self.layout.kind == "columns"
        sides = self.g.shape[-1], self.inputs.shape[-1]
        matrices = fresh(self.g, (*self.g.shape[:3], *(reversed(sides) if swapped else sides)))
        first = 0
        for piece in self._pieces(PATCH_BYTES):
            out = matrices[:, first : first + piece.samples]
            first += piece.samples
            g, a = piece.g, piece.a.expand(self.columns, *piece.inputs.shape)
            left, right = (a, g) if swapped else (g, a)
            if self.positions == 1:
                torch.mul(left.mT, right, out=out)
                continue
            for x, y, product in zip(left, right, out, strict=True):
                torch.bmm(x.flatten(0, 1).mT, y.flatten(0, 1), out=product.flatten(0, 1))
        return self.layout.store(matrices.mT if swapped else matrices)

    def _differentiable(self) -> Tensor:
        """``g^T a [v, n, q, o, i]``; all columns in one product, so that the graph holds ``a`` once."""
        if self.positions == 1:
            return self.g.mT * self.a
        v, n, q, _, o = self.g.shape
        g = self.g.permute(1, 2, 0, 4, 3).reshape(n, q, v * o, self.positions)
        return (g @ self.a).unflatten(2, (v, o)).movedim(2, 0)

    def total(self) -> Tensor:
        g = _sum_first(self.g).transpose(0, 1).flatten(1, 2)
        return self.layout.store(g.mT @ self.a.transpose(0, 1).flatten(1, 2))

    @property
    def _windows(self) -> tuple[Tensor, int]:
        """Inputs as a view ``[n, q, *inside, *positions]``, and the number of axes of the positions."""
        a = self.inputs
        return (a.windows, a.ndim) if isinstance(a, Patches) else (a.mT, 1)

    @property
    def _large(self) -> bool:
        """Whether products are written for some samples at a time, into memory used again."""
        size = self.columns * self.samples * self.shape.numel() * self.g.element_size()
        return size > SMALL_BYTES and self.g.device.type == "cpu" and not torch.is_grad_enabled()

    def _pieces(self, limits: dict[str, int]) -> Iterator[Outer]:
        """The form; where patches are not kept, for as many samples at a time as fit the limit."""
        inputs = self.inputs
        lazy = isinstance(inputs, Patches) and not inputs.keep and not torch.is_grad_enabled()
        step = inputs.step(limits) if lazy else max(1, self.samples)  # type: ignore[union-attr]
        if step >= self.samples:
            yield self
        else:
            for n in range(0, self.samples, step):
                yield self.take(slice(None), slice(n, n + step))

    def _products(self, centre: Tensor | None = None) -> Iterator[tuple[int, slice, Tensor]]:
        """Column, samples and their ``g^T a - centre [n, q, o, i]``, in memory that is overwritten."""
        shape = self.g.shape[2], self.g.shape[-1], self.inputs.shape[-1]
        step = max(1, PRODUCT_BYTES // (prod(shape) * self.g.element_size()))
        memory = self.g.new_empty(min(step, self.samples), *shape)
        first = 0
        for piece in self._pieces(BLOCK_BYTES):
            a = piece.a
            for n in range(0, piece.samples, step):
                here = slice(n, min(n + step, piece.samples))
                right = a[here].flatten(0, 1)
                products = memory[: here.stop - n]
                out = products.flatten(0, 1)
                for v in range(self.columns):
                    left = piece.g[v, here].flatten(0, 1).mT
                    if centre is not None:
                        start = centre.expand(products.shape).flatten(0, 1)
                        torch.baddbmm(start, left, right, beta=-1, out=out)
                    elif len(out) == 1:
                        torch.mm(left[0], right[0], out=out[0])
                    else:
                        torch.bmm(left, right, out=out)
                    yield v, slice(first + n, first + here.stop), products
            first += piece.samples

    def _add_squares(self, result: Tensor, products: Tensor, weights: Tensor | None = None) -> None:
        """Add up squares over samples; overwrites ``products``."""
        if len(products) == 1:
            value = 1.0 if weights is None else float(weights[0])
            result.addcmul_(products[0], products[0], value=value)
            return
        products.square_()
        if weights is not None:
            products *= weights.reshape(-1, 1, 1, 1)
        result += products.sum(0)

    def square_sum(self, sign: Tensor | None = None) -> Tensor:
        if self.positions != 1:
            fused = kernels.square_sum(*self._windows, self.g, sign)
            if fused is not None:
                return self.layout.store(fused)
            if not self._large:
                return super().square_sum(sign)
            result = self.g.new_zeros(self.g.shape[2], self.g.shape[-1], self.inputs.shape[-1])
            for v, n, products in self._products():
                self._add_squares(result, products, None if sign is None else sign[v, n])
            return self.layout.store(result)
        g, a = self.g[:, :, :, 0], self.a[:, :, 0]
        g = _sum_first(_signed(g * g, sign, slice(None), slice(None))).transpose(0, 1)
        return self.layout.store(g.mT @ (a * a).transpose(0, 1))

    def centred_square_sum(self) -> tuple[Tensor | None, Tensor]:
        """About zero for one position, where centring would mean writing ``G`` out."""
        if self.positions == 1:
            return None, self.square_sum()
        if not self._large:
            return super().centred_square_sum()
        centre = self.g[0, 0].mT @ self.take(slice(0, 1), slice(0, 1)).a[0]
        result = torch.zeros_like(centre)
        for _, _, products in self._products(centre):
            self._add_squares(result, products)
        return self.layout.store(centre), self.layout.store(result)

    def square_sum_per_sample(self, sign: Tensor | None = None) -> Tensor:
        if self.positions != 1:
            return super().square_sum_per_sample(sign)
        g = _sum_first(_signed(self.g * self.g, sign, slice(None), slice(None)))
        return self.layout.store(g.mT @ self.a.square())

    def squared_norms(self) -> Tensor:
        """By Gram matrices over positions where they are smaller than the weight."""
        s, o, i = self.positions, self.g.shape[-1], self.inputs.shape[-1]
        if s == 1:
            norms = _squared_norm(self.g, (0, 3, 4)) * _squared_norm(self.a, (2, 3))
            return norms.squeeze(1) if norms.shape[1] == 1 else norms.sum(1)
        if s * (o + i + 1) < o * i:
            return torch.cat([piece._norms_by_grams() for piece in self._pieces(PATCH_BYTES)])
        fused = kernels.squared_norms(*self._windows, self.g)
        if fused is not None:
            return fused
        if not self._large:
            return super().squared_norms()
        norms = self.g.new_zeros(self.samples)
        for _, n, products in self._products():
            norms[n] += torch.linalg.vector_norm(products.flatten(1), dim=1).square()
        return norms

    def _norms_by_grams(self) -> Tensor:
        similar, a = _sum_first(self.g @ self.g.mT), self.a
        terms = similar * (a @ a.mT)
        norms = terms.sum((1, 2, 3))
        # Terms that cancel leave rounding errors: there the products are written out.
        doubtful = norms < CANCELLED * terms.detach().abs().sum((1, 2, 3))
        if torch.is_grad_enabled() or not bool(doubtful.any()):
            return norms
        which = doubtful.nonzero()[:, 0]
        return norms.index_copy(0, which, Form.squared_norms(self.take(slice(None), which)))

    def _parts(self, vectors: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Some vectors and samples, inputs ``[q, n s, i]`` and columns ``[v, n, q, s, o]`` of these.

        For so many at a time, ``[vectors, n, q, s, o]`` may be written out.
        """
        _, q, s, i = self.inputs.shape
        o = self.g.shape[-1]
        samples = max(1, self.room // max(1, q * s * max(i, o)))
        step = max(1, self.room // max(1, min(samples, self.samples) * q * s * o))
        for first in range(0, self.samples, samples):
            n = slice(first, min(first + samples, self.samples))
            piece = self.take(slice(None), n)
            a = piece.a.transpose(0, 1).flatten(1, 2)
            for k in range(0, vectors, step):
                yield slice(k, min(k + step, vectors)), n, a, piece.g

    def _writes(self, vectors: int) -> bool:
        """Whether products with so many vectors cost less with the form written out."""
        s, i, v = self.positions, self.inputs.shape[-1], self.columns
        return s > 1 and v * i * (s + vectors) < vectors * s * (i + v)

    def project(self, vectors: Tensor) -> Tensor:
        """``sum_s g . (u a)``, where that costs less than ``G``."""
        if self._writes(len(vectors)):
            return super().project(vectors)
        u = self.layout.load(vectors.to(self.g.dtype), self.g.shape[2], self.g.shape[-1])
        result = self.g.new_zeros(len(u), self.columns, self.samples)
        for k, n, a, g in self._parts(len(u)):
            sides = a @ u[k].permute(1, 3, 0, 2).flatten(2)  # [q, n s, k o]
            sides = sides.unflatten(2, (k.stop - k.start, g.shape[4]))
            sides = sides.unflatten(1, (g.shape[1], g.shape[3]))
            result[k, :, n] = torch.einsum("qnsko,vnqso->kvn", sides, g)
        return result

    def combine(self, weights: Tensor) -> Tensor:
        """``sum_{n,s} (sum_v w g) a^T``, where that costs less than ``G``."""
        if self._writes(len(weights)):
            return super().combine(weights)
        (q, o), i = (self.g.shape[2], self.g.shape[-1]), self.inputs.shape[-1]
        result, w = self.g.new_zeros(len(weights), q, o, i), weights.to(self.g.dtype)
        for k, n, a, g in self._parts(len(w)):
            sides = torch.einsum("kvn,vnqso->qnsko", w[k, :, n], g).flatten(3).flatten(1, 2)
            sums = (sides.mT @ a).unflatten(1, (k.stop - k.start, o))
            result[k] = result[k] + sums.transpose(0, 1)
        return self.layout.store(result)

    def inner(self, other: Form) -> Tensor:
        """By products of inputs and of columns, where that costs less than rows of ``G``."""
        alike = isinstance(other, Outer) and other.layout == self.layout
        if not isinstance(other, Outer) or not alike or other.g.shape[2] != self.g.shape[2]:
            return super().inner(other)
        if self.positions == other.positions == 1:
            return self._inner_of_single(other)
        if not self._similar_cost_less(other) or self._cancels() or other._cancels():
            return self._inner_by_outputs(other)
        most = max(self.positions, other.positions, 1)
        rows = isqrt(self.room // max(1, self.g.shape[2])) // most
        return _by_tiles(self, other, max(rows, 1), Outer.take_tile, _similar)

    def take_tile(self, tile: Tile) -> Outer:
        """Some columns and samples."""
        return self.take(*tile)

    def _inner_by_outputs(self, other: Outer) -> Tensor:
        """Products of rows of ``G``, each written out once, for some outputs at a time."""
        (q, o), i = (self.g.shape[2], self.g.shape[-1]), self.inputs.shape[-1]
        counts = self.columns * self.samples, other.columns * other.samples
        step = max(1, ROWS_BYTES // max(1, max(counts) * q * i * self.g.element_size()))
        result = self.g.new_zeros(counts)
        for first in range(0, o, step):
            left = self._rows_of(slice(first, first + step))
            right = left if other is self else other._rows_of(slice(first, first + step))
            result = result + _row_products(left, right)
        return result

    def _rows_of(self, outputs: slice) -> Tensor:
        """What some outputs have in ``G``, ``[v n, q o i]``."""
        g = self.g[..., outputs]
        layout = Layout(torch.Size((g.shape[2] * g.shape[-1], self.inputs.shape[-1])))
        return Outer(self.inputs, g, layout).dense().flatten(2).flatten(0, 1)

    def _inner_of_single(self, other: Outer) -> Tensor:
        """``(g g^T) * (a a^T)``, group by group, of forms with one position."""
        result, left = _pairs(self, other), self.a
        right = left if other is self else other.a
        for q in range(self.g.shape[2]):
            g, a = self.g[:, :, q, 0].flatten(0, 1), left[:, q, 0]
            h, b = (g, a) if other is self else (other.g[:, :, q, 0].flatten(0, 1), right[:, q, 0])
            columns = _row_products(g, h).reshape(result.shape)
            result = result + columns * _row_products(a, b).unsqueeze(1)
        return result.flatten(2).flatten(0, 1)

    def _similar_cost_less(self, other: Outer) -> bool:
        """Whether products of pairs of positions cost less than rows of one form, or of both."""
        (n, m), (v, w) = (self.samples, other.samples), (self.columns, other.columns)
        (s, t), (o, i) = (self.positions, other.positions), (self.g.shape[-1], self.inputs.shape[-1])
        half = 2 if other is self else 1
        positions = n * m * s * t * (i + v * w * (o + 1)) // half
        written = o * i * (v * n * s + w * m * t + v * n * w * m // half)
        projected = w * m * o * (t * i + n * s * (i + v))
        return positions < (written if other is self else min(written, projected))

    @torch.no_grad()
    def _cancels(self) -> bool:
        """Whether products of positions add up to much less than their size, and lose digits."""
        for piece in self._pieces(PATCH_BYTES):
            a = piece.a
            terms = _sum_first(piece.g @ piece.g.mT) * (a @ a.mT)
            if bool((terms.sum((1, 2, 3)) < CANCELLED * terms.abs().sum((1, 2, 3))).any()):
                return True
        return False

    def kronecker(self, sharing: Sharing = None) -> list[Factor]:
        """``B = sum_{v,n} (sum_s g)(sum_s g)^T`` and ``A = 1/(N q) sum_{n,q,s} a a^T``; of a matrix.

        With ``"expand"``, ``B = sum_{v,n,s} g g^T`` and ``A`` is divided by ``s`` too; with
        ``"reduce"``, ``A = 1/(N q) sum_{n,q} (mean_s a)(mean_s a)^T``.
        """
        if len(self.shape) == 1:
            return super().kronecker(sharing)
        groups = self.inputs.shape[1]
        g, count = self.g, max(self.samples * groups, 1)
        if sharing == "expand":
            count = max(groups * positions_of(self), 1)
            g = g.transpose(2, 3).flatten(1, 2)
        else:
            g = g[:, :, :, 0] if self.positions == 1 else g.sum(3)
        g = g.flatten(2).flatten(0, 1)

        def second_moment() -> Tensor:
            if isinstance(self.inputs, Patches) and sharing != "reduce":
                return self.inputs.gram().to(g.dtype) / count
            a = _mean(self.a, self.counts, 2) if sharing == "reduce" else self.a
            return _gram(a.flatten(0, 2), count)

        output, inputs = Factor(lambda: gram(g), True), Factor(second_moment, False)
        return [inputs, output] if self.layout.kind == "columns" else [output, inputs]

    def rotated_square_sum(self, bases: Sequence[Tensor]) -> Tensor:
        """Of one group, by rotating its sides."""
        if len(bases) == 1:
            return super().rotated_square_sum(bases)
        columns = self.layout.kind == "columns"
        outputs, inputs = reversed(bases) if columns else bases
        if self.g.shape[2] == 1:
            shape = torch.Size((len(outputs), len(inputs)))
            squares = Outer(self.a @ inputs, self.g @ outputs, Layout(shape)).square_sum()
        else:
            squares = self.like.new_zeros(len(outputs), len(inputs))
            for g in self.g:
                matrix = (g.mT @ self.a).flatten(1, 2)
                squares = squares + _rotated(matrix, (outputs, inputs)).square().sum(0)
        return squares.mT if columns else squares


def _similar(left: Outer, right: Outer) -> Tensor:
    """``sum_{s,t} (a_s . a_t) (g_s . g_t)``, shape ``[v, n, w, m]``."""

    def sides(form: Outer) -> tuple[Tensor, Tensor]:
        """``[q, n s, i]`` and ``[q, v n s, o]``."""
        return form.a.transpose(0, 1).flatten(1, 2), form.g.movedim(2, 0).flatten(1, 3)

    (a, g), (b, h) = sides(left), sides(right)
    columns = (g @ h.mT).unflatten(2, (right.columns, right.samples, right.positions))
    columns = columns.unflatten(1, (left.columns, left.samples, left.positions))
    inputs = (a @ b.mT).unflatten(2, (1, right.samples, right.positions))
    inputs = inputs.unflatten(1, (1, left.samples, left.positions))
    return (columns * inputs).sum((0, 3, 6))


def positions_of(form: Outer | Lookup) -> int:
    """Number of positions of all samples together."""
    if form.counts is not None:
        return int(form.counts.sum())
    return form.samples * form.g.shape[3 if isinstance(form, Outer) else 2]


def _mean(x: Tensor, counts: Tensor | None, dim: int) -> Tensor:
    """Mean over positions, ``[n, ...]``, of which samples may have different numbers."""
    if counts is None:
        return x.sum(dim, keepdim=True) / max(x.shape[dim], 1)
    shape = [-1] + [1] * (x.dim() - 1)
    return x.sum(dim, keepdim=True) / counts.clamp(min=1).to(x.dtype).reshape(shape)


@dataclass(frozen=True, eq=False)
class Dense(Form):
    """``G`` itself, ``[v, n, *p]``."""

    values: Tensor
    projects = True

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.values.shape[2:]

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.values.shape[0]

    @property
    def samples(self) -> int:  # type: ignore[override]
        return self.values.shape[1]

    @property
    def like(self) -> Tensor:
        return self.values

    def take(self, columns: slice, samples: slice | Tensor) -> Dense:
        return Dense(self.values[columns][:, samples])

    def dense(self) -> Tensor:
        return self.values

    def square_sum(self, sign: Tensor | None = None) -> Tensor:
        if sign is not None or self.values.numel() > SMALL:
            return super().square_sum(sign)
        return _squared_norm(self.values, (0, 1))

    def squared_norms(self) -> Tensor:
        if self.values.numel() > SMALL:
            return super().squared_norms()
        flat = self.values.reshape(*self.values.shape[:2], self.shape.numel())
        return _squared_norm(flat, (0, 2))


@dataclass(frozen=True, eq=False)
class Together(Form):
    """Columns that belong to all samples together: sums over samples are known, single samples are not.

    Attributes:
        values: ``[v, *p]``.
        samples: number of samples.
    """

    values: Tensor
    samples: int = field()

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.values.shape[1:]

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.values.shape[0]

    @property
    def like(self) -> Tensor:
        return self.values

    def take(self, columns: slice, samples: slice | Tensor) -> Form:
        raise RuntimeError(
            "a quantity looks at single samples of a form, but its class says that it does not; set "
            "its attribute per_sample = True"
        )

    def dense(self) -> Tensor:
        return self.take(slice(None), slice(None)).dense()

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        self.take(slice(None), slice(None))
        yield from ()

    def total(self) -> Tensor:
        return self.values.sum(0)

    def square_sum(self, sign: Tensor | None = None) -> Tensor:
        """``sum_v sign_v G^2``; ``sign [v, n]`` is the same for all samples."""
        return Dense(self.values.unsqueeze(1)).square_sum(None if sign is None else sign[:, :1])


@dataclass(frozen=True, eq=False)
class Lookup(Form):
    """Rows of a table: ``G[v, n, index[n, s]] += g[v, n, s]``.

    Attributes:
        index: row of the table, ``[n, s]``.
        g: columns at the rows read, ``[v, n, s, d]``.
        shape: the table's shape ``[rows, d]``.
        reads: which positions read the table, ``[n, s]``, if not all do: a padding row is a constant,
            and a sample may have fewer positions than others.
        counts: how many positions each sample has, ``[n]``, where they differ.
    """

    index: Tensor
    g: Tensor
    shape: torch.Size = field()
    reads: Tensor | None = None
    counts: Tensor | None = None
    projects = True

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.g.shape[0]

    @property
    def samples(self) -> int:  # type: ignore[override]
        return self.g.shape[1]

    @property
    def like(self) -> Tensor:
        return self.g

    @property
    def read(self) -> Tensor:
        """``g`` at the positions that read the table, zero at others."""
        return self.g if self.reads is None else self.g * self.reads.unsqueeze(-1)

    def take(self, columns: slice, samples: slice | Tensor) -> Lookup:
        reads, counts = (x if x is None else x[samples] for x in (self.reads, self.counts))
        return Lookup(self.index[samples], self.g[columns][:, samples], self.shape, reads, counts)

    def dense(self) -> Tensor:
        v, n, s, d = self.g.shape
        rows = torch.arange(n, device=self.index.device).unsqueeze(1) * self.shape[0] + self.index
        if torch.is_grad_enabled():
            table = self.g.new_zeros(v, n * self.shape[0], d)
            table = table.index_add(1, rows.flatten(), self.read.flatten(1, 2))
        else:
            table = fresh_zeros(self.g, (v, n * self.shape[0], d))
            table.index_add_(1, rows.flatten(), self.read.flatten(1, 2))
        return table.reshape(v, n, *self.shape)

    def _touched(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows touched by each sample, duplicates summed: ``(sample [u], row [u], g [v, u, d])``."""
        samples = torch.arange(self.samples, device=self.index.device).unsqueeze(1)
        keys = samples * self.shape[0] + self.index
        unique, inverse = torch.unique(keys.flatten(), return_inverse=True)
        g = self.g.new_zeros(self.columns, len(unique), self.shape[1])
        g = g.index_add(1, inverse, self.read.flatten(1, 2))
        return unique // self.shape[0], unique % self.shape[0], g

    def _parts(self, vectors: int) -> Iterator[tuple[slice, slice, Lookup]]:
        """Some vectors and samples, so many that ``[vectors, n, s, d]`` may be written out."""
        size = max(1, self.g.shape[2:].numel())
        samples = max(1, self.room // size)
        step = max(1, self.room // (size * max(1, min(samples, self.samples))))
        for first in range(0, self.samples, samples):
            n = slice(first, min(first + samples, self.samples))
            for k in range(0, vectors, step):
                yield slice(k, min(k + step, vectors)), n, self.take(slice(None), n)

    def project(self, vectors: Tensor) -> Tensor:
        """``sum_s g . u[index]``."""
        u = vectors.to(self.g.dtype)
        result = u.new_zeros(len(u), self.columns, self.samples)
        for k, n, piece in self._parts(len(u)):
            result[k, :, n] = torch.einsum("knsd,vnsd->kvn", u[k][:, piece.index], piece.read)
        return result

    def combine(self, weights: Tensor) -> Tensor:
        w = weights.to(self.g.dtype)
        result = w.new_zeros(len(w), *self.shape)
        for k, n, piece in self._parts(len(w)):
            g = torch.einsum("kvn,vnsd->knsd", w[k, :, n], piece.read)
            result[k] = result[k].index_add(1, piece.index.flatten(), g.flatten(1, 2))
        return result

    def inner(self, other: Form) -> Tensor:
        """By products of positions that read the same row, where that costs less than tables."""
        if not isinstance(other, Lookup):
            return super().inner(other)
        s, t = self.index.shape[1], other.index.shape[1]
        of_row = self.columns * self.samples * s
        if of_row * t > self.shape[0] + of_row:
            return super().inner(other)
        rows = isqrt(self.room) // max(s, t, 1)
        return _by_tiles(self, other, max(rows, 1), Lookup.take_tile, _same_rows)

    def take_tile(self, tile: Tile) -> Lookup:
        """Some columns and samples."""
        return self.take(*tile)

    def histogram(self, edges: Tensor) -> Tensor:
        """Rows that are not read are zero."""
        g = self._touched()[2]
        zeros = self.columns * self.samples * self.shape.numel() - g.numel()
        return _counts(g, edges) + zeros * _counts(g.new_zeros(1), edges)

    def total(self) -> Tensor:
        g = self.read.sum(0).flatten(0, 1)
        return g.new_zeros(self.shape).index_add(0, self.index.flatten(), g)

    def square_sum(self, sign: Tensor | None = None) -> Tensor:
        samples, rows, g = self._touched()
        squares = g * g if sign is None else g * g * sign[:, samples].unsqueeze(-1)
        return g.new_zeros(self.shape).index_add(0, rows, squares.sum(0))

    def squared_norms(self) -> Tensor:
        samples, _, g = self._touched()
        return g.new_zeros(self.samples).index_add(0, samples, (g * g).sum((0, 2)))

    def kronecker(self, sharing: Sharing = None) -> list[Factor]:
        """As for a matrix that multiplies one-hot vectors, which are zero where the table is not read.

        ``[A, B]``, ``A`` the row frequencies.
        """
        if self.shape[0] > LARGEST_FACTOR:
            return super().kronecker()
        g = (self.g.flatten(1, 2) if sharing == "expand" else self.g.sum(2)).flatten(0, 1)
        ones = self.g.new_ones(self.index.shape) if self.reads is None else self.reads.to(g.dtype)
        if sharing == "reduce":
            a = g.new_zeros(self.samples, self.shape[0]).scatter_add(1, self.index, ones)
            sizes = self.index.shape[1] if self.counts is None else self.counts.unsqueeze(1)
            a = a / torch.as_tensor(sizes, device=g.device).clamp(min=1)
            return [
                Factor(lambda: a.mT @ a / max(self.samples, 1), False),
                Factor(lambda: gram(g), True),
            ]
        counts = g.new_zeros(self.shape[0]).index_add(0, self.index.flatten(), ones.flatten())
        count = max(positions_of(self), 1) if sharing == "expand" else max(self.samples, 1)
        return [Factor(lambda: torch.diag(counts / count), False), Factor(lambda: gram(g), True)]


def _same_rows(left: Lookup, right: Lookup) -> Tensor:
    """``sum_{s,t} [index_s = index_t] (g_s . g_t)``, shape ``[v, n, w, m]``."""
    same = left.index[:, :, None, None, None] == right.index
    products = left.read.flatten(0, 2) @ right.read.flatten(0, 2).mT
    products = products.unflatten(1, right.g.shape[:3]).unflatten(0, left.g.shape[:3])
    return (products * same.to(products.dtype)).sum((2, 5))


@dataclass(frozen=True, eq=False)
class Pullback(Form):
    """A form of a tensor made from parameters only, carried on to one of those parameters.

    Attributes:
        form: the form of the derived tensor ``t``.
        vjp: linear map ``[m, *t] -> [m, *p]``, the transposed Jacobian of ``t`` in the parameter.
        shape: the parameter's shape ``p``.
    """

    form: Form
    vjp: Callable[[Tensor], Tensor]
    shape: torch.Size = field()

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.form.columns

    @property
    def samples(self) -> int:  # type: ignore[override]
        return self.form.samples

    @property
    def like(self) -> Tensor:
        like = self.form.like
        return like.real if like.is_complex() else like

    def take(self, columns: slice, samples: slice | Tensor) -> Pullback:
        return Pullback(self.form.take(columns, samples), self.vjp, self.shape)

    def dense(self) -> Tensor:
        g = self.form.dense()
        return self.vjp(g.flatten(0, 1)).reshape(*g.shape[:2], *self.shape)

    def total(self) -> Tensor:
        return self.vjp(self.form.total().unsqueeze(0))[0]

    def combine(self, weights: Tensor) -> Tensor:
        return self.vjp(self.form.combine(weights))


@dataclass(frozen=True, eq=False)
class Single(Form):
    """The form of an operation on one sample only; for all others it is zero.

    Attributes:
        form: that sample's, ``[v, 1, *p]``.
        sample: which it is.
        samples: number of samples.
    """

    form: Form
    sample: int
    samples: int = field()  # type: ignore[assignment]

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.form.shape

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.form.columns

    @property
    def like(self) -> Tensor:
        return self.form.like

    def written(self) -> Single:
        return Single(Dense(self.form.dense()), self.sample, self.samples)

    def take(self, columns: slice, samples: slice | Tensor) -> Form:
        return _together([self]).take(columns, samples)

    def dense(self) -> Tensor:
        found = self.like.new_zeros(self.columns, self.samples, *self.shape)
        return found.index_copy(1, self._at(), self.form.dense())

    def _at(self) -> Tensor:
        return torch.tensor([self.sample], device=self.like.device)

    def total(self) -> Tensor:
        return self.form.total()

    def square_sum(self, sign: Tensor | None = None) -> Tensor:
        return self.form.square_sum(None if sign is None else sign[:, self.sample : self.sample + 1])

    def squared_norms(self) -> Tensor:
        return self.like.new_zeros(self.samples).index_copy(0, self._at(), self.form.squared_norms())

    def together(self) -> Form:
        """The form of all samples, zero for the others."""
        return _together([self])

    def kronecker(self, sharing: Sharing = None) -> list[Factor]:
        return self.together().kronecker(sharing)

    def rotated_square_sum(self, bases: Sequence[Tensor]) -> Tensor:
        return self.form.rotated_square_sum(bases)


def of_one(form: Form, function: Callable[[Form], Form]) -> Form:
    """``function(form)``; where the form is of one sample, of that sample's."""
    if isinstance(form, Single):
        return Single(function(form.form), form.sample, form.samples)
    return function(form)


def _together(singles: Sequence[Single]) -> Form:
    """One form of all samples, from forms of one sample each; those of one sample are summed."""
    size, like = singles[0].samples, singles[0].like
    of: dict[int, list[Form]] = {}
    for single in singles:
        of.setdefault(single.sample, []).append(single.form)
    forms = {sample: merge(each) for sample, each in of.items()}
    at = torch.tensor(list(forms), device=like.device)
    found = list(forms.values())

    def placed(parts: list[Tensor], dim: int) -> Tensor:
        """Put samples at their places, and fill up with zeros."""
        shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
        shape[dim] = 1
        parts = [_filled(part, shape) for part in parts]
        shape[dim] = size
        return parts[0].new_zeros(shape).index_copy(dim, at, torch.cat(parts, dim))

    def counted(numbers: list[int]) -> Tensor:
        return torch.zeros(size, dtype=at.dtype, device=at.device).index_copy(
            0, at, at.new_tensor(numbers)
        )

    if all(isinstance(form, Outer) for form in found):
        outers: list[Outer] = found  # type: ignore[assignment]
        if len({(form.layout, form.inputs.shape[1]) for form in outers}) == 1:
            a, g = placed([form.a for form in outers], 0), placed([form.g for form in outers], 1)
            return Outer(a, g, outers[0].layout, counted([positions_of(form) for form in outers]))
    if all(isinstance(form, Lookup) for form in found):
        lookups: list[Lookup] = found  # type: ignore[assignment]
        whole = [
            torch.ones_like(f.index, dtype=torch.bool) if f.reads is None else f.reads for f in lookups
        ]
        index, reads = placed([form.index for form in lookups], 0), placed(whole, 0)
        g, counts = placed([form.g for form in lookups], 1), [positions_of(form) for form in lookups]
        return Lookup(index, g, lookups[0].shape, reads, counted(counts))
    return Dense(placed([form.dense() for form in found], 1))


def _filled(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Filled up with zeros, at the end of each axis."""
    if list(x.shape) == list(shape):
        return x
    margins = [
        m for size, old in zip(reversed(shape), reversed(x.shape), strict=True) for m in (0, size - old)
    ]
    return torch.nn.functional.pad(x, margins)


@dataclass(frozen=True, eq=False)
class Sum(Form):
    """The sum of forms of different kinds: a parameter used by operations of different kinds."""

    forms: tuple[Form, ...]
    projects = True

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.forms[0].shape

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.forms[0].columns

    @property
    def samples(self) -> int:  # type: ignore[override]
        return self.forms[0].samples

    @property
    def like(self) -> Tensor:
        return self.forms[0].like

    def take(self, columns: slice, samples: slice | Tensor) -> Sum:
        return Sum(tuple(form.take(columns, samples) for form in self.forms))

    def dense(self) -> Tensor:
        first, *rest = (form.dense() for form in self.forms)
        return sum(rest, first)

    def total(self) -> Tensor:
        first, *rest = (form.total() for form in self.forms)
        return sum(rest, first)

    def project(self, vectors: Tensor) -> Tensor:
        first, *rest = (form.project(vectors) for form in self.forms)
        return sum(rest, first)

    def combine(self, weights: Tensor) -> Tensor:
        first, *rest = (form.combine(weights) for form in self.forms)
        return sum(rest, first)

    def inner(self, other: Form) -> Tensor:
        """Pairs of forms, each once."""
        total = _pairs(self, other).flatten(2).flatten(0, 1)
        others = other.forms if isinstance(other, Sum) else (other,)
        for i, form in enumerate(self.forms):
            for j, each in enumerate(others):
                if other is not self or i <= j:
                    part = form.inner(each)
                    total = total + (part if other is not self or i == j else part + part.mT)
        return total


def merge(forms: Sequence[Form]) -> Form:
    """The form of a parameter used several times: sums come before squares.

    Forms of one kind become one form with more shared positions; forms of different kinds are
    summed block by block.
    """
    if len(forms) == 1:
        return forms[0]
    singles = [form for form in forms if isinstance(form, Single)]
    if singles:
        forms = [_together(singles), *(form for form in forms if not isinstance(form, Single))]
        return merge(forms)
    merged: list[Form] = []
    outers: dict[tuple[Layout, int], list[Outer]] = {}
    lookups = [form for form in forms if isinstance(form, Lookup)]
    dense = [form for form in forms if isinstance(form, Dense)]
    for form in forms:
        if isinstance(form, Outer):
            outers.setdefault((form.layout, form.inputs.shape[1]), []).append(form)
        elif not isinstance(form, (Lookup, Dense)):
            merged.append(form)
    for (layout, _), group in outers.items():
        merged.append(group[0] if len(group) == 1 else _joined(group, layout))
    if lookups:
        index, g = torch.cat([f.index for f in lookups], 1), torch.cat([f.g for f in lookups], 2)
        reads = None
        if any(f.reads is not None for f in lookups):
            every = [torch.ones_like(f.index) > 0 if f.reads is None else f.reads for f in lookups]
            reads = torch.cat(every, 1)
        merged.append(Lookup(index, g, lookups[0].shape, reads, _position_counts(lookups)))
    if dense:
        first, *rest = (f.values for f in dense)
        merged.append(Dense(sum(rest, first)))
    return merged[0] if len(merged) == 1 else Sum(tuple(merged))


def _position_counts(forms: Sequence[Outer] | Sequence[Lookup]) -> Tensor | None:
    """Positions of each sample in all forms together; ``None`` if they have as many in each."""
    if all(form.counts is None for form in forms):
        return None
    found = torch.zeros(forms[0].samples, dtype=torch.long, device=forms[0].like.device)
    for form in forms:
        found = found + (positions_of(form) // form.samples if form.counts is None else form.counts)
    return found


def _joined(group: Sequence[Outer], layout: Layout) -> Outer:
    """One form with the positions of all; patches are written once, to their place in the result."""
    g, counts = torch.cat([form.g for form in group], 3), _position_counts(group)
    if torch.is_grad_enabled():
        return Outer(torch.cat([form.a for form in group], 2), g, layout, counts)
    n, q, _, i = group[0].inputs.shape
    a, first = fresh(g, (n, q, g.shape[3], i)), 0
    for form in group:
        place = a[:, :, first : first + form.positions]
        first += form.positions
        if isinstance(form.inputs, Patches):
            form.inputs.write(place)
        else:
            place.copy_(form.inputs)
    return Outer(a, g, layout, counts)
