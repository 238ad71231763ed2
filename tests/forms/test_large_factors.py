"""Kronecker factors that would be too large are kept as their diagonals, and work as matrices do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend, optim, plan
from backpack import extensions as E
from backpack.forms import base, lookup, outer
from backpack.kronecker import KroneckerEigen, KroneckerFactored
from tests.cases import Apply, P

Y = torch.tensor([[1, 0, 6], [5, 5, 2], [3, 4, 0], [6, 1, 1]])
IDS = torch.tensor([[1, 1, 2], [0, 6, 3], [5, 5, 5], [2, 4, 0]])


class Words(nn.Module):
    """A language model of one layer; ``tied``: its table is its head, too."""

    def __init__(self, rows: int = 7, width: int = 3, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(rows, width, padding_idx=4)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, rows, bias=not tied)
        self.scale = nn.Parameter(torch.rand(rows))
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return (self.head(self.mix(self.table(ids)).tanh()) * self.scale).transpose(1, 2)


def values(model: Words, exts: list[E.KFAC]) -> Words:
    model = extend(copy.deepcopy(model).double())
    torch.manual_seed(1)
    with backpack(*exts):
        F.cross_entropy(model(IDS), Y).backward()
    return model


@pytest.fixture
def at_most_four(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (base, lookup, outer):
        monkeypatch.setattr(room, "LARGEST_FACTOR", 4)


@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
@pytest.mark.parametrize("tied", [False, True])
def test_diagonals_of_the_factors(tied: bool, approx: str | None, monkeypatch) -> None:
    exts = [E.KFLR(approx), E.KFAC(2, None, approx), E.EmpiricalKFAC(approx)]
    exts += [E.EKFLR(approx)]
    model = Words(tied=tied)
    whole = values(model, exts)
    for room in (base, lookup, outer):
        monkeypatch.setattr(room, "LARGEST_FACTOR", 4)
    large = values(model, exts)
    vectors = 0
    for p, q in zip(whole.parameters(), large.parameters(), strict=True):
        for field in ("kflr", "kfac", "kfac_empirical"):
            for full, found in zip(getattr(p, field), getattr(q, field), strict=True):
                vectors += found.dim() == 1
                assert (found.dim() == 1) == (len(full) > 4)
                assert torch.allclose(found, full.diagonal() if found.dim() == 1 else full)
        _same_algebra(q.kflr)
        diagonal = q.diag = q.ekflr.diagonal()
        assert torch.allclose(diagonal.sum(), p.ekflr.diagonal().sum())
        if all(each.dim() == 1 for each in q.kflr):  # eigenvectors are units: the GGN's own diagonal
            with backpack(E.DiagGGNExact()):
                F.cross_entropy(large(IDS), Y).backward()
            assert torch.allclose(diagonal, q.diag_ggn_exact)
    assert vectors >= 6


def _same_algebra(block: KroneckerFactored) -> None:
    dense = KroneckerFactored(
        [torch.diag(f) if f.dim() == 1 else f for f in block],
        block.shape,
        block.layout,
        block.averaged_over,
    )
    v = torch.linspace(-1, 1, 2 * block.shape.numel()).double().reshape(2, *block.shape)
    for make in (
        lambda b: b.apply(v),
        lambda b: b.solve(v, 0.1),
        lambda b: b.solve(v, 0.1, pi=True),
        lambda b: b.sqrt().apply(v),
        lambda b: b.trace(),
        lambda b: b.diagonal(),
        lambda b: b.logdet(0.1),
        lambda b: b.eig().apply(v),
        lambda b: b.eig().solve(v, 0.1),
        lambda b: b.scale(3.0).add(b).apply(v),
        lambda b: b.to_dense(),
        lambda b: KroneckerFactored.from_state_dict(b.state_dict()).apply(v),
        lambda b: KroneckerEigen.from_state_dict(b.eig().state_dict()).diagonal(),
    ):
        assert torch.allclose(make(block), make(dense))
    g = torch.Generator()
    draws = block.sample_inverse(3, 0.1, generator=g.manual_seed(0))
    assert draws.shape == (3, *block.shape) and bool(draws.isfinite().all())


@pytest.mark.parametrize("width", [4, 5])
def test_blocks_of_tables(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of positions has one factor, its block, whose numbers are the square of its own."""
    monkeypatch.setattr(base, "LARGEST_BLOCK", 12)
    model = Apply(
        lambda m, x: m.o(x + m.table).sum(1), o=nn.Linear(width, 2), table=P(3, width)
    ).double()
    x, y = torch.randn(4, 3, width).double(), torch.tensor([0, 1, 1, 0])
    found = plan(extend(model), x, E.KFLR(), nn.CrossEntropyLoss(), y)
    with backpack(E.KFLR(), E.DiagGGNExact()):
        extend(nn.CrossEntropyLoss())(model(x), y).backward()
    (factor,) = model.table.kflr
    assert factor.shape == ((12, 12) if width == 4 else (15,))
    diagonal = factor.diagonal() if factor.dim() == 2 else factor
    assert torch.allclose(diagonal, model.table.diag_ggn_exact.flatten())
    assert [s.bytes for s in found.steps if s.parameter == "table"] == [8 * factor.numel()]
    assert len(model.o.bias.kflr[0].shape) == 2 and [f.dim() for f in model.o.weight.kflr] == [2, 2]


@pytest.mark.parametrize("kind", [optim.KFAC, optim.KFLR, optim.EKFAC, optim.EKFLR])
def test_optimizers(kind: type[optim.KFAC], at_most_four: None) -> None:
    model = extend(Words())
    optimizer = kind(model, lr=0.3, damping=0.1, ema_decay=0.9)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(IDS), Y)
        with optimizer.backpack():
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("tied", [False, True])
def test_a_real_vocabulary(tied: bool) -> None:
    """50,257 words, the loss not extended: no matrix of that size, and no pass for every word."""
    words = 50257
    model = extend(Words(words, 2, tied))
    exts = [E.KFAC(), E.DiagGGNMC(), E.BatchL2Grad(), E.EmpiricalKFAC()]
    with backpack(*exts):
        logits = model(7000 * IDS)
        F.cross_entropy(logits.transpose(1, 2).reshape(-1, words), 8000 * Y.reshape(-1)).backward()
    weight = model.head.weight
    shapes = [tuple(f.shape) for f in weight.kfac]
    assert shapes == ([(2 * words,)] if tied else [(words,), (2, 2)])
    assert weight.kfac.solve(weight.grad, 0.1).isfinite().all()
    assert torch.allclose(weight.diag_ggn_mc.sum(), weight.diag_ggn_mc.abs().sum())
