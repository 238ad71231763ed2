"""Custom Functions, checkpoints, operations without a gradient, products of data with data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.fuzz.draft import Given, Operation


class Double(torch.autograd.Function):
    """Twice the input: keeps samples apart on any axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class Roll(torch.autograd.Function):
    """Rows move by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.roll(1, 0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.roll(-1, 0)


class Centre(torch.autograd.Function):
    """The mean over an axis is taken off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> Tensor:
        ctx.axis = axis
        return x - x.mean(axis, keepdim=True)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g - g.mean(ctx.axis, keepdim=True), None


class Squash(torch.autograd.Function):
    """A function of single entries that can be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


def _without_gradient(t: Given) -> Tensor:
    with torch.no_grad():
        return 2 * t.x + 1


_SPECIAL: dict[str, Callable[[Given], Tensor]] = {
    "function double": lambda t: Double.apply(t.x),
    "function roll": lambda t: Roll.apply(t.x),
    "function centre": lambda t: Centre.apply(t.x, t.axis),
    "function squash": lambda t: Squash.apply(t.x),
    "checkpoint": lambda t: checkpoint(lambda x: x.tanh() * x, t.x, use_reentrant=False),
    "detach": lambda t: 1.1 * t.x.detach(),
    "no_grad": _without_gradient,
    "data": lambda t: 2 * t.x.data,
    "plus detached": lambda t: t.x + t.x.detach().flip(t.axis),
    "bucketize": lambda t: torch.bucketize(t.x.detach(), torch.tensor([-0.5, 0, 0.5])).double() * t.x,
    "one_hot": lambda t: F.one_hot((37 * t.x.detach()).long().abs() % 3, 3) * t.x.unsqueeze(-1),
    "pad": lambda t: F.pad(t.x, (1, 0)),
    "pad circular": lambda t: F.pad(t.x, (1, 1), mode="circular"),
    "diag_embed": lambda t: torch.diag_embed(t.x),
    "tril": lambda t: t.x.tril(),
    "fft2": lambda t: torch.fft.fft2(t.x).real,
    "complex": lambda t: torch.complex(t.x, t.x.tanh()).abs(),
    "polar": lambda t: torch.polar(t.x.abs() + 0.1, t.x).real,
    "inner": lambda t: torch.inner(t.x, t.x.tanh()),
    "gram": lambda t: torch.einsum("...ij,...kj->...ik", t.x, t.x),
    "x xT": lambda t: torch.matmul(t.x, t.x.transpose(-1, -2)),
    "xT x": lambda t: torch.matmul(t.x.transpose(-1, -2), t.x),
    "matmul data": lambda t: torch.matmul(t.x, t.y),
    "trace": lambda t: torch.trace(t.x).expand(2),
    "matrix_exp": lambda t: torch.linalg.matrix_exp(0.3 * t.x),
    "inverse": lambda t: torch.linalg.inv(t.x + 5 * torch.eye(t.x.shape[-1])),
    "cov": lambda t: torch.cov(t.x),
    "vander": lambda t: torch.vander(t.x, 3),
    "addr": lambda t: torch.addr(t.x.new_zeros(t.x.shape[0], 2), t.x, t.x.new_ones(2)),
    "hypernetwork": lambda t: F.linear(t.x, t.x.reshape(-1, t.x.shape[-1])[:2].tanh()),
    "F.unfold": lambda t: F.unfold(t.x, (min(2, t.x.shape[-2]), 1)),
    "F.fold": lambda t: F.fold(t.x, (t.x.shape[-1], 1), (1, 1)),
    "factory": lambda t: (
        torch.zeros(t.size, 2).movedim(0, 0) + t.x.movedim(t.axis, 0).flatten(1)[:, :1]
    ),
}
SPECIAL = [Operation(name, run) for name, run in _SPECIAL.items()]
