"""Every backward pass of the tests is certified, and a worker of the tests stays small."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Iterator

import pytest

from backpack.engine import certificate

certificate.default = "always"

LARGEST, LARGEST_OF_ZOO = 1.5 * 2**30, 2.5 * 2**30


def peak() -> int:
    """The most memory that this process has held so far, in bytes."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


@pytest.fixture(autouse=True, scope="module")
def _trimmed() -> Iterator[None]:
    """Memory that a file of tests has freed goes back to the system."""
    yield
    trim()


def trim() -> None:
    """Give what is free back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(autouse=True)
def _memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test that takes the worker over the limit fails: it needs that much, or something is kept."""
    before = peak()
    yield
    after = peak()
    if after > before + 2**25:
        trim()  # a large test: what it has freed goes back at once
    largest = LARGEST_OF_ZOO if request.node.get_closest_marker("zoo") else LARGEST
    if before <= largest < after:
        pytest.fail(
            f"memory of this worker has grown from {before / 2**20:.0f} to {after / 2**20:.0f} MB"
        )
