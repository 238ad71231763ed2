"""One budget for all columns: `chunk_size`, or as many as fit a number of bytes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.engine import loop
from backpack.graph import carry as carrying
from backpack.sources import at_parameter, hessian
from backpack.sources import kfra as chain
from backpack.testing.oracle import Oracle
from tests.cases import CASES, Case, seq, x

# By columns of curved entries, by the Hessian at the output, by entries of the parameter.
NAMES = "gelu softmax reuse softplus-weight lora conv2d-plain gated lstm weight-norm".split()
MODELS = [case for case in CASES if case.name in NAMES]
# The layer right below a curved operation needs no columns; one further down does.
WIDE = nn.Linear(3, 2), nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 2)
MODELS += [Case("wide", lambda: copy.deepcopy(seq(*WIDE)), x(4, 3))]
EXTS = (E.DiagHessian, E.BatchDiagHessian, E.DiagGGNExact)


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many columns went down together, each time."""
    counts: list[int] = []

    def watched(start: Any, targets: Any, columns: Any, *rest: Any) -> Any:
        counts.append(len(columns if isinstance(columns, torch.Tensor) else columns[0]))
        return carry(start, targets, columns, *rest)

    carry = carrying.carry
    for module in (hessian, at_parameter, chain, loop):
        monkeypatch.setattr(module, "carry", watched)
    return counts


def run(case: Case, *exts: E.BackpropExtension, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model, inputs = case.model().double(), case.inputs().double()
    with backpack(*exts, **options):
        output = extend(model)(inputs)
        extend(nn.MSELoss())(output, torch.ones_like(output)).backward()
    y = torch.ones_like(output.detach())
    reference = Oracle(model, nn.MSELoss(), inputs, y)
    for ext in exts:
        expected = reference.value(ext.savefield)
        for name, p in model.named_parameters():
            torch.testing.assert_close(getattr(p, ext.savefield), expected[name], rtol=1e-8, atol=1e-9)
    return model


@pytest.mark.parametrize("case", MODELS, ids=lambda c: c.name)
@pytest.mark.parametrize("ext", EXTS)
def test_chunk_size(case: Case, ext, carried: list[int]) -> None:
    for size in (1, 3, 50):
        carried.clear()
        run(case, ext(), chunk_size=size)
        assert carried and max(carried) <= size
        # The square has two columns a sample, wide models have more of curved entries.
        assert size < 50 or case.name != "wide" or ext is E.DiagGGNExact or max(carried) == 40


@pytest.mark.parametrize("case", MODELS, ids=lambda c: c.name)
@pytest.mark.parametrize("ext", EXTS)
def test_bytes(case: Case, ext, carried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrying, "COLUMN_BYTES", {"cpu": 1})
    run(case, ext())
    assert set(carried) == {1}
