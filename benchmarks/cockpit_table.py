"""Puts what the monitor costs into its page: ``python -m benchmarks.cockpit_table``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backpack.cockpit.configurations import CONFIGURATIONS
from benchmarks.report import TITLES

RESULTS = Path(__file__).parent / "results" / "cockpit-cost.json"
PAGE = Path(__file__).parents[1] / "docs" / "cockpit.md"
START, END = (
    "<!-- costs: written by python -m benchmarks.cockpit_table -->\n",
    "<!-- end of costs -->\n",
)


def of_problem(problem: str, found: dict[str, Any]) -> Iterator[str]:
    """The lines of a problem's table."""
    about = found["problems"][problem]
    step = next((f"{1e3 * row['step']:.3g}" for row in about["rows"] if "step" in row), "?")
    setting = f"batch {about['batch']}, {about['optimizer'].upper()}, {step} ms a step"
    yield f"\n{TITLES[problem]}, {setting}:\n"
    yield "| | every step | " + " | ".join(f"every {k}" for k in found["intervals"][1:]) + " |"
    yield "|---|" + "---|" * len(found["intervals"])
    named: dict[str, dict[str, Any]] = {}
    for row in about["rows"]:
        named.setdefault(row["tracked"], {})[row["monitor"]] = row
    for name, kinds in named.items():
        cells = []
        for k in range(len(found["intervals"])):
            ours, theirs = (_cell(kinds.get(kind), k) for kind in ("watch", "original"))
            cells.append(f"{ours} ({theirs})" if theirs else ours)
        yield f"| {name if name in CONFIGURATIONS else f'`{name}`'} | {' | '.join(cells)} |"


def _cell(row: dict[str, Any] | None, k: int) -> str:
    if row is None:
        return ""
    if "failed" in row:
        return "fails"
    value = row["multiples"][k]
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def table(found: dict[str, Any] | None) -> str:
    """What the page says of costs."""
    if found is None:
        return "`make bench-cockpit` measures them.\n"
    about = next(iter(found["problems"].values()))
    lines = [
        "Multiples of a step that nobody watches, in processor time of one thread "
        f"({about['cpu']}, torch {about['torch']}, {about['date']}); in parentheses those of "
        "cockpit-for-pytorch 1.0.2."
    ]
    for problem in found["problems"]:
        lines += of_problem(problem, found)
    return "\n".join(lines) + "\n"


def in_page(page: str, marks: tuple[str, str], text: str) -> str:
    """The page with this text between two marks."""
    start, end = page.index(marks[0]) + len(marks[0]), page.index(marks[1])
    return page[:start] + text + page[end:]


def with_table(page: str) -> str:
    """The page with the numbers of the results."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else None
    return in_page(page, (START, END), table(found))


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
