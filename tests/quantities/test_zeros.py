"""What no column reaches has the value of a column of zeros: its sizes are those of any other value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backpack import backpack, extend, optim
from backpack import extensions as E
from backpack.forms.base import Form
from backpack.forms.layout import Layout, Patches
from backpack.forms.lookup import Lookup
from backpack.forms.outer import Outer
from backpack.own import BackpropExtension, ExactRoot
from backpack.testing.oracle import Oracle
from tests.cases import CASES, Apply, Case, P, ids, seq, x

EXTS: tuple[Callable[[], Any], ...] = (
    *(E.KFLR, E.KFAC, E.EKFLR, E.EKFAC, E.DiagGGNExact, E.BatchDiagGGNExact),
    *(E.SqrtGGNExact, lambda: E.KFLR("expand"), lambda: E.KFLR("reduce")),
)
MORE = [
    Case("matmul-vector-2d", lambda: Apply(lambda m, a: (a @ m.w).tanh()[:, None], w=P(4)), x(4, 4)),
    Case("tied-linear", lambda: Apply(lambda m, a: m.l(m.l(a).tanh()), l=nn.Linear(3, 3)), x(4, 3)),
    Case("convt-tied", lambda: _tied(nn.ConvTranspose1d(2, 2, 3, padding=1)), x(3, 2, 4)),
    Case("convt-wide", lambda: seq(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Flatten()), x(3, 4, 2)),
    Case("table", lambda: seq(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)), ids(5, 4, 2)),
]  # fmt: skip


def _tied(layer: nn.Module) -> nn.Module:
    return Apply(lambda m, a: m.l(m.l(a).tanh()).flatten(1), l=layer)


def run(case: Case, lossfunc: nn.Module, *exts: BackpropExtension) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model, inputs = case.model().double(), case.inputs()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    inputs = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    extend(model, batch_dim=case.batch_dim)
    torch.manual_seed(0)  # dropout
    output = model(*inputs)
    y = torch.full_like(output, 20.0)
    with backpack(*exts):
        extend(lossfunc, batch_dim=case.output_dim)(output, y).backward()
    return model, inputs, y


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for each in value for t in tensors(each)]


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda c: c.name)
def test_sizes(case: Case) -> None:
    """The absolute value has no curvature, the square has."""
    for ext in EXTS:
        zero, *_ = run(case, nn.L1Loss(), ext())
        other, *_ = run(case, nn.MSELoss(), ext())
        field = ext().savefield
        for (name, p), q in zip(zero.named_parameters(), other.parameters(), strict=True):
            assert hasattr(p, field) == hasattr(q, field), name
            if not hasattr(p, field):
                continue
            value, like = tensors(getattr(p, field)), tensors(getattr(q, field))
            if "sqrt" in field:
                assert not value[0].any()
                continue
            assert [v.shape for v in value] == [v.shape for v in like], (name, field)
            if field in ("kflr", "kfac"):
                assert any(not factor.any() for factor in value), (name, field)
            elif field not in ("ekflr", "ekfac"):
                assert not value[0].any()
            else:
                assert not value[-1].any()
                for basis in value[:-1]:
                    torch.testing.assert_close(basis.mT @ basis, torch.eye(len(basis)).to(basis))


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda c: c.name)
def test_one_factor(case: Case) -> None:
    """A parameter that is no matrix has one, and one alone is the exact block."""
    model, inputs, y = run(case, nn.MSELoss(), E.KFLR())
    found = {name: p for name, p in model.named_parameters() if hasattr(p, "kflr")}
    blocks = Oracle(model, nn.MSELoss(), inputs, y, case.batch_dim, output_dim=case.output_dim).ggn
    for name, p in found.items():
        assert p.dim() > 1 or len(p.kflr) == 1, name
        if len(p.kflr) == 1:
            torch.testing.assert_close(p.kflr[0], blocks[name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
@pytest.mark.parametrize("samples, positions", [(0, 3), (4, 0), (0, 0)])
def test_without_samples_or_positions(samples: int, positions: int, approx: Any) -> None:
    """Means over nothing are zero."""
    a, g = torch.rand(samples, 1, positions, 3), torch.rand(2, samples, 1, positions, 2)
    patches = Patches(torch.rand(samples, 1, 3, 1, positions), 1)
    index = torch.zeros(samples, positions, dtype=torch.long)
    for form, sizes in (
        (Outer(a, g, Layout(torch.Size((2, 3)))), [2, 3]),
        (Outer(patches, g, Layout(torch.Size((2, 3, 1)))), [2, 3]),
        (Lookup(index, g[:, :, 0], torch.Size((5, 2))), [5, 2]),
    ):
        factors = [factor.matrix() for factor in form.kronecker(approx)]
        assert [f.shape for f in factors] == [(size, size) for size in sizes]
        assert not any(bool(f.any()) for f in factors)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_parameters_without_entries() -> None:
    model = extend(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3)).double())
    lossfunc, X = extend(nn.MSELoss()), torch.rand(5, 4).double()
    for options in ({}, {"gradient": False}):
        with backpack(E.KFLR(), E.EKFAC(), **options):
            lossfunc(model(X), torch.zeros(5, 3).double()).backward()
        sizes = [[tuple(f.shape) for f in p.kflr] for p in model.parameters()]
        assert sizes == [[(0, 0), (4, 4)], [(0, 0)], [(3, 3), (0, 0)], [(3, 3)]]
        assert [tuple(p.ekfac.eigenvalues.shape) for p in model.parameters()] == [
            *((0, 4), (0,), (3, 0), (3,)),
        ]


class OfSamples(BackpropExtension):
    """A user's quantity of another shape than the parameter's, without a method `zero`."""

    savefield = "of_samples"
    source = ExactRoot()

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        return form.squared_norms()


def test_quantities_of_users() -> None:
    model, *_ = run(CASES[0], nn.L1Loss(), OfSamples())
    assert all(torch.equal(p.of_samples, torch.zeros(5).double()) for p in model.parameters())


@pytest.mark.parametrize(
    "kind", ["convt1d-plain", "convt2d-groups", "matmul-vector", "matmul", "table"]
)
def test_a_step_without_curvature(kind: str) -> None:
    """Factors that are zero are damped: the step is that of the gradient."""
    (case,) = (case for case in (*CASES, *MORE) if case.name == kind)
    torch.manual_seed(0)
    model, inputs = case.model().double(), case.inputs()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    optimizer = optim.EKFLR(model, lr=1.0, damping=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.backpack():
        output = model(inputs)
        extend(nn.L1Loss())(output, torch.full_like(output, 20.0)).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - gradient / 0.5)
