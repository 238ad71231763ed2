"""Parameters above a model's outputs: a temperature, prototypes, a head, in whatever spelling."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.testing.oracle import Oracle

N, D, C = 4, 3, 5
Y = torch.tensor([0, 4, 2, 2])


class Top(nn.Module):
    """Parameters of each kind, and a model below."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, D))
        self.T = nn.Parameter(torch.tensor(1.3))
        self.v = nn.Parameter(torch.rand(D) + 0.5)
        self.W = nn.Parameter(torch.randn(C, D))
        self.b = nn.Parameter(torch.randn(C))
        self.head = nn.Linear(D, C)
        self.deep = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
        self.conv = nn.Conv1d(1, 2, 2)
        self.slope = nn.Parameter(torch.tensor(0.3))
        self.rows = nn.Parameter(torch.randn(N, D))
        self.double()


def batch() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(N, 2).double()


def ce(f: Tensor) -> Tensor:
    return F.cross_entropy(f, Y % f.shape[1])


# What happens between the model's output and the input of the loss.
Use = Callable[[Top, Tensor], Tensor]
# Linear in the output: there is a generalized Gauss-Newton with the loss's own Hessian.
FLAT: dict[str, Use] = {
    "temperature": lambda t, f: f / t.T,
    "log-scale": lambda t, f: f * t.T.exp(),
    "scale of columns": lambda t, f: t.v * f,
    "bias": lambda t, f: f + t.v,
    "difference": lambda t, f: torch.sub(t.v, f, alpha=2),
    "difference the other way": lambda t, f: torch.sub(f, t.v, alpha=2),
    "linear": lambda t, f: F.linear(f, t.W, t.b),
    "no bias": lambda t, f: F.linear(f, t.W),
    "several rows": lambda t, f: F.linear(f.view(N, 1, D).expand(N, 2, D), t.W, t.b).sum(1),
    "matrix": lambda t, f: f @ t.W.T,
    "matrix on the left": lambda t, f: (t.W @ f.T).T,
    "unit prototypes": lambda t, f: f @ F.normalize(t.W).T,
    "head": lambda t, f: t.head(f),
    "two uses": lambda t, f: torch.cat([F.linear(f, t.W), (0.3 * f) @ t.W.T + t.b], 1),
    "einsum": lambda t, f: torch.einsum("cd,nd->nc", t.W, f),
    "convolution": lambda t, f: t.conv(f.unsqueeze(1)).flatten(1),
    "joined": lambda t, f: torch.cat([f, t.v.expand(N, D)], 1),
    "where": lambda t, f: torch.where(f > 0, f, t.v),
    "slope": lambda t, f: F.prelu(f, t.slope),
    "an entry for each sample": lambda t, f: f + t.rows,
    "a tensor of the whole batch": lambda t, f: f + t.head(torch.ones(N, D).double())[:, :D],
}
CURVED: dict[str, Use] = {
    "distances": lambda t, f: -(f.unsqueeze(1) - t.W).square().sum(2),
    "division by data": lambda t, f: t.v / (f.square() + 1),
    "deep head": lambda t, f: t.deep(f),
    "cosine": lambda t, f: F.normalize(f) @ F.normalize(t.W).T,
    "power": lambda t, f: (f.square() + 1) ** t.T,
}
# Which torch cannot differentiate twice.
ONCE: dict[str, Use] = {"cdist": lambda t, f: -torch.cdist(f, t.W)}
BATCHED = [E.BatchGrad(), E.BatchL2Grad(), E.SumGradSquared(), E.Variance()]
GGN = [E.DiagGGNExact(), E.BatchDiagGGNExact(), E.DiagHessian()]


class All(nn.Module):
    """Model and what is above it in one, for brute force."""

    def __init__(self, top: Top, use: Use) -> None:
        super().__init__()
        self.top, self.use = top, use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.top, self.top.model(x))


def backward(top: Top, use: Use, exts: list[E.BatchGrad], **options: bool) -> None:
    """A pass in which the model alone is extended."""
    extend(top.model)
    with backpack(*exts, **options):
        ce(use(top, top.model(batch()))).backward()


