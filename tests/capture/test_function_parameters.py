"""Custom autograd.Functions with parameters: their backward is asked for each sample's part."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from backpack import backpack, extend
from backpack.extensions import BatchGrad
from backpack.testing.oracle import check
from tests.cases import Apply, P


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return g @ weight, g.T @ x, g.sum(0)


class StepSize(torch.autograd.Function):
    """A quantiser that learns its step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, most: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.most = most
        return (x / step).clamp(-most, most).round() * step

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x, step = ctx.saved_tensors
        ratio = x / step
        inside = (ratio.abs() <= ctx.most).to(g.dtype)
        slope = inside * (ratio.round() - ratio) + (1 - inside) * ratio.sign() * ctx.most
        return g * inside, (g * slope).sum().reshape(step.shape), None


class Curved(torch.autograd.Function):
    """Two results, neither of them linear in the parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return x * weight**2, x.sin() * weight

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return g * weight**2 + h * x.cos() * weight, (2 * g * x * weight + h * x.sin()).sum(0)


def _step() -> nn.Parameter:
    return nn.Parameter(torch.tensor([0.4]))


WITH_PARAMETERS: dict[str, Callable[[], nn.Module]] = {
    "of inputs": lambda: Apply(
        lambda m, x: m.o(Linear.apply(x, m.w, m.b)), w=P(5, 4), b=P(5), o=nn.Linear(5, 3)
    ),
    "alone": lambda: Apply(lambda m, x: Linear.apply(x, m.w, m.b), w=P(3, 4), b=P(3)),
    "inside": lambda: Apply(
        lambda m, x: m.o(Linear.apply(m.l(x).tanh(), m.w, m.b).tanh()),
        **{"l": nn.Linear(4, 4), "w": P(5, 4), "b": P(5), "o": nn.Linear(5, 3)},
    ),
    "last": lambda: Apply(
        lambda m, x: Linear.apply(m.l(x), m.w.T.exp(), m.b), l=nn.Linear(4, 4), w=P(4, 3), b=P(3)
    ),
    "samples one by one": lambda: Apply(
        lambda m, x: m.o(torch.cat([Linear.apply(each[None], m.w, m.b) for each in x])),
        **{"w": P(5, 4), "b": P(5), "o": nn.Linear(5, 3)},
    ),
    "step size": lambda: Apply(
        lambda m, x: F.linear(StepSize.apply(m.l(x), m.s, 2), StepSize.apply(m.w, m.t, 2)),
        **{"l": nn.Linear(4, 4), "s": _step(), "t": _step(), "w": P(3, 4)},
    ),
    "two results": lambda: Apply(
        lambda m, x: m.o(torch.cat(Curved.apply(m.l(x), m.w), 1)),
        **{"l": nn.Linear(4, 4), "w": P(4), "o": nn.Linear(8, 3)},
    ),
    "used twice": lambda: Apply(
        lambda m, x: m.o(Curved.apply(Curved.apply(m.l(x), m.w)[1] * m.w, m.w)[0]),
        **{"l": nn.Linear(4, 4), "w": P(4), "o": nn.Linear(4, 3)},
    ),
}


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_functions_with_parameters(name: str) -> None:
    torch.manual_seed(0)
    report = check(
        WITH_PARAMETERS[name](), nn.CrossEntropyLoss(), torch.randn(4, 4), torch.arange(4) % 3
    )
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("gradient", [False, "forms"])
@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_functions_with_parameters_without_the_gradient(name: str, gradient: Any) -> None:
    """Their nodes are asked after the gradient has passed them."""
    torch.manual_seed(0)
    model, X, y = (
        extend(WITH_PARAMETERS[name]().double()),
        torch.randn(4, 4).double(),
        torch.arange(4) % 3,
    )
    with backpack(BatchGrad()):
        F.cross_entropy(model(X), y).backward()
    wanted = {name: p.grad_batch for name, p in model.named_parameters()}
    model.zero_grad()
    with backpack(BatchGrad(), gradient=gradient):
        F.cross_entropy(model(X), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_batch, wanted[name])
        assert p.grad is None if gradient is False else torch.allclose(p.grad, wanted[name].sum(0))


def test_parameters_beside_samples_that_a_function_mixes() -> None:
    class Mixing(Curved):
        @staticmethod
        def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            along_x, along_weight = Curved.backward(ctx, g, h)
            return along_x.flip(0), along_weight

    model = extend(Apply(lambda m, x: Mixing.apply(m.l(x), m.w)[0], l=nn.Linear(4, 4), w=P(4)))
    loss = model(torch.randn(3, 4)).square().sum()
    message = "Mixing, a custom autograd.Function, mixes samples"
    with pytest.raises(RuntimeError, match=message), backpack(BatchGrad()):
        loss.backward()


def test_inside_of_a_checkpoint() -> None:
    """Torch computes again what such a Function has saved, but only once."""
    model = extend(
        Apply(
            lambda m, x: m.o(checkpoint(Curved.apply, m.l(x), m.w, use_reentrant=False)[0]),
            **{"l": nn.Linear(4, 4), "w": P(4), "o": nn.Linear(4, 3)},
        )
    )
    loss = model(torch.randn(3, 4)).square().sum()
    message = "inside of a checkpoint the backward of Curved can be called only once"
    with pytest.raises(RuntimeError, match=message), backpack(BatchGrad()):
        loss.backward()


def test_offloaded() -> None:
    torch.manual_seed(0)
    model, X, y = extend(WITH_PARAMETERS["inside"]()), torch.randn(4, 4), torch.arange(4) % 3
    found = []
    for context in (nullcontext(), save_on_cpu()):
        with context, backpack(BatchGrad()):
            F.cross_entropy(model(X), y).backward()
        found.append(model.w.grad_batch)
    torch.testing.assert_close(*found)


@torch.library.custom_op("tests::scaled", mutates_args=())
def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight.exp()


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _scaled_backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return g * weight.exp(), (g * x * weight.exp()).sum(0)


scaled.register_autograd(_scaled_backward, setup_context=_keep)


def test_operations_of_the_users_own_library() -> None:
    """Transforms do not go through them."""
    torch.manual_seed(0)
    model = Apply(lambda m, x: m.o(scaled(m.l(x), m.w)), l=nn.Linear(4, 4), w=P(4), o=nn.Linear(4, 3))
    report = check(model, nn.CrossEntropyLoss(), torch.randn(4, 4), torch.arange(4) % 3)
    assert report.ok, f"\n{report}"
