"""Batches without samples, as Poisson sampling gives them: sums over nothing are zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend, optim
from backpack import extensions as E


class Last(nn.Module):
    """A recurrent layer, and the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class Heads(nn.Module):
    """Attention, whose samples are reshaped away and back."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0].flatten(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)),
        (1, 5, 5),
    ),
    "pool": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3)
        ),
        (1, 5, 5),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(20, 3)),
        (5, 3),
    ),
    "lstm": (Last, (5, 3)),
    "attention": (Heads, (2, 4)),
}


QUANTITIES: dict[str, Callable[[], Any]] = {
    name: getattr(E, name)
    for name in (
        "BatchGrad BatchL2Grad SumGradSquared DiagGGNExact DiagGGNMC BatchDiagGGNExact BatchDiagGGNMC "
        "DiagHessian BatchDiagHessian SqrtGGNExact SqrtGGNMC DiagHessianMC KFAC KFLR EmpiricalKFAC "
        "GGNMP HMP"
    ).split()
} | {
    f"KFLR {approximation}": lambda a=approximation: E.KFLR(a) for approximation in ("expand", "reduce")
}


def tensors(value: Any, p: Tensor) -> Iterator[Tensor]:
    if callable(value):
        yield value(torch.ones_like(p))
    elif isinstance(value, Tensor):
        yield value
    else:
        for each in value:
            yield from tensors(each, p)


def loss(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    X, y = torch.zeros(0, *shape), torch.zeros(0, dtype=torch.long)
    return extend(nn.CrossEntropyLoss(reduction="sum"))(model(X), y)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", QUANTITIES)
def test_quantities(name: str, model: str) -> None:
    make, shape = MODELS[model]
    net, extension = extend(make()), QUANTITIES[name]()
    with backpack(extension):
        loss(net, shape).backward()
    for p in net.parameters():
        assert not p.grad.any()
        for found in tensors(getattr(p, extension.savefield), p):
            assert not found.any()  # nan counts as true
            if name.startswith("Batch") and name != "BatchL2Grad":
                assert found.shape == (0, *p.shape)


@pytest.mark.parametrize("extension", [E.KFRA(), E.EKFAC(), E.EKFLR()])
def test_quantities_of_chains(extension: Any) -> None:
    net = extend(MODELS["conv"][0]())
    with backpack(extension):
        loss(net, (1, 5, 5)).backward()
    for p in net.parameters():
        value = getattr(p, extension.savefield)
        for found in tensors(value.eigenvalues if hasattr(value, "eigenvalues") else value, p):
            assert not found.any()


@pytest.mark.parametrize("model", MODELS)
def test_private_step(model: str) -> None:
    """Noise alone, for every model whose forward pass takes an empty batch."""
    make, shape = MODELS[model]
    net = make()
    optimizer = optim.DPSGD(net, 0.1, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8.0)
    before = [p.detach().clone() for p in net.parameters()]
    X = torch.zeros(0, *shape)
    norms = optimizer.backward(F.cross_entropy(net(X), X.new_zeros(0).long(), reduction="none"))
    assert norms.shape == (0,)
    optimizer.step()
    assert all((p != old).any() for p, old in zip(net.parameters(), before, strict=True))
