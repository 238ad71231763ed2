"""Kronecker-factored steps: where matrices are in parameters, exact cases, singular factors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend, optim
from backpack import extensions as E
from backpack.kronecker.matrices import pi_damping
from backpack.optim.factors import damped_inverse
from backpack.testing.oracle import Oracle
from tests.cases import Apply, P
from tests.optim.problems import Problem, dense


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def close(a: Tensor, b: Tensor, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-11)


def head(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 3))


# --------------------------------------------------------------------------------------
# Layouts


def right() -> nn.Module:
    """A matrix that multiplies from the right, as large as it is wide."""
    return Apply(lambda m, a: torch.tanh(a @ m.w) @ m.v, w=P(4, 4), v=P(4, 3))


# One sample, and every weight at one position: factors are exact, whatever place they have.
EXACT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), lambda: randn(1, 4)),
    "right": (right, lambda: randn(1, 4)),
    "convolution": (lambda: head(nn.Conv2d(4, 4, 2), nn.Tanh(), width=4), lambda: randn(1, 4, 2, 2)),
    "transposed": (
        lambda: head(nn.ConvTranspose2d(4, 4, 1), nn.Tanh(), width=4),
        lambda: randn(1, 4, 1, 1),
    ),
    "table": (lambda: head(nn.Embedding(4, 4), nn.Tanh(), width=4), lambda: torch.tensor([[2]])),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)), lambda: randn(1, 4)),
    "derived": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        lambda: randn(1, 4),
    ),
}


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("name", EXACT)
def test_exact_for_one_sample_at_one_position(name: str, gamma: float) -> None:
    """The step of the GGN's block by brute force; EKFLR's with any damping, KFLR's with none."""
    make, data = EXACT[name]
    for optimizer in (optim.EKFLR,) if gamma else (optim.EKFLR, optim.KFLR):
        torch.manual_seed(0)
        problem = Problem(make(), data())
        before, gradients = problem.values(), problem.gradients()
        blocks = problem.oracle().ggn.values()
        problem.step(optimizer(problem.model, 1.0, gamma))
        for p, old, g, block in zip(problem.parameters, before, gradients, blocks, strict=True):
            block = block + gamma * torch.eye(len(block), dtype=block.dtype)
            inverse = torch.linalg.pinv(block, hermitian=True, rtol=1e-10)
            close(p.detach(), old - (inverse @ g.flatten()).reshape(p.shape))


# Weights whose factors belong to another order of their entries.
ORDERS = {
    "square": (nn.ConvTranspose2d(4, 4, 2), 1),
    "wide": (nn.ConvTranspose2d(4, 2, 2), 1),
    "two groups": (nn.ConvTranspose2d(4, 4, 2, groups=2), 2),
    "depthwise": (nn.ConvTranspose2d(4, 4, 2, groups=4), 4),
}


@pytest.mark.parametrize("optimizer", [optim.KFLR, optim.EKFLR])
@pytest.mark.parametrize("name", ORDERS)
def test_transposed_convolutions(name: str, optimizer: type[optim.KFLR] | type[optim.EKFLR]) -> None:
    layer, groups = ORDERS[name]
    width = layer.out_channels * 9
    problem = Problem(head(layer, nn.Tanh(), width=width), randn(4, 4, 2, 2))
    before, gradient = layer.weight.detach().clone(), problem.gradients()[0]
    quantity = E.KFLR() if optimizer is optim.KFLR else E.EKFLR()
    block = dense(problem.quantity(quantity)[0], 0.3)
    # Entries numbered as (group, output, input, kernel); stored as (group, input, output, kernel).
    i, o = 4 // groups, layer.out_channels // groups
    order = torch.arange(before.numel()).reshape(groups, i, o, 4).transpose(1, 2).flatten()
    expected = before.flatten().clone()
    expected[order] -= torch.linalg.solve(block, gradient.flatten()[order])
    problem.step(optimizer(problem.model, 1.0, 0.3))
    close(layer.weight.detach(), expected.reshape(before.shape))


@pytest.mark.parametrize("optimizer", [optim.KFLR, optim.EKFLR])
def test_transposed_convolutions_resume(optimizer: type[optim.KFLR] | type[optim.EKFLR]) -> None:
    """Between two updates, with what the ``state_dict`` says about the order of entries."""
    problem = Problem(head(nn.ConvTranspose2d(4, 2, 2), nn.Tanh(), width=18), randn(4, 4, 2, 2))
    first = optimizer(problem.model, 0.1, 0.3, update_every=3)
    problem.step(first)
    other = Problem(copy.deepcopy(problem.model), problem.X)
    resumed = optimizer(other.model, 9.0, 9.0)
    resumed.load_state_dict(first.state_dict())
    for each, its in ((problem, first), (other, resumed)):
        each.step(its)
    assert all(torch.equal(a, b) for a, b in zip(problem.values(), other.values(), strict=True))


