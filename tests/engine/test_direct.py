"""Passes without the gradient: the same numbers as in ordinary passes, which the oracle confirms."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backpack import backpack, disable, extend
from backpack import extensions as E
from tests.cases import CASES, LOSSES, Apply, Case

QUANTITIES = [
    *(E.BatchGrad(), E.BatchL2Grad(), E.SumGradSquared(), E.Variance()),
    *(E.DiagGGNExact(), E.DiagGGNMC(), E.BatchDiagGGNExact(), E.SqrtGGNExact()),
    *(E.KFAC(), E.KFLR(), E.EKFLR(), E.DiagHessian(), E.DiagHessianMC()),
]


def fields(model: nn.Module, exts: list[Any]) -> dict[tuple[str, str], Any]:
    return {
        (name, ext.savefield): getattr(p, ext.savefield)
        for name, p in model.named_parameters()
        for ext in exts
        if hasattr(p, ext.savefield)
    }


def clear(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None
        for field in [field for field in vars(p) if not field.startswith("_")]:
            delattr(p, field)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: Case, together: bool) -> None:
    """All quantities at once, and each order on its own."""
    torch.manual_seed(0)
    model, inputs = extend(case.model().double(), batch_dim=case.batch_dim), case.inputs()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    inputs = tuple(i.double() if torch.is_floating_point(i) else i for i in inputs)
    model.eval()
    lossfunc = extend(LOSSES[0].loss(), batch_dim=case.output_dim or case.batch_dim)
    with torch.no_grad(), disable():
        y = LOSSES[0].target(model(*inputs))
    for exts in [QUANTITIES] if together else [QUANTITIES[:4], QUANTITIES[4:8]]:
        found = []
        for gradient in (True, False):
            clear(model)
            torch.manual_seed(1)
            with backpack(*exts, gradient=gradient):
                lossfunc(model(*inputs), y).backward()
            found.append(fields(model, exts))
            assert gradient or all(p.grad is None for p in model.parameters())
        assert found[0].keys() == found[1].keys()
        assert found[0]
        for key, value in found[0].items():
            torch.testing.assert_close(found[1][key], value, rtol=1e-9, atol=1e-12, msg=str(key))


@pytest.fixture
def problem() -> tuple[nn.Sequential, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    return (
        extend(model),
        extend(nn.CrossEntropyLoss()),
        torch.randn(5, 4).double(),
        torch.randint(3, (5,)),
    )


def test_gradients_stay_as_they_are(problem) -> None:
    model, lossfunc, X, y = problem
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.register_hook(lambda g: pytest.fail("a hook was called"))
    with backpack(E.BatchGrad(), gradient=False):
        lossfunc(model(X), y).backward()
    for p in model.parameters():
        assert bool((p.grad == 1).all())
        assert p.grad_batch.shape == (5, *p.shape)


def test_gradients_that_are_asked_for_are_computed(problem) -> None:
    model, lossfunc, X, y = problem
    with backpack(E.Variance(), gradient=False):
        found = torch.autograd.grad(lossfunc(model(X), y), list(model.parameters()))
    assert all(g.shape == p.variance.shape for g, p in zip(found, model.parameters(), strict=True))


def test_only_inputs(problem) -> None:
    model, lossfunc, X, y = problem
    with backpack(E.BatchGrad(), E.DiagGGNExact(), gradient=False):
        lossfunc(model(X), y).backward(inputs=[model[0].weight])
    have = [hasattr(p, "grad_batch") and hasattr(p, "diag_ggn_exact") for p in model.parameters()]
    assert have == [True, False, False, False]


def test_scaled_loss(problem) -> None:
    """The gradient that `backward` is given counts, as it does in ordinary passes."""
    model, lossfunc, X, y = problem
    found = []
    for gradient in (True, False):
        with backpack(E.BatchGrad(), E.DiagGGNExact(), gradient=gradient):
            (2 * lossfunc(model(X), y)).backward(torch.tensor(3.0).double())
        found.append(fields(model, [E.BatchGrad(), E.DiagGGNExact()]))
    torch.testing.assert_close(found[0], found[1])


def test_several_losses(problem) -> None:
    model, lossfunc, X, y = problem
    mse, found = extend(nn.MSELoss()), []
    for gradient in (True, False):
        output = model(X)
        with backpack(E.DiagGGNExact(), E.Variance(), gradient=gradient):
            (lossfunc(output, y) + mse(output, torch.ones_like(output))).backward()
        found.append(fields(model, [E.DiagGGNExact(), E.Variance()]))
    torch.testing.assert_close(found[0], found[1])


def test_weight_decay_is_no_part_of_the_variance(problem) -> None:
    model, lossfunc, X, y = problem
    found = []
    for gradient in (True, False):
        decay = sum(p.square().sum() for p in model.parameters())
        with backpack(E.Variance(), gradient=gradient):
            (lossfunc(model(X), y) + decay).backward()
        found.append(fields(model, [E.Variance()]))
    torch.testing.assert_close(found[0], found[1])


def test_create_graph(problem) -> None:
    model, lossfunc, X, y = problem
    with backpack(E.BatchL2Grad(), gradient=False):
        lossfunc(model(X), y).backward(create_graph=True)
    total = sum(p.batch_l2.sum() for p in model.parameters())
    found = torch.autograd.grad(total, list(model.parameters()))
    plain = copy.deepcopy(model)
    total = plain(X).new_zeros(())
    for n in range(5):
        loss = nn.functional.cross_entropy(plain(X[n : n + 1]), y[n : n + 1]) / 5
        rows = torch.autograd.grad(loss, list(plain.parameters()), create_graph=True)
        total = total + sum(row.square().sum() for row in rows)
    expected = torch.autograd.grad(total, list(plain.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_graph_is_freed_or_retained(problem) -> None:
    model, lossfunc, X, y = problem
    loss = lossfunc(model(X), y)
    with backpack(E.BatchGrad(), gradient=False):
        loss.backward(retain_graph=True)
        first = model[0].weight.grad_batch
        loss.backward()
        torch.testing.assert_close(model[0].weight.grad_batch, first)
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            loss.backward()


def test_products_keep_the_graph(problem) -> None:
    model, lossfunc, X, y = problem
    found = []
    for gradient in (True, False):
        with backpack(E.GGNMP(), E.HMP(), gradient=gradient):
            lossfunc(model(X), y).backward()
        p = model[0].weight
        found.append((p.ggnmp(torch.ones_like(p)), p.hmp(torch.ones_like(p))))
    torch.testing.assert_close(found[0], found[1])


def test_extension_hook(problem) -> None:
    """Called once for each module, with its quantities and its input, after the loss."""
    model, lossfunc, X, y = problem
    called = []

    def hook(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            assert module.input0.shape[1] == module.in_features
            assert module.bias.grad_batch.shape[0] == 5
            del module.weight.grad_batch
        called.append(type(module).__name__)

    with backpack(E.BatchGrad(), extension_hook=hook, gradient=False):
        lossfunc(model(X), y).backward()
    assert called == ["CrossEntropyLoss", "Linear", "Linear"]


class Relative(E.BatchL2Grad):
    """An extension that needs the gradient."""

    savefield = "relative"
    needs_gradient = True

    def finish(self, state: Tensor, context: Any) -> Tensor:
        return state / context.gradient().square().sum()


class Needy(E.DiagGGNExact):
    savefield = "needy"
    needs_gradient = True

    def finish(self, state: Tensor, context: Any) -> Tensor:
        return state - context.gradient()


def test_own_extensions(problem, monkeypatch) -> None:
    model, lossfunc, X, y = problem
    found = []
    for gradient in (True, False):
        with backpack(Relative(), gradient=gradient):
            lossfunc(model(X), y).backward()
        found.append(fields(model, [Relative()]))
    torch.testing.assert_close(found[0], found[1])
    monkeypatch.setattr(Relative, "needs_gradient", False)
    with backpack(Relative()), pytest.raises(RuntimeError, match="needs_gradient = True"):
        lossfunc(model(X), y).backward()
    with backpack(Needy(), gradient=False), pytest.raises(RuntimeError, match="gradient=False"):
        lossfunc(model(X), y).backward()
    assert not any(hasattr(p, "needy") for p in model.parameters())


def test_failure_leaves_nothing(problem) -> None:
    """Nothing saved, no hook left, and the next pass works."""
    model, lossfunc, X, y = problem

    class Fails(E.BatchL2Grad):
        def reduce(self, form: Any, sign: Any = None) -> Tensor:
            if form.shape == model[0].weight.shape:
                raise ValueError("on purpose")
            return super().reduce(form, sign)

    with backpack(Fails(), gradient=False):
        with pytest.raises(ValueError, match="on purpose"):
            lossfunc(model(X), y).backward()
        assert not any(hasattr(p, "batch_l2") for p in model.parameters())
    with backpack(E.BatchL2Grad(), gradient=False):
        lossfunc(model(X), y).backward()
    assert all(p.batch_l2.shape == (5,) for p in model.parameters())


def test_disabled(problem) -> None:
    """Where capture is off, backward is torch's own."""
    model, lossfunc, X, y = problem
    with disable(), backpack(E.BatchGrad(), gradient=False):
        lossfunc(model(X), y).backward()
    assert all(p.grad is not None and not hasattr(p, "grad_batch") for p in model.parameters())


