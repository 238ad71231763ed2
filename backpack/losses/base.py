"""Loss functions: from a loss to columns ``S`` with ``sum_v S_v S_v^T`` = its Hessian.

Letters: ``v`` columns, ``n`` samples, ``r`` columns of one block, ``c`` classes, ``f`` the model
output, ``y`` targets, ``w`` weights, ``s(f) = 1 / (1 + exp(-f))``.

The Hessian of a loss in the model output ``f`` never mixes samples, and for the losses here it does
not mix positions either (time steps, pixels, outputs of a regression): it consists of blocks. A loss
rule gives a square root of every block at once, ``[r, *f.shape]``; the columns place one block at a
time, so that positions of one sample do not mix.

Monte-Carlo columns are would-be gradients, of targets drawn from the model's likelihood, where their
second moment is that Hessian (Martens, 2014, arXiv:1412.1193: natural parameters); otherwise a
square root of the Hessian times standard normal numbers. Both are unbiased.

Losses that are not listed here are differentiated twice (:func:`differentiate_twice`), among them
those that couple several model outputs (cosine and triplet embedding losses, a Gaussian likelihood
whose variance is an output too). Of a known likelihood (:mod:`backpack.losses.likelihoods`)
Monte-Carlo columns are then those of its Fisher information.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack._torch import reduction_name, shows
from backpack.losses.blocks import HessianBlocks
from backpack.samples.axis import SampleAxis

LossRule = Callable[..., "LossHessian | None"]


LOSSES: dict[Any, LossRule] = {}


def loss_rule(*functions: Any) -> Callable[[LossRule], LossRule]:
    """Register the Hessian of a loss function.

    The rule takes the sample axis of the model output followed by the function's own arguments, the
    model output first, and returns a :class:`LossHessian` (or ``None`` where it does not apply; the
    loss is then differentiated twice). Of PyTorch's deprecated ``size_average`` and ``reduce`` it
    sees only the ``reduction`` they stand for. It is not asked where another argument requires grad
    (targets or variances that are model outputs too), for the Hessian in one output is not all then.
    """

    def register(function: LossRule) -> LossRule:
        @wraps(function)
        def rule(batch: SampleAxis, *args: Any, **kwargs: Any) -> LossHessian | None:
            size_average, reduce = kwargs.pop("size_average", None), kwargs.pop("reduce", None)
            if size_average is not None or reduce is not None:
                kwargs["reduction"] = reduction_name(size_average, reduce, emit_warning=False)
            elif kwargs.get("reduction") == "elementwise_mean":
                kwargs["reduction"] = "mean"
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            if sum(tensor.requires_grad for tensor in tensors) > 1:
                return None
            return function(batch, *args, **kwargs)

        for func in functions:
            LOSSES[func] = rule
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
    batch: SampleAxis
    block: tuple[int, ...]

    @property
    def axes(self) -> list[SampleAxis]:
        """The sample axis of the model output."""
        return [self.batch]

    @abstractmethod
    def root(self) -> Tensor:
        """Square root of all blocks, ``[r, *f.shape]``, without the incoming gradient."""

    def with_minimal_root(self) -> LossHessian:
        """The same Hessian with a root of as few columns as there are."""
        return self

    def blocks(self, grad: Tensor, signed: bool = False) -> HessianBlocks | None:
        """The blocks for the incoming gradient ``grad``, if they are known without columns.

        Args:
            grad: the gradient at the loss.
            signed: whether that may be negative; ``None`` is the answer otherwise, and where the loss
                is not convex for other reasons.
        """
        return None

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        """``count`` random columns with expected outer product the blocks, ``[count, *f.shape]``."""
        root = self.root()
        positions = (1 if d in self.block else size for d, size in enumerate(self.f.shape))
        z = normal_draws((count, len(root), *positions), root, generator)
        return torch.stack([(root * each).sum(0) for each in z])

    def incoming(self, grad: Tensor) -> Tensor:
        """The gradient at the loss value, broadcastable to ``f``."""
        return grad

    def _positions(self) -> tuple[list[int], list[int]]:
        """Sizes of the split layout ``[N, k, *rest]`` and the axes in it that number blocks."""
        rest = [d for d in range(self.f.dim()) if d != self.batch.dim]
        sizes = [self.batch.size, self.batch.width]
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
        if self.count == 0:
            return
        root = self.batch.split(self.root() * incoming_root(self.incoming(grad)), 1)
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
        if self.rank == 0:
            return self.f.new_zeros(count, *self.f.shape)
        return self.draw(count, generator) * (incoming_root(self.incoming(grad)) / count**0.5)


def incoming_root(grad: Tensor) -> Tensor:
    """What columns are multiplied with, for the gradient at the loss."""
    if shows((grad < 0).any()):
        raise ValueError(
            "the loss is not convex in the model output (the gradient that arrives at a term of it is "
            "negative: a loss times a negative number, negative weights or advantages): its "
            "generalized Gauss-Newton has no square root; negate the quantity instead of the loss, or "
            "use its diagonal (DiagGGNExact, BatchDiagGGNExact) or products (GGNMP)"
        )
    return grad.sqrt()


def root_of_curvature(curvature: Tensor) -> Tensor:
    if shows((curvature < 0).any()):
        raise ValueError(
            "the loss is not convex in the model output (targets or weights outside their range?): "
            "its generalized Gauss-Newton has no square root"
        )
    return curvature.sqrt()


def normal_draws(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


def fits_output(f: Tensor, *others: Tensor | None) -> bool:
    """Whether targets and weights do not make the loss larger than the model output."""
    shapes = [other.shape for other in others if other is not None]
    return torch.broadcast_shapes(f.shape, *shapes) == f.shape


def any_negative(*weights: Tensor | None) -> bool:
    """Whether a weight is negative: the loss is then not convex."""
    return any(w is not None and shows((w < 0).any()) for w in weights)


def reduction_scale(reduction: str, shape: torch.Size) -> float:
    return 1.0 / max(shape.numel(), 1) if reduction == "mean" else 1.0


class NoCurvature(LossHessian):
    """No Hessian: a loss that is linear or piecewise linear in the model output."""

    def root(self) -> Tensor:
        return self.f.new_zeros(0, *self.f.shape)

    @property
    def rank(self) -> int:
        return 0
