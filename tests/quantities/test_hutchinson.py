"""The Hessian diagonal estimated by random signs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import (
    BatchDiagHessian,
    BatchDiagHessianMC,
    DiagHessian,
    DiagHessianMC,
)
from tests.cases import Apply, Case, P, flat, norm, seq, x

N = 3
MODELS = [
    Case("mlp", lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), x(N, 3)),
    Case("conv", lambda: flat(nn.Conv1d(2, 2, 2), nn.Sigmoid()), x(N, 2, 2)),
    Case("twice", lambda: Apply(lambda m, a: m.f(m.f(a).tanh()), f=nn.Linear(3, 3)), x(N, 3)),
    Case("norm", lambda: seq(nn.Linear(3, 4), norm(nn.LayerNorm(4)), nn.Linear(4, 2)), x(N, 3)),
    Case("curved", lambda: Apply(lambda m, a: (a * m.w).sin() @ m.v.exp(), w=P(3), v=P(3, 2)), x(N, 3)),
    Case("derived", lambda: Apply(lambda m, a: (a @ m.w.exp()).tanh(), w=P(3, 2)), x(N, 3)),
]  # fmt: skip
LOSSES = [
    (nn.CrossEntropyLoss(), lambda f: torch.randint(f.shape[1], (len(f),))),
    (nn.MSELoss(), torch.randn_like),
]
COUNT = 1000


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def run(model: nn.Module, X: Tensor, y: Tensor, lossfunc: nn.Module, *extensions) -> None:
    with backpack(*extensions):
        lossfunc(model(X), y).backward()


@pytest.mark.parametrize("kind", range(len(LOSSES)))
@pytest.mark.parametrize("case", MODELS, ids=lambda c: c.name)
def test_unbiased(case: Case, kind: int) -> None:
    """The mean over many draws, in units of its own standard deviation, which batches of draws give."""
    model, X = extend(case.model().double()), case.inputs().double()
    lossfunc = extend(LOSSES[kind][0])
    y = LOSSES[kind][1](model(X).detach())
    run(model, X, y, lossfunc, DiagHessian(), BatchDiagHessian())
    whole, batches = [], []
    for _ in range(20):
        draws = COUNT // 20 if case.name not in ("curved", "derived", "twice") else 20
        run(model, X, y, lossfunc, DiagHessianMC(draws), BatchDiagHessianMC(draws))
        whole.append(torch.cat([p.diag_h_mc.flatten() for p in model.parameters()]))
        batches.append(torch.cat([p.diag_h_mc_batch.flatten(1) for p in model.parameters()], 1))
    exact = torch.cat([p.diag_h.flatten() for p in model.parameters()])
    exact_batch = torch.cat([p.diag_h_batch.flatten(1) for p in model.parameters()], 1)
    for found, expected in ((torch.stack(whole), exact), (torch.stack(batches), exact_batch)):
        error = (found.mean(0) - expected).abs()
        deviation = found.std(0) / 20**0.5
        assert bool((error <= 6 * deviation + 1e-9).all())
        assert bool((error.norm() < 0.2 * expected.norm()).all())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_exact_where_the_hessian_is_diagonal(reduction: str) -> None:
    """Signs square to one."""
    model = extend(Apply(lambda m, a: (a * m.w).sin(), w=P(3)).double())
    lossfunc, X = extend(nn.MSELoss(reduction=reduction)), torch.randn(N, 3).double()
    run(
        *(model, X, torch.randn(N, 3).double(), lossfunc),
        *(DiagHessianMC(), BatchDiagHessianMC(), DiagHessian(), BatchDiagHessian()),
    )
    torch.testing.assert_close(model.w.diag_h_mc, model.w.diag_h, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.w.diag_h_mc_batch, model.w.diag_h_batch, rtol=1e-9, atol=1e-12)


def test_reproducible() -> None:
    model, lossfunc = extend(nn.Linear(3, 2)), extend(nn.CrossEntropyLoss())
    X, y, found = torch.randn(N, 3), torch.randint(2, (N,)), []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        run(model, X, y, lossfunc, DiagHessianMC(2, generator))
        found.append(model.weight.diag_h_mc)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
