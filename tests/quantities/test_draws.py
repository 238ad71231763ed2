"""More draws of targets than a sample has outputs: fewer columns with the same sums."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.sources import columns
from tests.cases import Apply

Y = torch.tensor([[0, 2], [1, 1], [2, -100]])


def two_outputs(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return m.a(x), m.b(x).flatten(1)


MODELS: dict[str, tuple[nn.Module, Callable[..., Tensor]]] = {
    "classes": (
        nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)),
        lambda f: F.cross_entropy(f, Y[:, 0]),
    ),
    "positions": (
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)),
        lambda f: F.cross_entropy(f.transpose(1, 2), Y),
    ),
    "square": (nn.Sequential(nn.Linear(4, 3)), lambda f: F.mse_loss(f, torch.ones_like(f))),
}


def computed(model: nn.Module, loss: Callable[..., Tensor], summed: bool, draws: int) -> nn.Module:
    model = extend(copy.deepcopy(model).double())
    exts = [E.DiagGGNMC(draws), E.BatchDiagGGNMC(draws), E.KFAC(draws), E.EKFAC(draws)]
    for ext in exts:
        ext.summed = summed
    torch.manual_seed(1)
    x = torch.randn(3, 2, 4).double()
    with backpack(*exts):
        loss(model(x)).backward()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_sums_are_those_of_the_draws(name: str) -> None:
    torch.manual_seed(0)
    model, loss = MODELS[name]
    for draws in (2, 50):
        few, many = (computed(model, loss, summed, draws) for summed in (True, False))
        for p, q in zip(few.parameters(), many.parameters(), strict=True):
            assert torch.allclose(p.diag_ggn_mc, q.diag_ggn_mc)
            assert torch.allclose(p.diag_ggn_mc_batch, q.diag_ggn_mc_batch)
            assert all(torch.allclose(a, b) for a, b in zip(p.kfac, q.kfac, strict=True))
            assert torch.allclose(p.ekfac.trace(), q.ekfac.trace())


def test_columns_are_as_few_as_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of several outputs together."""
    counts: list[int] = []

    class Counted(columns.Columns):
        def __new__(cls, starts, values, *rest):
            counts.append(len(values[0]))
            return super().__new__(cls, starts, values, *rest)

    monkeypatch.setattr("backpack.sources.table.Columns", Counted)
    model, x = extend(Apply(two_outputs, a=nn.Linear(4, 2), b=nn.Linear(4, 1))), torch.randn(3, 2, 4)
    square = lambda fs: sum(f.square().sum() for f in fs)  # noqa: E731
    with backpack(E.DiagGGNMC(1000)):
        square(model(x)).backward()
    assert sum(counts) <= 6
    counts.clear()
    with backpack(E.SqrtGGNMC(7), E.DiagGGNMC(7)):
        square(model(x)).backward()
    assert sum(counts) == 14  # single draws are asked for


def test_differentiable() -> None:
    model = extend(nn.Linear(4, 2).double())
    with backpack(E.DiagGGNMC(20)):
        F.cross_entropy(model(torch.randn(3, 4).double()), Y[:, 1].clamp(0, 1)).backward(
            create_graph=True
        )
    (slope,) = torch.autograd.grad(model.weight.diag_ggn_mc.sum(), model.bias)
    assert slope.isfinite().all()
