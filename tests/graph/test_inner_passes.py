"""Backward passes inside of forward or backward: steps for tasks, scores, sampling, fixed points."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import (
    GGNMP,
    HMP,
    KFLR,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SumGradSquared,
    Variance,
)
from backpack.testing.oracle import check
from tests.cases import Apply

Forward = Callable[[Any, Tensor], Tensor]
QUANTITIES = (
    *(BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance()),
    *(DiagGGNExact(), BatchDiagGGNExact(), DiagHessian()),
)
SUPPORT, LABELS = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])


def _first_order_step(m: Any, x: Tensor) -> Tensor:
    """A step for a task, whose own derivatives are left out (first-order MAML)."""
    weights = [m.last.weight, m.last.bias]
    for _ in range(2):
        error = F.cross_entropy(F.linear(m.first(SUPPORT.to(x)).tanh(), *weights), LABELS)
        slopes = torch.autograd.grad(error, weights)
        weights = [w - 0.3 * s for w, s in zip(weights, slopes, strict=True)]
    return F.linear(m.first(x).tanh(), *weights)


def _step_for_each(m: Any, x: Tensor) -> Tensor:
    """A step for each sample, down the entropy of its own prediction."""
    found = []
    for row in x:
        h = m.first(row).tanh()
        entropy = torch.special.entr(m.last(h).softmax(0)).sum()
        (slope,) = torch.autograd.grad(entropy, m.last.weight, retain_graph=True)
        found.append(h @ (m.last.weight - 0.1 * slope).T + m.last.bias)
    return torch.stack(found)


def _guided(m: Any, x: Tensor) -> Tensor:
    """Moved along the slope of a score, as a constant."""
    at = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(m.first(at).tanh().sum(), at)
    return m.last(m.first(x + 0.3 * slope).tanh())


def _guided_by_backward(m: Any, x: Tensor) -> Tensor:
    at = x.detach().requires_grad_()
    m.first(at).tanh().sum().backward(inputs=[at])
    assert at.grad is not None
    return m.last(m.first(x + 0.3 * at.grad).tanh())


def _sampled(m: Any, x: Tensor) -> Tensor:
    """Langevin sampling of an energy, then the energy of what was found."""
    z = x
    for _ in range(3):
        z = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(m.last(m.first(z).tanh()).sum(), z)
        z = z - 0.1 * slope
    return m.last(m.first(x).tanh()) - m.last(m.first(z.detach()).tanh())


FORWARDS: dict[str, Forward] = {
    "first-order step": _first_order_step,
    "step for each": _step_for_each,
    "guided": _guided,
    "guided by backward": _guided_by_backward,
    "sampled": _sampled,
}


def _model(forward: Forward) -> nn.Module:
    return Apply(forward, first=nn.Linear(3, 4), last=nn.Linear(4, 2))


@pytest.mark.parametrize("ext", QUANTITIES, ids=lambda ext: type(ext).__name__)
@pytest.mark.parametrize("name", FORWARDS)
def test_quantities(name: str, ext: Any) -> None:
    torch.manual_seed(0)
    model, X, y = _model(FORWARDS[name]), torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    report = check(model, nn.CrossEntropyLoss(), X, y, ext)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("name", FORWARDS)
def test_products_and_factors(name: str) -> None:
    """Products are those of the loss's pass; nothing is left of the inner ones."""
    torch.manual_seed(0)
    model, y = _model(FORWARDS[name]).double(), torch.tensor([0, 1, 1, 0, 1])
    X = torch.randn(5, 3, dtype=torch.float64)
    plain = copy.deepcopy(model)
    loss = F.cross_entropy(plain(X), y)
    parameters = list(plain.parameters())
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    extend(model)
    with backpack(HMP(), GGNMP(), KFLR()):
        F.cross_entropy(model(X), y).backward()
    for p, q, g in zip(model.parameters(), parameters, gradients, strict=True):
        vector = torch.randn_like(q)
        (expected,) = torch.autograd.grad((g * vector).sum(), q, retain_graph=True)
        torch.testing.assert_close(p.hmp(vector[None])[0], expected)
        block = p.ggnmp(torch.eye(p.numel()).view(-1, *p.shape).to(p)).flatten(1)
        if p.dim() == 1:
            torch.testing.assert_close(p.kflr[0], block)


def test_fields_of_an_inner_pass_are_none() -> None:
    """A network that only the inner pass differentiates has no quantities."""

    def forward(m: Any, x: Tensor) -> Tensor:
        at = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(m.score(at).tanh().sum(), at)
        return m.last(x + slope)

    model = extend(Apply(forward, score=nn.Linear(3, 4), last=nn.Linear(3, 2)))
    with backpack(BatchGrad()):
        model(torch.randn(5, 3)).square().sum().backward()
    assert hasattr(model.last.weight, "grad_batch") and not hasattr(model.score.weight, "grad_batch")


def test_a_pass_in_forward_alone_is_none() -> None:
    """A block in which no other ran says so."""
    model = extend(_model(_guided))
    with pytest.warns(UserWarning, match="no backward pass ran"), backpack(BatchGrad()):
        model(torch.randn(5, 3))


def test_a_pass_inside_of_backward() -> None:
    """The fixed point of an energy's slope, whose hook differentiates the energy once more."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        with torch.no_grad():
            z = h.clone()
            for _ in range(60):
                z = h + 0.3 * z.sin()
        z = z.requires_grad_()
        f = h + 0.3 * z.sin()

        def solve(g: Tensor) -> Tensor:
            u = g
            for _ in range(60):
                with torch.enable_grad():
                    (change,) = torch.autograd.grad((f * u).sum(), z, retain_graph=True)
                u = g + change
            return u

        out = h + 0.3 * z.detach().sin()
        out.register_hook(solve)
        return m.last(out)

    torch.manual_seed(0)
    model, X = _model(forward).double(), torch.randn(5, 3, dtype=torch.float64)
    y, rows = torch.tensor([0, 1, 1, 0, 1]), []
    for n in range(5):
        loss = F.cross_entropy(model(X[n : n + 1]), y[n : n + 1]) / 5
        rows.append(torch.autograd.grad(loss, list(model.parameters())))
    extend(model)
    with backpack(BatchGrad(), BatchL2Grad()):
        F.cross_entropy(model(X), y).backward()
    for p, expected in zip(model.parameters(), zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(p.grad_batch, torch.stack(expected))


def test_gradients_of_inputs_only() -> None:
    """A pass for adversarial examples computes no parameter's gradient: curvature is not asked for."""
    torch.manual_seed(0)
    model, y = extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), torch.arange(5) % 2
    x = torch.randn(5, 3, requires_grad=True)
    with backpack(DiagGGNExact(), GGNMP()):
        torch.autograd.backward(F.cross_entropy(model(x), y), inputs=[x])
        assert not hasattr(model[0].weight, "diag_ggn_exact")
        F.cross_entropy(model((x + x.grad.sign()).detach()), y).backward()
    assert hasattr(model[0].weight, "diag_ggn_exact")
