"""Every quantity, on every operation, with every loss, against the oracle in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from backpack import extensions as E
from backpack.testing.oracle import check
from tests.cases import CASES, LOSSES, Case, LossCase

QUANTITIES = [
    E.BatchGrad(),
    E.BatchL2Grad(),
    E.SumGradSquared(),
    E.Variance(),
    E.DiagGGNExact(),
    E.DiagGGNMC(),
    E.BatchDiagGGNExact(),
    E.BatchDiagGGNMC(),
    E.SqrtGGNExact(),
    E.SqrtGGNMC(),
    E.DiagHessian(),
    E.BatchDiagHessian(),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda c: c.name)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: Case, loss: LossCase) -> None:
    agree(case, loss, torch.float64, 1e-8)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_without_waiting(case: Case) -> None:
    """Quantities that need no parameter's gradient are saved earlier; first and second order apart."""
    agree(case, LOSSES[0], torch.float64, 1e-8, [E.BatchGrad(), E.BatchL2Grad(), E.SumGradSquared()])
    agree(case, LOSSES[0], torch.float64, 1e-8, [E.DiagGGNExact(), E.DiagHessian()])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_single_precision(case: Case) -> None:
    agree(case, LOSSES[0], torch.float32, 1e-4)


def agree(
    case: Case,
    loss: LossCase,
    dtype: torch.dtype,
    tolerance: float,
    quantities: Sequence[E.BackpropExtension] = QUANTITIES,
) -> None:
    torch.manual_seed(0)
    model, inputs = case.model(), case.inputs()
    with torch.no_grad():
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    report = check(
        *(model, loss.loss(), inputs, loss.target(output), quantities),
        batch_dim=case.batch_dim,
        output_dim=case.output_dim,
        dtype=dtype,
        tolerance=tolerance,
    )
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_single_columns(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in large models on a CPU: one column goes down after the other."""
    monkeypatch.setattr("backpack.graph.carry.SMALL_COLUMN", -1)
    agree(case, LOSSES[0], torch.float64, 1e-8, [E.DiagGGNExact(), E.BatchDiagGGNExact()])


@pytest.mark.parametrize("case", CASES[::3], ids=lambda c: c.name)
def test_batched_columns(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: all columns go down together, as far as the operations can do that."""
    monkeypatch.setattr("backpack.graph.carry.SEVERAL", 2)
    monkeypatch.setattr("backpack.graph.carry.SMALL_COLUMN", 2**30)
    agree(case, LOSSES[0], torch.float64, 1e-8)