def test_frozen_and_empty_parameters(problem) -> None:
    model, lossfunc, X, y = problem
    model[0].weight.requires_grad_(False)
    with warnings.catch_warnings(action="ignore"):
        empty = extend(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3)).double())
    with backpack(E.BatchGrad(), E.KFLR(), gradient=False):
        lossfunc(model(X), y).backward()
        lossfunc(empty(X), y).backward()
    assert not hasattr(model[0].weight, "grad_batch")
    assert model[0].bias.grad_batch.shape == (5, 6)
    assert empty[0].weight.grad_batch.shape == (5, 0, 4)
    assert empty[1].bias.kflr[0].shape == (3, 3)


class Marker:
    """Something that a weak reference can follow."""


@pytest.mark.parametrize("ext", [E.BatchL2Grad(), E.KFAC()], ids=repr)
def test_nothing_is_kept(problem, ext) -> None:
    model, lossfunc, X, y = problem
    with backpack(ext, gradient=False):
        loss = lossfunc(model(X), y)
        loss.grad_fn.next_functions[0][0].metadata["of the test"] = [Marker()]
        loss.backward()
        noted = [weakref.ref(tap) for tap in loss.grad_fn.next_functions[0][0].metadata["of the test"]]
        del loss
        assert noted[0]() is None


