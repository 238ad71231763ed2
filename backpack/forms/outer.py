"""Sums over shared positions of outer products: linear maps and convolutions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from backpack.forms import triton
from backpack.forms.base import (
    LARGEST_FACTOR,
    Factor,
    Form,
    Sharing,
    Tile,
    apply_sign,
    by_tiles,
    room_for_pairs,
    rotate_columns,
    second_moment,
    squared_norm,
    sum_first,
    turn,
)
from backpack.forms.layout import Layout, Patches
from backpack.forms.limits import PATCH_BYTES
from backpack.forms.products import row_products
from backpack.forms.sides import Sides

# Rows of a form, written out for some outputs at a time, of which scalar products are taken.
ROWS_BYTES = 2**26
# Where positive and negative terms of a norm leave less than this part, it is computed otherwise.
CANCELLED = 1e-3


@dataclass(frozen=True, eq=False)
class Outer(Sides):
    """``G = sum_s g a^T``: what is computed from the sides, see :class:`backpack.forms.sides.Sides`."""

    projects = True

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
            fused = triton.square_sum(*self._windows, self.g, sign)
            if fused is not None:
                return self.layout.store(fused)
            if not self._large:
                return super().square_sum(sign)
            if self._needs_strips:
                return self._squares_in_strips(sign)
            result = self.g.new_zeros(self.g.shape[2], self.g.shape[-1], self.inputs.shape[-1])
            for v, n, products in self._products():
                self._add_squares(result, products, None if sign is None else sign[v, n])
            return self.layout.store(result)
        g, a = self.g[:, :, :, 0], self.a[:, :, 0]
        g = sum_first(apply_sign(g * g, sign, slice(None), slice(None))).transpose(0, 1)
        return self.layout.store(g.mT @ (a * a).transpose(0, 1))

    def _squares_in_strips(self, sign: Tensor | None) -> Tensor:
        result, total, first = None, None, 0
        for piece in self._pieces(PATCH_BYTES):
            here, strips = slice(first, first + piece.samples), piece.strips()
            total = total if first else self._room_in_tally(strips)
            first += piece.samples
            part = strips.square_sum(None if sign is None else sign[:, here], total)
            result = part if result is None else result.add_(part)
        assert result is not None
        return result.reshape(self.shape)

    def centred_square_sum(self) -> tuple[Tensor | None, Tensor]:
        """About zero for one position, where centring would mean writing ``G`` out."""
        if self.positions == 1:
            return None, self.square_sum()
        if not self._large:
            return super().centred_square_sum()
        if self._needs_strips and not isinstance(self.inputs, Patches):
            strips = self.strips()
            centre, squares = strips.centred_square_sum(self._room_in_tally(strips))
            return centre.reshape(self.shape), squares.reshape(self.shape)
        centre = self.g[0, 0].mT @ self.take(slice(0, 1), slice(0, 1)).a[0]
        result = torch.zeros_like(centre)
        for _, _, products in self._products(centre):
            self._add_squares(result, products)
        return self.layout.store(centre), self.layout.store(result)

    def square_sum_per_sample(self, sign: Tensor | None = None) -> Tensor:
        if self.positions != 1:
            return super().square_sum_per_sample(sign)
        g = sum_first(apply_sign(self.g * self.g, sign, slice(None), slice(None)))
        return self.layout.store(g.mT @ self.a.square())

    def squared_norms(self) -> Tensor:
        """By Gram matrices over positions where they are smaller than the weight."""
        s, o, i = self.positions, self.g.shape[-1], self.inputs.shape[-1]
        if s == 1:
            norms = squared_norm(self.g, (0, 3, 4)) * squared_norm(self.a, (2, 3))
            return norms.squeeze(1) if norms.shape[1] == 1 else norms.sum(1)
        if s * (o + i + 1) < o * i:
            return torch.cat([piece._norms_by_grams() for piece in self._pieces(PATCH_BYTES)])
        fused = triton.squared_norms(*self._windows, self.g)
        if fused is not None:
            return fused
        if not self._large:
            return super().squared_norms()
        norms = self.g.new_zeros(self.samples)
        for _, n, products in self._products():
            norms[n] += torch.linalg.vector_norm(products.flatten(1), dim=1).square()
        return norms

    def _norms_by_grams(self) -> Tensor:
        similar, a = sum_first(self.g @ self.g.mT), self.a
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
        result, w = None, weights.to(self.g.dtype)
        for k, n, a, g in self._parts(len(w)):
            sides = torch.einsum("kvn,vnqso->qnsko", w[k, :, n], g).flatten(3).flatten(1, 2)
            sums = (sides.mT @ a).unflatten(1, (k.stop - k.start, o)).transpose(0, 1)
            if result is None and len(sums) == len(w) and n.stop == self.samples:
                return self.layout.store(sums)
            result = self.g.new_zeros(len(w), q, o, i) if result is None else result
            result[k] += sums
        return self.layout.store(self.g.new_zeros(len(w), q, o, i) if result is None else result)

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
        return by_tiles(self, other, max(rows, 1), Outer.take_tile, _similar)

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
            result = result + row_products(left, right)
        return result

    def _rows_of(self, outputs: slice) -> Tensor:
        """What some outputs have in ``G``, ``[v n, q o i]``."""
        g = self.g[..., outputs]
        layout = Layout(torch.Size((g.shape[2] * g.shape[-1], self.inputs.shape[-1])))
        return Outer(self.inputs, g, layout).dense().flatten(2).flatten(0, 1)

    def _inner_of_single(self, other: Outer) -> Tensor:
        """``(g g^T) * (a a^T)``, group by group, of forms with one position."""
        result, left = room_for_pairs(self, other), self.a
        right = left if other is self else other.a
        for q in range(self.g.shape[2]):
            g, a = self.g[:, :, q, 0].flatten(0, 1), left[:, q, 0]
            h, b = (g, a) if other is self else (other.g[:, :, q, 0].flatten(0, 1), right[:, q, 0])
            columns = row_products(g, h).reshape(result.shape)
            result = result + columns * row_products(a, b).unsqueeze(1)
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
            terms = sum_first(piece.g @ piece.g.mT) * (a @ a.mT)
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
            count = max(groups * self.all_positions, 1)
            g = g.transpose(2, 3).flatten(1, 2)
        else:
            g = g[:, :, :, 0] if self.positions == 1 else g.sum(3)
        g = g.flatten(2).flatten(0, 1)

        def of_inputs() -> Tensor:
            small = self.shape.numel() // max(self.shape[0], 1) <= LARGEST_FACTOR
            if isinstance(self.inputs, Patches) and sharing != "reduce" and small:
                return self.inputs.gram().to(g.dtype) / count
            a = _mean(self.a, self.counts, 2) if sharing == "reduce" else self.a
            return second_moment(a.flatten(0, 2), count)

        output, inputs = Factor(lambda: second_moment(g), True), Factor(of_inputs, False)
        return [inputs, output] if self.layout.kind == "in_out" else [output, inputs]

    def rotated_square_sum(self, bases: Sequence[Tensor]) -> Tensor:
        """Of one group, by rotating its sides."""
        if len(bases) == 1:
            return super().rotated_square_sum(bases)
        columns = self.layout.kind == "in_out"
        outputs, inputs = reversed(bases) if columns else bases
        if self.g.shape[2] == 1:
            shape = torch.Size((len(outputs), len(inputs)))
            squares = Outer(turn(self.a, inputs), turn(self.g, outputs), Layout(shape)).square_sum()
        else:
            squares = self.like.new_zeros(len(outputs), len(inputs))
            for g in self.g:
                matrix = (g.mT @ self.a).flatten(1, 2)
                squares = squares + rotate_columns(matrix, (outputs, inputs)).square().sum(0)
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


def _mean(x: Tensor, counts: Tensor | None, dim: int) -> Tensor:
    """Mean over positions, ``[n, ...]``, of which samples may have different numbers."""
    if counts is None:
        return x.sum(dim, keepdim=True) / max(x.shape[dim], 1)
    shape = [-1] + [1] * (x.dim() - 1)
    return x.sum(dim, keepdim=True) / counts.clamp(min=1).to(x.dtype).reshape(shape)
