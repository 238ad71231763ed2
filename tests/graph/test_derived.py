"""Weights made from parameters: sums, and functions of single entries (Bayes by backprop)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.engine import collect
from backpack.forms.several import Pullback
from backpack.testing.oracle import check
from tests.cases import Apply, P

QUANTITIES = [
    *(E.BatchGrad(), E.BatchL2Grad(), E.SumGradSquared(), E.Variance()),
    *(E.DiagGGNExact(), E.BatchDiagGGNExact(), E.DiagHessian()),
]
Y = torch.tensor([0, 2, 1])
NOISE = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()


def doubled(weight: Tensor) -> Tensor:
    if weight.requires_grad:
        weight.register_hook(lambda g: 2 * g)
    return weight


def shifted(weight: Tensor) -> Tensor:
    """A hook under which entries meet."""
    if weight.requires_grad:
        weight.register_hook(lambda g: g.flip(0))
    return weight


# Weights from `p` and `r`, and whether any of them needs each sample's gradient written out.
WEIGHTS: dict[str, tuple[Callable[[Any], Tensor], bool]] = {
    "drawn": (lambda m: m.p + F.softplus(m.r) * NOISE.to(m.p), False),
    "difference": (lambda m: m.p - torch.exp(m.r), False),
    "scaled terms": (lambda m: torch.add(m.p, m.r, alpha=3) - 2, False),
    "subtracted": (lambda m: 1 - torch.sub(m.r, m.p, alpha=0.5), False),
    "of itself": (lambda m: m.p + m.p + torch.tanh(m.p), False),
    "product": (lambda m: m.p * torch.sigmoid(m.r) / 2, False),
    "squared": (lambda m: m.p * m.p + m.r.clamp(min=0), False),
    "clone": (lambda m: m.p.clone() * m.r, False),
    "hooked": (lambda m: doubled(m.p + m.r), False),
    "hooked inside": (lambda m: m.p + doubled(m.r.exp()), False),
    "flipped by a hook": (lambda m: m.p + shifted(m.r.exp()), True),
    "row added": (lambda m: m.p + m.r[:1], True),
    "flipped": (lambda m: m.p * m.r.flip(0), True),
    "normalised": (lambda m: m.r * m.p / m.p.norm(), True),
    "softmax": (lambda m: m.p.softmax(0) * m.r, True),
}
LAYERS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "linear": lambda m, x, w: F.linear(x[:, 0], w),
    "positions": lambda m, x, w: F.linear(x, w).tanh().sum(1),
    "product": lambda m, x, w: (x @ w.T).tanh().mean(1),
    "table": lambda m, x, w: F.embedding((x[..., 0] > 0).long(), w).sum(1)[:, :3],
    "convolution": lambda m, x, w: F.conv1d(x, w.view(3, 2, 2)).tanh().sum(2),
    "twice": lambda m, x, w: F.linear(x[:, 0], w) * F.linear(x[:, 1], w),
}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights(weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled: list[tuple] = []

    def pullback(*args: Any) -> Pullback:
        pulled.append(args)
        return Pullback(*args)

    monkeypatch.setattr(collect, "Pullback", pullback)
    make, written = WEIGHTS[weight]
    every = weight in ("drawn", "difference")
    for layer in LAYERS if every else ["positions"]:
        torch.manual_seed(0)
        function, pulled[:] = LAYERS[layer], []
        model = Apply(lambda m, x, f=function: f(m, x, make(m)), p=P(3, 4), r=P(3, 4))
        if "hook" in weight:  # whose gradients are no derivatives
            agree_with_autograd(model)
        else:
            report = check(model, nn.CrossEntropyLoss(), torch.randn(3, 2, 4), Y, QUANTITIES)
            assert report.ok, report
        assert bool(pulled) == (written or layer == "convolution")


def agree_with_autograd(model: nn.Module) -> None:
    model, x = extend(model.double()), torch.randn(3, 2, 4).double()
    with backpack(E.BatchGrad(), E.SumGradSquared(), E.Variance(), E.BatchL2Grad()):
        F.cross_entropy(model(x), Y).backward()
    for n in range(3):
        loss = F.cross_entropy(model(x[n : n + 1]), Y[n : n + 1]) / 3
        for p, g in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            assert torch.allclose(p.grad_batch[n], g)
    for p in model.parameters():
        assert torch.allclose(p.grad_batch.square().sum(0), p.sum_grad_squared)
        assert torch.allclose(p.grad_batch.var(0, unbiased=False), p.variance)
        assert torch.allclose(p.grad_batch.flatten(1).square().sum(1), p.batch_l2)


def test_terms_have_the_factors_of_the_sum() -> None:
    """Mean and correction enter as a weight does; other parameters have their block in one piece."""
    torch.manual_seed(0)
    w, x = torch.randn(3, 4).double(), torch.randn(3, 2, 4).double()
    plain = extend(Apply(lambda m, x: F.linear(x, m.w).tanh().sum(1), w=nn.Parameter(w)))
    summed = extend(
        Apply(
            lambda m, x: F.linear(x, m.p - 2 * m.s + m.r).tanh().sum(1),
            **{"p": nn.Parameter(w / 2), "r": nn.Parameter(w / 2), "s": nn.Parameter(0 * w)},
        )
    )
    for model in (plain, summed):
        with backpack(E.KFLR(), E.DiagHessian()):
            F.cross_entropy(model(x), Y).backward()
    for a, b in zip(plain.w.kflr, summed.r.kflr, strict=True):
        assert torch.allclose(a, b)
    assert torch.allclose(plain.w.diag_h, summed.r.diag_h)
    assert torch.allclose(4 * plain.w.diag_h, summed.s.diag_h)
    assert [f.shape for f in summed.s.kflr] == [(12, 12)]


def test_differentiable() -> None:
    model = extend(Apply(lambda m, x: F.linear(x, m.p.exp()), p=P(3, 4))).double()

    def value() -> Tensor:
        with backpack(E.SumGradSquared()):
            loss = F.cross_entropy(model(NOISE), Y)
            loss.backward(create_graph=True)
        return model.p.sum_grad_squared.sum()

    (slope,) = torch.autograd.grad(value(), model.p)
    step = torch.randn_like(slope)
    ends = []
    for size in (1e-5, -2e-5):
        with torch.no_grad():
            model.p += size * step
        ends.append(value().item())
    assert (slope * step).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.permute(0, 1),
        lambda w: w.permute(-1, 0),
        lambda w: w.transpose(0, 0),
        lambda w: w.transpose(-2, 0),
        lambda w: w.transpose(-1, -2),
        lambda w: w.swapaxes(0, 1),
        lambda w: w.t(),
        lambda w: (w + 1).T,
    ],
)
def test_square_weights_are_transposed_where_they_are(view: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Apply(lambda m, x: (x @ view(m.w)).tanh(), w=P(4, 4))
    report = check(model, nn.CrossEntropyLoss(), NOISE, Y, QUANTITIES)
    assert report.ok, report
