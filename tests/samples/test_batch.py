"""The sample axis of a tensor, found from the sample that each entry belongs to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backpack.samples import separability as probe
from backpack.samples.axis import NOBODY, Rows, SampleAxis, axis_of, owners_of, solo_axis
from backpack.testing.oracle import check
from tests.cases import Apply

AXES = [
    (SampleAxis(3), (3, 4)),
    (SampleAxis(3, 1), (4, 3)),
    (SampleAxis(3, 1, 2, 1), (2, 6, 3)),
    (SampleAxis(3, 0, 1, 2), (6, 5)),
    (SampleAxis(3, 0, 2, 2), (12, 5)),
    (SampleAxis(3, 1, picked=Rows(torch.tensor([2, 0, 0, 1]), 3)), (2, 4)),
    (SampleAxis(1, 0, 1, 4), (4, 3)),
]


@pytest.mark.parametrize("axis, shape", AXES)
def test_there_and_back(axis: SampleAxis, shape: tuple[int, ...]) -> None:
    owners = owners_of(axis, shape, torch.device("cpu"))
    assert owners.shape == shape
    found = axis_of(owners, axis.size)
    assert found is not None and torch.equal(owners_of(found, shape, torch.device("cpu")), owners)


def test_entries_that_are_anybodys() -> None:
    owners = torch.tensor([[0, 0], [NOBODY, 1], [NOBODY, NOBODY]])
    assert axis_of(owners, 3) == SampleAxis(3, 0)
    assert axis_of(owners[[1, 0, 2]], 3) is None  # whose is the last row?


def test_no_axis() -> None:
    assert axis_of(torch.tensor([[0, 1], [1, 0]]), 2) is None
    assert axis_of(torch.tensor(0), 1) is None


def test_rows_of_one_sample_take_no_memory() -> None:
    """There may be many of these, of different lengths, and they are remembered."""
    for length in range(1, 200):
        axis = solo_axis(2, 5, (1000 * length, 3), torch.device("cpu"))
        assert axis.picked is not None and axis.picked.nbytes == 0
        assert axis.picked.samples.untyped_storage().nbytes() == 8
    tensor = torch.randn(199_000, 3)
    split = axis.split(tensor)
    assert torch.equal(split[2], tensor) and not split[[0, 1, 3, 4]].any()
    assert torch.equal(axis.join(split), tensor)


def test_verdicts_hold_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered by the rows that were picked, others each time, is forgotten in time."""
    probe._verdicts.clear()
    monkeypatch.setattr(probe, "_held", 0)
    monkeypatch.setattr(probe, "_BYTES", 10 * 2 * 6 * 8)
    h = torch.randn(6, 3, requires_grad=True)
    for k in range(40):
        axis = SampleAxis(3, picked=Rows(torch.tensor([0, 1, 2, 2, 1, k % 3]), 3))
        assert probe.is_sample_separable(torch.fft.fft, (h, k + 3), {}, 0, [(h, axis)], axis)
        assert len(probe._verdicts) <= 5  # each has the axis of the argument and of the result


def test_joined_guesses_are_guesses() -> None:
    """Rows of what may be no samples do not become samples by being put beside each other again."""

    def forward(m: Any, x: Tensor) -> Tensor:
        codes = torch.stack([m.code(row) for row in torch.eye(3, 4, dtype=x.dtype)])
        return m.first(x) @ codes.T

    torch.manual_seed(0)
    model = Apply(forward, first=nn.Linear(2, 3), code=nn.Linear(4, 3))
    report = check(model, nn.CrossEntropyLoss(), torch.randn(3, 2), torch.tensor([0, 2, 1]))
    assert report.ok, f"\n{report}"
