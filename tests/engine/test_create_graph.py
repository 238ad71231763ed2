"""With ``create_graph=True`` every quantity has the same value, and is differentiable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backpack import backpack, extend, memory_cleanup
from backpack import extensions as E
from tests.cases import CASES, Case

QUANTITIES = (
    *(E.BatchGrad, E.BatchL2Grad, E.SumGradSquared, E.Variance, E.DiagGGNExact, E.BatchDiagGGNExact),
    *(E.SqrtGGNExact, E.KFLR, E.DiagHessian, E.BatchDiagHessian),
)


def values(case: Case, create_graph: bool) -> dict[str, list[Tensor]]:
    torch.manual_seed(0)
    model, inputs = case.model().double(), case.inputs()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    inputs = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    extend(model, batch_dim=case.batch_dim)
    lossfunc = extend(nn.MSELoss(), batch_dim=case.output_dim)
    output = model(*inputs)
    exts = [ext() for ext in QUANTITIES]
    with backpack(*exts):
        lossfunc(output, torch.zeros_like(output)).backward(create_graph=create_graph)
    found = {}
    for ext in exts:
        each = [getattr(p, ext.savefield, None) for p in model.parameters() if p.requires_grad]
        found[ext.savefield] = [
            t for v in each if v is not None for t in (v if isinstance(v, list) else [v])
        ]
    memory_cleanup(model)  # without it neither graph nor model are ever freed
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_same_values(case: Case) -> None:
    plain, recorded = values(case, False), values(case, True)
    for field, tensors in plain.items():
        for a, b in zip(tensors, recorded[field], strict=True):
            torch.testing.assert_close(b.detach(), a, rtol=1e-8, atol=1e-10, msg=field)
