"""Plans: what they foretell is what comes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import backpack
from backpack import extend
from backpack import extensions as E
from backpack.engine.costs import contraction, cost_of
from backpack.forms.layout import Layout, Patches
from backpack.forms.outer import Outer
from tests.cases import CASES, LOSSES, Apply

QUANTITIES = """BatchGrad BatchL2Grad SumGradSquared Variance DiagGGNExact DiagGGNMC BatchDiagGGNExact
    KFAC KFLR EKFLR SqrtGGNExact SqrtGGNMC DiagHessian BatchDiagHessianMC EmpiricalKFAC""".split()
NAMES = """linear embedding tied-embedding lora conv2d-groups conv1d-plain convt2d-groups matmul
    attention layer-norm group-norm lstm reuse softplus-weight weight-norm prelu""".split()


def bytes_of(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(bytes_of, value))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMES], ids=lambda c: c.name)
def test_bytes_are_those_of_the_values(case) -> None:
    """Of every quantity, all parameters; the model is as it was before, and so are random numbers."""
    torch.manual_seed(0)
    model, X = case.model(), case.inputs()
    loss = LOSSES[0]
    lossfunc, exts = loss.loss(), [getattr(E, name)() for name in QUANTITIES]
    before, drawn = dict(model.__dict__), torch.random.get_rng_state()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    output = model(*X) if isinstance(X, tuple) else model(X)
    y = loss.target(output)
    torch.random.set_rng_state(drawn)
    plan = backpack.plan(model, X, exts, lossfunc, y)
    assert plan.refused is None and plan.steps and str(plan)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert model.__dict__ == before and all(
        torch.equal(t, state[n]) for n, t in model.state_dict().items()
    )
    assert not any(hasattr(p, ext.savefield) for p in model.parameters() for ext in exts)
    extend(model)
    with backpack.backpack(*exts):
        lossfunc(model(*X) if isinstance(X, tuple) else model(X), y).backward()
    parameters = dict(model.named_parameters())
    assert {step.parameter for step in plan.steps} == parameters.keys()
    for step in plan.steps:
        value = getattr(parameters[step.parameter], step.savefield)
        assert step.bytes == bytes_of(value), (step, value)
        assert step.shape == parameters[step.parameter].shape


def test_columns_are_those_that_are_carried() -> None:
    model, X = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.rand(6, 4)
    exts = E.DiagGGNExact(), E.SqrtGGNExact(), E.DiagGGNMC(mc_samples=7)
    y = torch.zeros(6).long()
    plan = backpack.plan(model, X, exts, nn.CrossEntropyLoss(), y)
    # What is carried for all has as many as any asks for.
    assert plan.columns == {"diag_ggn_exact": 3, "sqrt_ggn_exact": 3, "diag_ggn_mc": 7}
    assert backpack.plan(model, X, exts[:1], nn.CrossEntropyLoss(), y).columns == {"diag_ggn_exact": 2}
    assert plan.column_bytes == 4 * 6 * (5 + 3)
    # Six samples, three products of both layers.
    assert plan.gradient == 3 * 2 * 6 * (4 * 5 + 5 * 3) + 3 * 6 * (5 + 3)


@pytest.mark.parametrize("positions", [1, 4, 40])
def test_operations_are_those_that_torch_counts(positions: int) -> None:
    """In products; of norms by Gram matrices too."""
    n, o, i = 3, 12, 10
    form = Outer(
        torch.rand(n, 1, positions, i), torch.rand(2, n, 1, positions, o), Layout(torch.Size((o, i)))
    )
    one = form.take(slice(0, 1), slice(None))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        one.square_sum()
    assert counter.get_total_flops() == (cost_of(E.SumGradSquared(), one, 1).operations or 0) - (
        n * o if positions == 1 else 0  # squares of the columns, which are no products
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        one.squared_norms()
    products = counter.get_total_flops()
    said = cost_of(E.BatchL2Grad(), one, 1).operations or 0
    assert (
        said == contraction(one) if positions == 40 else products <= said <= products + 2 * n * 22 * 16
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for factor in form.kronecker():
            factor.matrix()
    assert counter.get_total_flops() == cost_of(E.KFAC(), form, 2).operations


def test_operations_of_windows_that_overlap() -> None:
    """Products that pairs of places have in common are counted once."""
    x = torch.rand(4, 40, 32, 32)
    windows = x.unfold(2, 5, 1).unfold(3, 5, 1).permute(0, 1, 4, 5, 2, 3).unsqueeze(1)
    g = torch.rand(1, 4, 1, 28 * 28, 3)
    form = Outer(Patches(windows, 2), g, Layout(torch.Size((3, 40, 5, 5))))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for factor in form.kronecker():
            factor.matrix()
    said = cost_of(E.KFAC(), form, 1).operations or 0
    assert 0.5 < counter.get_total_flops() / said < 1.2
    assert said < 0.5 * 2 * 4 * 28 * 28 * 1000**2


def test_one_quantity_needs_no_list() -> None:
    model, X = nn.Linear(4, 3), torch.rand(5, 4)
    assert backpack.plan(model, X, E.KFAC()).bytes == backpack.plan(model, X, [E.KFAC()]).bytes
    assert backpack.check(model, F.mse_loss, X, torch.rand(5, 3), E.DiagGGNExact()).ok
    backpack.accumulate(model, F.mse_loss, [(X, torch.rand(5, 3))], E.Variance())
    assert model.weight.variance.shape == (3, 4)


def test_refusals_are_those_of_a_pass() -> None:
    torch.manual_seed(0)
    model = Apply(
        lambda m, x: m.head(m.norm(m.first(x))),
        first=nn.Linear(4, 3), norm=nn.BatchNorm1d(3), head=nn.Linear(3, 2),
    )  # fmt: skip
    X, y = torch.rand(5, 4), torch.zeros(5).long()
    exts = E.BatchGrad(), E.BatchL2Grad(), E.KFAC()
    with pytest.warns(UserWarning, match="each row's contribution"):
        plan = backpack.plan(model, X, exts, nn.CrossEntropyLoss(), y)
    said = {(step.parameter, step.savefield): step.refused for step in plan.steps if step.refused}
    extend(model)
    with pytest.warns(UserWarning), backpack.backpack(*exts, unsupported="skip") as block:
        F.cross_entropy(model(X), y).backward()
    assert said == {(each.name.strip("'"), each.savefield): each.reason for each in block.left_out}
    assert {field for _, field in said} == {"batch_l2", "kfac"} and "refused: batch_l2 of" in str(plan)


def test_a_pass_that_is_refused_as_a_whole() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(0, keepdim=True).expand(3, 4) * 2

    model = Two()
    plan = backpack.plan(model, torch.rand(3, 4), [E.BatchGrad()])
    extend(model)
    with backpack.backpack(E.BatchGrad()), pytest.raises(RuntimeError) as error:
        model(torch.rand(3, 4)).square().sum().backward()
    assert plan.refused == str(error.value) and str(plan) == f"refused: {error.value}"


def test_inputs_by_name_and_losses_of_the_model() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            out = {"logits": self.layer(features)}
            return out if labels is None else {"loss": F.cross_entropy(out["logits"], labels), **out}

    exts, X = [E.DiagGGNExact()], {"features": torch.rand(5, 4)}
    assert backpack.plan(Own(), X, exts).columns == {"diag_ggn_exact": 3}  # a sum of squares
    own = backpack.plan(Own(), {**X, "labels": torch.zeros(5).long()}, exts)
    assert own.refused is None and own.columns == {"diag_ggn_exact": 2}
    with pytest.raises(TypeError, match="give plan"):
        backpack.plan(nn.Identity(), torch.rand(3), exts)
    with pytest.raises(ValueError, match="instances of extensions"):
        backpack.plan(nn.Linear(4, 3), torch.rand(5, 4), [E.BatchGrad])


def test_debug_prints_forms(capsys: pytest.CaptureFixture[str]) -> None:
    model = extend(nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 3)))
    with backpack.backpack(E.BatchGrad(), E.GGNMP(), debug=True):
        model(torch.rand(5, 1, 4)).square().sum().backward()
    printed = capsys.readouterr().out
    assert "form of '0.weight': 2 outputs x 3 inputs at 2 positions; grad_batch 0.000114 MB" in printed
    assert "form of '2.bias': written out; grad_batch" in printed
