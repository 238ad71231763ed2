"""Programs of the benchmark of rows compute what its loop does; its table is that of its results."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

import backpack as bp
from backpack.extensions import BatchGrad
from benchmarks import rows


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
@pytest.mark.parametrize("name", rows.KINDS)
def test_loop(name: str) -> None:
    kind = rows.made(name)
    loop = rows.steps(kind)["loop"]()
    kind.say(kind.model)
    with bp.backpack(BatchGrad(), **kind.options):
        kind.loss(kind.model).backward()
    scale = max(float(each.abs().max()) for each in loop)
    for (parameter, p), expected in zip(kind.model.named_parameters(), loop, strict=True):
        if not hasattr(p, "grad_batch"):
            assert not expected.any(), parameter
            continue
        torch.testing.assert_close(p.grad_batch, expected, rtol=1e-4, atol=1e-5 * scale)


def test_table() -> None:
    results = json.loads((rows.RESULTS / "rows.json").read_text())
    assert (rows.RESULTS / "rows.md").read_text() == rows.table(results)
