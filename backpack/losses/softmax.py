"""Losses that couple classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack._torch import shows
from backpack.losses.base import LossHessian, NoCurvature, any_negative, loss_rule, root_of_curvature
from backpack.losses.blocks import HessianBlocks
from backpack.samples.axis import SampleAxis


@dataclass(frozen=True, eq=False)
class _Softmax(LossHessian):
    """Blocks ``w (diag(p) - p p^T)`` with ``p = softmax(f)`` and a weight per position."""

    weight: Tensor  # broadcastable to f, class axis of size one
    reduced: bool
    triangular: bool = False

    def with_minimal_root(self) -> LossHessian:
        # The diagonal of the triangular root is no smooth function where a probability vanishes.
        return self if torch.is_grad_enabled() else replace(self, triangular=True)

    @property
    def rank(self) -> int:
        return super().rank - self.triangular

    def root(self) -> Tensor:
        dim = self.block[0]
        if self.triangular:
            return self._triangular(self.f.softmax(dim).movedim(dim, 0), dim) * root_of_curvature(
                self.weight
            )
        log_p = self.f.log_softmax(dim)
        p = log_p.exp()
        eye = torch.eye(p.shape[dim], dtype=p.dtype, device=p.device)
        shape = [p.shape[dim] if d == dim else 1 for d in range(p.dim())]
        eye = eye.reshape(-1, *shape)
        root = (log_p / 2).exp().movedim(dim, 0).unsqueeze(dim + 1) * (eye - p)
        return root * root_of_curvature(self.weight)

    def blocks(self, grad: Tensor, signed: bool = False) -> HessianBlocks | None:
        grad = self.incoming(grad)
        if shows((self.weight < 0).any()) or not (signed or shows((grad >= 0).all(), True)):
            return None
        dim = self.block[0]
        weight = (self.weight * grad).expand(self.f.select(dim, 0).unsqueeze(dim).shape)
        return HessianBlocks.of_softmax(self.f, weight, dim)

    def _triangular(self, p: Tensor, dim: int) -> Tensor:
        """``diag(p) - p p^T`` has rank ``C - 1`` and the Cholesky factor (Tanabe, Sagae, 1992).

        ``L_jj = sqrt(p_j q_j / q_{j-1})``, ``L_ij = -p_i sqrt(p_j / (q_j q_{j-1}))`` for ``i > j``,
        ``q_j = sum_{k > j} p_k``.
        """
        below = p.flip(0).cumsum(0).flip(0)  # q_{j-1}
        q, p_j, tiny = below[1:], p[:-1], torch.finfo(p.dtype).tiny
        share = (p_j / below[:-1].clamp(min=tiny)).sqrt()
        later = p.unsqueeze(0) * (share / q.clamp(min=tiny).sqrt()).unsqueeze(1)
        columns = torch.arange(len(p), device=p.device)
        columns = columns.reshape(1, -1, *(1 for _ in p.shape[1:]))
        rows = columns[:, :-1].transpose(0, 1)
        root = torch.where(columns > rows, -later, 0)
        root = torch.where(columns == rows, (share * q.sqrt()).unsqueeze(1), root)
        return root.movedim(1, dim + 1)

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        dim = self.block[0]
        p = self.f.softmax(dim)
        rows = p.movedim(dim, -1)
        flat = rows.flatten(0, -2)
        draws = torch.multinomial(flat.detach(), count, replacement=True, generator=generator)
        places = draws.T.unsqueeze(2)
        columns = flat.expand(count, *flat.shape).scatter_add(
            2, places, p.new_full((), -1).expand_as(places)
        )
        return columns.reshape(count, *rows.shape).movedim(-1, dim + 1) * root_of_curvature(self.weight)

    def incoming(self, grad: Tensor) -> Tensor:
        return grad if self.reduced else grad.unsqueeze(self.block[0])


def softmax(f: Tensor, batch: SampleAxis, dim: int) -> LossHessian:
    """The Hessian of ``-log p_c`` for any class: ``diag(p) - p p^T`` over an axis of ``f``."""
    return _Softmax(
        f, batch, (dim,), f.new_ones(()).expand(f.select(dim, 0).unsqueeze(dim).shape), True
    )


@loss_rule(F.cross_entropy)
def cross_entropy(
    batch: SampleAxis,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> LossHessian | None:
    """``H = w (diag(p) - p p^T)`` at every position, ``p = softmax(f)``; ``w`` sums to 1 for "mean".

    ``w`` is the weight of the position's class, ``sum_c w_c y_c`` for soft targets and smoothed
    labels, 0 if ignored. "mean" divides by the sum of the labels' class weights, or by the number of
    positions for soft targets. Draws: labels from the categorical distribution ``p``.
    """
    if input.dim() < 2 or batch.dim == 1 or any_negative(weight):
        return None
    with torch.no_grad():
        classes = input.shape[1]
        per_class = input.new_ones(()).expand(classes) if weight is None else weight
        if target.is_floating_point():
            smooth = target * (1 - label_smoothing) + label_smoothing / classes
            shape = [classes if d == 1 else 1 for d in range(input.dim())]
            position = (smooth * per_class.reshape(shape)).sum(1)
            total: Any = position.numel()
        elif weight is None and not label_smoothing:
            position = (target != ignore_index).to(input.dtype)
            total = position.sum()
        else:
            kept = target != ignore_index
            own = per_class[target.where(kept, 0)] * kept
            smooth_weight = label_smoothing / classes * per_class.sum()
            position = own * (1 - label_smoothing) + smooth_weight * kept
            total = own.sum()
        if reduction == "mean":
            position = position / total
    return _Softmax(input, batch, (1,), position.unsqueeze(1), reduction != "none")


@dataclass(frozen=True, eq=False)
class _SquaredMargins(LossHessian):
    """Blocks ``sum_c w_c (e_c - e_y)(e_c - e_y)^T``."""

    weight: Tensor  # of f's shape, 0 for the class y itself and where the margin is kept
    target: Tensor
    reduced: bool

    def root(self) -> Tensor:
        own = F.one_hot(self.target, self.f.shape[1]).to(self.f.dtype)
        each = torch.eye(self.f.shape[1], dtype=self.f.dtype, device=self.f.device).unsqueeze(1)
        return (each - own) * self.weight.sqrt().T.unsqueeze(2)

    def incoming(self, grad: Tensor) -> Tensor:
        return grad if self.reduced else grad.unsqueeze(1)


@loss_rule(F.multi_margin_loss)
def multi_margin_loss(
    batch: SampleAxis,
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> LossHessian | None:
    """Zero for ``p = 1``; ``H = 2 w_y / C sum_c (e_c - e_y)(e_c - e_y)^T`` for ``p = 2``.

    The sum is over classes ``c != y`` with ``f_y - f_c < margin``. "mean" divides by ``N``.
    """
    if p == 1:
        return NoCurvature(input, batch, ())
    if input.dim() != 2 or batch.dim != 0 or any_negative(weight):
        return None
    with torch.no_grad():
        own = input.gather(1, target.unsqueeze(1))
        active = (margin - own + input > 0).to(input.dtype).scatter(1, target.unsqueeze(1), 0)
        scale = active * (2 / input.shape[1])
        if weight is not None:
            scale = scale * weight[target].unsqueeze(1)
        if reduction == "mean":
            scale = scale / len(input)
    return _SquaredMargins(input, batch, (1,), scale, target, reduction != "none")
