"""The tutorials run as they stand; their own assertions say whether the numbers are right."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

from backpack.losses.base import LOSSES
from backpack.rules.base import RULES

FOLDER = Path(__file__).parents[2] / "tutorials"
SCRIPTS = sorted(FOLDER.glob("*/*.py"))


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """No window is opened; figures and rules of a script do not outlive it."""
    matplotlib.use("Agg")
    rules, losses = dict(RULES), dict(LOSSES)
    yield
    plt.close("all")
    for registry, before in ((RULES, rules), (LOSSES, losses)):
        registry.clear()
        registry.update(before)


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_runs(script: Path) -> None:
    runpy.run_path(str(script), run_name="__main__")


def test_some() -> None:
    assert len(SCRIPTS) >= 15
