"""Losses of several model outputs, of curved functions of outputs, and partly known losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, disable, extend
from backpack import extensions as E

Loss = Callable[..., Tensor]
N = 4
LABELS, BITS = torch.tensor([0, 2, 1, 1]), torch.tensor([1, 0, 1, 1])
REAL = torch.linspace(-1, 1, 2 * N).double().reshape(N, 2)
CE, MSE = extend(nn.CrossEntropyLoss()), extend(nn.MSELoss())
CE_EACH = extend(nn.CrossEntropyLoss(reduction="none"))


class Heads(nn.Module):
    """Two outputs of one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.t, self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.t(x).tanh()
        return self.a(h), self.b(h)


class Chain(nn.Module):
    """The second output is a function of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        f = self.a(x)
        return f, self.b(f.tanh())


class Derived(Heads):
    """The third output has no parameters of its own."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        f, g = super().forward(x)
        return f, g, f.tanh() + 1


class Chunks(nn.Module):
    """Two outputs of one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.a(x).chunk(2, 1)


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Inside(nn.Module):
    """A loss function is one of the model's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.mse_loss(self.a(x), torch.zeros(N, 4).double(), reduction="none"))


class With(nn.Module):
    """A function of model outputs, as a loss module."""

    def __init__(self, function: Loss) -> None:
        super().__init__()
        self.function = function

    def forward(self, *outputs: Tensor) -> Tensor:
        return self.function(*outputs)


SEVERAL: dict[str, tuple[type[nn.Module], Loss]] = {
    "ce + mse": (Heads, lambda f, g: F.cross_entropy(f, LABELS) + F.mse_loss(g, REAL)),
    "ce + custom": (Heads, lambda f, g: F.cross_entropy(f, LABELS) + g.cosh().mean()),
    "coupled": (Heads, lambda f, g: torch.cat([f, g], 1).logsumexp(1).sum()),
    "one against the other": (Heads, lambda f, g: F.mse_loss(f[:, :2], g)),
    "chain": (Chain, lambda f, g: F.cross_entropy(g, BITS) + f.pow(2).mean()),
    "chain, known": (Chain, lambda f, g: F.cross_entropy(g, BITS) + F.cross_entropy(f, LABELS)),
    "derived": (
        Derived,
        lambda f, g, h: F.cross_entropy(f, LABELS) + g.cosh().mean() + h.pow(2).sum(),
    ),
    "unused": (Derived, lambda f, g, h: F.cross_entropy(f, LABELS) + g.cosh().mean()),
    "chunks": (Chunks, lambda f, g: (f - g).cosh().sum()),
}
ONE: dict[str, tuple[type[nn.Module], Loss]] = {
    "l1 of exp": (One, lambda f: F.l1_loss(f.exp(), -torch.ones_like(f))),
    "kl": (One, lambda f: F.kl_div(f.log_softmax(1), f.new_ones(N, 3) / 3, reduction="sum")),
    "nll": (One, lambda f: F.nll_loss(f.log_softmax(1), LABELS)),
    "bce": (One, lambda f: F.binary_cross_entropy(f.sigmoid(), f.new_ones(N, 3) / 3)),
    "ce of scaled + mse": (One, lambda f: F.cross_entropy(2 * f, LABELS) + F.mse_loss(f, 0 * f)),
    "ce + custom": (One, lambda f: F.cross_entropy(f, LABELS) + f.cosh().mean()),
    "per sample": (One, lambda f: f.cosh().sum(1)),
    "weighted": (One, lambda f: F.cross_entropy(f, LABELS, reduction="none") * REAL[:, 0] ** 2),
}
APART: dict[str, tuple[type[nn.Module], Loss]] = {
    "ce + mse": (Heads, lambda f, g: CE(f, LABELS) + MSE(g, REAL)),
    "ce + custom": (Heads, lambda f, g: CE(f, LABELS) + g.cosh().mean()),
    "ce on both + custom": (Heads, lambda f, g: CE(torch.cat([f, g], 1), LABELS) + g.cosh().mean()),
    "one against the other": (Heads, lambda f, g: MSE(f[:, :2], g)),
    "chain, ce + custom": (Chain, lambda f, g: CE(g, BITS) + f.pow(2).mean()),
    "chain, custom + mse": (Chain, lambda f, g: g.cosh().mean() + MSE(f, 0 * f.detach())),
    "chain, ce + mse": (Chain, lambda f, g: CE(g, BITS) + MSE(f, 0 * f.detach())),
    "one, ce + custom": (One, lambda f: CE(f, LABELS) + f.cosh().mean()),
    "inside": (Inside, lambda f: CE(f, LABELS)),
    "weighted": (One, lambda f: (CE_EACH(f, LABELS) * REAL[:, 0] ** 2).sum()),
}
SETTINGS = {
    **{f"function: {k}": v for k, v in {**SEVERAL, **ONE}.items()},
    **{f"module: {k}": (m, extend(With(f))) for k, (m, f) in {**SEVERAL, **ONE}.items()},
    **{f"apart: {k}": v for k, v in APART.items()},
}


