"""A loss's Hessian by its blocks, without columns: what their sums need.

Letters: ``f`` the input of the loss, ``c`` classes, ``R`` positions of all samples together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from backpack.forms.base import LARGEST_FACTOR
from backpack.forms.products import gram


@dataclass(frozen=True, eq=False)
class HessianBlocks:
    """All blocks of a Hessian: ``w (diag(p) - p p^T)`` over an axis of classes, or single numbers.

    Attributes:
        diagonal: of the Hessian, ``[*f.shape]``.
        dim: the axis of classes; ``None``: each entry is a block by itself.
        p: probabilities, ``[*f.shape]``, if there are classes.
        weight: of each position, as ``f`` with one class.
    """

    diagonal: Tensor
    dim: int | None = None
    p: Tensor | None = None
    weight: Tensor | None = None

    @staticmethod
    def of_softmax(f: Tensor, weight: Tensor, dim: int) -> HessianBlocks:
        """Of ``w (diag(p) - p p^T)``, ``p = softmax(f)``.

        Nothing cancels: one minus the largest probability is the sum of the others.
        """
        p = (f.float() if f.dtype in (torch.float16, torch.bfloat16) else f).softmax(dim)
        others = _others(p, dim)
        return HessianBlocks(
            weight * p * (1 - p).where(others == p, others.sum(dim, keepdim=True)), dim, p, weight
        )

    @property
    def classes(self) -> int:
        """Rows of a block."""
        return 1 if self.dim is None else self.diagonal.shape[self.dim]

    def _rows(self, x: Tensor) -> Tensor:
        assert self.dim is not None
        return x.movedim(self.dim, -1).reshape(-1, x.shape[self.dim])

    @cached_property
    def _rooted(self) -> Tensor:
        """``sqrt(w) p``, ``[R, c]``."""
        assert self.p is not None and self.weight is not None
        return self._rows(self.p) * self._rows(self.weight).sqrt()

    def summed(self) -> Tensor:
        """Of blocks over classes the sum, ``[c, c]``; if that is too large its diagonal, ``[c]``."""
        diagonal = self._rows(self.diagonal).sum(0)
        if self.classes > LARGEST_FACTOR:
            return diagonal
        if torch.is_grad_enabled():  # a root is not smooth at zero
            assert self.p is not None and self.weight is not None
            p = self._rows(self.p)
            return -((p * self._rows(self.weight)).mT @ p).diagonal_scatter(-diagonal)
        total = -gram(self._rooted)
        total.diagonal().copy_(diagonal)
        return total

    def rotated(self, basis: Tensor) -> Tensor:
        """``diag(Q^T H Q)`` of each block, for ``Q [c, k]``, as ``f`` with ``k`` classes.

        The variance of the rows of ``Q`` with probabilities ``p``, about the row of the largest one, so
        that nothing cancels where that is nearly one.
        """
        assert self.p is not None and self.weight is not None and self.dim is not None
        if basis.dim() == 1:
            shape = [-1 if d == self.dim else 1 for d in range(self.diagonal.dim())]
            return self.diagonal * basis.square().reshape(shape)
        p, weight = self._rows(self.p), self._rows(self.weight)
        others, centre = _others(p, 1), basis[p.argmax(1)]
        mean, rest = others @ basis, others.sum(1, keepdim=True)
        squares = others @ basis.square() - 2 * centre * mean + rest * centre.square()
        found = weight * (squares - (mean - rest * centre).square()).clamp(min=0)
        shape = list(self.diagonal.shape)
        shape.append(shape.pop(self.dim))
        return found.reshape(*shape[:-1], basis.shape[1]).movedim(-1, self.dim)


def _others(p: Tensor, dim: int) -> Tensor:
    """``p`` without its largest entry."""
    return p.scatter(dim, p.argmax(dim, keepdim=True), 0)
