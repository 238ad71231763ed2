"""Kronecker factors, corrected eigenvalues, PCHMP on every row of the case table, by brute force."""

from __future__ import annotations

import pytest
import torch

from backpack import extensions as E
from tests.blocks import Blocks
from tests.cases import CASES, LOSSES, Case

EXTENSIONS = (E.KFLR(), E.KFAC(), E.EKFLR(), E.EKFAC(), E.EmpiricalKFAC())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_factors(case: Case) -> None:
    torch.manual_seed(0)
    loss, model, X = LOSSES[0], case.model(), case.inputs()
    with torch.no_grad():
        y = loss.target(model(*X) if isinstance(X, tuple) else model(X))
    axes = {"batch_dim": case.batch_dim, "output_dim": case.output_dim}
    blocks = Blocks(model, loss.loss(), X, y, **axes)
    for ext in EXTENSIONS:
        report = blocks.compare(ext)
        assert report.ok, f"\n{report}"
        assert len(report.errors) == sum(p.requires_grad for p in model.parameters())


# Large ones take minutes entry by entry; all rows with both quantities are those of the support page.
SMALL = [case for case in CASES if "3d-" not in case.name]


@pytest.mark.parametrize(
    ("case", "ext"),
    [(case, (E.KFRA(), E.PCHMP())[number % 2]) for number, case in enumerate(SMALL)],
    ids=lambda given: getattr(given, "name", None) or given.savefield,
)
def test_for_some_models_only(case: Case, ext: E.BackpropExtension) -> None:
    """Right, or refused: not for all models there is such a matrix."""
    torch.manual_seed(0)
    loss, model, X = LOSSES[0], case.model(), case.inputs()
    with torch.no_grad():
        y = loss.target(model(*X) if isinstance(X, tuple) else model(X))
    axes = {"batch_dim": case.batch_dim, "output_dim": case.output_dim}
    blocks = Blocks(model, loss.loss(), X, y, **axes)
    try:
        blocks.run(ext)
    except NotImplementedError as refusal:
        assert "is defined" in str(refusal)
        return
    report = blocks.compare(ext)
    assert report.ok, f"\n{report}"