@pytest.mark.parametrize("where", ["hidden", "output", "loss"])
def test_hooks_of_tensors_count(problem, where: str) -> None:
    """Hooks that change the gradient on its way, at taps too."""
    model, lossfunc, X, y = problem
    exts: list[Any] = [E.BatchGrad(), E.Variance(), E.BatchL2Grad()]
    exts += [E.DiagGGNExact()] if where == "loss" else []
    tensors: dict[str, Tensor] = {}
    model[0].register_forward_hook(lambda module, args, out: tensors.update(hidden=out))
    found = []
    for gradient in (True, False):
        tensors["output"] = model(X)
        tensors["loss"] = lossfunc(tensors["output"], y)
        tensors[where].register_hook(lambda g: 2 * g)
        with backpack(*exts, gradient=gradient):
            tensors["loss"].backward()
        found.append(fields(model, exts))
    torch.testing.assert_close(found[1], found[0])
    grads = torch.autograd.grad(lossfunc(model(X), y), list(model.parameters()))
    factors = (2, 2, 1, 1) if where == "hidden" else (2, 2, 2, 2)
    for p, g, factor in zip(model.parameters(), grads, factors, strict=True):
        torch.testing.assert_close(p.grad_batch.sum(0), factor * g)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(
    "exts", [[E.BatchL2Grad(), E.BatchGrad()], [E.Variance(), E.BatchGrad()]], ids=str
)
def test_backward_from_a_layers_output(exts: list[Any], gradient: bool) -> None:
    """The root of the pass is an operation with parameters; no field of a former pass is left."""
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double())
    for X in (torch.randn(5, 4).double(), torch.randn(5, 4).double(), torch.randn(1, 4).double()):
        model.zero_grad()
        with backpack(*exts, gradient=gradient):
            model(X).backward(torch.ones(len(X), 1).double())
        for n in range(len(X)):
            with disable():
                rows = torch.autograd.grad(model(X[n : n + 1]), list(model.parameters()))
            for p, row in zip(model.parameters(), rows, strict=True):
                torch.testing.assert_close(p.grad_batch[n], row)
        for p in model.parameters():
            if hasattr(p, "variance"):
                torch.testing.assert_close(p.variance, p.grad_batch.var(0, unbiased=False))
            else:
                torch.testing.assert_close(p.batch_l2, p.grad_batch.flatten(1).square().sum(1))


class Stops(torch.autograd.Function):
    """Passes its input on and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_no_gradient_arrives(problem) -> None:
    """Zeros, in passes of both kinds."""
    model, lossfunc, X, y = problem
    model.insert(1, extend(Apply(lambda m, a: Stops.apply(a))))
    for gradient in (True, False):
        clear(model)
        with backpack(E.BatchGrad(), E.BatchL2Grad(), gradient=gradient):
            lossfunc(model(X), y).backward()
        assert not model[0].weight.grad_batch.any()
        assert not model[0].bias.batch_l2.any()
        assert model[3].weight.grad_batch.any()


def test_what_torch_refuses(problem) -> None:
    model, lossfunc, X, y = problem
    with backpack(E.BatchGrad(), gradient=False):
        with pytest.raises(RuntimeError, match="several entries"):
            model(X).backward()
        with pytest.raises(RuntimeError, match="empty"):
            lossfunc(model(X), y).backward(inputs=[])
        edge = torch.autograd.graph.get_gradient_edge(model[0].weight)
        lossfunc(model(X), y).backward(inputs=[edge])
    assert [hasattr(p, "grad_batch") for p in model.parameters()] == [True, False, False, False]


def test_empty_batch(problem) -> None:
    model, _, X, _ = problem
    exts = [E.BatchGrad(), E.KFLR(), E.KFAC()]
    with backpack(*exts, gradient=False):
        extend(nn.MSELoss(reduction="sum"))(model(X[:0]), torch.zeros(0, 3).double()).backward()
    assert model[0].weight.grad_batch.shape == (0, 6, 4)
    assert not any(factor.any() for p in model.parameters() for factor in (*p.kflr, *p.kfac))
