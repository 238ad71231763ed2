"""Complex parameters, data and outputs: every quantity against a model with two real parameters each.

The judge knows nothing of complex derivatives: a complex parameter is made from a real one with an axis
of two, a complex output is handed over as real numbers, and the oracle differentiates these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backpack import accumulating, backpack, check, extend, optim, plan
from backpack.cockpit import Monitor
from backpack.extensions import (
    EKFAC,
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    DiagHessianMC,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)
from backpack.forms.base import Form
from backpack.own import BackpropExtension
from backpack.samples.separability import generic
from backpack.testing.oracle import DEFAULT, Oracle
from backpack.vivit import LowRank
from tests.cases import Apply
from tests.complex_cases import ModReLU, crossentropy
from tests.complex_programs import PROGRAMS, Program

FIRST = (BatchGrad, BatchL2Grad, SumGradSquared, Variance)
CURVED = (DiagGGNExact, BatchDiagGGNExact)
HESSIAN = (DiagHessian, BatchDiagHessian)
PAIRS = frozenset({"grad_batch", "sqrt_ggn_exact"})


class Twin(nn.Module):
    """A model whose complex parameters are made from real ones, and whose output is real."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held, self.names = [model], []
        for number, (name, p) in enumerate(model.named_parameters()):
            real = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
            self.register_parameter(f"p{number}", nn.Parameter(real.clone()))
            self.names.append((name, p.is_complex()))

    def forward(self, *inputs: Any) -> Tensor:
        made = {
            name: torch.view_as_complex(p) if is_complex else p
            for (name, is_complex), p in zip(self.names, self.parameters(), strict=True)
        }
        out = torch.func.functional_call(self.held[0], made, inputs)
        self.complex_output = out.is_complex()
        return torch.view_as_real(out) if out.is_complex() else out


def judged(program: Program, model: nn.Module, data: Any) -> Oracle:
    twin = Twin(model)

    def loss(out: Tensor, y: Any) -> Tensor:
        return program.loss(torch.view_as_complex(out) if twin.complex_output else out, y)

    return Oracle(twin, loss, data, None)


def converted(value: Tensor, field: str) -> Tensor:
    """A field of two real parameters as that of a complex one: complex if linear, else the sum."""
    if field in PAIRS:
        return torch.view_as_complex(value.contiguous())
    return value if field == "batch_l2" else value.sum(-1)


def compare(program: Program, quantities: tuple[type, ...]) -> None:
    torch.manual_seed(0)
    model, data = program.model(), program.data()
    oracle = judged(program, model, data)
    extend(model)
    loss = program.loss(model(data), None)
    with backpack(*(quantity() for quantity in quantities)):
        loss.backward()
    for quantity in quantities:
        field = quantity.savefield
        expected = list(oracle.value(field).values())
        for (name, p), want in zip(model.named_parameters(), expected, strict=True):
            got, scale = getattr(p, field), float(want.abs().max()) or 1.0
            if field.startswith("sqrt"):
                flat = torch.view_as_real(got) if p.is_complex() else got
                flat = flat.flatten(0, 1).flatten(1)
                assert got.is_complex() == p.is_complex()
                got = flat.mT @ flat
            elif p.is_complex():
                want = converted(want, field)
            assert got.dtype == want.dtype, (name, field)
            error = float((got - want).abs().max()) / scale
            assert error < 1e-9, (name, field, error)


each = pytest.mark.parametrize("program", PROGRAMS, ids=[p.name for p in PROGRAMS])


@each
def test_first_order(program: Program) -> None:
    compare(program, FIRST)


@each
def test_ggn(program: Program) -> None:
    compare(program, CURVED)


@pytest.mark.parametrize(
    "program", [p for p in PROGRAMS if p.convex], ids=[p.name for p in PROGRAMS if p.convex]
)
def test_root(program: Program) -> None:
    compare(program, (SqrtGGNExact,))


@each
def test_hessian(program: Program) -> None:
    compare(program, HESSIAN)


def blocks(oracle: Oracle, curvature: str) -> list[Tensor]:
    """Blocks of the Gauss-Newton or the Hessian, of real parameters."""
    if curvature == "ggn":
        return list(oracle.ggn.values())
    parameters, found = list(oracle.parameters.values()), []
    gradients = torch.autograd.grad(oracle.loss(oracle.output()), parameters, create_graph=True)
    for p, gradient in zip(parameters, gradients, strict=True):
        rows = []
        for entry in gradient.flatten():
            row = None
            if entry.requires_grad:
                (row,) = torch.autograd.grad(entry, p, retain_graph=True, allow_unused=True)
            rows.append(torch.zeros_like(p) if row is None else row)
        found.append(torch.stack(rows).flatten(1))
    return found


