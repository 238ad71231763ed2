"""What the monitor holds, and when."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from backpack.cockpit.norms import norms_of, squared_norm, squared_norms
from benchmarks import cockpit_memory
from benchmarks.cockpit_memory import peak

PROBLEMS = [("2c2d", 16, "SGD"), ("3c3d", 16, "SGD"), ("3c3d", 16, "Adam"), ("char-lstm", 50, "Adam")]


def test_the_page_has_the_numbers() -> None:
    page = cockpit_memory.PAGE.read_text()
    assert cockpit_memory.with_table(page) == page


@pytest.mark.parametrize(("problem", "batch", "optimizer"), PROBLEMS)
def test_less_than_a_quarter_of_individual_gradients(
    problem: str, batch: int, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backpack.engine.certificate.default", "once")  # as outside of tests
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = cockpit_memory.measured(problem, batch, optimizer, ["economy"])
    assert row["more"]["economy"] < row["individual"] / 4


def test_peaks_are_seen() -> None:
    """A tensor counts while it lives, also one that was there before the step."""

    def training() -> Callable[[], None]:
        kept = torch.ones(2**18)  # 1 MB

        def step() -> None:
            nonlocal kept
            kept = (kept + torch.ones(2**20)[: 2**18]).clone()

        return step

    found = peak(training)
    assert 6 * 2**20 <= found < 7.1 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_large_tensors(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [t.to(dtype) for t in (torch.randn(700, 300).mT, torch.randn(5), torch.zeros(0))]
    expected = torch.stack([t.double().square().sum() for t in tensors])
    torch.testing.assert_close(torch.stack(squared_norms(tensors)), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(squared_norm(tensors[0]), expected[0], rtol=1e-12, atol=0)


def test_norms_of_tensors_that_are_not_there() -> None:
    table = nn.Embedding(3, 1, sparse=True)
    table(torch.tensor([0, 0, 1])).sum().backward()  # one row twice
    found = norms_of([None, torch.tensor([3.0, 4.0]), table.weight.grad])
    torch.testing.assert_close(found, torch.tensor([0.0, 5.0, 5**0.5], dtype=torch.float64))
