"""docs/support.md lists what the tests try; `make support` writes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cases import CASES
from tests.losses.test_losses import ROWS
from tests.zoo.models import ZOO
from tests.zoo.support import ORDERS, Row, bound, quantities, table

PAGE = (Path(__file__).parents[2] / "docs" / "support.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize(
    "section, names, columns",
    [
        ("Operations", [case.name for case in CASES], list(quantities())),
        ("Losses", [row.name for row in ROWS], list(quantities())),
        ("Models", list(ZOO), list(ORDERS.values())),
    ],
    ids=["operations", "losses", "models"],
)
def test_page_is_complete(section: str, names: list[str], columns: list[str]) -> None:
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("| ")]
    header, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert [row[0] for row in rows] == names, "run `make support`"
    assert header[1:-1] == columns, "run `make support`"
    assert not any("differs" in row for row in rows)


def test_rows() -> None:
    row = Row()
    row.add("a", lambda: 3e-15)
    row.add("a", lambda: None)
    row.add("b", lambda: 1e-3)
    row.add("b", lambda: 0.0)
    row.add("c", lambda: 1 // 0)
    assert row.cells == {"a": "runs", "b": "differs", "c": "ZeroDivisionError"}
    assert row.line("x", "abcd") == "| x | runs | differs | ZeroDivisionError | - | 1e-03 |"
    assert [bound(e) for e in (0.0, 2e-16, 2e-11, float("inf"))] == ["1e-12", "1e-12", "1e-10", "inf"]
    lines = table("T", "Text.", {"x": row}, "abcd").splitlines()
    assert lines[0] == "## T" and lines[-3] == "|  | a | b | c | d | error |"
    assert lines[-2].count("|") == lines[-1].count("|") == 7
