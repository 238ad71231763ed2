"""Conjugate gradients, with and without negative curvature."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backpack import extend, optim
from backpack.optim import conjugate_gradients
from tests.cases import Apply, P


def matrix(*eigenvalues: float) -> Tensor:
    torch.manual_seed(0)
    size = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    return Q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ Q.T


def solve(M: Tensor, b: Tensor, max_iter: int = 50, tol: float = 0.0, atol: float = 1e-12) -> Tensor:
    return conjugate_gradients(lambda v: M @ v, b, max_iter, tol, atol)


def test_solves() -> None:
    M, b = matrix(1.0, 2.0, 5.0, 30.0), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(solve(M, b), torch.linalg.solve(M, b), rtol=1e-9, atol=1e-12)
    # Three distinct eigenvalues take three products.
    M = matrix(1.0, 1.0, 5.0, 30.0)
    torch.testing.assert_close(solve(M, b, 3), torch.linalg.solve(M, b), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(solve(M, b, 2), torch.linalg.solve(M, b))


def test_stops_at_the_tolerance() -> None:
    M, b = matrix(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), torch.ones(6, dtype=torch.float64)
    calls = []

    def product(v: Tensor) -> Tensor:
        calls.append(v)
        return M @ v

    x = conjugate_gradients(product, b, 50, 1e-2, 0.0)
    assert (b - M @ x).norm() <= 1e-2 * b.norm() and len(calls) < 6
    calls.clear()
    x = conjugate_gradients(product, b, 50, 0.0, float(b.norm()))
    assert not calls and not x.any()


def test_zero() -> None:
    assert not solve(matrix(1.0, 2.0), torch.zeros(2, dtype=torch.float64), atol=0.0).any()


def test_negative_curvature() -> None:
    """Met at once: the right-hand side. Met later: what was found before. Descent in any case."""
    b = torch.tensor([1.0, 0.2], dtype=torch.float64)
    M = torch.diag(torch.tensor([-1.0, 0.5], dtype=torch.float64))
    assert torch.equal(solve(M, b), b)
    M = torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64))
    length = b @ b / (b @ M @ b)
    torch.testing.assert_close(solve(M, b), length * b)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_leaves_a_saddle(curvature: str) -> None:
    """The product of two factors that should be one, near zero: a saddle of the Hessian's block too."""
    model = Apply(lambda m, a: a * m.w[0] * m.w[1], w=P(2))
    model.double()
    with torch.no_grad():
        model.w.copy_(torch.tensor([0.1, -0.05]))
    X = torch.ones(3, 1, dtype=torch.float64)
    lossfunc = extend(nn.MSELoss())
    optimizer = optim.CGNewton(model, 0.3, 1e-2, curvature=curvature)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = lossfunc(model(X), torch.ones_like(X))
        with optimizer.backpack():
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 < losses[0]


def test_positive_curvature_of_factors_that_are_one_parameter() -> None:
    """There is none: what is multiplied is no linear function of it."""
    model = Apply(lambda m, a: a * m.w[0] * m.w[1], w=P(2))
    optimizer = optim.CGNewton(model, 0.3, 1e-2, curvature="pch")
    with pytest.raises(NotImplementedError, match="linear in it"), optimizer.backpack():
        extend(nn.MSELoss())(model(torch.ones(3, 1)), torch.ones(3, 1)).backward()


def test_releases_the_graph() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = optim.CGNewton(model, 0.1, 0.5)
    loss = extend(nn.MSELoss())(model(torch.randn(5, 3)), torch.randn(5, 2))
    with optimizer.backpack():
        loss.backward()
    product = model[0].weight.ggnmp
    assert product(torch.ones_like(model[0].weight)).any()
    optimizer.step()
    assert not hasattr(model[0].weight, "ggnmp")
