"""What transforms and derivatives in forward have made, and may hold data, meets data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from backpack import backpack, extend
from backpack.engine import certificate
from backpack.extensions import (
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    Variance,
)
from backpack.testing.oracle import check
from tests.cases import Apply, P

Forward = Callable[[Any, Tensor], Tensor]
QUANTITIES = (
    *(BatchGrad(), BatchL2Grad(), Variance()),
    *(DiagGGNExact(), BatchDiagGGNExact(), DiagHessian()),
)


def _energy(m: Any) -> Callable[[Tensor], Tensor]:
    return lambda z: m.energy(m.first(z).tanh()).sum()


def _divergence(m: Any) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.trace(jacrev(lambda q: m.first(q).tanh()[:3])(z))


def _adapted_for_each(m: Any, x: Tensor) -> Tensor:
    found = []
    for row in x:
        (slope,) = torch.autograd.grad(_energy(m)(row), m.first.weight, create_graph=True)
        found.append(F.linear(row, m.first.weight - 0.1 * slope, m.first.bias)[:3])
    return m.last(torch.stack(found))


def _adapted_to_all(m: Any, x: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(_energy(m)(x), m.first.weight, create_graph=True)
    return m.last(F.linear(x, m.first.weight - 0.1 * slope, m.first.bias)[:, :3])


def _adapted_to_another(m: Any, x: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(_energy(m)(x[0]), m.first.weight, create_graph=True)
    return m.last(torch.stack([F.linear(row, m.first.weight - slope)[:3] for row in x]))


APART: dict[str, Forward] = {
    "slope beside": lambda m, x: m.last(torch.cat([grad(_energy(m))(x)[:, :2], x[:, :1]], 1)),
    "slope added": lambda m, x: m.last(x + 0.1 * grad(_energy(m))(x)),
    "slope of each": lambda m, x: m.last(x + 0.1 * vmap(grad(_energy(m)))(x)),
    "features": lambda m, x: m.last(x * vmap(lambda z: m.first(z).tanh()[:3])(x)),
    "divergence": lambda m, x: m.last(x) * vmap(_divergence(m))(x)[:, None],
    "weights": lambda m, x: m.last(F.linear(x, vmap(lambda W: W / W.norm())(m.several).mean(0))),
    "adapted for each": _adapted_for_each,
}
MIXED: dict[str, Forward] = {
    "slope": lambda m, x: m.last(x + grad(lambda z: _energy(m)(z) ** 2)(x)),
    "slope beside": lambda m, x: m.last(
        torch.cat([grad(lambda z: _energy(m)(z) ** 2)(x)[:, :2], x[:, :1]], 1)
    ),
    "centred": lambda m, x: m.last(
        x * vmap(lambda W: (x @ W).tanh() - (x @ W).tanh().mean(), out_dims=1)(m.several[0])
    ),
    "adapted to all": _adapted_to_all,
    "adapted to another": _adapted_to_another,
}


def _model(forward: Forward) -> nn.Module:
    parts = {"first": nn.Linear(3, 4), "energy": nn.Linear(4, 1), "last": nn.Linear(3, 2)}
    return Apply(forward, **parts, several=P(2, 3, 3))


@pytest.mark.parametrize("ext", QUANTITIES, ids=lambda ext: type(ext).__name__)
@pytest.mark.parametrize("name", APART)
def test_samples_are_apart(name: str, ext: Any) -> None:
    torch.manual_seed(0)
    model, X, y = _model(APART[name]), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    report = check(model, nn.CrossEntropyLoss(), X, y, ext)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("certify", ["once", "never"])
@pytest.mark.parametrize("name", MIXED)
def test_samples_are_mixed(name: str, certify: Literal["once", "never"]) -> None:
    torch.manual_seed(0)
    model = extend(_model(MIXED[name]).double())
    loss = F.cross_entropy(model(torch.randn(4, 3, dtype=torch.float64)), torch.tensor([0, 1, 1, 0]))
    with (
        pytest.raises(RuntimeError, match="samples are|the samples"),
        backpack(BatchGrad(), certify=certify),
    ):
        loss.backward()


def test_every_time() -> None:
    """A matrix inside of a transform that is diagonal at first: nothing shows that it is another."""
    torch.manual_seed(0)
    certificate.forget()
    matrix = torch.eye(4, dtype=torch.float64)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(x * vmap(lambda c: matrix @ c, in_dims=1, out_dims=1)(m.first(x))[:, :3])

    model = extend(_model(forward).double())

    def run() -> None:
        with backpack(BatchGrad(), certify="once"):
            model(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()

    run()
    run()
    matrix[2, 1] = 1
    with pytest.raises(RuntimeError, match="samples"):
        run()
