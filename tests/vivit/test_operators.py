"""Products with curvature over data, Lanczos' iteration and spectral densities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backpack import extend
from backpack.vivit import GGN, Hessian, LowRank, lanczos, spectral_density
from tests.vivit.dense import Brute, flat, near

X, Y = torch.rand(7, 4).double(), torch.tensor([0, 1, 2, 2, 1, 0, 1])
BATCHES = [(X[:3], Y[:3]), (X[3:4], Y[3:4]), (X[4:], Y[4:])]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def hessian(model: nn.Module, lossfunc: nn.Module) -> Tensor:
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(lossfunc(model(X), Y), parameters, create_graph=True)
    entries = torch.cat([g.flatten() for g in gradient])
    rows = [torch.autograd.grad(e, parameters, retain_graph=True) for e in entries]
    return torch.stack([flat(row) for row in rows])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("extended", [True, False])
def test_products(reduction: str, extended: bool) -> None:
    """Over batches of different sizes, as over all data at once."""
    model, lossfunc = network(), nn.CrossEntropyLoss(reduction=reduction)
    G = Brute(network(), nn.CrossEntropyLoss(reduction=reduction), X, Y).ggns.sum(0)
    if extended:
        model, lossfunc = extend(model), extend(lossfunc)
    x = torch.rand(len(G), 2).double()
    ggn, full = GGN(model, lossfunc, BATCHES), Hessian(model, lossfunc, BATCHES)
    near(ggn @ x, G @ x)
    near(ggn @ x[:, 0], G @ x[:, 0])
    H = hessian(model, lossfunc)
    near(full @ x, H @ x)
    gradient = torch.autograd.grad(lossfunc(model(X), Y), model.parameters())
    near(flat(ggn.gradient()), flat(gradient))
    near(torch.as_tensor(ggn.scipy() @ x.numpy()), G @ x)
    near(torch.as_tensor(full.scipy() @ x[:, 0].numpy()), H @ x[:, 0])
    assert all(p.grad is None for p in model.parameters())


def test_some_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    brute = Brute(network(), nn.CrossEntropyLoss(), X, Y)
    at = brute.entries([brute.parameters["2.weight"], brute.parameters["0.bias"]])
    G = brute.ggns.sum(0)[at][:, at]
    some = [model[2].weight, model[0].bias]
    found = GGN(model, nn.CrossEntropyLoss(), BATCHES, some, progress=True)
    near(found @ torch.eye(len(G)).double(), G)
    assert "product: 7 of 7 samples" in capsys.readouterr().out


def test_scipy_finds_eigenvalues() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    ggn = GGN(network(), nn.CrossEntropyLoss(), BATCHES)
    G = Brute(network(), nn.CrossEntropyLoss(), X, Y).ggns.sum(0)
    values = linalg.eigsh(ggn.scipy(), k=3, return_eigenvectors=False)
    near(torch.as_tensor(values.copy()), torch.linalg.eigvalsh(G)[-3:])


def test_names_of_the_original() -> None:
    pytest.importorskip("scipy.sparse.linalg")
    from backpack.vivit.hessianfree import GGNLinearOperator, HessianLinearOperator

    model, lossfunc = network(), nn.CrossEntropyLoss()
    G = Brute(network(), nn.CrossEntropyLoss(), X, Y).ggns.sum(0)
    x = torch.rand(len(G)).double()
    found = GGNLinearOperator(model, lossfunc, BATCHES, "cpu")
    assert found.shape == tuple(G.shape)
    near(torch.as_tensor(found @ x.numpy()), G @ x)
    found = HessianLinearOperator(model, lossfunc, BATCHES, check_deterministic=False)
    near(torch.as_tensor(found @ x.numpy()), hessian(model, lossfunc) @ x)


def test_refusals() -> None:
    model, lossfunc = network(), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="several times"):
        GGN(model, lossfunc, iter(BATCHES))
    with pytest.raises(RuntimeError, match="different gradients"):
        GGN(nn.Sequential(network(), nn.Dropout(0.5)), lossfunc, BATCHES)
    ggn = GGN(model, lossfunc, data := list(BATCHES))
    with pytest.raises(ValueError, match="cannot multiply"):
        ggn @ torch.ones(3)
    data.pop()
    with pytest.raises(RuntimeError, match="7 samples at first and have 4 now"):
        ggn @ torch.ones(ggn.size)
    with pytest.raises(ValueError, match="requires grad"):
        GGN(model.requires_grad_(False), lossfunc, BATCHES)


def test_from_kept_forms() -> None:
    """The same matrix without a graph; Lanczos' pairs are those of the Gram matrix."""
    model, lossfunc = extend(network()), extend(nn.CrossEntropyLoss())
    brute = Brute(network(), nn.CrossEntropyLoss(), X, Y)
    G = brute.ggns.sum(0)
    with LowRank() as curvature:
        lossfunc(model(X), Y).backward()
    operator = curvature.operator()
    x = torch.rand(len(G), 3).double()
    near(operator @ x, G @ x)
    generator = torch.Generator().manual_seed(0)
    few = curvature.eigh(4, method="lanczos", generator=generator)
    pairs = curvature.eigh(4)
    near(few.values, pairs.values)
    for u, v in zip(few.vectors, pairs.vectors, strict=True):
        near(u.abs(), v.abs(), 1e-5)
    near(curvature.derivatives(few).lambdas, curvature.derivatives(pairs).lambdas, 1e-5)
    near(flat(curvature.newton(few, 0.1)), flat(curvature.newton(pairs, 0.1)), 1e-5)


