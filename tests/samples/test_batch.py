"""The sample axis of a tensor, found from the sample that each entry belongs to."""

from __future__ import annotations

import pytest
import torch

from backpack.samples.axis import NOBODY, Rows, SampleAxis, axis_of, owners_of

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
