"""Every quantity on published architectures and on parameters used in unusual ways, in float64.

What needs a package is marked `zoo` and run by `make zoo`, as is what takes more than a second.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.testing.oracle import check
from tests.zoo.compare import Trial
from tests.zoo.models import ZOO
from tests.zoo.unusual import Checkpointed

ALL = "first", "second", "hessian", "hessian_by_sample"
# A view changed in place hides a parameter that met constants only, which is said.
REFUSED = "reuse: view in place", "transformers: Funnel"


def _table() -> list:
    rows = []
    for name, entry in ZOO.items():
        for kind in entry.kinds:
            marks = [] if entry.quick(kind) else [pytest.mark.zoo]
            rows.append(pytest.param(name, kind, marks=marks, id=f"{name}: {kind}"))
    return rows


@pytest.mark.filterwarnings("ignore")  # packages' own, and torch's about masks and nested tensors
@pytest.mark.parametrize("name, kind", _table())
def test_zoo(name: str, kind: str) -> None:
    trial = Trial(ZOO[name].make)
    if name in REFUSED:
        with pytest.raises(RuntimeError, match="in a way that backpack cannot see"):
            getattr(trial, kind)()
        return
    report = getattr(trial, kind)()
    assert report.errors and report.ok, f"\n{report}"
    if kind == "first":
        assert trial.lively()


@pytest.mark.parametrize("quantity", [E.BatchGrad(), E.DiagGGNExact()])
def test_reentrant_checkpointing(quantity: E.BackpropExtension) -> None:
    """The right numbers, or an error that says what to do."""
    torch.manual_seed(0)
    model, X, y = (
        Checkpointed(reentrant=True),
        torch.randn(3, 4, requires_grad=True),
        torch.tensor([0, 2, 1]),
    )
    extend(model)
    try:
        with backpack(quantity):
            extend(nn.CrossEntropyLoss())(model(X), y).backward()
    except RuntimeError as error:
        assert "use_reentrant=False" in str(error)
        return
    report = check(Checkpointed(), nn.CrossEntropyLoss(), X, y, [quantity])
    assert all(hasattr(p, quantity.savefield) for p in model.parameters()) and report.ok


def test_loss_that_is_not_convex() -> None:
    """The similarity of two outputs has no square root of its Hessian."""
    model = extend(nn.Linear(4, 3))
    a, b = torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match="not convex"), backpack(E.SqrtGGNExact()):
        (model(a) * model(b)).sum(1).cosh().mean().backward()
