"""Several forward passes below one loss: their rows are the same samples, or further ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E

SIZES = (3, 1, 2)
QUANTITIES = (
    *(E.BatchGrad, E.BatchL2Grad, E.SumGradSquared, E.Variance, E.EmpiricalKFAC),
    *(E.DiagGGNExact, E.BatchDiagGGNExact, E.KFLR, E.SqrtGGNExact, E.DiagHessian, E.BatchDiagHessian),
)


class Words(nn.Module):
    """An embedding, a scale and a bias of bare use, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(self.table(x))) * self.scale
        return self.layer(h).sum(1)[:, :3]


class Returns(nn.Module):
    """A model that computes its loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.layer(x), x.argmax(1) % 3, reduction="sum") / 6


MODELS: dict[str, Callable[[], nn.Module]] = {
    "smooth": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "piecewise": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)),
    "convolution": lambda: nn.Sequential(
        *(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(6, 3))
    ),
    "softmax inside": lambda: nn.Sequential(nn.Linear(4, 5), nn.Softmax(1), nn.Linear(5, 3)),
    "words": Words,
}


def inputs(name: str) -> Tensor:
    return torch.randint(5, (6, 3)) if name == "words" else torch.randn(6, 4).double()


def values(model: nn.Module) -> dict[str, list[Tensor]]:
    """All fields, as lists of tensors."""
    found = {}
    for name, p in model.named_parameters():
        for quantity in QUANTITIES:
            field = quantity().savefield
            if hasattr(p, field):
                value = getattr(p, field)
                found[f"{name}.{field}"] = list(value) if isinstance(value, list) else [value]
    return found


def same(found: dict[str, list[Tensor]], wanted: dict[str, list[Tensor]]) -> None:
    assert found.keys() == wanted.keys() and wanted
    for key, each in wanted.items():
        for a, b in zip(found[key], each, strict=True):
            if "sqrt" in key:  # of any order of columns
                a, b = (torch.einsum("cn...,cn...->n...", x, x) for x in (a, b))
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("joined", [True, False], ids=["cat", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_in_parts(name: str, joined: bool, gradient: bool) -> None:
    """Numbers are those of one forward pass of all samples."""
    torch.manual_seed(0)
    model, lossfunc = extend(MODELS[name]().double()), extend(nn.CrossEntropyLoss(reduction="sum"))
    X, y = inputs(name), torch.randint(3, (6,))
    quantities = [quantity() for quantity in QUANTITIES if joined or quantity is not E.SqrtGGNExact]
    with backpack(*quantities):
        (lossfunc(model(X), y) / 6).backward()
    wanted = values(model)
    outputs = [model(part) for part in X.split(SIZES)]
    if joined:
        loss = lossfunc(torch.cat(outputs), y) / 6
    else:
        loss = sum(lossfunc(f, t) for f, t in zip(outputs, y.split(SIZES), strict=True)) / 6
    with backpack(*quantities, forwards="further", gradient=gradient):
        loss.backward()
    same(values(model), wanted)


def test_losses_inside_the_model() -> None:
    torch.manual_seed(0)
    model, X = extend(Returns().double()), inputs("")
    quantities = [quantity() for quantity in QUANTITIES if quantity is not E.SqrtGGNExact]
    with backpack(*quantities):
        model(X).backward()
    wanted = values(model)
    with backpack(*quantities, forwards="further"):
        torch.stack([model(part) for part in X.split(SIZES)]).sum().backward()
    same(values(model), wanted)


def test_a_loss_of_one_sample_inside_the_model() -> None:
    """A number is what remains of a batch of one, too; curvature is that of the loss all the same."""
    torch.manual_seed(0)
    model, X = extend(Returns().double()), inputs("")
    with backpack(E.DiagGGNExact(), E.DiagHessian()):
        model(X[:1]).backward()
    assert model.layer.weight.diag_h.abs().max() > 0.01
    for p in model.parameters():
        torch.testing.assert_close(p.diag_ggn_exact, p.diag_h)


def test_two_models() -> None:
    """Each with samples of its own; all parameters are used once."""
    torch.manual_seed(0)
    models = [extend(MODELS["smooth"]().double()) for _ in range(2)]
    data, y = [torch.randn(n, 4).double() for n in (2, 3)], torch.randint(3, (5,))
    quantities = E.BatchGrad(), E.BatchDiagGGNExact(), E.KFLR(), E.BatchDiagHessian()
    outputs = [model(x) for model, x in zip(models, data, strict=True)]
    with backpack(*quantities, forwards="further"):
        F.cross_entropy(torch.cat(outputs), y, reduction="sum").backward()
    for model, x, t, own in zip(models, data, y.split([2, 3]), (slice(2), slice(2, 5)), strict=True):
        found = values(model)
        with backpack(*quantities):
            F.cross_entropy(model(x), t, reduction="sum").backward()
        wanted = values(model)
        for key in found:
            if "batch" in key:
                assert len(found[key][0]) == 5
                found[key] = [found[key][0][own]]
        same(
            {k: v for k, v in found.items() if "kflr" not in k},
            {k: v for k, v in wanted.items() if "kflr" not in k},
        )


def test_one_pass_for_each_sample() -> None:
    """Sequences of different lengths; each is one sample."""
    torch.manual_seed(0)
    cell, head = nn.LSTM(3, 4, batch_first=True).double(), nn.Linear(4, 2).double()

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = cell, head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x)[0][:, -1])

    model = extend(Reads())
    data = [torch.randn(1, length, 3).double() for length in (2, 5, 1)]
    y = torch.tensor([0, 1, 1])
    with backpack(E.BatchGrad(), E.BatchDiagGGNExact(), forwards="further"):
        sum(F.cross_entropy(model(x), t[None]) for x, t in zip(data, y, strict=True)).backward()
    found = [(p.grad_batch, p.diag_ggn_exact_batch) for p in model.parameters()]
    for n, x in enumerate(data):
        with backpack(E.BatchGrad(), E.BatchDiagGGNExact()):
            F.cross_entropy(model(x), y[n : n + 1]).backward()
        for p, (gradients, curvatures) in zip(model.parameters(), found, strict=True):
            torch.testing.assert_close(gradients[n], p.grad_batch[0])
            torch.testing.assert_close(curvatures[n], p.diag_ggn_exact_batch[0])


def test_a_graph_that_is_used_again() -> None:
    """Where samples are is a matter of each backward pass."""
    model, X = extend(nn.Linear(4, 3).double()), inputs("")
    loss = torch.cat([model(X[:3]), model(X[3:])]).square().sum()
    with backpack(E.BatchGrad(), forwards="further"):
        loss.backward(retain_graph=True)
    apart = model.weight.grad_batch
    with backpack(E.BatchGrad(), forwards="same"):
        loss.backward()
    assert apart.shape[0] == 6
    torch.testing.assert_close(model.weight.grad_batch, apart[:3] + apart[3:])


def losses_and_difference(a: Tensor, b: Tensor) -> Tensor:
    return a.square().mean() - b.mean() + F.mse_loss(a, b)


AMBIGUOUS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "cat": lambda m, x: torch.cat([m(x[:3]), m(x[3:])]).square().mean(),
    "cat of rows": lambda m, x: torch.cat([m(row[None]) for row in x]).square().mean(),
    "stack of rows": lambda m, x: torch.stack([m(row[None]) for row in x]).square().mean(),
    "losses of rows": lambda m, x: sum(m(row[None]).square().mean() for row in x),
    "losses of batches": lambda m, x: m(x[:3]).square().mean() + m(x[3:]).square().mean(),
    "losses in a stack": lambda m, x: torch.stack(
        [m(part).square().mean() for part in x.split(3)]
    ).mean(),
    "a critic": lambda m, x: m(x[:3]).mean() - m(x[3:]).mean(),
    "a relativistic critic": lambda m, x: F.softplus(m(x[:3]) - m(x[3:]).mean(0, keepdim=True)).mean(),
    "means of features": lambda m, x: F.mse_loss(m(x[:3]).mean(0), m(x[3:]).mean(0)),
    "all pairs": lambda m, x: F.cross_entropy(m(x[:3]) @ m(x[3:]).T, torch.arange(3)),
    "distances of all pairs": lambda m, x: torch.cdist(m(x[:3]), m(x[3:])).mean(),
    "a copy": lambda m, x: m(x[:3]).square().mean() + m(x[:3].clone()).exp().mean(),
}
PLAIN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "two views": lambda m, x: (m(x) - m(x.flip(1))).square().mean(),
    "two views of a row": lambda m, x: (m(x[:1]) - m(x[1:2])).square().mean(),
    "the same rows again": lambda m, x: m(x).square().mean() - m(x).mean(),
    "losses of rows that meet": lambda m, x: losses_and_difference(m(x), m(-x)),
    "a chain": lambda m, x: m(F.pad(m(x[:1]), (0, 1))).square().mean(),
    "views on an axis of their own": lambda m, x: torch.stack([m(x), m(-x)]).square().mean(),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_may_be_either_is_asked(name: str) -> None:
    model = extend(nn.Linear(4, 3).double())
    with pytest.raises(RuntimeError, match="forwards='same'.*'further'"), backpack(E.Variance()):
        AMBIGUOUS[name](model, inputs("")).backward()
    assert not hasattr(model.weight, "variance")
    for forwards, size in (("same", {6, 3, 1}), ("further", {6})):
        with backpack(E.BatchGrad(), forwards=forwards):
            AMBIGUOUS[name](model, inputs("")).backward()
        assert len(model.weight.grad_batch) in size
        torch.testing.assert_close(model.weight.grad_batch.sum(0), model.weight.grad)
        model.zero_grad()


def test_a_real_and_a_generated_batch() -> None:
    """What the two answers mean: twelve samples, or six pairs."""
    torch.manual_seed(0)
    model = extend(MODELS["smooth"]().double())
    parts = [torch.randn(6, 4).double() for _ in range(2)]

    def shares() -> list[list[Tensor]]:
        losses = [F.binary_cross_entropy_with_logits(model(x)[:, 0], torch.full((6,), t).double(),
                  reduction="none") / 6 for x, t in zip(parts, (1, 0), strict=True)]  # fmt: skip
        return [list(each) for each in losses]

    parameters = list(model.parameters())[:3]

    def gradients(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    real, generated = shares()
    rows = torch.stack([gradients(each) for each in (*real, *generated)])
    for forwards, wanted in (("further", rows), ("same", rows[:6] + rows[6:])):
        with backpack(E.BatchGrad(), E.Variance(), E.BatchL2Grad(), forwards=forwards):
            sum(sum(each) for each in shares()).backward()
        found = torch.cat([p.grad_batch.flatten(1) for p in parameters], 1)
        torch.testing.assert_close(found, wanted)
        variance = torch.cat([p.variance.flatten() for p in parameters])
        torch.testing.assert_close(variance, wanted.var(0, unbiased=False))
    with backpack(E.DiagGGNExact(), E.DiagHessian(), E.GGNMP()):  # which do not depend on it
        sum(sum(each) for each in shares()).backward()


def test_passes_that_share_no_parameters_are_not_asked() -> None:
    """Samples of an ensemble, whose losses are added up."""
    torch.manual_seed(0)
    first, second = (extend(nn.Linear(4, 3).double()) for _ in range(2))
    X = inputs("")
    with backpack(E.BatchGrad()):
        (first(X).square().mean() + second(-X).exp().mean()).backward()
    assert len(first.weight.grad_batch) == len(second.weight.grad_batch) == 6
    trunk = nn.Linear(4, 4).double()
    first, second = (extend(nn.Sequential(trunk, nn.Linear(4, 3).double())) for _ in range(2))
    with pytest.raises(RuntimeError, match="forwards='same'.*'further'"), backpack(E.BatchGrad()):
        (first(X).square().mean() + second(-X).exp().mean()).backward()


def test_data_that_was_overwritten_is_not_the_same() -> None:
    """A buffer that the next batch is copied to."""
    model, X = extend(nn.Embedding(5, 4).double()), torch.randint(5, (6,))
    loss = model(X).square().mean()
    X.copy_(X.flip(0))
    loss = loss + model(X).exp().mean()
    with pytest.raises(RuntimeError, match="forwards='same'.*'further'"), backpack(E.BatchGrad()):
        loss.backward()


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_plain_is_not_asked(name: str) -> None:
    model = extend(nn.Linear(4, 3).double())
    model.zero_grad()
    with backpack(E.BatchGrad()):
        PLAIN[name](model, inputs("")).backward()
    torch.testing.assert_close(model.weight.grad_batch.sum(0), model.weight.grad)


def test_errors() -> None:
    model, X = extend(nn.Linear(4, 3).double()), inputs("")
    with pytest.raises(ValueError, match="forwards must be one of"):
        backpack(E.BatchGrad(), forwards="other")
    with pytest.raises(RuntimeError, match="forwards='further'"), backpack(E.BatchGrad()):
        (model(X[:4]).mean() + model(X[4:]).mean()).backward()
    further = backpack(E.BatchGrad(), forwards="further")
    with pytest.raises(RuntimeError, match=r"loss.backward\(\)"), further:
        torch.autograd.backward(model(X).mean())
