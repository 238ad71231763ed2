"""Models that return what their output is computed from, too: each is a variable of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.testing.oracle import check
from tests.blocks import Blocks
from tests.cases import Apply

Loss = Callable[[Any, Tensor], Tensor]


def _rate(hidden: Tensor, by: float = 0.1) -> Tensor:
    return by * hidden.square().sum(1).mean()


def _refined(m: Any, x: Tensor) -> list[Tensor]:
    found = []
    for _ in range(3):
        x = m.same(x).tanh()
        found.append(x)
    return found


def _named(m: Any, x: Tensor) -> dict[str, Tensor]:
    h = m.first(x)
    return {"before": h, "after": h.tanh(), "logits": m.last(h.tanh())}


def _parts(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """One part of a layer's output is returned, the other is computed with."""
    kept, used = m.first(x).split(2, 1)
    return kept, m.part(used.tanh())


def _weighted(o: Any, y: Tensor) -> Tensor:
    """A loss that couples both."""
    return (F.cross_entropy(o[0], y, reduction="none") * (1 + o[1].square().sum(1))).mean()


MODELS: dict[str, tuple[Callable[[Any, Tensor], Any], Loss]] = {
    "logits and hidden": (
        lambda m, x: (m.last(h := m.first(x).tanh()), h),
        lambda o, y: F.cross_entropy(o[0], y) + _rate(o[1]),
    ),
    "hidden and logits": (
        lambda m, x: (h := m.first(x).tanh(), m.last(h)),
        lambda o, y: F.cross_entropy(o[1], y) + F.mse_loss(o[0], torch.zeros_like(o[0])),
    ),
    "coupled": (lambda m, x: (m.last(h := m.first(x).tanh()), h), _weighted),
    "chain": (
        _named,
        lambda o, y: F.cross_entropy(o["logits"], y) + _rate(o["before"]) + _rate(o["after"]),
    ),
    "logits and probabilities": (
        lambda m, x: (f := m.last(m.first(x).tanh()), f.softmax(-1)),
        lambda o, y: F.cross_entropy(o[0], y) + _rate(o[1]),
    ),
    "refined": (
        _refined,
        lambda o, y: sum(((k + 1) * F.cross_entropy(f, y) for k, f in enumerate(o)), torch.zeros(())),
    ),
    "refined, compared": (
        _refined,
        lambda o, y: F.mse_loss(o[0], o[1]) + F.cross_entropy(o[2], y),
    ),
    "parts": (_parts, lambda o, y: F.cross_entropy(o[1], y) + _rate(o[0])),
}
QUANTITIES = (
    *(E.BatchGrad(), E.BatchL2Grad(), E.SumGradSquared(), E.Variance()),
    *(E.DiagGGNExact(), E.BatchDiagGGNExact(), E.DiagHessian(), E.BatchDiagHessian()),
)


def _case(name: str) -> tuple[nn.Module, Loss, Tensor, Tensor]:
    torch.manual_seed(0)
    forward, lossfunc = MODELS[name]
    parts = {"first": nn.Linear(3, 4), "last": nn.Linear(4, 3), "same": nn.Linear(3, 3)}
    model = Apply(forward, **parts, part=nn.Linear(2, 3))
    return model, lossfunc, torch.randn(4, 3), torch.tensor([0, 2, 1, 1])


@pytest.mark.parametrize("ext", QUANTITIES, ids=lambda ext: type(ext).__name__)
@pytest.mark.parametrize("name", MODELS)
def test_quantities(name: str, ext: E.BackpropExtension) -> None:
    report = check(*_case(name), ext)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("ext", [E.GGNMP(), E.HMP()], ids=lambda ext: type(ext).__name__)
@pytest.mark.parametrize("name", MODELS)
def test_products(name: str, ext: E.BackpropExtension) -> None:
    model, lossfunc, X, y = _case(name)
    report = Blocks(model, _Module(lossfunc), X, y).compare(ext)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("modify", ["clip", "abs"])
def test_positive_curvature(modify: str) -> None:
    """Without curved activations in between it is the Gauss-Newton."""
    torch.manual_seed(0)
    layers = {"first": nn.Linear(3, 4), "last": nn.Linear(4, 3)}
    model = extend(Apply(lambda m, x: (m.last(h := m.first(x)), h), **layers).double())
    X, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    with backpack(E.GGNMP(), E.PCHMP(modify=modify)):
        logits, hidden = model(X)
        (F.cross_entropy(logits, y) + _rate(hidden)).backward()
    for p in model.parameters():
        vectors = torch.randn(3, *p.shape, dtype=torch.float64)
        torch.testing.assert_close(p.pchmp(vectors), p.ggnmp(vectors))


class _Module(nn.Module):
    """A loss function as a module."""

    def __init__(self, lossfunc: Loss) -> None:
        super().__init__()
        self.lossfunc = lossfunc

    def forward(self, output: Any, y: Tensor) -> Tensor:
        return self.lossfunc(output, y)


@pytest.mark.parametrize("ext", [E.DiagGGNExact(), E.KFLR(), E.GGNMP()], ids=lambda e: type(e).__name__)
def test_a_frozen_model_above(ext: E.BackpropExtension) -> None:
    """Of a generator below a discriminator that is not trained in this step: its output is the same."""
    torch.manual_seed(0)
    below = extend(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double())
    above = extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double())
    z, found = torch.randn(5, 2, dtype=torch.float64), []
    for trained in (True, False):
        above.requires_grad_(trained)
        with backpack(ext):
            F.softplus(-above(below(z))).mean().backward()
        values = [(getattr(p, ext.savefield), torch.ones_like(p)) for p in below.parameters()]
        found.append([value(ones) if callable(value) else value for value, ones in values])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(list(one), list(other))
