"""The page on optimizers, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from backpack import optim

ROOT = Path(__file__).parent.parent.parent


def test_page() -> None:
    """Its loops bring the loss down, one after the other."""
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "optim.md").read_text(), re.DOTALL)
    space: dict[str, Any] = {}
    before = float("inf")
    for block in blocks[:2]:
        exec(block, space)
        loss = F.cross_entropy(space["model"](space["X"]), space["y"]).item()
        assert loss < min(before, 1.0)
        before = loss
    for block in blocks[2:]:
        exec(block, space)
        assert all(p.isfinite().all() for p in space["model"].parameters())


def test_every_name_is_on_the_page() -> None:
    page = (ROOT / "docs" / "optim.md").read_text()
    inner = {"BackpackOptimizer", "CurvatureOptimizer", "conjugate_gradients"}
    for name in set(optim.__all__) - inner:
        assert f"`{name}`" in page or f"optim.{name}(" in page, name
