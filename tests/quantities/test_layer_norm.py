"""Layer norms: what their nodes keep of each row is used where it may be; quantities are the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact, SumGradSquared
from backpack.own import op_rule
from backpack.rules.base import RULES


class Normed(nn.Module):
    """A norm between layers, over positions."""

    def __init__(self, within: Callable[[], AbstractContextManager[Any]], checkpoints: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)
        self.norm = nn.LayerNorm(5)
        self.within, self.checkpoints = within, checkpoints

    def _middle(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        with self.within():
            if self.checkpoints:
                return self.last(checkpoint(self._middle, x, use_reentrant=False))
            return self.last(self._middle(x))


X = torch.rand(3, 7, 4, dtype=torch.float64)
Y = torch.rand(3, 7, 2, dtype=torch.float64)


def _model(
    within: Callable[[], AbstractContextManager[Any]] = nullcontext, checkpoints: bool = False
) -> Normed:
    torch.manual_seed(0)
    model = Normed(within, checkpoints).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def _expected(model: nn.Module, p: Tensor) -> Tensor:
    """Gradients of single samples of the mean over all entries."""
    losses = [F.mse_loss(model(X[n : n + 1]), Y[n : n + 1]) / len(X) for n in range(len(X))]
    return torch.stack([torch.autograd.grad(loss, p)[0] for loss in losses])


WAYS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], bool]] = {
    "plain": (nullcontext, False),
    "checkpoint": (nullcontext, True),
    "offloaded": (save_on_cpu, False),
}


@pytest.mark.parametrize("way", WAYS)
def test_quantities(way: str) -> None:
    model, twin = extend(_model(*WAYS[way])), _model()
    lossfunc = extend(nn.MSELoss())
    with backpack(BatchGrad(), SumGradSquared(), DiagGGNExact()):
        lossfunc(model(X), Y).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        each = _expected(twin, q)
        torch.testing.assert_close(BatchGrad.of(p), each, msg=name)
        torch.testing.assert_close(SumGradSquared.of(p), each.square().sum(0), msg=name)
    outputs = twin(X).flatten()
    rows = [torch.autograd.grad(f, twin.norm.weight, retain_graph=True)[0] for f in outputs]
    diagonal = torch.stack(rows).square().sum(0) * 2 / Y.numel()
    torch.testing.assert_close(DiagGGNExact.of(model.norm.weight), diagonal)


def test_quantities_may_be_differentiated() -> None:
    model, twin = extend(_model()), _model()
    with backpack(BatchGrad()):
        F.mse_loss(model(X), Y).backward(create_graph=True)
    found = torch.autograd.grad(BatchGrad.of(model.norm.weight).square().sum(), model.first.weight)[0]
    losses = [F.mse_loss(twin(X[n : n + 1]), Y[n : n + 1]) / len(X) for n in range(len(X))]
    each = [torch.autograd.grad(loss, twin.norm.weight, create_graph=True)[0] for loss in losses]
    expected = torch.autograd.grad(torch.stack(each).square().sum(), twin.first.weight)[0]
    torch.testing.assert_close(found, expected)


def test_a_graph_that_is_kept_gives_the_same_again() -> None:
    model = extend(_model())
    loss = F.mse_loss(model(X), Y)
    with backpack(BatchGrad()):
        loss.backward(retain_graph=True)
        first = BatchGrad.of(model.norm.weight)
        loss.backward()
    torch.testing.assert_close(BatchGrad.of(model.norm.weight), first, rtol=0, atol=0)


def test_a_rule_of_the_users_own_need_not_know() -> None:
    before, called = RULES[F.layer_norm], []

    @op_rule(F.layer_norm)
    def rule(
        batch: Any, input: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ):
        called.append(weight)
        return before(batch, input, shape, weight, bias, eps)

    try:
        model = extend(_model())
        with backpack(BatchGrad()):
            F.mse_loss(model(X), Y).backward()
    finally:
        RULES[F.layer_norm] = before
    assert len(called) == 1
    twin = _model()
    torch.testing.assert_close(BatchGrad.of(model.norm.weight), _expected(twin, twin.norm.weight))


def test_an_input_that_is_changed_is_refused() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4).double()

        def forward(self, x: Tensor) -> Tensor:
            h = x + 1
            out = self.norm(h)
            h.mul_(2)
            return out

    model = extend(Changing())
    with pytest.raises(RuntimeError, match="in.?place"), backpack(BatchGrad()):
        F.mse_loss(model(X), X).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precision(dtype: torch.dtype) -> None:
    """Statistics of rows are in single precision, whatever the rows are in."""
    model, twin = extend(_model().to(dtype)), _model()
    x, y = X.to(dtype), Y.to(dtype)
    with torch.no_grad():
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    with backpack(BatchGrad()):
        F.mse_loss(model(x), y).backward()
    found = BatchGrad.of(model.norm.weight)
    assert found.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    expected = _expected(twin, twin.norm.weight)
    assert (found.double() - expected).norm() <= tolerance * expected.norm()
