"""What nobody sees in a model's forward: transforms of torch.func, scripted code."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backpack import backpack, check, extend
from backpack import extensions as E
from tests.cases import Apply, P

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

FIRST = [E.BatchGrad(), E.BatchL2Grad(), E.SumGradSquared(), E.Variance()]
ALL = [*FIRST, E.DiagGGNExact(), E.BatchDiagGGNExact(), E.SqrtGGNExact(), E.DiagHessian()]
X = torch.randn(5, 4)
vmap = torch.vmap


def scripted(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(function)


@scripted
def centred(h: Tensor) -> Tensor:
    return h - h.mean(0)


@scripted
def scripted_tanh(h: Tensor) -> Tensor:
    return h.tanh()


def attention(m: Any, a: Tensor) -> Tensor:
    def one(x: Tensor) -> Tensor:
        return (m.q(x) @ m.k(x).T).softmax(-1) @ m.v(x)

    return vmap(one)(a).flatten(1)


def jvp(m: Any, a: Tensor) -> Tensor:
    return vmap(lambda x: torch.func.jvp(lambda z: m.l(z).tanh(), (x,), (x,))[1])(a)


def ensemble(m: Any, h: Tensor) -> Tensor:
    return vmap(lambda w: (h @ w).tanh())(m.w).mean(0)


def linear(inputs: int = 4) -> nn.Module:
    return nn.Linear(inputs, 3)


MODELS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Callable[[], Any]], Tensor]] = {
    "weight": (lambda m, a: vmap(lambda x: (m.w @ x).tanh())(a), {"w": lambda: P(3, 4)}, X),
    "layer": (lambda m, a: vmap(m.l)(a), {"l": linear}, X),
    "layer above": (lambda m, a: m.k(vmap(m.l)(a).tanh()), {"l": linear, "k": lambda: linear(3)}, X),
    "layer below": (
        *(lambda m, a: vmap(m.l)(m.k(a).tanh()),),
        *({"l": linear, "k": lambda: nn.Linear(4, 4)}, X),
    ),
    "network": (
        *(lambda m, a: vmap(m.l)(a),),
        *({"l": lambda: nn.Sequential(linear(), nn.Tanh(), nn.LayerNorm(3), linear(3))}, X),
    ),
    "attention": (
        *(attention, {name: lambda: nn.Linear(4, 2) for name in "qkv"}, torch.randn(5, 3, 4)),
    ),
    "convolution": (
        lambda m, a: vmap(lambda x: m.l(x[None])[0])(a).flatten(1),
        {"l": lambda: nn.Conv1d(2, 3, 2)},
        torch.randn(5, 2, 4),
    ),
    "entries": (lambda m, a: vmap(lambda x: x * m.w + m.b)(a), dict.fromkeys("wb", lambda: P(4)), X),
    "features": (
        lambda m, a: vmap(lambda x: m.l(x[:, None])[:, 0], 1, 1)(a),
        {"l": lambda: nn.Linear(1, 1)},
        X,
    ),
    "another axis": (
        lambda m, a: vmap(m.l, in_dims=1, out_dims=1)(a).flatten(1),
        {"l": linear},
        torch.randn(5, 2, 4),
    ),
    "samples second": (
        lambda m, a: vmap(m.l, in_dims=1)(m.k(a).T.contiguous()),
        {"l": linear, "k": lambda: nn.Linear(4, 4)},
        X,
    ),
    "models": (ensemble, {"w": lambda: P(2, 4, 3)}, X),
    "as many models": (ensemble, {"w": lambda: P(5, 4, 3)}, X),
    "models above a layer": (
        *(lambda m, a: ensemble(m, m.l(a)), {"w": lambda: P(2, 3, 3), "l": linear}, X),
    ),
    "table": (
        lambda m, a: vmap(lambda i: m.e.weight[i].mean(0))(a),
        {"e": lambda: nn.Embedding(6, 3)},
        torch.randint(6, (5, 2)),
    ),
    "lookups": (
        lambda m, a: m.l(vmap(lambda i: m.e(i).mean(0))(a)),
        {"e": lambda: nn.Embedding(6, 3), "l": lambda: linear(3)},
        torch.randint(6, (5, 2)),
    ),
    "penalty": (*(lambda m, a: vmap(m.l)(a) + (m.w**2).sum(), {"l": linear, "w": lambda: P(3)}, X),),
    "of maps": (lambda m, a: vmap(vmap(m.l))(a).flatten(1), {"l": lambda: linear(2)}, X.view(5, 2, 2)),
    "derivative": (jvp, {"l": linear}, X),
    "scripted": (lambda m, a: scripted_tanh(m.l(a)), {"l": linear}, X),
}


def build(parts: dict[str, Callable[[], Any]], forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Apply(forward, **{name: make() for name, make in parts.items()})


@pytest.mark.parametrize("name", MODELS)
def test_against_brute_force(name: str) -> None:
    forward, parts, inputs = MODELS[name]
    model = build(parts, forward)
    for loss in (nn.MSELoss(), nn.CrossEntropyLoss()):
        shape = model(inputs).shape
        y = torch.randn(shape) if isinstance(loss, nn.MSELoss) else torch.arange(5) % shape[1]
        report = check(model, loss, inputs, y, ALL)
        assert report.ok, report


def test_rows_that_move() -> None:
    """Fields follow the input's samples, as where operations are seen."""
    model = build({"l": linear}, lambda m, a: vmap(m.l)(a).roll(1, 0))
    report = check(model, nn.MSELoss(), X, torch.randn(5, 3), FIRST, sample_of_row=[4, 0, 1, 2, 3])
    assert report.ok, report


MIXING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "each with all": lambda m, a: vmap(lambda x: m.l(a).mean(0) * x.sum())(a),
    "centred": lambda m, a: vmap(lambda h: h - h.mean(), in_dims=1, out_dims=1)(m.l(a)),
    "scripted": lambda m, a: centred(m.l(a)),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixed_samples_are_refused(name: str) -> None:
    model = extend(build({"l": linear}, MIXING[name]))
    with pytest.raises(RuntimeError, match="its rows depend on several samples"), backpack(*FIRST):
        nn.functional.cross_entropy(model(X), torch.arange(5) % 3).backward()


UNKNOWN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "solve": lambda m, a: vmap(lambda x: torch.linalg.solve(torch.outer(x, x) + torch.eye(4), m.w))(a),
    "layer of solve": lambda m, a: m.l(UNKNOWN["solve"](m, a)),
    "chunks": lambda m, a: vmap(m.l, chunk_size=2)(a),
    "a scripted part": lambda m, a: m.k(scripted_tanh(m.l(a))),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_found_is_an_error(name: str) -> None:
    parts = {"w": lambda: P(4), "l": linear, "k": lambda: linear(3)}
    model = extend(build(parts, UNKNOWN[name]))
    with pytest.raises(RuntimeError, match="parameter '(w|l.weight|k.weight)'"), backpack(*FIRST):
        nn.functional.cross_entropy(model(X), torch.arange(5) % 3).backward()


def test_the_hessian_names_the_transform() -> None:
    model = extend(build({"l": linear}, lambda m, a: vmap(m.l)(a)))
    with pytest.raises(NotImplementedError, match="torch.vmap"), backpack(E.DiagHessian()):
        nn.functional.mse_loss(model(X), torch.randn(5, 3)).sqrt().backward()
