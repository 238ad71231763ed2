"""Operations that mix samples for some values of a constant, and keep them apart for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.engine import certificate
from backpack.extensions import BatchGrad
from backpack.samples import separability as probe
from tests.cases import Apply

N = 4
Call = Callable[[Tensor, Tensor], Tensor]
# Of an entry of the diagonal, what features are multiplied by.
POWERS = {"solve": -1, "solve_triangular": -1, "cholesky_solve": -2, "multi_dot": 2}
OPERATIONS: dict[str, Call] = {
    "solve": torch.linalg.solve,
    "solve_triangular": lambda A, h: torch.linalg.solve_triangular(A.tril(), h, upper=False),
    "cholesky_solve": lambda A, h: torch.cholesky_solve(h, A.tril()),
    "tensordot": lambda A, h: torch.tensordot(A, h, 1),
    "multi_dot": lambda A, h: torch.linalg.multi_dot([A, A, h]),
    "convolution": lambda A, h: F.conv1d(h[None], A[:, :, None])[0],
    "bilinear": lambda A, h: F.bilinear(h.T, h.new_ones(3, 1), A[:, :, None]).T,
    "matmul": lambda A, h: A @ h,
    "einsum": lambda A, h: torch.einsum("ij,jd->id", A, h),
}


class Multiplied(torch.autograd.Function):
    """A matrix is kept for backward."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, h: Tensor) -> Tensor:
        ctx.save_for_backward(A)
        return A @ h

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        (A,) = ctx.saved_tensors
        return None, A.T @ g


def _enclosed(A: Tensor) -> Any:
    class Enclosed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return A @ h

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return A.T @ g

    return Enclosed


class Model(nn.Module):
    """Features, multiplied over the batch with a matrix that changes."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.first, self.last, self.call = nn.Linear(3, 3).double(), nn.Linear(3, 2).double(), call
        self.A = torch.eye(N, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self.A, self.first(x)))


DIAGONAL = torch.arange(1.0, 1 + N, dtype=torch.float64).diag()
FULL = DIAGONAL + torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0] * 4, [0] * 4])
Mode = Literal["once", "never"]


def _gradients(model: Model, x: Tensor, certify: Mode) -> list[Tensor]:
    with backpack(BatchGrad(), certify=certify):
        model(x).square().sum().backward()
    return [p.grad_batch for p in model.parameters()]


@pytest.mark.parametrize("certify", ["once", "never"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_was_diagonal_is_full(name: str, certify: Mode) -> None:
    """What was found for a diagonal matrix is not believed of another."""
    torch.manual_seed(0)
    certificate.forget()
    model, x = extend(Model(OPERATIONS[name])), torch.randn(N, 3, dtype=torch.float64)
    for matrix in (DIAGONAL, FULL, 2 * DIAGONAL):
        model.A = matrix
        if matrix is FULL:
            with pytest.raises(RuntimeError, match="holds the samples"):
                _gradients(model, x, certify)
            continue
        found = _gradients(model, x, certify)
        for n, factor in enumerate(matrix.diagonal() ** POWERS.get(name, 1)):
            loss = model.last(factor * model.first(x[n])).square().sum()
            expected = torch.autograd.grad(loss, list(model.parameters()))
            for g, e in zip(found, expected, strict=True):
                torch.testing.assert_close(g[n], e)


@pytest.mark.parametrize("certify", ["once", "never"])
@pytest.mark.parametrize("name", ["kept", "enclosed", "operation"])
def test_functions_with_a_matrix(name: str, certify: Mode) -> None:
    """So of custom Functions that keep it, or have closed over it, and of custom operations."""
    torch.manual_seed(0)
    certificate.forget()
    A = DIAGONAL.clone()
    enclosed = _enclosed(A)
    calls: dict[str, Call] = {
        "kept": Multiplied.apply,
        "enclosed": lambda _, h: enclosed.apply(h),
        "operation": _multiplied,
    }
    model, x = extend(Model(calls[name])), torch.randn(N, 3, dtype=torch.float64)
    model.A = A
    first = _gradients(model, x, certify)
    for again, before in zip(_gradients(model, x, certify), first, strict=True):
        torch.testing.assert_close(again, before)
    A.copy_(FULL)
    with pytest.raises(RuntimeError, match="holds the samples"):
        _gradients(model, x, certify)


@torch.library.custom_op("backpack_tests::multiplied", mutates_args=())
def _multiplied(A: Tensor, h: Tensor) -> Tensor:
    return A @ h


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


_multiplied.register_autograd(lambda ctx, g: (None, ctx.saved_tensors[0].T @ g), setup_context=_keep)


def test_what_does_not_depend_on_constants_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer without a rule, whose weights are multiplied with features."""
    probe._verdicts.clear()
    calls: list[int] = []
    inner = probe._tried
    monkeypatch.setattr(probe, "_tried", lambda *args: calls.append(1) or inner(*args))
    table = torch.randn(2, 3, 1)
    model = extend(Apply(lambda m, x: F.bilinear(m.first(x), x[:, :1], table), first=nn.Linear(3, 3)))
    for _ in range(3):
        model(torch.randn(N, 3))
    assert len(calls) == 2
    table *= 0
    model(torch.randn(N, 3))
    assert len(calls) == 2


@pytest.mark.parametrize("certify", ["once", "never"])
def test_derivatives_with_a_matrix(certify: Mode) -> None:
    """So of what a loss contains: the slope of an energy that is solved for."""
    torch.manual_seed(0)
    certificate.forget()
    model = extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())

    def run(A: Tensor) -> None:
        x = torch.randn(N, 3, dtype=torch.float64, requires_grad=True)
        with backpack(BatchGrad(), certify=certify):
            energy = torch.linalg.solve(A, model(x)).square().sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
            slope.square().sum().backward()

    run(DIAGONAL)
    run(2 * DIAGONAL)
    with pytest.raises(RuntimeError, match="where samples are"):
        run(FULL)
