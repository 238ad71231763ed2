"""Inputs and outputs that are attributes of objects: batches, results, distributions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as D

from backpack import backpack, extend
from backpack import extensions as E
from tests.cases import Apply

EXTENSIONS = (
    *(E.BatchGrad(), E.Variance(), E.BatchDiagGGNExact(), E.KFLR()),
    *(E.BatchDiagHessian(), E.DiagHessian()),
)
Y = torch.tensor([0, 2, 1, 1])
REAL = torch.linspace(-1, 1, 12).reshape(4, 3)


class Result:
    """Knows its model, as results of programs may; that is not looked into."""

    def __init__(self, model: nn.Module, **parts: Any) -> None:
        self.model, self.parts, self.last = model, SimpleNamespace(**parts), parts["logits"]


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _fields(model: nn.Module) -> dict[str, Any]:
    found = {}
    for name, p in model.named_parameters():
        for ext in EXTENSIONS:
            found[name, ext.savefield] = getattr(p, ext.savefield, None)
    return found


def _compare(wrap: Callable[[Tensor], Any], loss: Callable[[Any], Tensor]) -> None:
    """A model that returns an object, beside one that returns the tensor that the object is made of."""
    inner, X = _mlp(), torch.linspace(-2, 1, 12).reshape(4, 3).double()
    plain = extend(copy.deepcopy(inner))
    with backpack(*EXTENSIONS):
        loss(wrap(plain(X))).backward()
    wrapped = extend(Apply(lambda m, x: wrap(m.inner(x)), inner=inner))
    with backpack(*EXTENSIONS):
        loss(wrapped(X)).backward()
    ours = _fields(wrapped.inner)
    for key, value in _fields(plain).items():
        torch.testing.assert_close(ours[key], value)
        assert value is None or any(each.any() for each in value)


OBJECTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "namespace": (
        lambda f: SimpleNamespace(logits=f, twice=2 * f.detach()),
        lambda r: nn.functional.cross_entropy(r.logits, Y),
    ),
    "list of namespaces": (
        lambda f: [SimpleNamespace(logits=f)],
        lambda r: nn.functional.cross_entropy(r[0].logits, Y),
    ),
    "class": (
        lambda f: Result(nn.Identity(), logits=f),
        lambda r: nn.functional.cross_entropy(r.last, Y),
    ),
    "categorical": (lambda f: D.Categorical(logits=f), lambda d: -d.log_prob(Y).mean()),
    "one hot": (
        lambda f: D.OneHotCategorical(logits=f),
        lambda d: -d.log_prob(nn.functional.one_hot(Y, 3)).mean(),
    ),
    "beside another output": (
        lambda f: (D.Categorical(logits=f[:, :2]), f[:, 2]),
        lambda r: (r[1].square() - r[0].log_prob(Y.clamp(max=1))).mean(),
    ),
    "bernoulli": (lambda f: D.Bernoulli(logits=f), lambda d: -d.log_prob((REAL > 0).double()).mean()),
    "independent normal": (
        lambda f: D.Independent(D.Normal(f, 0.5), 1),
        lambda d: -d.log_prob(REAL.double()).mean(),
    ),
    "transformed": (lambda f: D.LogNormal(f, 1.0), lambda d: -d.log_prob(REAL.double().exp()).mean()),
    "divergence": (lambda f: D.Normal(f, 1.0), lambda d: D.kl_divergence(d, D.Normal(0.0, 1.0)).mean()),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_results(name: str) -> None:
    _compare(*OBJECTS[name])


def test_curvature_of_classes_is_fishers() -> None:
    """Not that of the normalised logits, in which the loss is linear."""
    model, X = (
        extend(Apply(lambda m, x: D.Categorical(logits=m.l(x)), l=nn.Linear(3, 3))),
        torch.ones(1, 3),
    )
    with backpack(E.DiagGGNExact()):
        d = model(X)
        (-d.log_prob(Y[:1]).sum()).backward()
    torch.testing.assert_close(model.l.bias.diag_ggn_exact, (d.probs * (1 - d.probs))[0])


@pytest.mark.parametrize("make", [lambda x: SimpleNamespace(x=x), lambda x: [SimpleNamespace(x=x)]])
def test_batches(make: Callable[[Tensor], Any]) -> None:
    inner, X = _mlp(), torch.linspace(-2, 1, 12).reshape(4, 3).double()

    def forward(m: nn.Module, batch: Any) -> Tensor:
        return m.inner((batch[0] if isinstance(batch, list) else batch).x)

    plain, ours = extend(copy.deepcopy(inner)), extend(Apply(forward, inner=inner))
    with backpack(*EXTENSIONS):
        nn.functional.cross_entropy(plain(X), Y).backward()
    with backpack(*EXTENSIONS):
        nn.functional.cross_entropy(ours(make(X)), Y).backward()
    wanted = _fields(plain)
    for key, value in _fields(ours.inner).items():
        torch.testing.assert_close(value, wanted[key])


def test_settings_beside_inputs() -> None:
    """Their tensors are constants, of whatever length, and so is what is returned beside outputs."""
    table = torch.linspace(-1, 1, 21).reshape(7, 3).double()
    inner, X = _mlp(), torch.linspace(-2, 1, 12).reshape(4, 3).double()

    def forward(m: nn.Module, settings: Any, x: Tensor) -> tuple[Tensor, Any]:
        f = m.inner(x)
        return f @ settings.table.T @ settings.table, SimpleNamespace(mixed=f @ f.T)

    plain, ours = extend(copy.deepcopy(inner)), extend(Apply(forward, inner=inner))
    with backpack(*EXTENSIONS):
        nn.functional.cross_entropy(plain(X) @ table.T @ table, Y).backward()
    wanted = _fields(plain)
    with backpack(E.BatchGrad()):
        nn.functional.cross_entropy(ours(SimpleNamespace(table=table), X)[0], Y).backward()
    for name, p in ours.inner.named_parameters():
        torch.testing.assert_close(p.grad_batch, wanted[name, "grad_batch"])
