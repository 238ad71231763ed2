"""Times to compare from commit to commit: ``make bench-regressions``.

Each run is saved and compared with the one before; it fails where the fastest pass takes a quarter
longer. Nothing else should run on the machine at the time.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from benchmarks.libraries import GRADIENT, Backpack
from benchmarks.problems import make, setting

CASES = [
    (problem, quantity)
    for problem in ("mlp", "3c3d", "char-lstm")
    for quantity in (GRADIENT, *Backpack.quantities)
    if quantity not in ("DiagGGNExact", "KFLR", "DiagHessian") or problem == "mlp"
]


@pytest.mark.parametrize(("problem", "quantity"), CASES, ids=map("-".join, CASES))
def test_step(benchmark: Any, problem: str, quantity: str) -> None:
    """Forward and backward."""
    torch.set_num_threads(2)
    library = Backpack(*make(setting(problem, batch=8)))
    step = library.step(quantity)
    step()
    gc.collect()
    benchmark.pedantic(step, setup=library.reset, rounds=30, warmup_rounds=3)
