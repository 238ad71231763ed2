"""What the monitor costs: the benchmark runs, and the page has what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cockpit, cockpit_table
from benchmarks.cockpit import multiples


def test_the_page_has_the_numbers() -> None:
    page = cockpit_table.PAGE.read_text()
    assert cockpit_table.with_table(page) == page


def test_numbers_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [
        {"tracked": "economy", "monitor": "watch", "multiples": [1.504, 1.1], "step": 0.25},
        {"tracked": "economy", "monitor": "original", "multiples": [104.2, 12.5], "step": 0.25},
        {"tracked": "alpha", "monitor": "watch", "multiples": [2.0, 1.0], "step": 0.25},
        {"tracked": "alpha", "monitor": "original", "failed": "RuntimeError: no"},
    ]
    about = {"cpu": "a CPU", "torch": "2", "date": "today", "optimizer": "sgd", "batch": 8}
    found = {"intervals": [1, 16], "problems": {"3c3d": {**about, "rows": rows}}}
    monkeypatch.setattr(cockpit_table, "RESULTS", tmp_path / "cost.json")
    cockpit_table.RESULTS.write_text(json.dumps(found))
    page = cockpit_table.with_table(f"before\n{cockpit_table.START}old\n{cockpit_table.END}after\n")
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "3C3D, batch 8, SGD, 250 ms a step:" in page and "(a CPU, torch 2, today)" in page
    assert "| economy | 1.50 (104) | 1.10 (12.5) |\n| `alpha` | 2.00 (fails) | 1.00 (fails) |" in page
    assert cockpit_table.with_table(page) == page


def test_intervals_are_sums() -> None:
    steps = {"every": [4.0], "tracked": [3.0, 5.0], "after": [2.0], "between": [1.5, 1.0]}
    expected = [4.0, (3 + 2 + 2) / 4, (3 + 2 + 14) / 16, (3 + 2 + 62) / 64]
    assert multiples(steps, 1.0) == pytest.approx(expected)


def test_problems_are_measured_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run, of this library alone: each problem's numbers are written, those of others stay."""
    monkeypatch.setattr(cockpit, "ALONE", ("mlp", "char-lstm"))
    monkeypatch.setattr(cockpit, "BATCH", {"mlp": 4, "char-lstm": 2})
    monkeypatch.setattr(cockpit, "CONFIGURATIONS", {"economy": cockpit.CONFIGURATIONS["economy"]})
    output = tmp_path / "cost.json"
    given = ["cost", "--folder", str(tmp_path), "--output", str(output), "--rounds", "1", "--alone"]
    for problem in ("mlp", "char-lstm"):
        monkeypatch.setattr(sys, "argv", ["cockpit", *given, "--problems", problem])
        cockpit.main()
    found = json.loads(output.read_text())
    assert list(found["problems"]) == ["mlp", "char-lstm"]
    for each in found["problems"].values():
        (row,) = each["rows"]
        assert row["tracked"] == "economy" and len(row["multiples"]) == len(found["intervals"])
        assert row["multiples"][0] > row["multiples"][-1] > 0