def test_shared_weights() -> None:
    """A layer used twice, and a weight that is a table and a matrix (one dense factor)."""
    tied = nn.Linear(4, 4)
    problem = Problem(nn.Sequential(tied, nn.Tanh(), tied, nn.Tanh(), nn.Linear(4, 3)), randn(5, 4))
    table = Apply(lambda m, a: F.linear(F.embedding(a, m.w).mean(1), m.w), w=P(3, 4))
    for each in (problem, Problem(table, torch.randint(3, (5, 2)))):
        before, gradients = each.values(), each.gradients()
        blocks = [dense(value, 0.3) for value in each.quantity(E.KFLR())]
        each.step(optim.KFLR(each.model, 1.0, 0.3))
        for p, old, g, block in zip(each.parameters, before, gradients, blocks, strict=True):
            close(p.detach(), old - torch.linalg.solve(block, g.flatten()).reshape(p.shape))


@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
def test_tables(approx: str | None) -> None:
    """Row frequencies are a diagonal matrix, kept as a vector; those of averaged positions are not."""
    problem = Problem(head(nn.Embedding(7, 2), width=6), torch.randint(7, (5, 3)))
    before, gradients = problem.values(), problem.gradients()
    blocks = [dense(value, 0.3) for value in problem.quantity(E.KFLR(kfac_approx=approx))]
    optimizer = optim.KFLR(problem.model, 1.0, 0.3, ema_decay=0.9, kfac_approx=approx)
    problem.step(optimizer)
    for p, old, g, block in zip(problem.parameters, before, gradients, blocks, strict=True):
        close(p.detach(), old - torch.linalg.solve(block, g.flatten()).reshape(p.shape))
    state = optimizer.state[problem.parameters[0]]
    dims = [1, 2] if approx != "reduce" else [2, 2]
    problem.X = problem.X.flip(0)
    problem.step(optimizer)
    for kept in ("inverses", "factors"):
        assert [each.dim() for each in state[kept]] == dims
        assert [len(each) for each in state[kept]] == [7, 2]


def test_average_of_a_diagonal_and_a_full_factor() -> None:
    """One token in every sample has diagonal frequencies even where positions are averaged."""
    problem = Problem(head(nn.Embedding(4, 2), width=4), torch.tensor([[1, 1], [2, 2], [0, 0]]))
    optimizer = optim.KFLR(problem.model, 0.0, 0.3, ema_decay=0.9, kfac_approx="reduce")
    seen = [problem.quantity(E.KFLR("reduce"))[0]]
    problem.step(optimizer)
    problem.X = torch.tensor([[1, 2], [2, 3], [0, 1]])
    seen.append(problem.quantity(E.KFLR("reduce"))[0])
    problem.step(optimizer)
    for kept, first, second in zip(
        optimizer.state[problem.parameters[0]]["factors"], *seen, strict=True
    ):
        close(kept, (first + second) / 2)


@pytest.mark.parametrize("name", ["linear", "right", "table", "transposed"])
def test_averages_under_a_scaler_whose_factor_changes(name: str) -> None:
    """The one factor that has the scaler's factor is not always the first."""
    make, data = EXACT[name]
    found = []
    for growth in (1.0, 4.0):
        torch.manual_seed(0)
        problem = Problem(make(), data())
        optimizer = optim.KFLR(problem.model, 0.3, 0.1, ema_decay=0.9)
        for step in range(3):
            optimizer.zero_grad()
            scale = growth**step
            with optimizer.backpack(scale=scale):
                (scale * problem.loss()).backward()
            for p in problem.parameters:
                p.grad /= scale
            optimizer.step()
        found.append(problem.values())
    for a, b in zip(*found, strict=True):
        close(a, b)


# --------------------------------------------------------------------------------------
# Least squares


NEWTON = {
    "KFLR": lambda m: optim.KFLR(m, 1.0, 0.0),
    "KFRA": lambda m: optim.KFRA(m, 1.0, 0.0),
    "EKFLR": lambda m: optim.EKFLR(m, 1.0, 0.0),
    "CGNewton": lambda m: optim.CGNewton(m, 1.0, 0.0, tol=0, atol=1e-14, max_iter=200),
    "CGNewton hessian": lambda m: optim.CGNewton(m, 1.0, 0.0, curvature="hessian", tol=0, atol=1e-14),
}


@pytest.mark.parametrize("samples", [30, 4])
@pytest.mark.parametrize("name", NEWTON)
def test_one_step_solves_least_squares(name: str, samples: int) -> None:
    """Ill-conditioned; with fewer samples than unknowns, the nearest of all solutions."""
    scales = torch.logspace(0, -2, 6, dtype=torch.float64)
    X, y = randn(samples, 6) * scales, randn(samples, 3)
    model = nn.Linear(6, 3, bias=False).double()
    before = model.weight.detach().clone()
    optimizer, lossfunc = NEWTON[name](model), extend(nn.MSELoss())
    with optimizer.backpack():
        lossfunc(model(X), y).backward()
    optimizer.step()
    residual = y - X @ before.T
    change = (torch.linalg.pinv(X) @ residual).T
    close(model.weight.detach(), before + change, rtol=1e-6)