def together(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def expected(model: nn.Module, loss: Loss, X: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``J_n^T H_n J_n`` over all outputs, and the Hessian diagonal, by plain autograd."""
    with disable():
        outputs = together(model(X))
        widths = [f.shape[1] for f in outputs]
        flat = torch.cat(outputs, 1)
        H = torch.autograd.functional.hessian(lambda v: loss(*v.split(widths, 1)).sum(), flat.detach())
        ggn, diagonal = {}, {}
        total = loss(*together(model(X))).sum()
        for name, p in model.named_parameters():
            rows = [
                torch.autograd.grad(e, p, retain_graph=True, materialize_grads=True)[0]
                for e in flat.flatten()
            ]
            J = torch.stack(rows).reshape(*flat.shape, -1)
            ggn[name] = torch.stack([J[n].T @ H[n][:, n] @ J[n] for n in range(N)])
            (g,) = torch.autograd.grad(total, p, create_graph=True)
            second = [
                torch.autograd.grad(e, p, retain_graph=True, materialize_grads=True)[0].flatten()[j]
                for j, e in enumerate(g.flatten())
            ]
            diagonal[name] = torch.stack(second).reshape(p.shape)
    return ggn, diagonal


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs(name: str) -> None:
    kind, loss = SETTINGS[name]
    torch.manual_seed(0)
    model, X = extend(kind().double()), torch.randn(N, 2).double()
    ggn, diagonal = expected(model, loss, X)
    value = loss(*together(model(X)))
    exts = E.DiagGGNExact(), E.BatchDiagGGNExact(), E.SqrtGGNExact(), E.DiagHessian()
    with backpack(*exts, E.SqrtGGNMC(3)):
        value.backward(torch.ones_like(value))
    columns = {(len(p.sqrt_ggn_exact), len(p.sqrt_ggn_mc)) for p in model.parameters()}
    assert len(columns) == 1  # so that square roots of parameters can be concatenated
    for key, p in model.named_parameters():
        diagonals = ggn[key].diagonal(dim1=1, dim2=2).reshape(N, *p.shape)
        V = p.sqrt_ggn_exact.flatten(2)
        close(p.diag_ggn_exact_batch, diagonals)
        close(p.diag_ggn_exact, diagonals.sum(0))
        close(torch.einsum("vni,vnj->ij", V, V), ggn[key].sum(0))
        close(p.diag_h, diagonal[key])


def close(a: Tensor, b: Tensor) -> None:
    assert torch.allclose(a, b, rtol=1e-8, atol=1e-9 * float(b.abs().max()) + 1e-14), (a, b)


def test_draws_of_a_coupled_loss() -> None:
    torch.manual_seed(0)
    model, X = extend(Heads().double()), torch.randn(N, 2).double()
    with backpack(E.DiagGGNExact(), E.DiagGGNMC(3000)):
        SEVERAL["coupled"][1](*model(X)).backward()
    for p in model.parameters():
        assert torch.allclose(p.diag_ggn_mc, p.diag_ggn_exact, rtol=0.15, atol=1e-3)


def test_mean_and_variance_are_not_convex() -> None:
    model = extend(Heads().double())
    f, g = model(torch.randn(N, 2).double())
    loss = extend(nn.GaussianNLLLoss())(f[:, :2], REAL, F.softplus(g))
    with pytest.raises(ValueError, match="not convex"), backpack(E.SqrtGGNExact()):
        loss.backward()


def test_differentiable_without_a_rule() -> None:
    """With create_graph the derivative of a quantity includes that of the loss Hessian."""
    torch.manual_seed(0)
    model, X = extend(Heads().double()), torch.randn(N, 2).double()
    weights = list(model.parameters())

    def quantity(create_graph: bool) -> Tensor:
        f, g = model(X)
        loss = torch.cat([f, g], 1).logsumexp(1).sum() + f.cosh().sum()
        with backpack(E.DiagGGNExact()):
            torch.autograd.grad(loss, weights, create_graph=create_graph)
        return sum(p.diag_ggn_exact.sum() for p in weights)

    grads = torch.autograd.grad(quantity(True), weights, allow_unused=True)
    entry = model.t.weight.data[1]
    entry[0] += 1e-5
    above = quantity(False)
    entry[0] -= 2e-5
    assert torch.allclose(grads[0][1, 0], (above - quantity(False)) / 2e-5, rtol=1e-5)