def symmetric(values: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(len(values), len(values)).double())[0]
    return ((Q * values) @ Q.mT).to(dtype)


@pytest.mark.parametrize(
    ("values", "k"),
    {
        "spread": (torch.linspace(-1, 5, 60).double(), 6),
        "decay": (torch.logspace(2, -8, 60).double(), 10),
        "low rank": (torch.cat([torch.arange(1, 5), torch.zeros(40)]).double(), 7),
        "all": (torch.arange(12).double(), 12),
        "negative": (-torch.arange(1, 30).double(), 3),
        "one": (torch.tensor([2.0]).double(), 1),
        "zero": (torch.zeros(8).double(), 2),
    }.values(),
    ids=["spread", "decay", "low rank", "all", "negative", "one", "zero"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lanczos(values: Tensor, k: int, dtype: torch.dtype) -> None:
    A = symmetric(values, dtype)
    found = lanczos(A, k, generator=torch.Generator().manual_seed(1))
    tolerance = 1e-9 if dtype is torch.float64 else 1e-4
    expected = values.sort(descending=True).values[:k]
    scale = float(values.abs().max())
    assert float((found.values - expected).abs().max()) <= tolerance * max(scale, 1e-12)
    near(found.vectors @ found.vectors.mT, torch.eye(k).double(), 100 * tolerance)
    residuals = (found.vectors @ A - found.values.unsqueeze(1) * found.vectors).norm(dim=1)
    assert float(residuals.max()) <= 10 * tolerance * max(scale, 1e-12)


def test_lanczos_says_when_it_has_not_converged() -> None:
    A = symmetric(torch.linspace(0, 1, 200).double())
    with pytest.warns(UserWarning, match="residuals of up to"):
        lanczos(A, 5, iterations=8)


def test_density() -> None:
    """Moments, functions of the matrix, and where the mass is."""
    values = torch.cat([torch.linspace(0, 1, 180), torch.linspace(9, 10, 20)]).double()
    A = symmetric(values)
    generator = torch.Generator().manual_seed(0)
    found = spectral_density(A, steps=40, draws=20, generator=generator)
    assert abs(float(found.weights.sum()) - 1) < 1e-10
    assert abs(float(found.trace()) / float(values.sum()) - 1) < 0.05
    exact = (values / (values + 0.1)).sum()
    assert abs(float(found.trace(lambda x: x / (x + 0.1)) / exact) - 1) < 0.02
    grid = torch.linspace(-2, 12, 500).double()
    density = found.on(grid)
    step = float(grid[1] - grid[0])
    assert abs(float(density.sum()) * step - 1) < 1e-2
    assert abs(float(density[grid > 5].sum()) * step - 0.1) < 0.02


def test_density_of_all_vectors() -> None:
    """With one step for each dimension, and a start that is no eigenvector, the spectrum itself."""
    values = torch.arange(1, 9).double()
    found = spectral_density(symmetric(values), steps=50, draws=1)
    near(found.values.sort().values, values)


def test_argument() -> Any:
    with pytest.raises(ValueError, match="method"):
        curvature = LowRank()
        model, lossfunc = extend(network()), extend(nn.CrossEntropyLoss())
        with curvature:
            lossfunc(model(X), Y).backward()
        curvature.eigh(2, method="power")
