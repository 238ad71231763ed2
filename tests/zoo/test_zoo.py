"""Every quantity on published architectures and on parameters used in unusual ways, in float64.

What needs a package is marked `zoo` and run by `make zoo`, as is what takes more than a second.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.oracle import check
from tests.zoo.compare import Trial
from tests.zoo.models import ZOO
from tests.zoo.unusual import Checkpointed

LOST = "an index along the sample axis together with another one loses the samples"
KEYWORDS = "products do not look at keyword arguments: ValueError"
EXPANDED = "shapes do not match where constants expanded to the batch meet a parameter"
IN_PLACE = "a parameter is not seen below a view that is changed in place"
SECOND_USE = "BatchDiagHessian is refused for losses without a rule"
ALL = "first", "second", "hessian", "hessian_by_sample"
DEFECTS = {
    (name, kind): reason
    for name, kinds, reason in (
        ("transformers: GPT-2, classifier", ALL[1:2], LOST),
        ("reuse: last token", ALL, LOST),
        ("reuse: all tokens to one expert", ALL, LOST),
        ("reuse: products with keywords", ALL, KEYWORDS),
        ("transformers: BLOOM", ALL[:2], KEYWORDS),
        ("reuse: expanded constant", ALL[:2], EXPANDED),
        ("transformers: XLNet", ALL[:2], EXPANDED),
        ("reuse: view in place", ALL, IN_PLACE),
        ("transformers: Funnel", ALL[:2], IN_PLACE),
        ("reuse: siamese, distance", ALL[3:], SECOND_USE),
        ("reuse: siamese, log-cosh", ALL[3:], SECOND_USE),
    )
    for kind in kinds
}


def _table() -> list:
    rows = []
    for name, entry in ZOO.items():
        for kind in entry.kinds:
            marks = [] if entry.quick(kind) else [pytest.mark.zoo]
            if (name, kind) in DEFECTS:
                marks.append(pytest.mark.xfail(strict=True, reason=DEFECTS[name, kind]))
            rows.append(pytest.param(name, kind, marks=marks, id=f"{name}: {kind}"))
    return rows


@pytest.mark.filterwarnings("ignore")  # packages' own, and torch's about masks and nested tensors
@pytest.mark.parametrize("name, kind", _table())
def test_zoo(name: str, kind: str) -> None:
    trial = Trial(ZOO[name].make)
    report = getattr(trial, kind)()
    assert report.errors and report.ok, f"\n{report}"
    if kind == "first":
        assert trial.lively()


@pytest.mark.xfail(strict=True, reason="an AttributeError in the forward pass")
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
    with pytest.raises(ValueError, match="not convex"), backpack(E.DiagGGNExact()):
        (model(a) * model(b)).sum(1).cosh().mean().backward()
