"""Programs of the benchmark of derivatives agree with each other; its table is that of its results."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from backpack import backpack, extend
from backpack.extensions import BatchGrad
from benchmarks import derivatives


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", derivatives.KINDS)
def test_individual_gradients(name: str) -> None:
    """By a loop, by ``torch.func`` and by this library."""
    kind = derivatives.made(name)
    kind = kind._replace(
        model=kind.model.double(),
        terms=[term._replace(rows=tuple(x[:5].double() for x in term.rows)) for term in kind.terms],
    )
    loop, mapped = derivatives.looped(kind), derivatives.mapped(kind)
    extend(kind.model)
    with backpack(BatchGrad(), **derivatives.options(kind)):
        derivatives.loss_of(kind, kind.model).backward()
    for p, one, other in zip(kind.model.parameters(), loop, mapped, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-7, atol=1e-10)
        if p.grad is not None:
            torch.testing.assert_close(p.grad_batch, one, rtol=1e-7, atol=1e-10)
        else:
            assert not one.any()


def test_table() -> None:
    results = json.loads((derivatives.RESULTS / "derivatives.json").read_text())
    assert (derivatives.RESULTS / "derivatives.md").read_text() == derivatives.table(results)
