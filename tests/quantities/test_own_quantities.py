"""Quantities of users: what they get depends on what their class declares, not on names or methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.forms.base import Form
from backpack.own import BackpropExtension, Context, HessianRoot, RandomSigns
from backpack.testing.oracle import Oracle
from tests.cases import CASES, Case

# A parameter used nonlinearly, twice, through another tensor, or in none of these ways.
NAMES = """softplus-weight reuse reuse-parallel tied-transpose own-rows weight-norm lora pow rdiv
loop-cell lstm gru relative-bias linear gelu conv2d-plain embedding""".split()
MODELS = [case for case in CASES if case.name in NAMES]


class DiagonalBySample(BackpropExtension):
    """As a user may write it; the field's name says nothing."""

    savefield = "curvature"
    source = HessianRoot()

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        return form.square_sum_per_sample(sign)

    def zero(self, context: Context) -> Tensor:
        return context.parameter.new_zeros(context.samples, *context.parameter.shape)


def run(case: Case, *exts: BackpropExtension, **options: Any) -> tuple[nn.Module, Any, nn.Module]:
    torch.manual_seed(0)
    model, inputs = case.model().double(), case.inputs()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    inputs = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    lossfunc = extend(nn.MSELoss(), batch_dim=case.output_dim)
    with backpack(*exts, **options):
        output = extend(model, batch_dim=case.batch_dim)(*inputs)
        lossfunc(output, torch.ones_like(output)).backward()
    return model, inputs, lossfunc


@pytest.mark.parametrize("case", MODELS, ids=lambda c: c.name)
def test_single_samples_of_the_hessian(case: Case) -> None:
    """Each sample's own diagonal, whatever the field is called."""
    ext = DiagonalBySample()
    model, inputs, lossfunc = run(case, ext)
    found = {name: p.curvature for name, p in model.named_parameters() if hasattr(p, "curvature")}
    with torch.no_grad():
        y = torch.ones_like(model(*inputs))
    reference = Oracle(model, lossfunc, inputs, y, case.batch_dim, output_dim=case.output_dim)
    assert found
    for name, value in found.items():
        expected = reference.value("diag_h_batch")[name]
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case", MODELS, ids=lambda c: c.name)
def test_single_samples_of_the_sampled_hessian(case: Case) -> None:
    class Estimate(DiagonalBySample):
        source = RandomSigns(2, torch.Generator().manual_seed(0))

    mc = E.BatchDiagHessianMC(2, torch.Generator().manual_seed(0))
    found, expected = run(case, Estimate())[0], run(case, mc)[0]
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        if hasattr(q, "diag_h_mc_batch"):
            torch.testing.assert_close(p.curvature, q.diag_h_mc_batch)


@pytest.mark.parametrize("base", [E.DiagHessian, E.DiagHessianMC])
def test_a_quantity_that_does_not_say_so(base) -> None:
    """Derived from one that needs sums only, it is refused rather than given all samples' on one."""

    class Sloppy(base):
        savefield = "diag_h_batch"

        def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
            return form.square_sum_per_sample(sign)

    (case,) = (case for case in CASES if case.name == "softplus-weight")
    with pytest.raises(RuntimeError, match="per_sample = True"):
        run(case, Sloppy())
    Sloppy.per_sample = True
    model, *_ = run(case, Sloppy())
    assert bool((model.w.diag_h_batch != 0).all())


def test_the_gradient_is_known_to_any_quantity() -> None:
    """Also to one whose `finish` is no method of its class."""
    ext = E.SumGradSquared()

    class Own(BackpropExtension):
        savefield = "own"

        def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
            return form.total()

    own = Own()
    own.finish = lambda state, context: state - context.gradient()
    for options in ({}, {"gradient": False}):
        model, *_ = run(CASES[0], own, ext, **options)
        for p in model.parameters():
            torch.testing.assert_close(p.own, torch.zeros_like(p))


def test_forms_do_not_depend_on_other_quantities() -> None:
    """Beside quantities that write forms out, one that needs factored forms is given these."""

    class Factors(BackpropExtension):
        savefield = "factors"

        def reduce(self, form: Form, sign: Tensor | None = None) -> list[Tensor]:
            return [factor.matrix() for factor in form.kronecker()]

    alone, *_ = run(CASES[0], Factors())
    beside, *_ = run(CASES[0], E.BatchGrad(), Factors(), E.SumGradSquared())
    for p, q in zip(alone.parameters(), beside.parameters(), strict=True):
        assert [f.shape for f in p.factors] == [f.shape for f in q.factors]


def test_unknown_columns() -> None:
    class Own(BackpropExtension):
        savefield = "own"
        source = "Hessian"

    with pytest.raises(ValueError, match="no source of columns, but 'Hessian'"):
        backpack(Own())


def test_mixed_samples() -> None:
    class Rows(BackpropExtension):
        savefield = "rows"

        def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
            return form.dense()[0]

    model = extend(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    lossfunc, x = extend(nn.MSELoss()), torch.rand(5, 3)
    with pytest.raises(NotImplementedError, match="rows: batch norm"), backpack(Rows()):
        lossfunc(model(x), torch.zeros(5, 2)).backward()
    Rows.mixed = True
    with pytest.warns(UserWarning, match="rows holds each row's"), backpack(Rows()):
        lossfunc(model(x), torch.zeros(5, 2)).backward()
    torch.testing.assert_close(model[0].weight.rows.sum(0), model[0].weight.grad)
