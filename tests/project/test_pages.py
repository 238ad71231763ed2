"""Every block of code on the pages runs, here or in a test of the page's own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# What a page does not say again: the reader's own model and data.
GIVEN = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import backpack as library
from backpack import *
from backpack.extensions import *
torch.manual_seed(0)
X, y = torch.randn(12, 6), torch.randint(3, (12,))
model = extend(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
lossfunc = extend(nn.CrossEntropyLoss())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(X, y), batch_size=4)
"""
# What the files have that the page's examples go into.
INSIDE = """
from torch import Tensor
import torch.nn.functional as F
from backpack.losses.base import reduction_scale
from backpack.losses.elementwise import _Elementwise
from backpack.own import *
from tests.cases import Apply, Case, P, x
"""
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
TESTS = {
    path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)
}


def blocks(page: Path) -> list[str]:
    return [code for language, code in BLOCK.findall(page.read_text()) if language == "python"]


def has_a_test(page: Path) -> bool:
    """Whether some test reads the page by its name, and executes it."""
    return any(f'"{page.name}"' in text and "exec(" in text for text in TESTS.values())


HERE = [page for page in PAGES if blocks(page) and not has_a_test(page)]


def test_languages() -> None:
    """No block escapes by another name."""
    for page in [*PAGES, *(ROOT / "docs" / "howto").glob("*.md")]:
        for language, _ in BLOCK.findall(page.read_text()):
            known = {"python", "sh", "text", ""}
            assert language in known or re.match(r"\{[\w-]+\}", language), (page.name, language)


@pytest.mark.parametrize("page", HERE, ids=lambda page: page.name)
def test_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join([GIVEN, *blocks(page)])
    if page.name == "CONTRIBUTING.md":
        # It adds rules to the library's, so in a process that ends.
        code = "\n".join([GIVEN, INSIDE, *blocks(page)])
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return
    monkeypatch.chdir(tmp_path)
    state = torch.random.get_rng_state()
    try:
        exec(compile(code, page.name, "exec"), {"__name__": "page"})
    finally:
        torch.random.set_rng_state(state)


def test_pages_with_tests_of_their_own() -> None:
    known = {page.name for page in PAGES if blocks(page)} - {page.name for page in HERE}
    assert {"README.md", "index.md", "optim.md", "own.md", "rows.md", "vivit.md"} <= known