# --------------------------------------------------------------------------------------
# Damping


def test_pi_damping() -> None:
    B, A = torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([8.0, 4.0, 12.0])
    b, a = pi_damping([B, A], 0.09)
    assert b == pytest.approx(0.3 / 2) and a == pytest.approx(0.3 * 2)
    assert pi_damping([B, 0 * A], 0.09) == pytest.approx([0.3, 0.3])
    assert pi_damping([B], 0.09) == [0.09]


def indefinite() -> Tensor:
    root = torch.linalg.qr(randn(3, 3)).Q
    return root @ torch.diag(torch.tensor([-1e-3, 0.5, 2.0], dtype=torch.float64)) @ root.T


def test_damping_is_doubled_until_a_factor_can_be_inverted() -> None:
    matrix, eye = indefinite(), torch.eye(3, dtype=torch.float64)
    close(damped_inverse(matrix, 3e-4, "'w'"), torch.linalg.inv(matrix + 12e-4 * eye))
    vector = torch.tensor([-1e-3, 0.5], dtype=torch.float64)
    close(damped_inverse(vector, 3e-4, "'w'"), 1 / (vector + 12e-4))
    for factor in (matrix, vector):
        with pytest.raises(
            ValueError, match="of parameter 'w' is not positive definite, even with 1.0e-09"
        ):
            damped_inverse(factor, 1e-12, "'w'")
        with pytest.raises(ValueError, match="of parameter 'w' has negative eigenvalues"):
            damped_inverse(factor, 0.0, "'w'")


def test_a_factor_that_cannot_be_inverted() -> None:
    problem = Problem()
    optimizer = optim.KFLR(problem.model, 0.1, 1e-8)
    with optimizer.backpack():
        problem.loss().backward()
    problem.parameters[2].kflr[0] -= torch.eye(3)
    values = problem.values()
    with pytest.raises(ValueError, match="a Kronecker factor of parameter '3.weight' is not positive"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(problem.values(), values, strict=True))
    assert not optimizer.state


@pytest.mark.parametrize("seed", range(3))
def test_low_rank_in_single_precision(seed: int) -> None:
    """Moments of rectified features, half of them dead; LAPACK's eigensolver fails on some of these."""
    torch.manual_seed(seed)
    features = torch.randn(64, 512) * torch.logspace(0, -6, 512)
    features = features.relu() * (torch.rand(512) < 0.5)
    moments = features.T @ features / 64
    inverse = damped_inverse(moments, 0.0, "'w'").double()
    eigenvalues, basis = torch.linalg.eigh(moments.double())
    large = eigenvalues > 1e-2 * eigenvalues[-1]
    product = basis[:, large].T @ inverse @ basis[:, large]
    torch.testing.assert_close(product, torch.diag(1 / eigenvalues[large]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", [optim.KFLR, optim.EKFLR])
def test_no_curvature(optimizer: type[optim.KFLR] | type[optim.EKFLR], damping: float) -> None:
    """Inputs that are zero: factors are zero, and the step of zero gradients is zero."""
    problem = Problem(
        nn.Sequential(nn.Linear(4, 3, bias=False)), torch.zeros(5, 4, dtype=torch.float64)
    )
    before = problem.values()
    problem.step(optimizer(problem.model, 1.0, damping))
    close(*problem.values(), *before)


def test_half_precision() -> None:
    """Matrices are inverted in single precision."""
    exact, half = Problem(), Problem()
    exact.model.bfloat16().double()
    half.model.bfloat16()
    half.X = half.X.bfloat16()
    for each in (exact, half):
        each.step(optim.KFLR(each.model, 0.3, 0.5))
    for a, b in zip(half.values(), exact.values(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.01)


def test_factors_of_another_block() -> None:
    """They tell where in the parameter they belong; plain lists do not."""
    problem, other = Problem(), Problem()
    for each in (problem, other):
        optimizer = optim.KFLR(each.model, 0.1, 0.5)
        with optimizer.backpack() if each is other else backpack(E.KFLR()):
            each.loss().backward()
        optimizer.step()
    for a, b in zip(problem.values(), other.values(), strict=True):
        assert torch.equal(a, b)
    with optimizer.backpack():
        other.loss().backward()
    for p in other.parameters:
        p.kflr = list(p.kflr)
    with pytest.raises(RuntimeError, match="kflr of parameter '0.weight' does not come from"):
        optimizer.step()


def test_oracle_is_of_the_same_loss() -> None:
    """The reference of this file: cross-entropy's GGN of a linear model, in closed form."""
    X, y = randn(4, 2), torch.tensor([0, 1, 2, 1])
    model = nn.Linear(2, 3).double()
    p = model(X).softmax(1).detach()
    H = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / 4
    expected = torch.einsum("nab,ni,nj->aibj", H, X, X).reshape(6, 6)
    close(Oracle(model, F.cross_entropy, X, y).ggn["weight"], expected)
