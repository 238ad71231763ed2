"""Ways of computing that depend on a network's size."""

from __future__ import annotations

import pytest

from backpack.cockpit import small


@pytest.fixture(params=["together", "alone"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of few entries are looked at together, and one by one."""
    if request.param == "alone":
        monkeypatch.setattr(small, "SMALL", 0)
