"""Small problems, and steps by dense linear algebra in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, disable, extend, optim
from backpack import extensions as E
from backpack.kronecker.eigen import KroneckerEigen
from backpack.testing.oracle import Oracle

N = 5


class Problem:
    """A small network in float64, data, and cross-entropy."""

    def __init__(self, model: nn.Module | None = None, X: Tensor | None = None, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = (model or network()).double()
        self.X = torch.randn(N, 1, 4, 4, dtype=torch.float64) if X is None else X
        self.y = torch.arange(len(self.X)) % 3
        self.lossfunc = extend(nn.CrossEntropyLoss())

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def loss(self) -> Tensor:
        return self.lossfunc(self.model(self.X), self.y)

    def oracle(self) -> Oracle:
        return Oracle(self.model, F.cross_entropy, self.X, self.y)

    def step(self, optimizer: Any) -> Tensor:
        """One pass of the documented loop."""
        optimizer.zero_grad()
        loss = self.loss()
        with optimizer.backpack():
            loss.backward()
        optimizer.step()
        return loss.detach()

    def quantity(self, extension: E.BackpropExtension) -> list[Any]:
        """What plain backpack saves; parameters are left without gradients."""
        with backpack(extension):
            extend(self.model)
            self.loss().backward()
        found = [getattr(p, extension.savefield) for p in self.parameters]
        self.model.zero_grad()
        for p in self.parameters:
            delattr(p, extension.savefield)
        return found

    def gradients(self) -> list[Tensor]:
        """Of the parameters that are not frozen."""
        with disable():
            return list(
                torch.autograd.grad(self.loss(), [p for p in self.parameters if p.requires_grad])
            )


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


# --------------------------------------------------------------------------------------
# Curvature blocks [P, P], from brute force where it exists


def _diagonal(values: dict[str, Tensor]) -> list[Tensor]:
    return [torch.diag(value.flatten()) for value in values.values()]


def _ggn(problem: Problem) -> list[Tensor]:
    return list(problem.oracle().ggn.values())


def _hessian(problem: Problem) -> list[Tensor]:
    with disable():
        gradients = torch.autograd.grad(problem.loss(), problem.parameters, create_graph=True)
        return [
            torch.stack(
                [torch.autograd.grad(e, p, retain_graph=True)[0].flatten() for e in g.flatten()]
            )
            for g, p in zip(gradients, problem.parameters, strict=True)
        ]


def _products(problem: Problem) -> list[Tensor]:
    """Of the positive-curvature Hessian; its products have a test of their own."""
    blocks = []
    for p, product in zip(problem.parameters, problem.quantity(E.PCHMP()), strict=True):
        columns = torch.eye(p.numel(), dtype=p.dtype).reshape(-1, *p.shape)
        blocks.append(product(columns).flatten(1))
    return blocks


def kron(factors: list[Tensor]) -> Tensor:
    """The Kronecker product of one or two matrices."""
    return torch.kron(*factors) if len(factors) == 2 else factors[0]


def dense(value: list[Tensor] | KroneckerEigen, gamma: float) -> Tensor:
    """Damped Kronecker-factored block, by the formulas of the docstrings."""
    if isinstance(value, KroneckerEigen):
        Q = kron(value.eigenvectors)
        return Q @ torch.diag(value.eigenvalues.flatten() + gamma) @ Q.T
    if len(value) == 1:
        return value[0] + gamma * torch.eye(len(value[0]), dtype=torch.float64)
    B, A = value
    pi = ((A.trace() / len(A)) / (B.trace() / len(B))) ** 0.5
    B = B + gamma**0.5 / pi * torch.eye(len(B), dtype=torch.float64)
    return torch.kron(B, A + gamma**0.5 * pi * torch.eye(len(A), dtype=torch.float64))


def _kronecker(make: Callable[[], E.BackpropExtension]) -> Callable[[Problem, float], list[Tensor]]:
    return lambda problem, gamma: [dense(value, gamma) for value in problem.quantity(make())]


def _plain(blocks: Callable[[Problem], list[Tensor]]) -> Callable[[Problem, float], list[Tensor]]:
    return lambda problem, gamma: [
        block + gamma * torch.eye(len(block), dtype=torch.float64) for block in blocks(problem)
    ]


# Constructor (of parameters, learning rate and damping) and damped blocks, for each optimizer.
Make = Callable[..., Any]
STEPS: dict[str, tuple[Make, Callable[[Problem, float], list[Tensor]]]] = {
    "DiagGGNExact": (
        optim.DiagGGNExact,
        _plain(lambda p: _diagonal(p.oracle().value("diag_ggn_exact"))),
    ),
    "DiagGGNMC": (
        lambda *a, **k: optim.DiagGGNMC(*a, mc_samples=2, generator=generator(), **k),
        _plain(
            lambda p: [torch.diag(c.flatten()) for c in p.quantity(E.DiagGGNMC(2, generator()))],
        ),
    ),
    "DiagHessian": (
        optim.DiagHessian,
        _plain(lambda p: [d.abs() for d in _diagonal(p.oracle().value("diag_h"))]),
    ),
    "SumGradSquared": (
        optim.SumGradSquared,
        _plain(lambda p: [N * d for d in _diagonal(p.oracle().value("sum_grad_squared"))]),
    ),
    "KFAC": (
        lambda *a, **k: optim.KFAC(*a, mc_samples=2, generator=generator(), **k),
        _kronecker(lambda: E.KFAC(2, generator())),
    ),
    "KFLR": (optim.KFLR, _kronecker(E.KFLR)),
    "KFLR expand": (
        lambda *a, **k: optim.KFLR(*a, kfac_approx="expand", **k),
        _kronecker(lambda: E.KFLR("expand")),
    ),
    "KFAC reduce": (
        lambda *a, **k: optim.KFAC(*a, kfac_approx="reduce", generator=generator(), **k),
        _kronecker(lambda: E.KFAC(1, generator(), "reduce")),
    ),
    "KFRA": (optim.KFRA, _kronecker(E.KFRA)),
    "EKFAC": (
        lambda *a, **k: optim.EKFAC(*a, generator=generator(), **k),
        _kronecker(lambda: E.EKFAC(1, generator())),
    ),
    "EKFLR": (optim.EKFLR, _kronecker(E.EKFLR)),
    "CGNewton": (
        lambda *a, **k: optim.CGNewton(*a, tol=0, atol=1e-13, **k),
        _plain(_ggn),
    ),
    "CGNewton hessian": (
        lambda *a, **k: optim.CGNewton(*a, curvature="hessian", tol=0, atol=1e-13, **k),
        _plain(_hessian),
    ),
    "CGNewton pch": (
        lambda *a, **k: optim.CGNewton(*a, curvature="pch", tol=0, atol=1e-13, **k),
        _plain(_products),
    ),
}
