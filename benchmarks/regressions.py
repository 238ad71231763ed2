"""Times to compare from commit to commit: ``make bench-regressions``.

Each run is saved and compared with the one before; it fails where the fastest pass takes a quarter
longer. Nothing else should run on the machine at the time. ``REGRESSIONS`` holds the numbers of rounds
and samples: ``REGRESSIONS="2 2" python -m pytest benchmarks/regressions.py`` shows that all of it runs.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from backpack.cockpit import watch
from benchmarks.libraries import GRADIENT, Backpack, Library, Step
from benchmarks.low_rank import LowRank
from benchmarks.problems import make, setting

ROUNDS, BATCH = map(int, os.environ.get("REGRESSIONS", "30 8").split())
EXACT = "DiagGGNExact", "KFLR", "DiagHessian"


class Watched(Library):
    """Training steps under the monitor's eyes; the quantity is the name of a configuration."""

    def steps(self, quantity: str) -> Step:
        optimizer = torch.optim.SGD(self.model.parameters(), 1e-4)
        self.monitor = watch(self.model, optimizer, quantities=quantity, every=1)

        def step() -> None:
            optimizer.zero_grad()
            self.lossfunc(self.model(self.X), self.y).backward()
            optimizer.step()

        return step


PROBLEMS = ("mlp", "3c3d", "char-lstm")
# What is measured on each problem: a library's class, with its quantities.
LIBRARIES: dict[type[Library], Callable[[str], tuple[str, ...]]] = {
    Backpack: lambda problem: tuple(
        quantity
        for quantity in (GRADIENT, *Backpack.quantities)
        if quantity not in EXACT or problem == "mlp"
    ),
    LowRank: lambda problem: (
        *(("pairs, exact", "newton, exact") if problem == "mlp" else ()),
        *("pairs, sampled", "newton, sampled"),
    ),
    Watched: lambda problem: ("economy", "business"),
}
CASES = [
    (problem, library, quantity)
    for problem in PROBLEMS
    for library, quantities in LIBRARIES.items()
    for quantity in quantities(problem)
]


def name_of(value: Any) -> str:
    """Of a case's part."""
    return value.__name__ if isinstance(value, type) else value.replace(", ", "-")


@pytest.mark.parametrize(("problem", "library", "quantity"), CASES, ids=name_of)
def test_step(benchmark: Any, problem: str, library: type[Library], quantity: str) -> None:
    """Forward and backward, and what follows from them."""
    torch.set_num_threads(2)
    way = library(*make(setting(problem, batch=BATCH)))
    step = way.step(quantity)
    step()
    gc.collect()
    benchmark.pedantic(step, setup=way.reset, rounds=ROUNDS, warmup_rounds=min(3, ROUNDS))