@each
def test_products(program: Program) -> None:
    torch.manual_seed(0)
    model, data = program.model(), program.data()
    oracle = judged(program, model, data)
    loss = program.loss(extend(model)(data), None)
    with backpack(GGNMP(), HMP()):
        loss.backward()
    for curvature, field in (("ggn", "ggnmp"), ("hessian", "hmp")):
        for p, block in zip(model.parameters(), blocks(oracle, curvature), strict=True):
            vectors = torch.randn(2, *p.shape, dtype=p.dtype)
            real = torch.view_as_real(vectors) if p.is_complex() else vectors
            want = (real.flatten(1) @ block).reshape(real.shape)
            want = torch.view_as_complex(want) if p.is_complex() else want
            torch.testing.assert_close(getattr(p, field)(vectors), want, rtol=1e-8, atol=1e-9)


@each
def test_gradients_from_forms_and_without(program: Program) -> None:
    torch.manual_seed(0)
    model, data = extend(program.model()), program.data()
    program.loss(model(data), None).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    for option in (False, "forms"):
        model.zero_grad()
        loss = program.loss(model(data), None)
        with backpack(BatchGrad(), Variance(), gradient=option):
            loss.backward()
        for p, want in zip(model.parameters(), wanted, strict=True):
            if option == "forms":
                torch.testing.assert_close(p.grad, want)
            else:
                assert p.grad is None
            torch.testing.assert_close(p.grad_batch.sum(0), want)
            torch.testing.assert_close(p.variance, p.grad_batch.var(0, unbiased=False))


@each
def test_check(program: Program) -> None:
    torch.manual_seed(0)
    quantities = [q for q in DEFAULT if program.convex or not isinstance(q, SqrtGGNExact)]
    assert check(program.model(), program.loss, program.data(), None, quantities).ok


def test_check_keeps_imaginary_parts() -> None:
    """``Module.to`` with a real type would drop them."""
    model = nn.Linear(3, 2, dtype=torch.complex64)
    oracle = Oracle(model, lambda f, y: f.imag.sum(), torch.ones(2, 3) + 1j, None)
    copied = check(model, lambda f, y: f.imag.square().sum(), torch.randn(4, 3) + 1j, None)
    assert copied.ok and model.weight.dtype == torch.complex64
    assert oracle.grad_batch["weight"].dtype == torch.float32


NAMED = {p.name: p for p in PROGRAMS}


def squares(out: Tensor) -> Tensor:
    return (out.abs() ** 2 + out.real.exp()).sum()


@pytest.mark.parametrize("name", ["modrelu", "recurrence", "Fourier operator 1d", "shared"])
def test_batches_of_a_data_set(name: str) -> None:
    torch.manual_seed(0)
    model, data = extend(NAMED[name].model()), NAMED[name].data()
    quantities = [*(q() for q in (*FIRST, *CURVED, *HESSIAN)), SqrtGGNExact(), GGNMP()]
    with backpack(*quantities):
        squares(model(data)).backward()
    fields = [q.savefield for q in quantities if not isinstance(q, GGNMP)]
    wanted = [{field: getattr(p, field) for field in fields} for p in model.parameters()]
    vectors = [torch.randn_like(p) for p in model.parameters()]
    products = [p.ggnmp(v) for p, v in zip(model.parameters(), vectors, strict=True)]
    with accumulating(*quantities, reduction="sum"):
        for part in (data[:2], data[2:]):
            squares(model(part)).backward()
    for p, want, v, product in zip(model.parameters(), wanted, vectors, products, strict=True):
        for field, value in want.items():
            torch.testing.assert_close(getattr(p, field), value, msg=field)
        torch.testing.assert_close(p.ggnmp(v), product)


@pytest.mark.parametrize(
    ("drawn", "exact"),
    [(DiagGGNMC, DiagGGNExact), (DiagHessianMC, DiagHessian)],
    ids=["ggn", "hessian"],
)
@pytest.mark.parametrize("name", ["linear abs", "linear, complex output"])
def test_draws_agree_on_average(name: str, drawn: Any, exact: Any) -> None:
    torch.manual_seed(0)
    model, data = extend(NAMED[name].model()), NAMED[name].data()
    for quantity in (exact(), drawn(mc_samples=1000)):
        with backpack(quantity):
            NAMED[name].loss(model(data), None).backward()
    for p in model.parameters():
        want = getattr(p, exact.savefield)
        error = (getattr(p, drawn.savefield) - want).abs().max() / want.abs().max()
        assert not getattr(p, drawn.savefield).is_complex() and error < 0.2


def test_single_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 3, dtype=torch.complex64), nn.Linear(3, 2, dtype=torch.complex64)
    )
    report = check(
        model,
        lambda f, y: f.abs().square().sum(),
        torch.randn(5, 4) + 0j,
        None,
        tolerance=1e-4,
        dtype=torch.float32,
    )
    assert report.ok


