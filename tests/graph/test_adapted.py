"""Models that take a step of their own for each task (MAML), written without a transform."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend, mark
from backpack.extensions import (
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SumGradSquared,
    Variance,
)

Weights = dict[str, Tensor]
Call = Callable[[Weights, Tensor], Tensor]
QUANTITIES = (BatchGrad, BatchL2Grad, SumGradSquared, Variance, DiagGGNExact, BatchDiagGGNExact)


@pytest.fixture(autouse=True)
def double() -> None:
    torch.manual_seed(0)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def data(tasks: int = 3, rows: int = 5) -> tuple[Tensor, ...]:
    return tuple(torch.rand(tasks, rows, k, dtype=torch.float64) for k in (2, 1, 2, 1))


Error = Callable[[Tensor, Tensor], Tensor]


def squares(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean()


def adapted(
    weights: Weights, call: Call, x: Tensor, y: Tensor, steps: int, error_of: Error = F.mse_loss
) -> Weights:
    """Weights after steps down the gradient of the error on a task's own data."""
    for _ in range(steps):
        error = error_of(call(weights, x), y)
        slopes = torch.autograd.grad(error, list(weights.values()), create_graph=True)
        weights = {key: w - 0.1 * s for (key, w), s in zip(weights.items(), slopes, strict=True)}
    return weights


def functional(model: nn.Module) -> Call:
    return lambda weights, x: torch.func.functional_call(model, weights, (x,))


def written_out(model: nn.Module) -> Call:
    def call(weights: Weights, x: Tensor) -> Tensor:
        first, bias, second, last = weights.values()
        return F.linear(torch.tanh(F.linear(x, first, bias)), second, last)

    return call


class Meta(nn.Module):
    """Tasks one after the other, in the forward pass of one model."""

    def __init__(self, call: Callable[[nn.Module], Call], steps: int, error: Error) -> None:
        super().__init__()
        self.net, self.call, self.steps, self.error = network(), call, steps, error

    def forward(self, x: Tensor, y: Tensor, new: Tensor) -> Tensor:
        weights, call = dict(self.net.named_parameters()), self.call(self.net)
        tasks = zip(x, y, new, strict=True)
        return torch.stack(
            [call(adapted(weights, call, a, b, self.steps, self.error), c) for a, b, c in tasks]
        )


def wanted(net: nn.Module, outputs: Tensor, targets: Tensor) -> dict[str, list[Tensor]]:
    """Quantities of the mean squared error, samples first in ``outputs``, by brute force."""
    parameters, count = list(net.parameters()), targets.numel()
    rows, roots = [], []
    for out, target in zip(outputs, targets, strict=True):
        share = (out - target).square().sum() / count
        rows.append(torch.autograd.grad(share, parameters, retain_graph=True))
        entries = [torch.autograd.grad(e, parameters, retain_graph=True) for e in out.flatten()]
        roots.append([torch.stack(g) for g in zip(*entries, strict=True)])
    found: dict[str, list[Tensor]] = {}
    for g, j in zip(zip(*rows, strict=True), zip(*roots, strict=True), strict=True):
        grads = torch.stack(g)
        diagonals = torch.stack([2 / count * each.square().sum(0) for each in j])
        values = {
            "grad_batch": grads,
            "batch_l2": grads.flatten(1).square().sum(1),
            "sum_grad_squared": grads.square().sum(0),
            "variance": grads.var(0, unbiased=False),
            "diag_ggn_exact": diagonals.sum(0),
            "diag_ggn_exact_batch": diagonals,
        }
        for field, value in values.items():
            found.setdefault(field, []).append(value)
    return found


def compare(net: nn.Module, expected: dict[str, list[Tensor]]) -> None:
    for field, values in expected.items():
        for p, value in zip(net.parameters(), values, strict=True):
            torch.testing.assert_close(getattr(p, field), value, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("error", [F.mse_loss, squares])
@pytest.mark.parametrize("call", [functional, written_out])
def test_tasks_of_one_model(call: Callable[[nn.Module], Call], error: Error, steps: int) -> None:
    """A loop over tasks inside of the model: each task is a sample, and a step no pass of the block."""
    x, y, new, targets = data()
    model = Meta(call, steps, error)
    plain = copy.deepcopy(model)
    expected = wanted(plain.net, plain(x, y, new), targets)
    extend(model)
    with backpack(*(quantity() for quantity in QUANTITIES)):
        F.mse_loss(model(x, y, new), targets).backward()
    compare(model.net, expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_tasks_as_forward_passes(steps: int) -> None:
    """Passes of a task depend on each other; all their rows are marked as one sample's."""
    x, y, new, targets = data()
    model = network()
    call, weights = functional(model), dict(model.named_parameters())
    outputs = [call(adapted(weights, call, a, b, steps), c) for a, b, c in zip(x, y, new, strict=True)]
    expected = wanted(model, torch.stack(outputs), targets)
    extend(model)
    with backpack(*(quantity() for quantity in QUANTITIES), forwards="further"):
        outputs = [
            call(adapted(weights, call, mark(a.clone(), 0), b, steps), mark(c.clone(), 0))
            for a, b, c in zip(x, y, new, strict=True)
        ]
        F.mse_loss(torch.cat(outputs), targets.flatten(0, 1)).backward()
    compare(model, expected)


def test_rows_of_one_task() -> None:
    """Without a mark a row of the second pass is a sample: the first has made the weights, no more."""
    x, y, new, targets = (each[0] for each in data())
    model = network()
    call, weights = functional(model), dict(model.named_parameters())
    outputs = call(adapted(weights, call, x, y, 1), new)
    expected = wanted(model, outputs, targets)
    diagonals = []
    for p in model.parameters():
        (g,) = torch.autograd.grad(F.mse_loss(outputs, targets), p, create_graph=True)
        entries = [torch.autograd.grad(e, p, retain_graph=True)[0].flatten() for e in g.flatten()]
        diagonals.append(torch.stack(entries).diagonal().reshape(p.shape))
    extend(model)
    with backpack(*(quantity() for quantity in QUANTITIES), DiagHessian()):
        F.mse_loss(call(adapted(weights, call, x, y, 1), new), targets).backward()
    compare(model, expected | {"diag_h": diagonals})
