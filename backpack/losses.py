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
whose variance is an output too).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from backpack.batch import Batch
from backpack.factors import spectrum

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
        def rule(batch: Batch, *args: Any, **kwargs: Any) -> LossHessian | None:
            size_average, reduce = kwargs.pop("size_average", None), kwargs.pop("reduce", None)
            if size_average is not None or reduce is not None:
                kwargs["reduction"] = legacy_get_string(size_average, reduce, emit_warning=False)
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
    batch: Batch
    block: tuple[int, ...]

    @property
    def axes(self) -> list[Batch]:
        """The sample axis of the model output."""
        return [self.batch]

    @abstractmethod
    def root(self) -> Tensor:
        """Square root of all blocks, ``[r, *f.shape]``, without the incoming gradient."""

    def fewest(self) -> LossHessian:
        """The same Hessian with a root of as few columns as there are."""
        return self

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        """``count`` random columns with expected outer product the blocks, ``[count, *f.shape]``."""
        root = self.root()
        positions = (1 if d in self.block else size for d, size in enumerate(self.f.shape))
        z = _normal((count, len(root), *positions), root, generator)
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
        root = self.batch.split(self.root() * _incoming_root(self.incoming(grad)), 1)
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
        return self.draw(count, generator) * (_incoming_root(self.incoming(grad)) / count**0.5)


def signed_columns(
    loss: LossHessian | Differentiated, grad: Tensor, chunk: int, signed: bool
) -> Iterator[tuple[Sequence[Tensor], Tensor | None]]:
    """Exact columns at every model output, with the signs ``[v, n]`` that their squares count with.

    Args:
        loss: the Hessian, which may be indefinite if it was differentiated twice.
        grad: the gradient at the loss, which may be negative.
        chunk: number of columns at a time.
        signed: whether signs are wanted; without them an indefinite Hessian is an error.

    Yields:
        ``[<= chunk, *output.shape]`` for every output, and signs (``None``: all positive).
    """
    if isinstance(loss, Differentiated):
        signs = loss.signs.split(chunk) if loss.signs is not None and signed else None
        root = replace(loss, signs=None) if signed else loss
        for j, parts in enumerate(root.columns(grad, chunk)):
            yield parts, None if signs is None else signs[j]
    elif signed and bool((grad < 0).any()):
        for part, sign in ((grad, 1.0), (-grad, -1.0)):
            for columns in loss.columns(part.clamp(min=0), chunk):
                yield [columns], columns.new_full((len(columns), loss.batch.size), sign)
    else:
        yield from (([columns], None) for columns in loss.columns(grad, chunk))


def _incoming_root(grad: Tensor) -> Tensor:
    if bool((grad < 0).any()):
        raise ValueError(
            "the gradient arriving at the loss is negative (a loss times a negative number?): its "
            "generalized Gauss-Newton has no square root; negate the quantity instead of the loss, or "
            "use its diagonal (DiagGGNExact) or products (GGNMP)"
        )
    return grad.sqrt()


def _root(curvature: Tensor) -> Tensor:
    if bool((curvature < 0).any()):
        raise ValueError(
            "the loss is not convex in the model output (targets or weights outside their range?): "
            "its generalized Gauss-Newton has no square root"
        )
    return curvature.sqrt()


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


def _fits(f: Tensor, *others: Tensor | None) -> bool:
    """Whether targets and weights do not make the loss larger than the model output."""
    shapes = [other.shape for other in others if other is not None]
    return torch.broadcast_shapes(f.shape, *shapes) == f.shape


def _negative(*weights: Tensor | None) -> bool:
    """Whether a weight is negative: the loss is then not convex."""
    return any(w is not None and bool((w < 0).any()) for w in weights)


# --------------------------------------------------------------------------------------
# Losses that couple classes


