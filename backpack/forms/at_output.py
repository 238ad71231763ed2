"""All columns of a loss's Hessian at a layer that makes the loss's input, none of them written out.

Letters: ``v`` columns, ``n`` samples, ``s`` positions, ``o`` outputs of the layer, ``i`` inputs.

There the Jacobian is the identity: at every position the columns ``g_v [o]`` have
``sum_v g_v g_v^T = H`` with ``H`` the position's block of the Hessian, and no two positions share a
column. Sums over all columns are functions of these blocks: of their diagonals, of their sum, of their
diagonals in another basis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from backpack.forms.base import Dense, Factor, Form, Sharing, turn
from backpack.forms.limits import PATCH_BYTES
from backpack.forms.outer import Outer


class BlockSums(Protocol):
    """What is known of the blocks ``H [o, o]`` at all positions."""

    def summed(self) -> Tensor:
        """Their sum, ``[o, o]``; its diagonal, a vector, if that is too large."""

    def rotated(self, basis: Tensor) -> Tensor:
        """``diag(Q^T H Q)`` of each for ``Q [o, k]``; a vector stands for a diagonal matrix.

        Returns:
            Of the shape of the layer's output, with ``k`` in place of ``o``.
        """


@dataclass(frozen=True, eq=False)
class AtOutput(Form):
    """``G`` for all columns of the Hessian at the output of a linear layer; only sums are known.

    Attributes:
        form: that of one column that holds the diagonals of the blocks, ``[1, n, *p]``: an ``Outer``
            of a weight, or ``Dense`` of a bias.
        sums: what is known of the blocks.
        arrange: numbers at the layer's output as the ``g`` of such a form.
    """

    form: Outer | Dense
    sums: BlockSums
    arrange: Callable[[Tensor], Form] = field(repr=False)

    @property
    def shape(self) -> torch.Size:
        return self.form.shape

    @property
    def columns(self) -> int:
        return 1

    @property
    def samples(self) -> int:
        return self.form.samples

    @property
    def like(self) -> Tensor:
        return self.form.like

    def take(self, columns: slice, samples: slice | Tensor) -> Form:
        raise RuntimeError(
            "a quantity asks for single columns of a form, but its class says that it does not; set "
            "its attribute summed = False"
        )

    def dense(self) -> Tensor:
        return self.take(slice(None), slice(None)).dense()

    def total(self) -> Tensor:
        return self.take(slice(None), slice(None)).total()

    def square_sum(self, sign: Tensor | None = None) -> Tensor:
        return self._weighted(self.form)

    def square_sum_per_sample(self, sign: Tensor | None = None) -> Tensor:
        if isinstance(self.form, Dense):
            return self.form.values[0]
        parts = [
            self.form.layout.store(piece.g[0].mT @ piece.a.square())
            for piece in self.form._pieces(PATCH_BYTES)
        ]
        return torch.cat(parts)

    def squared_norms(self) -> Tensor:
        if isinstance(self.form, Dense):
            return self.form.values[0].sum(1)
        parts = [
            (piece.g[0].sum(3) * piece.a.square().sum(3)).sum((1, 2))
            for piece in self.form._pieces(PATCH_BYTES)
        ]
        return torch.cat(parts)

    def kronecker(self, sharing: Sharing = None) -> list[Factor]:
        """As of the columns: ``B`` is the sum of all blocks, however positions are shared."""
        output = Factor(lambda: self.sums.summed().to(self.like.dtype), True)
        if isinstance(self.form, Dense) or len(self.shape) == 1:
            return [output]
        outer = self.form
        inputs = next(factor for factor in outer.kronecker(sharing) if not factor.grows)
        return [inputs, output] if outer.layout.kind == "in_out" else [output, inputs]

    def rotated_square_sum(self, bases: Sequence[Tensor]) -> Tensor:
        if isinstance(self.form, Dense):
            rotated = self.arrange(self.sums.rotated(bases[0])[None])
            return rotated.total().reshape(-1)
        swapped = self.form.layout.kind == "in_out"
        outputs, inputs = reversed(bases) if swapped else bases
        rotated = self.arrange(self.sums.rotated(outputs)[None])
        assert isinstance(rotated, Outer)
        g, a = rotated.g[0].flatten(0, 2), turn(rotated.a, inputs).flatten(0, 2)
        squares = g.mT @ a.square()
        return squares.mT if swapped else squares

    def _weighted(self, form: Outer | Dense) -> Tensor:
        """``sum_{n,s} d a^2`` for the diagonals ``d``."""
        if isinstance(form, Dense):
            return form.values.sum((0, 1))
        total: Tensor | None = None
        for piece in form._pieces(PATCH_BYTES):
            part = piece.g[0].flatten(0, 2).mT @ piece.a.flatten(0, 2).square()
            total = part if total is None else total + part
        assert total is not None
        return form.layout.store(total.unsqueeze(0))
