"""Loss functions: from a loss to columns ``S`` with ``sum_v S_v S_v^T`` = its Hessian.

Letters: ``v`` columns, ``n`` samples, ``r`` columns of one block, ``c`` classes.

The Hessian of a loss in the model output ``f`` never mixes samples, and for the losses here it does
not mix positions either (time steps, pixels, outputs of a regression): it consists of blocks. A loss
rule gives a square root of every block at once, ``[r, *f.shape]``; the columns place one block at a
time, so that positions of one sample do not mix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.batch import Batch

LossRule = Callable[..., "LossHessian | None"]
LOSSES: dict[Any, LossRule] = {}


def loss_rule(*functions: Any) -> Callable[[LossRule], LossRule]:
    """Register the Hessian of a loss function.

    The rule takes the sample axis of the model output followed by the function's own arguments, the
    model output first, and returns a :class:`LossHessian` (or ``None`` where it does not apply; the
    loss is then differentiated twice).
    """

    def register(function: LossRule) -> LossRule:
        for func in functions:
            LOSSES[func] = function
        return function

    return register


@dataclass(frozen=True, eq=False)
class LossHessian(ABC):
    """Hessian of a loss in the model output.

    Attributes:
        f: the model output.
        batch: its sample axis.
        block: axes of ``f`` over which a block extends (the class axis; none if elementwise).
    """

    f: Tensor
    batch: Batch
    block: tuple[int, ...]

    @abstractmethod
    def root(self) -> Tensor:
        """Square root of all blocks, ``[r, *f.shape]``, without the incoming gradient."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        """``count`` random columns with expected outer product the blocks, ``[count, *f.shape]``."""

    def incoming(self, grad: Tensor) -> Tensor:
        """The gradient at the loss value, broadcastable to ``f``."""
        return grad

    def _positions(self) -> tuple[list[int], list[int]]:
        """Sizes of the split layout ``[N, k, *rest]`` and the axes in it that number blocks."""
        rest = [d for d in range(self.f.dim()) if d != self.batch.dim]
        sizes = [self.batch.size, self.batch.outer * self.batch.inner]
        sizes += [self.f.shape[d] for d in rest]
        axes = [1] + [2 + j for j, d in enumerate(rest) if d not in self.block]
        return sizes, axes

    @property
    def count(self) -> int:
        """Number of exact columns per sample: positions times columns of a block."""
        sizes, axes = self._positions()
        return prod(sizes[axis] for axis in axes) * self.rank

    @property
    def rank(self) -> int:
        """Columns of a block."""
        return prod(self.f.shape[d] for d in self.block)

    def columns(self, grad: Tensor, chunk: int) -> Iterator[Tensor]:
        """Exact columns for the incoming gradient ``grad``, ``[<= chunk, *f.shape]`` at a time."""
        root = self.batch.split(self.root() * _sqrt(self.incoming(grad)), 1)
        sizes, axes = self._positions()
        shape = [sizes[axis] for axis in axes]
        blocks = prod(shape)
        if blocks == 1:
            for part in root.split(chunk):
                yield self.batch.join(part, 1)
            return
        for start in range(0, self.count, chunk):
            index = torch.arange(start, min(start + chunk, self.count), device=root.device)
            mask = F.one_hot(index // self.rank, blocks).to(root.dtype)
            mask = mask.reshape(-1, *(sizes[d] if d in axes else 1 for d in range(len(sizes))))
            yield self.batch.join(root[index % self.rank] * mask, 1)

    def sampled(self, grad: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        """``count`` Monte-Carlo columns for the incoming gradient ``grad``."""
        return self.draw(count, generator) * (_sqrt(self.incoming(grad)) / count**0.5)


def _sqrt(weight: Tensor) -> Tensor:
    if bool((weight < 0).any()):
        raise ValueError(
            "the gradient arriving at the loss is negative (a loss times a negative number?): its "
            "generalized Gauss-Newton has no square root; negate the quantity instead of the loss"
        )
    return weight.sqrt()


# --------------------------------------------------------------------------------------
# Cross-entropy


@dataclass(frozen=True, eq=False)
class _Softmax(LossHessian):
    """Blocks ``w (diag(p) - p p^T)`` with ``p = softmax(f)`` and a weight per position."""

    weight: Tensor  # broadcastable to f, class axis of size one
    reduced: bool

    def root(self) -> Tensor:
        dim = self.block[0]
        p = self.f.softmax(dim)
        eye = torch.eye(p.shape[dim], dtype=p.dtype, device=p.device)
        shape = [p.shape[dim] if d == dim else 1 for d in range(p.dim())]
        eye = eye.reshape(-1, *shape)
        root = p.movedim(dim, 0).unsqueeze(dim + 1).sqrt() * (eye - p)
        return root * self.weight.sqrt()

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        dim = self.block[0]
        p = self.f.softmax(dim)
        rows = p.detach().movedim(dim, -1).flatten(0, -2)
        draws = torch.multinomial(rows, count, replacement=True, generator=generator)
        hot = F.one_hot(draws.T, p.shape[dim]).to(p.dtype)
        hot = hot.reshape(count, *p.movedim(dim, -1).shape).movedim(-1, dim + 1)
        return (p - hot) * self.weight.sqrt()

    def incoming(self, grad: Tensor) -> Tensor:
        return grad if self.reduced else grad.unsqueeze(self.block[0])


@loss_rule(F.cross_entropy)
def cross_entropy(
    batch: Batch,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> LossHessian | None:
    if size_average is not None or reduce is not None or input.dim() < 2 or batch.dim == 1:
        return None
    with torch.no_grad():
        classes = input.shape[1]
        per_class = input.new_ones(classes) if weight is None else weight
        if target.is_floating_point():
            smooth = target * (1 - label_smoothing) + label_smoothing / classes
            shape = [classes if d == 1 else 1 for d in range(input.dim())]
            position = (smooth * per_class.reshape(shape)).sum(1)
            total: Any = position.numel()
        else:
            kept = target != ignore_index
            own = per_class[target.where(kept, 0)] * kept
            smooth_weight = label_smoothing / classes * per_class.sum()
            position = own * (1 - label_smoothing) + smooth_weight * kept
            total = own.sum()
        if reduction == "mean":
            position = position / total
    return _Softmax(input, batch, (1,), position.unsqueeze(1), reduction != "none")


# --------------------------------------------------------------------------------------
# Elementwise losses


@dataclass(frozen=True, eq=False)
class _Elementwise(LossHessian):
    """Diagonal Hessian ``second(f)``; ``noise`` draws would-be gradients of unit curvature."""

    second: Callable[[Tensor], Tensor]
    scale: Tensor | float
    noise: Callable[[Tensor, torch.Generator | None], Tensor] | None = None

    def root(self) -> Tensor:
        return (self.second(self.f) * self.scale).sqrt().unsqueeze(0)

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        if self.noise is None:
            draws = [_normal(self.f, generator) for _ in range(count)]
            return torch.stack(draws) * self.root()
        draws = [self.noise(self.f, generator) for _ in range(count)]
        return torch.stack(draws) * torch.as_tensor(self.scale).sqrt()


def _normal(f: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(f.shape, dtype=f.dtype, device=f.device, generator=generator)


def _reduction_scale(reduction: str, shape: torch.Size) -> float:
    return 1.0 / max(shape.numel(), 1) if reduction == "mean" else 1.0


@loss_rule(F.mse_loss)
def mse_loss(
    batch: Batch,
    input: Tensor,
    target: Tensor,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossHessian | None:
    if size_average is not None or reduce is not None:
        return None
    if torch.broadcast_shapes(input.shape, target.shape) != input.shape or weight is not None:
        return None
    scale = _reduction_scale(reduction, input.shape)
    return _Elementwise(input, batch, (), lambda f: torch.full_like(f, 2.0), scale)


@loss_rule(F.binary_cross_entropy_with_logits)
def binary_cross_entropy_with_logits(
    batch: Batch,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> LossHessian | None:
    if size_average is not None or reduce is not None:
        return None
    with torch.no_grad():
        scale = torch.full_like(input, _reduction_scale(reduction, input.shape))
        if pos_weight is not None:
            scale = scale * (1 + (pos_weight - 1) * target)
        if weight is not None:
            scale = scale * weight
    if scale.shape != input.shape:
        return None

    def second(f: Tensor) -> Tensor:
        p = f.sigmoid()
        return p * (1 - p)

    def noise(f: Tensor, generator: torch.Generator | None) -> Tensor:
        p = f.sigmoid()
        return p - torch.bernoulli(p.detach(), generator=generator)

    return _Elementwise(input, batch, (), second, scale, noise)


# --------------------------------------------------------------------------------------
# Any other loss: differentiate it twice

LARGEST_OUTPUT = 4096


@dataclass(frozen=True, eq=False)
class Differentiated(LossHessian):
    """The Hessian blocks of a loss without a rule, one per sample, found by autograd.

    Attributes:
        blocks: square roots, ``[r, *f.shape]``; the incoming gradient is already in them.
    """

    blocks: Tensor

    def root(self) -> Tensor:
        return self.blocks

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        n, r = self.batch.size, len(self.blocks)
        z = torch.randn((count, r, n), dtype=self.f.dtype, device=self.f.device, generator=generator)
        split = self.batch.split(self.blocks, 1)
        return self.batch.join(torch.einsum("crn,rn...->cn...", z, split), 1)

    def _positions(self) -> tuple[list[int], list[int]]:
        return [1], []

    @property
    def rank(self) -> int:
        return len(self.blocks)


def differentiate_twice(gradient: Tensor, edge: Any, batch: Batch) -> Differentiated:
    """Square roots of the per-sample Hessian blocks of a loss, from its gradient's graph.

    Args:
        gradient: gradient of the loss at the model output, differentiable, ``f.shape``.
        edge: the model output's place in the graph.
        batch: the model output's sample axis.

    Raises:
        ValueError: if the output is too large for this, or the loss is not convex in it.
    """
    like = gradient.detach()
    flat = batch.split(gradient).flatten(1)
    size = flat.shape[1]
    if size > LARGEST_OUTPUT:
        raise ValueError(
            f"this loss has no known Hessian, and differentiating it twice for a model output of "
            f"{size} numbers per sample needs that many backward passes; extend a loss module that "
            "has a rule, or register one with loss_rule"
        )
    rows = []
    for c in range(size):
        row = None
        if gradient.requires_grad:
            (row,) = torch.autograd.grad(flat[:, c].sum(), [edge], retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(like) if row is None else row.detach())
    hessian = batch.split(torch.stack(rows), 1).flatten(2).movedim(0, 1)
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    largest = values.abs().amax() if values.numel() else values.sum()
    if bool((values < -1e-6 * largest - torch.finfo(values.dtype).tiny).any()):
        raise ValueError(
            "the loss is not convex in the model output (its Hessian has negative eigenvalues): the "
            "generalized Gauss-Newton has no square root there"
        )
    roots = (vectors * values.clamp(min=0).sqrt().unsqueeze(1)).movedim(2, 0)
    roots = batch.join(roots.reshape(size, *batch.split(like).shape), 1)
    return Differentiated(like, batch, tuple(range(like.dim())), roots)