@dataclass(frozen=True, eq=False)
class _Softmax(LossHessian):
    """Blocks ``w (diag(p) - p p^T)`` with ``p = softmax(f)`` and a weight per position."""

    weight: Tensor  # broadcastable to f, class axis of size one
    reduced: bool
    triangular: bool = False

    def fewest(self) -> LossHessian:
        # The diagonal of the triangular root is no smooth function where a probability vanishes.
        return self if torch.is_grad_enabled() else replace(self, triangular=True)

    @property
    def rank(self) -> int:
        return super().rank - self.triangular

    def root(self) -> Tensor:
        dim = self.block[0]
        if self.triangular:
            return self._triangular(self.f.softmax(dim).movedim(dim, 0), dim) * _root(self.weight)
        log_p = self.f.log_softmax(dim)
        p = log_p.exp()
        eye = torch.eye(p.shape[dim], dtype=p.dtype, device=p.device)
        shape = [p.shape[dim] if d == dim else 1 for d in range(p.dim())]
        eye = eye.reshape(-1, *shape)
        root = (log_p / 2).exp().movedim(dim, 0).unsqueeze(dim + 1) * (eye - p)
        return root * _root(self.weight)

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
        return columns.reshape(count, *rows.shape).movedim(-1, dim + 1) * _root(self.weight)

    def incoming(self, grad: Tensor) -> Tensor:
        return grad if self.reduced else grad.unsqueeze(self.block[0])