def agrees(top: Top, use: Use, fields: list[str], only: str = "") -> None:
    oracle, compared = Oracle(All(Top(), use), lambda f, _: ce(f), batch(), None), 0
    for field in fields:
        for name, expected in oracle.value(field).items():
            p = top.get_parameter(name.removeprefix("top."))
            if p.grad is None:
                assert not hasattr(p, field), name
            elif only in name:
                found = getattr(p, field)
                assert found.shape == expected.shape, (name, field)
                error = (found - expected).abs().amax() / expected.abs().amax().clamp(min=1e-12)
                assert error < 1e-9, (name, field, found, expected)
                compared += 1
    assert compared >= len(fields)


@pytest.mark.parametrize("name", [*FLAT, *CURVED, *ONCE])
def test_gradients_of_samples(name: str) -> None:
    use, top = {**FLAT, **CURVED, **ONCE}[name], Top()
    backward(top, use, BATCHED)
    agrees(top, use, [ext.savefield for ext in BATCHED])


@pytest.mark.parametrize("name", FLAT)
def test_curvature(name: str) -> None:
    use, top = FLAT[name], Top()
    backward(top, use, GGN)
    agrees(top, use, [ext.savefield for ext in GGN])
    again = Top()
    extend(again.model)
    with backpack(*GGN, E.BatchGrad(), gradient=False):
        ce(use(again, again.model(batch()))).backward()
    for p, q in zip(top.parameters(), again.parameters(), strict=True):
        if p.grad is not None:
            assert torch.allclose(p.diag_ggn_exact, q.diag_ggn_exact), name
            assert torch.allclose(p.grad, q.grad_batch.sum(0)), name


@pytest.mark.parametrize("name", CURVED)
def test_hessian(name: str) -> None:
    use, top = CURVED[name], Top()
    backward(top, use, [E.DiagHessian()])
    agrees(top, use, ["diag_h"])


@pytest.mark.parametrize("name", ["temperature", "linear", "head", "unit prototypes"])
def test_other_quantities_are_those_of_an_extended_whole(name: str) -> None:
    use = FLAT[name]
    exts = [
        E.KFLR(),
        E.KFAC(2),
        E.DiagGGNMC(2),
        E.SqrtGGNExact(),
        E.EmpiricalKFAC(),
        E.GGNMP(),
        E.HMP(),
    ]
    found = []
    for whole in (False, True):
        model = All(Top(), use)
        extend(model if whole else model.top.model)
        loss = ce(model(batch()))
        torch.manual_seed(2)
        with backpack(*exts):
            loss.backward()
        found.append(model)
    for p, q in zip(*(model.parameters() for model in found), strict=True):
        if p.grad is None:
            continue
        for field in ("kflr", "kfac", "kfac_empirical"):
            pairs = zip(getattr(p, field), getattr(q, field), strict=True)
            assert all(torch.allclose(a, b) for a, b in pairs), field
        for field in ("diag_ggn_mc", "sqrt_ggn_exact"):
            assert torch.allclose(getattr(p, field), getattr(q, field))
        v = torch.ones(1, *p.shape).double()
        assert torch.allclose(p.ggnmp(v), q.ggnmp(v)) and torch.allclose(p.hmp(v), q.hmp(v))


def hidden(top: Top) -> Tensor:
    """An activation that the model does not return."""
    kept: list[Tensor] = []
    with top.model[1].register_forward_hook(lambda _, __, out: kept.append(out)):
        top.model(batch())
    return kept[0]


def test_data_that_is_no_output() -> None:
    def use(top: Top, f: Tensor) -> Tensor:
        return hidden(top)[:, :D] * top.T + f

    top = Top()
    backward(top, use, BATCHED)
    agrees(top, use, [ext.savefield for ext in BATCHED])