@pytest.mark.parametrize("kept", ["kept", "complex"])
def test_both_parts(kept: Any) -> None:
    """What is summed over both parts can be had of each."""
    torch.manual_seed(0)
    program = NAMED["modrelu"]
    model, data = program.model(), program.data()
    want = list(judged(program, model, data).value("diag_h").values())
    quantity = DiagHessian()
    quantity.of_complex = kept
    with backpack(quantity):
        program.loss(extend(model)(data), None).backward()
    for p, expected in zip(model.parameters(), want, strict=True):
        value = torch.view_as_real(p.diag_h) if p.diag_h.is_complex() else p.diag_h
        assert p.diag_h.is_complex() == (kept == "complex" and p.is_complex())
        torch.testing.assert_close(value, expected)


def test_quantity_of_ones_own() -> None:
    """Sees real and imaginary parts as the last axis of its form."""

    class Largest(BackpropExtension):
        savefield = "largest"

        def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
            return form.dense()[0].flatten(1).abs().amax(1)

    torch.manual_seed(0)
    model = extend(nn.Linear(4, 3, dtype=torch.complex128))
    with backpack(Largest(), BatchGrad()):
        squares(model(torch.randn(5, 4, dtype=torch.complex128))).backward()
    rows = torch.view_as_real(model.weight.grad_batch).flatten(1)
    torch.testing.assert_close(model.weight.largest, rows.abs().amax(1))


@pytest.mark.parametrize(
    "bent",
    [lambda h: torch.complex(h.real, h.imag - h.imag.mean(0)), lambda h: torch.fft.fft(h, dim=0)],
)
def test_samples_mixed_in_one_part_are_refused(bent: Any) -> None:
    model = extend(Apply(lambda m, a: bent(m.l(a)), l=nn.Linear(4, 3, dtype=torch.complex128)))
    loss = squares(model(torch.randn(5, 4, dtype=torch.complex128)))
    with pytest.raises(RuntimeError, match="mixes samples"), backpack(BatchGrad()):
        loss.backward()


def test_numbers_that_try_out_complex_operations_have_both_parts() -> None:
    for dtype in (torch.complex64, torch.complex128):
        found = generic((50,), torch.empty(0, dtype=dtype))
        assert (
            found.dtype == dtype
            and found.imag.abs().min() > 0
            and not torch.equal(found.real, found.imag)
        )


@pytest.mark.parametrize("quantity", [KFAC, KFLR, EKFAC, KFRA])
def test_kronecker_factors_are_refused(quantity: Any) -> None:
    model = extend(ModReLU())
    X = torch.randn(5, 4, dtype=torch.complex128)
    with pytest.raises(NotImplementedError, match="is complex, for which"), backpack(quantity()):
        crossentropy(model(X), None).backward()
    found = plan(model, X, [quantity(), BatchGrad()], crossentropy, None)
    refused = {step.parameter for step in found.steps if step.refused}
    assert refused == {name for name, p in model.named_parameters() if p.is_complex()}


def test_optimizers_refuse() -> None:
    for make in (
        lambda m: optim.KFAC(m, lr=0.1, damping=0.1),
        lambda m: optim.DiagGGNExact(m, lr=0.1, damping=0.1),
        lambda m: optim.CGNewton(m, lr=0.1, damping=0.1),
        lambda m: optim.GramNewton(m, lr=0.1, damping=0.1),
        lambda m: optim.DPSGD(m, 0.1, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=2),
    ):
        with pytest.raises(NotImplementedError, match=r"'one.weight' is complex.*view_as_complex"):
            make(ModReLU())


def test_low_rank_curvature_refuses() -> None:
    loss = crossentropy(extend(ModReLU())(torch.randn(5, 4, dtype=torch.complex128)), None)
    with pytest.raises(NotImplementedError, match=r"is complex.*backpack.vivit"), LowRank():
        loss.backward()


def test_monitor_goes_on() -> None:
    """What it cannot measure of a complex parameter is left out."""
    model, X = ModReLU(), torch.randn(5, 4, dtype=torch.complex128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.one.weight.detach().clone()
    with pytest.warns(UserWarning, match="is left out.*is complex"), Monitor(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            crossentropy(model(X), None).backward()
            optimizer.step()
    assert not torch.equal(before, model.one.weight)


@pytest.mark.parametrize(
    "weight",
    [
        lambda w, v: torch.add(w, v, alpha=1j),
        lambda w, v: torch.sub(w, v, alpha=1 + 2j),
        lambda w, v: w.add(v, alpha=2j) * 1j,
        lambda w, v: torch.add(w, v.real, alpha=1j),
    ],
    ids=["add", "sub", "method", "real"],
)
def test_weights_that_are_sums_with_complex_factors(weight: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = (nn.Parameter(torch.randn(4, 2, dtype=torch.complex128)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return x @ weight(self.w, self.v)

    model, x = extend(Sum()), torch.randn(3, 4, dtype=torch.complex128)
    with backpack(BatchGrad(), Variance()):
        model(x).abs().square().sum().backward()
    for p in model.parameters():
        for n, x_n in enumerate(x):
            (own,) = torch.autograd.grad(model(x_n[None]).abs().square().sum(), p)
            torch.testing.assert_close(p.grad_batch[n], own)
        torch.testing.assert_close(p.variance, p.grad_batch.var(0, unbiased=False))