@loss_rule(F.cross_entropy)
def cross_entropy(
    batch: Batch,
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
    if input.dim() < 2 or batch.dim == 1 or _negative(weight):
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
    batch: Batch,
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
        return _Zero(input, batch, ())
    if input.dim() != 2 or batch.dim != 0 or _negative(weight):
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


# --------------------------------------------------------------------------------------
# Losses of single entries


@dataclass(frozen=True, eq=False)
class _Elementwise(LossHessian):
    """Diagonal Hessian ``scale * second(f)``.

    Attributes:
        second: second derivative of one entry's loss.
        scale: weights and the reduction's factor, broadcastable to ``f``.
        noise: draws would-be gradients whose expected square is ``second(f)``.
        axis: axis of ``f`` over which the loss is summed even if not reduced.
    """

    second: Callable[[Tensor], Tensor]
    scale: Tensor | float
    noise: Callable[[Tensor, torch.Generator | None], Tensor] | None = None
    axis: int | None = None

    def _scale_root(self) -> Tensor | float:
        return _root(self.scale).to(self.f) if isinstance(self.scale, Tensor) else self.scale**0.5

    def root(self) -> Tensor:
        return (_root(self.second(self.f)) * self._scale_root()).unsqueeze(0)

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        if self.noise is None:
            return super().draw(count, generator)
        draws = [self.noise(self.f, generator) for _ in range(count)]
        return torch.stack(draws) * self._scale_root()

    def incoming(self, grad: Tensor) -> Tensor:
        return grad if self.axis is None or grad.dim() == 0 else grad.unsqueeze(self.axis)


def elementwise(
    f: Tensor,
    batch: Batch,
    second: Callable[[Tensor], Tensor],
    scale: Tensor | float = 1.0,
    noise: Callable[[Tensor, torch.Generator | None], Tensor] | None = None,
) -> LossHessian:
    """The Hessian of a loss that acts on each entry of the model output by itself.

    Args:
        f: the model output.
        batch: its sample axis.
        second: second derivative of one entry's loss.
        scale: weights and the reduction's factor, broadcastable to ``f``.
        noise: draws would-be gradients whose expected square is ``second(f)``; default standard normal
            numbers times its root.
    """
    return _Elementwise(f, batch, (), second, scale, noise)


def _reduction_scale(reduction: str, shape: torch.Size) -> float:
    return 1.0 / max(shape.numel(), 1) if reduction == "mean" else 1.0


def _logistic(f: Tensor) -> Tensor:
    return f.sigmoid() * (-f).sigmoid()  # not p (1 - p), which cancels


def _logistic_noise(f: Tensor, generator: torch.Generator | None) -> Tensor:
    p = f.sigmoid()
    return p - torch.bernoulli(p.detach(), generator=generator)


@loss_rule(F.mse_loss)
def mse_loss(
    batch: Batch,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossHessian | None:
    """``H = 2 w``; "mean" divides by the number of entries, or by ``sum w`` if there are weights.

    Draws: targets from a normal distribution around ``f`` with variance 1/2.
    """
    if not _fits(input, target, weight) or _negative(weight):
        return None
    scale: Tensor | float = _reduction_scale(reduction, input.shape)
    if weight is not None:
        scale = weight / weight.sum() if reduction == "mean" else weight
    return _Elementwise(input, batch, (), lambda f: torch.full_like(f, 2.0), scale)


@loss_rule(F.gaussian_nll_loss)
def gaussian_nll_loss(
    batch: Batch,
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> LossHessian | None:
    """``H = 1 / max(var, eps)`` for given variances; "mean" divides by the number of entries.

    Where the variances depend on the model, they are a model output as well, and the loss is
    differentiated twice (it is not convex in both). Draws: targets from ``Normal(f, var)``.
    """
    variance = torch.as_tensor(var, dtype=input.dtype, device=input.device)
    if variance.dim() and variance.shape == input.shape[:-1] != input.shape:
        variance = variance.unsqueeze(-1)
    if not _fits(input, target, variance):
        return None
    scale = _reduction_scale(reduction, input.shape) / variance.clamp(min=eps)
    return _Elementwise(input, batch, (), torch.ones_like, scale)


@loss_rule(F.poisson_nll_loss)
def poisson_nll_loss(
    batch: Batch,
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    eps: float = 1e-8,
    reduction: str = "mean",
) -> LossHessian | None:
    """``H = exp(f)``, or ``y / (f + eps)^2`` without ``log_input``; "mean" divides by the entries.

    Draws with ``log_input``: counts from ``Poisson(exp(f))``. Without it the Hessian depends on the
    targets, and drawn ones would have another one on average: normal numbers then.
    """
    if not _fits(input, target):
        return None
    scale = _reduction_scale(reduction, input.shape)
    if not log_input:
        return _Elementwise(input, batch, (), lambda f: target / (f + eps) ** 2, scale)

    def noise(f: Tensor, generator: torch.Generator | None) -> Tensor:
        rate = f.exp()
        return rate - torch.poisson(rate.detach(), generator=generator)

    return _Elementwise(input, batch, (), torch.exp, scale, noise)


@loss_rule(F.binary_cross_entropy_with_logits)
def binary_cross_entropy_with_logits(
    batch: Batch,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> LossHessian | None:
    """``H = w (pos_weight y + 1 - y) s(f) s(-f)``; "mean" divides by the number of entries.

    Draws: labels from the Bernoulli distribution ``s(f)``.
    """
    if not _fits(input, target, weight, pos_weight) or _negative(weight, pos_weight):
        return None
    with torch.no_grad():
        scale: Tensor | float = _reduction_scale(reduction, input.shape)
        if pos_weight is not None:
            scale = scale * (1 + (pos_weight - 1) * target)
        if weight is not None:
            scale = scale * weight
    return _Elementwise(input, batch, (), _logistic, scale, _logistic_noise)


@loss_rule(F.binary_cross_entropy)
def binary_cross_entropy(
    batch: Batch,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> LossHessian | None:
    """``H = w (y / f^2 + (1 - y) / (1 - f)^2)`` for probabilities ``f``; "mean" divides by entries.

    It depends on the targets; Monte-Carlo columns are normal, as for Poisson without ``log_input``.
    With the sigmoid in the model the generalized Gauss-Newton is another one than that of logits.
    """
    if not _fits(input, target, weight) or _negative(weight):
        return None

    def second(f: Tensor) -> Tensor:
        return target / f.clamp(min=1e-12) ** 2 + (1 - target) / (1 - f).clamp(min=1e-12) ** 2

    scale: Tensor | float = _reduction_scale(reduction, input.shape)
    return _Elementwise(input, batch, (), second, scale if weight is None else scale * weight)


@loss_rule(F.soft_margin_loss)
def soft_margin_loss(
    batch: Batch, input: Tensor, target: Tensor, reduction: str = "mean"
) -> LossHessian | None:
    """``H = y^2 s(y f) s(-y f)``; "mean" divides by the number of entries.

    Draws: the sign of the target, positive with probability ``s(|y| f)``.
    """
    if not _fits(input, target):
        return None
    with torch.no_grad():
        size = target.abs().to(input.dtype)
        scale = size**2 * _reduction_scale(reduction, input.shape)
    return _Elementwise(
        *(input, batch, ()),
        lambda f: _logistic(f * size),
        scale,
        lambda f, generator: _logistic_noise(f * size, generator),
    )


@loss_rule(F.multilabel_soft_margin_loss)
def multilabel_soft_margin_loss(
    batch: Batch,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> LossHessian | None:
    """``H = w s(f) s(-f) / C``, ``C`` the length of the last axis; "mean" divides by all others.

    Draws: labels from the Bernoulli distribution ``s(f)``.
    """
    if not _fits(input, target, weight) or _negative(weight):
        return None
    scale: Tensor | float = 1 / input.shape[-1]
    if reduction == "mean":
        scale = _reduction_scale(reduction, input.shape)
    if weight is not None:
        scale = scale * weight
    return _Elementwise(input, batch, (), _logistic, scale, _logistic_noise, axis=-1)


@loss_rule(F.huber_loss)
def huber_loss(
    batch: Batch,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> LossHessian | None:
    """``H = w`` where ``|f - y| <= delta``, else 0; "mean" divides by the number of entries."""
    if not _fits(input, target, weight) or _negative(weight):
        return None

    def second(f: Tensor) -> Tensor:
        return ((f - target).abs() <= delta).to(f.dtype)

    scale: Tensor | float = _reduction_scale(reduction, input.shape)
    return _Elementwise(input, batch, (), second, scale if weight is None else scale * weight)


@loss_rule(F.smooth_l1_loss)
def smooth_l1_loss(
    batch: Batch, input: Tensor, target: Tensor, reduction: str = "mean", beta: float = 1.0
) -> LossHessian | None:
    """``H = 1 / beta`` where ``|f - y| < beta``, else 0; "mean" divides by the number of entries."""
    if beta == 0:
        return _Zero(input, batch, ())
    if not _fits(input, target):
        return None

    def second(f: Tensor) -> Tensor:
        return ((f - target).abs() < beta).to(f.dtype) / beta

    return _Elementwise(input, batch, (), second, _reduction_scale(reduction, input.shape))


# --------------------------------------------------------------------------------------
# Losses without curvature


class _Zero(LossHessian):
    """No Hessian: a loss that is linear or piecewise linear in the model output."""

    def root(self) -> Tensor:
        return self.f.new_zeros(0, *self.f.shape)

    @property
    def rank(self) -> int:
        return 0


@loss_rule(
    F.l1_loss,
    F.nll_loss,
    F.kl_div,
    F.margin_ranking_loss,
    F.hinge_embedding_loss,
    F.multilabel_margin_loss,
)
def piecewise_linear(batch: Batch, input: Tensor, *args: Any, **kwargs: Any) -> LossHessian:
    """``H = 0``: all generalized Gauss-Newton quantities are zero, Monte-Carlo ones too.

    ``nll_loss`` and ``kl_div`` are linear in the log-probabilities that they take, so that all
    curvature is in the ``log_softmax`` before them. Where it is the model's last operation, use
    ``cross_entropy`` of the logits instead; its generalized Gauss-Newton is the Fisher information.
    """
    return _Zero(input, batch, ())


# --------------------------------------------------------------------------------------
# Any other loss: differentiate it twice

LARGEST_OUTPUT = 4096


@dataclass(frozen=True, eq=False)
class Differentiated:
    """The Hessian of a loss without a rule, one block per sample, found by autograd.

    A block extends over all model outputs that the loss depends on, for they may be coupled. The
    gradient at the loss is already in it.

    Attributes:
        root: square roots, ``[r, N, outputs of a sample]``; of the absolute values where a Hessian has
            negative eigenvalues.
        outputs: shape and sample axis of every model output.
        signs: signs of the eigenvalues, ``[r, N]``; ``None``: none is negative.
    """

    root: Tensor
    outputs: Sequence[tuple[torch.Size, Batch]]
    signs: Tensor | None = None

    @property
    def f(self) -> Tensor:
        """A tensor with dtype and device of the model output."""
        return self.root

    @property
    def axes(self) -> list[Batch]:
        """The sample axes of the model outputs."""
        return [axis for _, axis in self.outputs]

    def _parts(self, columns: Tensor) -> list[Tensor]:
        """``[v, N, outputs of a sample]`` -> ``[v, *output.shape]`` each."""
        shapes = [
            (batch.width, *(size for d, size in enumerate(shape) if d != batch.dim))
            for shape, batch in self.outputs
        ]
        parts = columns.split([prod(shape) for shape in shapes], 2)
        return [
            batch.join(part.reshape(len(part), batch.size, *shape), 1)
            for part, shape, (_, batch) in zip(parts, shapes, self.outputs, strict=True)
        ]

    def columns(self, grad: Tensor, chunk: int) -> Iterator[list[Tensor]]:
        """Exact columns, ``[<= chunk, *output.shape]`` at a time for every output."""
        self._refuse_negative()
        return (self._parts(part) for part in self.root.split(chunk) if len(part))

    def _refuse_negative(self) -> None:
        if self.signs is not None:
            raise ValueError(
                "the loss is not convex in the model output (its Hessian has negative eigenvalues): "
                "the generalized Gauss-Newton has no square root there; its diagonal (DiagGGNExact, "
                "BatchDiagGGNExact) and products with it (GGNMP) are defined"
            )

    def fewest(self) -> Differentiated:
        """As few columns as there are."""
        return self

    def sampled(self, grad: Tensor, count: int, generator: torch.Generator | None) -> list[Tensor]:
        """``count`` Monte-Carlo columns, ``[count, *output.shape]`` for every output."""
        self._refuse_negative()
        z = _normal((count, *self.root.shape[:2]), self.root, generator) / count**0.5
        return self._parts(torch.einsum("vrn,rno->vno", z, self.root))


def differentiate_twice(
    found: Sequence[tuple[Tensor, Any, Batch]], create_graph: bool = False
) -> Differentiated:
    """Square roots of the per-sample Hessian blocks of a loss, from its gradient's graph.

    Args:
        found: for every model output the differentiable gradient there, its place in the graph, and
            its sample axis.
        create_graph: whether the result is to be differentiated (once).

    Raises:
        ValueError: if the outputs are too large for this, or the loss mixes samples.
        NotImplementedError: if torch cannot differentiate the loss twice.
    """
    sizes = {batch.size for _, _, batch in found}
    if len(sizes) > 1:
        raise ValueError(f"a loss of model outputs for {sorted(sizes)} samples each: cannot match them")
    if any(gradient.is_complex() for gradient, _, _ in found):
        raise NotImplementedError(
            "the model output is complex, for which this quantity is not defined; return real numbers"
        )
    flat = torch.cat([batch.split(gradient).flatten(1) for gradient, _, batch in found], 1)
    edges = [edge for _, edge, _ in found]
    samples, size = flat.shape
    if size > LARGEST_OUTPUT:
        raise ValueError(
            f"this loss has no known Hessian, and differentiating it twice for model outputs of "
            f"{size} numbers per sample needs that many backward passes; extend a loss module that "
            "has a rule, or register one with loss_rule"
        )

    def row(entries: Tensor) -> Tensor:
        """``[N, size]``: derivative of the sum of ``entries`` in the model outputs."""
        rows: Sequence[Tensor | None] = [None] * len(found)
        if entries.requires_grad:
            try:
                rows = torch.autograd.grad(
                    *(entries.sum(), edges),
                    retain_graph=True,
                    create_graph=create_graph,
                    allow_unused=True,
                )
            except RuntimeError as error:
                if "is not implemented" not in str(error):
                    raise
                raise NotImplementedError(
                    f"this loss has no known Hessian, and torch cannot differentiate it twice ({error})"
                ) from error
        parts = [
            batch.split(torch.zeros_like(gradient) if part is None else part).flatten(1)
            for part, (gradient, _, batch) in zip(rows, found, strict=True)
        ]
        row = torch.cat(parts, 1)
        return row if create_graph else row.detach()

    outputs = [(gradient.shape, batch) for gradient, _, batch in found]
    hessian = torch.stack([row(flat[:, c]) for c in range(size)], 1) if size else flat.new_zeros(0)
    if not hessian.numel():
        return Differentiated(flat.new_zeros(0, samples, size), outputs)
    exact, eps = hessian.detach(), torch.finfo(hessian.dtype).eps
    # Samples that do not mix contribute to their own rows only, whatever they are multiplied with.
    n, o = (torch.arange(length).to(exact) for length in (samples, size))
    factors = torch.cos(7 * n + 1).unsqueeze(1) * torch.cos(5 * o + 2)
    apart = row(flat * factors).detach() - torch.einsum("nc,ncd->nd", factors, exact)
    if bool(apart.abs().amax() > 10 * (eps**0.5 * exact.abs().amax() + eps)):
        raise ValueError(
            "the loss mixes the samples of a batch (its Hessian couples their outputs), so that its "
            "generalized Gauss-Newton is no sum over samples"
        )
    values, vectors = spectrum((exact + exact.mT) / 2)
    noise = 1e3 * eps * values.abs().amax() + eps / samples
    signs = torch.where(values < -noise, -1.0, 1.0).to(values)
    scale = (values * signs).clamp(min=0).sqrt().unsqueeze(1)
    roots = vectors * scale
    if create_graph:
        # Of the square root's derivatives one that is right for the product and smooth.
        inverse = vectors * torch.where(values.abs().unsqueeze(1) > noise, 1 / scale, 0)
        change = (hessian - exact) @ (inverse * signs.unsqueeze(1))
        roots = roots + change - roots @ (inverse.mT @ change) / 2
    indefinite = bool((signs < 0).any())
    return Differentiated(roots.movedim(2, 0), outputs, signs.T if indefinite else None)
