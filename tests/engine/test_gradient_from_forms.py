"""``gradient="forms"``: ``p.grad`` is autograd's, and so are all that comes with it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from backpack import backpack, disable, extend
from backpack import extensions as E
from backpack.forms.base import Form
from backpack.forms.outer import Outer
from tests.cases import CASES, LOSSES, Case

ALL = [(E.BatchGrad(), E.Variance()), (E.SumGradSquared(), E.BatchL2Grad()), (E.DiagGGNExact(),)]


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: Case) -> None:
    """Accumulated to what is there, for quantities that write gradients out and others."""
    torch.manual_seed(0)
    model, inputs = extend(case.model().double(), batch_dim=case.batch_dim), case.inputs()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    inputs = tuple(i.double() if torch.is_floating_point(i) else i for i in inputs)
    model.eval()
    lossfunc = extend(LOSSES[0].loss(), batch_dim=case.output_dim or case.batch_dim)
    with torch.no_grad(), disable():
        y = LOSSES[0].target(model(*inputs))
    lossfunc(model(*inputs), y).backward()
    plain = gradients(model)
    for exts in ALL[:1] if len(plain) > 3 else ALL:
        model.zero_grad()
        for times in (1, 2):
            with backpack(*exts, gradient="forms"):
                lossfunc(model(*inputs), y).backward()
            for found, wanted in zip(gradients(model), plain, strict=True):
                assert (found is None) == (wanted is None)
                if found is not None:
                    assert wanted is not None
                    torch.testing.assert_close(found, times * wanted, rtol=1e-9, atol=1e-12)


class Wide(nn.Module):
    """Weights so large that quantities are computed piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(8, 64, 3, padding=1), nn.Linear(64, 200)
        self.scale = nn.Parameter(torch.rand(200) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        return (self.last(torch.relu(x)) * self.scale).mean(1)


@pytest.fixture
def problem() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = extend(Wide().double())
    return model, extend(nn.CrossEntropyLoss()), torch.rand(5, 8, 6, 6).double(), torch.arange(5)


QUANTITIES = [
    *([E.BatchGrad()], [E.BatchL2Grad()], [E.SumGradSquared()], [E.Variance()], [E.KFAC()]),
    *([E.BatchGrad(subsampling=[1])], [E.Variance(), E.SumGradSquared(), E.BatchGrad()]),
]


@pytest.mark.parametrize("exts", QUANTITIES, ids=str)
def test_piece_by_piece(problem: Any, exts: list[Any]) -> None:
    """The gradient and the quantities."""
    model, lossfunc, X, y = problem
    torch.manual_seed(1)
    with backpack(*exts):
        lossfunc(model(X), y).backward()
    wanted = [(p.grad, *(getattr(p, e.savefield) for e in exts)) for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    with backpack(*exts, gradient="forms"):
        lossfunc(model(X), y).backward()
    for p, (gradient, *values) in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-14)
        for ext, value in zip(exts, values, strict=True):
            found = getattr(p, ext.savefield)
            for a, b in zip(found, value, strict=True) if isinstance(value, list) else [(found, value)]:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


class Large(nn.Module):
    """Weights of which one product does not fit the cache, as a matrix and as its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 400), nn.Parameter(torch.randn(400, 400) / 20)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.relu(self.first(x)) @ self.second).mean(1)[:, :9]


PIECES = {
    "products": (Wide, (5, 8, 6, 6), {E.SumGradSquared: 10, E.Variance: 10, E.BatchL2Grad: 5}),
    "strips": (Large, (5, 9, 8), {E.SumGradSquared: 5, E.Variance: 5}),
}


@pytest.mark.parametrize("name", PIECES)
def test_products_are_added_up_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where squares are taken of single gradients their sum costs no product, and is autograd's."""
    make, shape, expected = PIECES[name]
    torch.manual_seed(0)
    model, X, y = extend(make().double()), torch.randn(shape).double(), torch.arange(5)
    F.cross_entropy(model(X), y).backward()
    wanted = gradients(model)
    # How many single gradients of the two large weights are in a sum that no product has made.
    added: list[int] = []
    total = Outer.total

    def counted(self: Outer) -> Tensor:
        assert self.tally is not None
        if self.shape.numel() > 3000 and self.tally.rows:
            assert self.tally.rows == self.samples * self.columns
            added.append(self.tally.rows)
        return total(self)

    monkeypatch.setattr(Outer, "total", counted)
    for quantity, count in expected.items():
        model.zero_grad()
        added.clear()
        with backpack(quantity(), gradient="forms"):
            F.cross_entropy(model(X), y).backward()
        assert sum(added) == count, quantity
        for found, true in zip(gradients(model), wanted, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-13)


def test_hooks_and_other_leaves(problem: Any) -> None:
    """Hooks are called once, with the gradient; tensors that are no parameters have gradients too."""
    model, lossfunc, X, y = problem
    X.requires_grad_()
    weight = model.last.weight
    seen: list[str] = []

    def run(**options: Any) -> list[Tensor]:
        model.zero_grad()
        X.grad = None
        with backpack(E.Variance(), **options):
            (lossfunc(model(X), y) + model.scale.square().sum()).backward()
        return [X.grad, *(p.grad for p in model.parameters())]

    weight.register_hook(lambda g: seen.append("hook") or 2 * g)
    weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    wanted = run()
    assert seen == ["hook", "accumulated"]
    found = run(gradient="forms")
    assert seen == 2 * ["hook", "accumulated"]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_options_of_backward(problem: Any) -> None:
    """``inputs``, ``retain_graph`` and ``create_graph`` mean what they mean."""
    model, lossfunc, X, y = problem
    loss = lossfunc(model(X), y)
    loss.backward(retain_graph=True)
    wanted = model.last.weight.grad.clone()
    model.zero_grad()
    with backpack(E.Variance(), gradient="forms"):
        loss.backward(inputs=[model.last.weight], retain_graph=True)
        assert [name for name, p in model.named_parameters() if p.grad is not None] == ["last.weight"]
        torch.testing.assert_close(model.last.weight.grad, wanted, rtol=1e-10, atol=1e-14)
        loss.backward(retain_graph=True, create_graph=True)
        torch.testing.assert_close(model.last.weight.grad, 2 * wanted, rtol=1e-10, atol=1e-14)
        assert model.last.weight.variance.requires_grad
    squares = model.last.weight.grad.square().sum()
    (again,) = torch.autograd.grad(squares, [model.conv.bias], retain_graph=True)
    (true,) = _twice(model, lossfunc, X, y)
    torch.testing.assert_close(again, true, rtol=1e-9, atol=1e-14)
    model.zero_grad()
    with backpack(E.Variance(), gradient="forms"):
        loss.backward()
        with pytest.raises(RuntimeError, match="retain_graph"):
            loss.backward()
    model.zero_grad()


def _twice(model: nn.Module, lossfunc: nn.Module, X: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    weight = model.last.weight
    (g,) = torch.autograd.grad(lossfunc(model(X), y), [weight], create_graph=True)
    return torch.autograd.grad((g.detach() + g).square().sum(), [model.conv.bias])


def test_refused_leaves_gradients_alone(problem: Any) -> None:
    """Where a quantity raises nothing is accumulated."""
    model, lossfunc, X, y = problem
    with backpack(E.KFRA(), E.Variance(), gradient="forms"), pytest.raises(NotImplementedError):
        lossfunc(model(X) + model(X), y).backward()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="forms"):
        backpack(gradient="form")


class Uses(nn.Module):
    """A leaf that is used by taps, by another operation of the model and in the loss; frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6, sparse=True)
        self.norm = weight_norm(nn.Linear(6, 6))
        self.gru, self.last = nn.GRU(6, 6, batch_first=True), nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.tied, self.empty = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.norm, self.words(x) @ self.tied, use_reentrant=False)
        x = self.frozen(torch.tanh(self.gru(x)[0] @ self.tied.T)) + self.last(x)
        return self.last(x).mean(1) + self.empty.sum()

    @staticmethod
    def loss(model: Uses, X: Tensor, y: Tensor) -> Tensor:
        plain = F.cross_entropy(model(X), y) + 0.1 * model.last.weight.square().sum()
        return plain + model.norm.bias.abs().sum()


def train(model: nn.Module, loss: Any, steps: int = 2, **options: Any) -> list[Tensor | None]:
    """Gradients that are accumulated, stepped with, and that of the input's features."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    X, y = torch.randint(9, (5, 3)), torch.arange(5)
    found: list[Tensor | None] = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(2):
            with backpack(E.BatchL2Grad(), E.SumGradSquared(), **options):
                loss(model, X, y).backward()
        found += [g.to_dense() if g is not None else g for g in gradients(model)]
        optimizer.step()
    return found


def test_every_use() -> None:
    """Where a form does not hold all of the gradient, autograd's is taken."""
    torch.manual_seed(0)
    model = extend(Uses().double())
    state = copy.deepcopy(model.state_dict())
    wanted = train(model, Uses.loss)
    model.load_state_dict(state)
    found = train(model, Uses.loss, gradient="forms")
    assert sum(g is not None for g in wanted) == 2 * 12
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    assert model.words.weight.grad is not None and model.words.weight.grad.is_sparse


class Refused(E.BatchL2Grad):
    """No value for matrices, which turns out late."""

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        if len(form.shape) > 1:
            raise NotImplementedError("no matrices")
        return super().reduce(form, sign)


@pytest.mark.parametrize("exts", [[Refused()], [E.KFRA(), E.BatchGrad()], [E.DiagHessian(), Refused()]])
def test_left_out(exts: list[Any]) -> None:
    """A parameter that cannot have a quantity has its gradient, also where samples are mixed."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6)
    model = extend(nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3)).double())
    X, y = torch.randn(5, 4).double(), torch.arange(5) % 3
    norm.eval() if isinstance(exts[-1], Refused) else norm.train()
    F.cross_entropy(model(X), y).backward()
    wanted = gradients(model)
    model.zero_grad()
    with warnings.catch_warnings(), backpack(*exts, gradient="forms", unsupported="skip") as block:
        warnings.simplefilter("ignore")
        F.cross_entropy(model(X), y).backward()
    assert block.left_out
    for a, b in zip(gradients(model), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_loss_with_derivatives() -> None:
    """Of the model in its inputs, which have gradients of their own."""
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 1)).double())
    X = torch.randn(5, 2).double().requires_grad_()

    def run(**options: Any) -> list[Tensor | None]:
        model.zero_grad()
        X.grad = None
        with backpack(E.BatchGrad(), **options):
            u = model(X)
            (du,) = torch.autograd.grad(u.sum(), X, create_graph=True)
            ((du[:, :1] - u) ** 2).mean().backward()
        return [X.grad, *gradients(model)]

    for a, b in zip(run(gradient="forms"), run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_features_of_the_model(problem: Any) -> None:
    """No leaves, but asked for among the inputs."""
    model, lossfunc, X, y = problem
    kept: list[Tensor] = []

    def run(*exts: Any) -> list[Tensor | None]:
        model.zero_grad()
        kept.clear()
        hook = model.conv.register_forward_hook(lambda m, i, o: kept.append(o))
        loss = lossfunc(model(X), y)
        hook.remove()
        with backpack(*exts, gradient="forms"):
            loss.backward(inputs={"conv": model.conv.weight, "features": kept[0]})
        return [kept[0].grad, *gradients(model)]

    for a, b in zip(run(E.BatchGrad()), run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_half_precision() -> None:
    """Autocast, a scaler, weights that are not contiguous: no less exact than autograd's."""
    torch.manual_seed(0)
    model = extend(Wide()).to(memory_format=torch.channels_last)
    X, y = torch.rand(64, 8, 6, 6), torch.randint(9, (64,))
    double = copy.deepcopy(model).double()
    F.cross_entropy(double(X.double()), y).backward()
    errors = []
    for options in ({}, {"gradient": "forms"}):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), backpack(E.SumGradSquared(), **options):
            F.cross_entropy(model(X), y).mul(2**7).backward()
        pairs = zip(gradients(double), gradients(model), strict=True)
        errors.append([float((a - b / 2**7).norm() / a.norm()) for a, b in pairs])
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        assert model.conv.weight.grad.stride() == model.conv.weight.stride()
    assert all(ours <= 1.2 * theirs for theirs, ours in zip(*errors, strict=True)), errors


def test_ordinary_pass() -> None:
    """Nothing of first order is asked for: the gradient is autograd's, bit for bit."""
    model = extend(nn.Linear(40, 30))
    X, y = torch.randn(50, 40), torch.randint(30, (50,))
    F.cross_entropy(model(X), y).backward()
    wanted = gradients(model)
    model.zero_grad()
    with backpack(E.KFAC(), gradient="forms"):
        F.cross_entropy(model(X), y).backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), wanted, strict=True))
