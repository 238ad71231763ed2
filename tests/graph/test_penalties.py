"""Terms of a loss from inside of a model: penalties on parameters, activations, picked rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.testing.oracle import check

EXTS = [
    *(E.BatchGrad(), E.BatchL2Grad(), E.Variance(), E.DiagGGNExact(), E.BatchDiagGGNExact()),
    *(E.DiagHessian(), E.BatchDiagHessian()),
]
X, Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])


def added_in_place(m: nn.Module) -> Tensor:
    total = torch.zeros(())
    for p in m.parameters():
        total += p.square().sum()
    return total


def drawn(m: nn.Module) -> Tensor:
    """As of Bayes by backprop: an estimate of a divergence, with noise."""
    return sum((p + p.exp() * torch.ones_like(p)).log_softmax(0).mean() for p in m.parameters())


PENALTIES: dict[str, Callable[[Any], Tensor]] = {
    "sum of squares": lambda m: sum(p.square().sum() for p in m.parameters()),
    "in place": added_in_place,
    "divergence": drawn,
    "norms": lambda m: torch.stack([p.norm() for p in m.parameters()]).sum(),
    "each layer's": lambda m: torch.stack([p.abs().sum() for p in m.parameters()]),
    "orthogonality": lambda m: (m.o.weight @ m.o.weight.T - torch.eye(3)).square().sum(),
    "flat": lambda m: torch.cat([p.reshape(-1) for p in m.parameters()]).square().mean(),
    "detached and not": lambda m: (m.l.weight * m.l.weight.detach().sign()).sum(),
}


class Penalised(nn.Module):
    def __init__(self, penalty: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.l, self.o, self.penalty = nn.Linear(4, 6), nn.Linear(6, 3), penalty

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        penalty = self.penalty(self)
        return self.o(self.l(x).tanh()), penalty


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties(name: str) -> None:
    """They are part of the gradient and of no quantity, as weight decay outside of the model is."""
    torch.manual_seed(0)
    model = Penalised(PENALTIES[name])
    plain = nn.Sequential(model.l, nn.Tanh(), model.o)
    report = check(plain, F.cross_entropy, X, Y, EXTS)
    assert report.ok, report
    expected = _values(extend(plain), lambda f: F.cross_entropy(f, Y))
    alone = [p.grad.clone() for p in plain.parameters()]
    (0.1 * model.penalty(model).sum()).backward()
    both = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    found = _values(extend(model), lambda out: F.cross_entropy(out[0], Y) + 0.1 * out[1].sum())
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    assert all(
        torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(model.parameters(), both, strict=True)
    )
    assert any(not torch.allclose(a, b) for a, b in zip(both, alone, strict=True))


def _values(model: nn.Module, loss: Callable[[Any], Tensor]) -> list[Tensor]:
    with backpack(*EXTS):
        loss(model(X)).backward()
    return [getattr(p, ext.savefield) for p in model.parameters() for ext in EXTS]


class Uses(nn.Module):
    """Terms of data that nobody saw."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.l, self.kind = nn.Linear(4, 3), kind

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.l(x)
        if self.kind == "mapped":
            return out, torch.vmap(self.l)(x).sum()
        with torch._C.DisableTorchFunction():
            return out, (x @ self.l.weight.t()).square().sum()


def test_what_a_transform_maps_over_samples_is_theirs() -> None:
    model = Uses("mapped")
    shares = []
    for n in range(len(X)):
        out, term = model(X[n : n + 1])
        share = F.cross_entropy(out, Y[n : n + 1]) / len(X) + term
        shares.append(torch.autograd.grad(share, model.l.weight)[0])
    extend(model)
    with backpack(E.BatchGrad()):
        out, term = model(X)
        (F.cross_entropy(out, Y) + term).backward()
    torch.testing.assert_close(model.l.weight.grad_batch, torch.stack(shares))


def test_what_nobody_saw_is_no_penalty() -> None:
    model = extend(Uses("unseen"))
    with pytest.raises(RuntimeError, match="cannot see"), backpack(E.BatchGrad()):
        out, penalty = model(X)
        (F.cross_entropy(out, Y) + penalty).backward()


class Layers(nn.Module):
    """Hidden activations are part of the loss, ``inside`` of the model or outside."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.l, self.o, self.inside = nn.Linear(4, 6), nn.Linear(6, 3), inside

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.l(x).tanh()
        return self.o(hidden), hidden.square().sum(1).mean() if self.inside else hidden


def test_losses_of_activations() -> None:
    """Second-order quantities need the activations; with them they are exact."""
    torch.manual_seed(0)
    inside, outside = Layers(True).double(), Layers(False).double()
    outside.load_state_dict(inside.state_dict())
    lossfunc = extend(nn.CrossEntropyLoss())
    for ext in (E.DiagHessian(), E.DiagGGNExact(), E.KFLR()):
        with (
            pytest.raises(RuntimeError, match="inside of the model.*return out, hidden"),
            backpack(ext),
        ):
            out, penalty = extend(inside)(X.double())
            (lossfunc(out, Y) + 0.1 * penalty).backward()
    with backpack(*EXTS):
        out, hidden = extend(outside)(X.double())
        (lossfunc(out, Y) + 0.1 * hidden.square().sum(1).mean()).backward()
    parameters = list(outside.parameters())

    def total() -> Tensor:
        out, hidden = outside(X.double())
        return F.cross_entropy(out, Y) + 0.1 * hidden.square().sum(1).mean()

    gradients = torch.autograd.grad(total(), parameters, create_graph=True)
    for p, g in zip(parameters, gradients, strict=True):
        rows = [
            torch.autograd.grad(e, p, retain_graph=True)[0].flatten()[j]
            for j, e in enumerate(g.flatten())
        ]
        assert torch.allclose(torch.stack(rows).reshape(p.shape), p.diag_h)
        assert torch.allclose(p.grad_batch.sum(0), g)
        assert torch.allclose(p.diag_h_batch.sum(0), p.diag_h)


MASK = torch.tensor([True, False, True, True, False])
ENTRIES = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0]]).bool()
PICKS: dict[str, Callable[[Tensor], Tensor]] = {
    "mask": lambda f: f[MASK],
    "rows": lambda f: f[torch.tensor([3, 0, 3])],
    "entries": lambda f: f[ENTRIES],
    "masked_select": lambda f: f.masked_select(ENTRIES),
    "of the data": lambda f: f[f[:, 0] > 0],
    "all": lambda f: f[torch.ones(5).bool()],
}


@pytest.mark.parametrize("name", PICKS)
def test_rows_are_picked_last(name: str) -> None:
    """As if they were picked outside of the model."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self, pick: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.l, self.pick = nn.Linear(4, 3), pick

        def forward(self, x: Tensor) -> Tensor:
            return self.pick(self.l(x))

    inner, loss = Model(PICKS[name]), lambda f: F.mse_loss(f, torch.zeros_like(f), reduction="sum")
    outer = Model(lambda f: f)
    outer.load_state_dict(inner.state_dict())
    found = _values(extend(inner), loss)
    expected = _values(extend(outer), lambda f: loss(PICKS[name](f)))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    report = check(outer, lambda f, _: loss(PICKS[name](f)), X, None, EXTS)
    assert report.ok, report
