"""The page on low-rank curvature, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tests.vivit.dense import flat, near

PAGE = Path(__file__).parent.parent.parent / "docs" / "vivit.md"


def test_page() -> None:
    torch.manual_seed(0)
    space: dict[str, Any] = {"__name__": __name__}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile("\n".join(blocks), str(PAGE), "exec"), space)
    curvature, found = space["curvature"], space["found"]
    assert curvature.derivatives(curvature.eigh(5)).gammas.shape == (32, 5)
    assert found.gammas.shape == found.lambdas.shape == (128, 5)
    # The last program has the same pair as the first.
    assert torch.allclose(space["evals"], curvature.eigvalsh()[:1], rtol=1e-4)
    near(flat(space["evecs"], 1).abs(), flat(curvature.eigh(1).vectors, 1).abs().double(), 1e-3)
    # Both ways over the data agree.
    near(space["few"].values, space["whole"].eigvalsh()[:3].double(), 1e-3)
