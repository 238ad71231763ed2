"""Rows of a table: embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isqrt

import torch
from torch import Tensor

from backpack._torch import has_values
from backpack.forms.base import (
    LARGEST_FACTOR,
    Factor,
    Form,
    Positioned,
    Sharing,
    Tile,
    bin_counts,
    by_tiles,
    second_moment,
    turn,
)
from backpack.forms.memory import fresh_zeros


@dataclass(frozen=True, eq=False)
class Lookup(Positioned):
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
    def columns(self) -> int:
        return self.g.shape[0]

    @property
    def samples(self) -> int:
        return self.g.shape[1]

    @property
    def like(self) -> Tensor:
        return self.g

    @property
    def read(self) -> Tensor:
        """``g`` at the positions that read the table, zero at others, also where it is not finite."""
        return self.g if self.reads is None else self.g.masked_fill(~self.reads.unsqueeze(-1), 0)

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

    def touched(self) -> tuple[Tensor, Tensor]:
        """Rows each sample reads, duplicates summed: sorted ``n * rows + row [u]``, ``g [v, u, d]``."""
        samples = torch.arange(self.samples, device=self.index.device).unsqueeze(1)
        keys = samples * self.shape[0] + self.index
        if not has_values(keys):  # as many as there may be
            return keys.flatten(), self.read.flatten(1, 2)
        unique, inverse = torch.unique(keys.flatten(), return_inverse=True)
        g = self.g.new_zeros(self.columns, len(unique), self.shape[1])
        return unique, g.index_add_(1, inverse, self.read.flatten(1, 2))

    def _touched(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same as ``(sample [u], row [u], g [v, u, d])``."""
        keys, g = self.touched()
        return keys // self.shape[0], keys % self.shape[0], g

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
        return by_tiles(self, other, max(rows, 1), Lookup.take_tile, _same_rows)

    def take_tile(self, tile: Tile) -> Lookup:
        """Some columns and samples."""
        return self.take(*tile)

    def histogram(self, edges: Tensor) -> Tensor:
        """Rows that are not read are zero."""
        g = self._touched()[2]
        zeros = self.columns * self.samples * self.shape.numel() - g.numel()
        return bin_counts(g, edges) + zeros * bin_counts(g.new_zeros(1), edges)

    def total(self) -> Tensor:
        g = self.read.sum(0).flatten(0, 1)
        return g.new_zeros(self.shape).index_add(0, self.index.flatten(), g)

    def square_sum(self, sign: Tensor | None = None) -> Tensor:
        samples, rows, g = self._touched()
        squares = g * g if sign is None else g * g * sign[:, samples].unsqueeze(-1)
        return g.new_zeros(self.shape).index_add(0, rows, squares.sum(0))

    def centred_square_sum(self) -> tuple[Tensor | None, Tensor]:
        """About the first sample's gradient, at the rows that are read; at others all are zero."""
        if not self.samples:
            return None, self.g.new_zeros(self.shape)
        samples, rows, g = self._touched()
        first = samples == 0
        centre = g.new_zeros(self.shape).index_add(0, rows[first], g[0, first])
        reads = g.new_zeros(self.shape[0]).index_add(0, rows, g.new_ones(rows.shape))
        elsewhere = self.columns * (self.samples - reads[rows[first]])
        squares = g.new_zeros(self.shape).index_add(0, rows, (g - centre[rows]).square().sum(0))
        zeros = elsewhere.unsqueeze(1) * g[0, first].square()
        return centre, squares.index_add(0, rows[first], zeros)

    def squared_norms(self) -> Tensor:
        samples, _, g = self._touched()
        return g.new_zeros(self.samples).index_add(0, samples, (g * g).sum((0, 2)))

    def kronecker(self, sharing: Sharing = None) -> list[Factor]:
        """As for a matrix that multiplies one-hot vectors, which are zero where the table is not read.

        ``[A, B]``, ``A`` the row frequencies: a vector, which stands for a diagonal matrix, if the
        table has more than :data:`~backpack.forms.base.LARGEST_FACTOR` rows. With ``"reduce"``, where
        ``A`` is not diagonal, its diagonal then.
        """
        large = self.shape[0] > LARGEST_FACTOR
        g = (self.g.flatten(1, 2) if sharing == "expand" else self.g.sum(2)).flatten(0, 1)
        ones = self.g.new_ones(self.index.shape) if self.reads is None else self.reads.to(g.dtype)
        output = Factor(lambda: second_moment(g), True)
        if sharing == "reduce" and large:
            return [Factor(self._reduced_frequencies, False), output]
        if sharing == "reduce":
            a = g.new_zeros(self.samples, self.shape[0]).scatter_add(1, self.index, ones)
            sizes = self.index.shape[1] if self.counts is None else self.counts.unsqueeze(1)
            a = a / torch.as_tensor(sizes, device=g.device).clamp(min=1)
            return [
                Factor(lambda: a.mT @ a / max(self.samples, 1), False),
                output,
            ]
        counts = g.new_zeros(self.shape[0]).index_add(0, self.index.flatten(), ones.flatten())
        count = max(self.all_positions, 1) if sharing == "expand" else max(self.samples, 1)
        frequencies = counts / count
        return [Factor(lambda: frequencies if large else torch.diag(frequencies), False), output]

    def _reduced_frequencies(self) -> Tensor:
        """``1/N sum_n (mean_s a)^2``, without a table for each sample."""
        ones = self.g.new_ones(self.index.shape) if self.reads is None else self.reads.to(self.g.dtype)
        sizes = self.index.shape[1] if self.counts is None else self.counts.unsqueeze(1)
        ones = ones / torch.as_tensor(sizes, device=self.g.device).clamp(min=1)
        one = Lookup(self.index, ones.reshape(1, *ones.shape, 1), torch.Size((self.shape[0], 1)))
        _, rows, shares = one._touched()
        squares = shares[0, :, 0].square() / max(self.samples, 1)
        return self.g.new_zeros(self.shape[0]).index_add(0, rows, squares)

    def rotated_square_sum(self, bases: Sequence[Tensor]) -> Tensor:
        """With rows that stay what they are, by those that are read."""
        if len(bases) != 2 or bases[0].dim() != 1:
            return super().rotated_square_sum(bases)
        samples, rows, g = self._touched()
        squares = turn(g, bases[1]).square().sum(0)
        table = squares.new_zeros(len(bases[0]), squares.shape[1]).index_add(0, rows, squares)
        return table * bases[0].square().unsqueeze(1)


def _same_rows(left: Lookup, right: Lookup) -> Tensor:
    """``sum_{s,t} [index_s = index_t] (g_s . g_t)``, shape ``[v, n, w, m]``."""
    same = left.index[:, :, None, None, None] == right.index
    products = left.read.flatten(0, 2) @ right.read.flatten(0, 2).mT
    products = products.unflatten(1, right.g.shape[:3]).unflatten(0, left.g.shape[:3])
    return (products * same.to(products.dtype)).sum((2, 5))
