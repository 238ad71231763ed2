"""The device of these tests: ``BACKPACK_DEVICE``, by default the GPU. With ``cpu`` they are tried."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the library runs."""
    return torch.device(os.environ.get("BACKPACK_DEVICE", "cuda"))


@pytest.fixture(autouse=True)
def _as_given() -> Iterator[None]:
    """Products in the precision of their arguments, and the same draws each time."""
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    torch.manual_seed(0)
    yield
    for place, allowed in zip(places, before, strict=True):
        place.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def _memory() -> None:
    """A process with a GPU's context is large from the beginning: its size says nothing."""
