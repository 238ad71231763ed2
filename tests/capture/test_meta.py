"""Planning without numbers: on the meta device values have the shapes that they would have."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from backpack import backpack, extend
from backpack import extensions as E
from tests.cases import ATTENTION, CONVOLUTIONS, OPERATIONS, Case

QUANTITIES = (
    *(E.BatchGrad, E.BatchL2Grad, E.SumGradSquared, E.Variance, E.DiagGGNExact, E.DiagGGNMC),
    *(E.KFAC, E.KFLR, E.EKFAC, E.SqrtGGNExact, E.DiagHessian, E.BatchDiagHessian, E.GGNMP),
)
# Rows that are picked by what an index holds, and a product whose derivative is tried out.
ASK_FOR_NUMBERS = ("picked", "split", "sliced", "siamese")
# Its own forward pass asks for numbers; a weight that cannot be copied.
LEFT_OUT = ("experts", "pruned")


def shapes(model: nn.Module, X: Any) -> dict[tuple[str, str], Any]:
    """The shapes of all quantities."""
    extend(model)
    lossfunc = extend(nn.MSELoss())
    with backpack(*(quantity() for quantity in QUANTITIES)):
        output = model(*X) if isinstance(X, tuple) else model(X)
        lossfunc(output, torch.zeros_like(output)).backward()
    found = {}
    for name, p in model.named_parameters():
        for quantity in QUANTITIES:
            value = getattr(p, quantity().savefield, None)
            found[name, quantity.__name__] = getattr(value, "shape", type(value))
    return found


def to_meta(X: Any) -> Any:
    if isinstance(X, tuple):
        return tuple(map(to_meta, X))
    return X.to("meta") if isinstance(X, Tensor) else X


CHOSEN = [
    case
    for case in OPERATIONS + CONVOLUTIONS[::3] + ATTENTION
    if not case.batch_dim and case.name not in (*ASK_FOR_NUMBERS, *LEFT_OUT)
]


@pytest.mark.parametrize("case", CHOSEN[::5], ids=lambda c: c.name)
def test_shapes(case: Case) -> None:
    torch.manual_seed(0)
    model, X = case.model(), case.inputs()
    assert shapes(copy.deepcopy(model).to("meta"), to_meta(X)) == shapes(model, X)


@pytest.mark.parametrize("name", ASK_FOR_NUMBERS)
def test_what_needs_numbers(name: str) -> None:
    (case,) = (c for c in OPERATIONS if c.name == name)
    with pytest.raises(RuntimeError, match=r"On the meta device.*backpack\.plan"):
        shapes(case.model().to("meta"), to_meta(case.inputs()))


def test_fake_tensors_are_refused() -> None:
    with FakeTensorMode():
        model, X = extend(nn.Linear(4, 3)), torch.randn(5, 4)
        loss = model(X).sum()
        with pytest.raises(NotImplementedError, match="to\\('meta'\\)"), backpack(E.BatchGrad()):
            loss.backward()
    del model, loss
    gc.collect()
    model = extend(nn.Linear(4, 3))
    with backpack(E.BatchGrad()):
        model(torch.randn(5, 4)).sum().backward()
    assert not model.weight.grad_batch.is_meta and type(model.weight.grad_batch) is Tensor
