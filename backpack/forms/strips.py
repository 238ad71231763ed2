"""Squares of matrices too large to be written out sample by sample: some of their rows at a time.

Such a matrix is ``M[v, n] = left^T right + rows of a table``: a weight that meets inputs, and a weight
that is an embedding too (the tied head of a language model). Letters: ``R`` rows, ``C`` columns of it,
``u`` rows of the table that single samples have read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from backpack.forms.limits import STRIP_BYTES


@dataclass(frozen=True)
class Read:
    """Rows of a table that samples have read, in the order of :attr:`keys`.

    Attributes:
        keys: ``n * R + row`` of each, increasing, ``[u]``.
        g: what is added to it, ``[v, u, C]``.
    """

    keys: Tensor
    g: Tensor


@dataclass(frozen=True)
class Strips:
    """``M [v, n, R, C]``, of which a strip of rows is written out at a time.

    Attributes:
        left: ``[v, n, s, R]``, or ``[1, n, s, R]``, the same for all columns.
        right: ``[v, n, s, C]``, or ``[1, n, s, C]``.
        columns: how many columns there are.
        read: rows that are added.
    """

    left: Tensor
    right: Tensor
    columns: int
    read: Read | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """``R, C``."""
        return self.left.shape[3], self.right.shape[3]

    def _ranges(self) -> list[slice]:
        """The rows of each strip."""
        rows, columns = self.shape
        limit = STRIP_BYTES[self.left.device.type]
        step = max(1, limit // max(1, columns * self.left.element_size()))
        return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]

    def _of(self, v: int, n: int, rows: slice) -> tuple[Tensor, Tensor]:
        left, right = self.left, self.right
        return left[min(v, len(left) - 1), n, :, rows].mT, right[min(v, len(right) - 1), n]

    def _places(self, ranges: list[slice]) -> list[list[int]]:
        """Where the rows that each sample has read in each strip begin, and where the last ones end."""
        if self.read is None:
            return []
        starts = torch.tensor([rows.start for rows in ranges] + [self.shape[0]])
        grid = torch.arange(self.samples).unsqueeze(1) * self.shape[0] + starts
        return torch.searchsorted(self.read.keys, grid.to(self.read.keys.device)).tolist()

    def _add_read(self, product: Tensor, v: int, first: int, here: slice) -> None:
        """Add rows that were read, to a strip whose first row has that key."""
        assert self.read is not None
        if here.start < here.stop:
            product.index_add_(0, self.read.keys[here] - first, self.read.g[v, here])

    def _centred(
        self, centres: Tensor | None, total: Tensor | None = None
    ) -> Iterator[tuple[slice, int, int, Tensor]]:
        """Rows, column, sample and ``M - centre`` there (without centres ``M``), in the same memory.

        Args:
            centres: where the first sample's first column, which is the centre, is written.
            total: where ``M - centre`` is added up.
        """
        ranges = self._ranges()
        places = self._places(ranges)
        memory = self.left.new_empty(ranges[0].stop if ranges else 0, self.shape[1])
        for j, rows in enumerate(ranges):
            centre = None if centres is None else centres[rows]
            for n, v in itertools.product(range(self.samples), range(self.columns)):
                left, right = self._of(v, n, rows)
                first = centre is not None and v == n == 0
                product = centre if centre is not None and first else memory[: rows.stop - rows.start]
                if centre is None or first:
                    torch.mm(left, right, out=product)
                else:
                    torch.addmm(centre, left, right, beta=-1, out=product)
                if places:
                    key = n * self.shape[0] + rows.start
                    self._add_read(product, v, key, slice(*places[n][j : j + 2]))
                if first:
                    continue
                if total is not None:
                    total[rows] += product
                yield rows, v, n, product

    def square_sum(self, sign: Tensor | None = None, total: Tensor | None = None) -> Tensor:
        """``sum_{v,n} sign_{vn} M^2``, ``[R, C]``; ``sum_{v,n} M`` is added to ``total``."""
        result = self.left.new_zeros(self.shape)
        signs = None if sign is None else sign.tolist()
        for rows, v, n, product in self._centred(None, total):
            value = 1 if signs is None else signs[v][n]
            result[rows].addcmul_(product, product, value=value)
        return result

    def centred_square_sum(self, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The first sample's first ``M``, and ``sum_{v,n} (M - that)^2``, each ``[R, C]``.

        ``sum_{v,n} M`` is added to ``total``.
        """
        centre, result = self.left.new_zeros(self.shape), self.left.new_zeros(self.shape)
        for rows, _, _, product in self._centred(centre, total):
            result[rows].addcmul_(product, product)
        if total is not None:
            total.add_(centre, alpha=self.columns * self.samples)
        return centre, result

    def squared_norms(self) -> Tensor:
        """``sum_{v,R,C} M^2``, ``[n]``."""
        norms = self.left.new_zeros(self.samples)
        for _, _, n, product in self._centred(None):
            norms[n] += torch.linalg.vector_norm(product).square()
        return norms