@pytest.mark.parametrize(
    "loss",
    [
        lambda t, f: ce(f) * t.T,  # samples are summed up
        lambda t, f: ce(f) * (-t.T).exp() + F.mse_loss(f, 0 * f) + t.T,  # task weights
        lambda t, f: (ce(f) - t.T).abs() ** 2,
        lambda t, f: ce((f - f.mean(0)) * t.v),  # samples are mixed
    ],
    ids=["loss", "task", "flooding", "mixed"],
)
def test_what_cannot_be_told_apart_is_said(loss: Use) -> None:
    """The parameter of no extended model is left out, the others have their quantities."""
    top = Top()
    extend(top.model)
    names = ("T", "v")
    for name in names:
        setattr(top.get_parameter(name), "grad_batch", "of an earlier pass")  # noqa: B010
    block = backpack(E.BatchGrad())
    with pytest.warns(UserWarning, match="above the model's output"), block:
        loss(top, top.model(batch())).backward()
    (p,) = (p for p in (top.T, top.v) if p.grad is not None)
    assert not hasattr(p, "grad_batch") and "above" in block.left_out.reasons(p)["grad_batch"]
    assert "no grad_batch: parameter of shape" in str(block.left_out)
    for p in top.model.parameters():
        assert torch.allclose(p.grad_batch.sum(0), p.grad)


def test_a_parameter_of_the_model_is_an_error_there() -> None:
    model = extend(nn.Sequential(nn.Linear(2, D), nn.Linear(D, D)))
    with (
        pytest.raises(RuntimeError, match="'1.bias' is used above the model's output"),
        backpack(E.BatchGrad()),
    ):
        (ce(model(batch().float())) * model[1].bias.sum()).backward()
    assert not hasattr(model[0].weight, "grad_batch")


def test_may_be_left_out() -> None:
    top = Top()
    extend(top.model)
    with backpack(E.BatchGrad(), E.DiagGGNExact(), parameters=top.model.parameters()):
        (ce(top.deep(top.model(batch()))) * top.T).backward()
    assert not hasattr(top.T, "grad_batch") and hasattr(top.model[0].weight, "grad_batch")


@pytest.mark.parametrize("name", [*CURVED])
def test_curvature_below_a_loss_with_a_rule(name: str) -> None:
    """Parameters above have the Hessian in the input of the loss, the model's that in its output."""
    exts = [E.DiagGGNExact(), E.BatchDiagGGNExact()]
    top = Top()
    backward(top, CURVED[name], exts)
    for part in ("top.T", "top.v", "top.W", "top.deep"):
        if top.get_parameter((part + ".0.weight" * (part == "top.deep"))[4:]).grad is not None:
            agrees(top, CURVED[name], ["diag_ggn_exact", "diag_ggn_exact_batch"], part)
    plain = Top()
    extend(plain.model)
    with backpack(*exts, parameters=plain.model.parameters()):
        ce(CURVED[name](plain, plain.model(batch()))).backward()
    for p, q in zip(top.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(p.diag_ggn_exact, q.diag_ggn_exact)


@pytest.mark.parametrize("quantity", [E.DiagGGNExact(), E.KFAC(), E.GGNMP(), E.KFRA(), E.PCHMP()])
def test_curvature_that_is_not_defined_is_said(quantity: E.DiagGGNExact) -> None:
    top = Top()
    extend(top.model)
    first = backpack(quantity, E.BatchGrad(), unsupported="skip")
    with first:
        f = top.deep(top.model(batch()))
        torch.atan(f * f).sum().backward()
    p = top.deep[0].weight
    assert hasattr(p, "grad_batch") and not hasattr(p, quantity.savefield)
    assert list(first.left_out.reasons(p)) == [quantity.savefield]


def test_weight_decay_is_no_use() -> None:
    """Nor are other terms that no sample's share depends on."""
    top = Top()
    plain = copy.deepcopy(top)
    for each, decays in ((top, True), (plain, False)):
        extend(each.model)
        with backpack(E.BatchGrad(), E.DiagGGNExact()):
            loss = ce(each.head(each.model(batch())))
            decay = sum(p.square().sum() for p in each.parameters())
            (loss + 0.1 * decay if decays else loss).backward()
    for p, q in zip(top.parameters(), plain.parameters(), strict=True):
        assert hasattr(p, "grad_batch") == hasattr(q, "grad_batch")
        if hasattr(p, "grad_batch"):
            assert torch.equal(p.grad_batch, q.grad_batch)
            assert torch.equal(p.diag_ggn_exact, q.diag_ggn_exact)
