"""The two sides of a sum of outer products, and how their product is written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from backpack.forms.base import Positioned, sum_first
from backpack.forms.layout import Layout, Patches
from backpack.forms.limits import ADDED_FROM, BLOCK_BYTES, PATCH_BYTES, STRIP_BYTES, Limit
from backpack.forms.memory import fresh
from backpack.forms.strips import Strips
from backpack.forms.tally import Tally

# On a CPU, products of matrices that are squared at once are written into the same memory each time, up
# to so many bytes of them; all at once if they take no more than the lesser number.
PRODUCT_BYTES, SMALL_BYTES = 2**20, 2**17
# So few numbers are written out by as few calls as can be.
FEW = 2**12

S = TypeVar("S", bound="Sides")


@dataclass(frozen=True, eq=False)
class Sides(Positioned):
    """``G = sum_s g a^T``: a weight matrix that meets its input at ``s`` positions.

    Attributes:
        inputs: ``[n, q, s, i]``, written out or not.
        g: columns at the outputs, ``[v, n, q, s, o]``.
        layout: where the matrix entries are stored in the parameter.
        counts: how many positions each sample has, ``[n]``, where they differ; the rest is zero.
        tally: adds up what is written out piece by piece, if :meth:`total` will be asked for.
        call: the same object for forms of several results of one call: their inputs are counted once.
    """

    inputs: Tensor | Patches
    g: Tensor
    layout: Layout
    counts: Tensor | None = None
    tally: Tally | None = None
    call: object | None = None

    @property
    def adds_up(self) -> bool:
        return self.positions >= ADDED_FROM[self.g.device.type]

    def tallied(self: S) -> S:
        # Of less precise numbers sums are taken by the product, in which they are added up exactly.
        return replace(self, tally=Tally()) if self.g.element_size() >= 4 else self

    @property
    def a(self) -> Tensor:
        """Inputs ``[n, q, s, i]`` written out, in the precision of ``g`` (after autocast)."""
        a = self.inputs.written() if isinstance(self.inputs, Patches) else self.inputs
        return a if a.dtype == self.g.dtype else a.to(self.g.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.layout.shape

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
    def positions(self) -> int:
        """Number of shared positions."""
        return self.g.shape[3]

    @property
    def row_size(self) -> float:
        patches = self.inputs.shape[1:].numel() if isinstance(self.inputs, Patches) else 0
        return self.shape.numel() + patches / max(1, self.columns)

    def take(self: S, columns: slice, samples: slice | Tensor) -> S:
        counts = None if self.counts is None else self.counts[samples]
        return type(self)(self.inputs[samples], self.g[columns][:, samples], self.layout, counts)

    def dense(self) -> Tensor:
        few = self.columns * self.samples * self.shape.numel() <= FEW
        if few or torch.is_grad_enabled():
            return self.layout.store(self._differentiable())
        swapped = self.layout.kind == "in_out"
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
        if self.columns == 1:
            return (self.g[0].mT @ self.a).unsqueeze(0)
        v, n, q, _, o = self.g.shape
        g = self.g.permute(1, 2, 0, 4, 3).reshape(n, q, v * o, self.positions)
        return (g @ self.a).unflatten(2, (v, o)).movedim(2, 0)

    def total(self) -> Tensor:
        if self.tally is not None and self.tally.rows == self.columns * self.samples > 0:
            return self.layout.store(self.tally.total)  # type: ignore[arg-type]
        g = sum_first(self.g).transpose(0, 1).flatten(1, 2)
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

    def _pieces(self: S, limits: Limit) -> Iterator[S]:
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
        first, tally = 0, self.tally
        if tally is not None and tally.rows:
            tally = None  # there is one already
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
                    if tally is not None:
                        tally.add(products, centre)
                    yield v, slice(first + n, first + here.stop), products
            first += piece.samples

    @property
    def _needs_strips(self) -> bool:
        """Whether one sample's product does not fit the memory that is used again."""
        size = self.shape.numel() * self.g.element_size()
        return self.g.shape[2] == 1 and size > STRIP_BYTES["cpu"] and self.layout.kind != "convt"

    def strips(self) -> Strips:
        """The matrix (of one group), of which some rows are written out at a time."""
        a, g = self.a[:, 0].unsqueeze(0), self.g[:, :, 0]
        sides = (a, g) if self.layout.kind == "in_out" else (g, a)
        return Strips(*sides, self.columns)

    def _room_in_tally(self, strips: Strips) -> Tensor | None:
        """Where strips ``[R, C]`` are added up, if that is asked for."""
        if self.tally is None or self.tally.rows:
            return None
        room = self.g.new_zeros(strips.shape)
        self.tally.rows = self.columns * self.samples
        self.tally.total = (room.mT if self.layout.kind == "in_out" else room).unsqueeze(0)
        return room
