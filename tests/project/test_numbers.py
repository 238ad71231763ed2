"""Numbers on the pages that came from a benchmark are its results', or say which run they are from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks.pages import ROOT
from experiments import report, store
from tests.project.claims import claims

CLAIMS = list(claims())


def words(text: str) -> str:
    """With single spaces."""
    return " ".join(text.split())


@pytest.mark.parametrize("page", sorted(set(pages.PAGES.values())))
def test_tables(page: str) -> None:
    """``python -m benchmarks.pages`` has nothing to write."""
    text = (ROOT / page).read_text()
    assert pages.with_tables(text) == text
    for name, place in pages.PAGES.items():
        assert (f"<!-- {name}: written by" in text) == (place == page)


def test_tables_of_experiments() -> None:
    """The file of all tables is made of the records."""
    written = pages.TRAINING.with_suffix(".md").read_text()
    for table in report.tables(*store.read(pages.TRAINING)):
        assert table.strip() in written


@pytest.mark.parametrize(("page", "sentence"), CLAIMS, ids=lambda each: each[:40])
def test_sentences(page: str, sentence: str) -> None:
    assert sentence in words((ROOT / page).read_text())


# What numbers of measurements look like, and what of that look are others on the pages.
MEASURED = re.compile(r"(?<![\w.:/-])\d[\d,]*\.\d+(?!\w|\.\d)|(?<![\w.])\d[\d,]*(?= ms\b)")
OTHERS = [
    r"(torch|Python|Triton|backpack-for-pytorch|opacus|curvlinops|section) \d+\.[\d.]*",
    r"(rates?|dampings?( of)?|momentum|(Adam|KFAC) with)( \d[\d.]*,?)+",
    r"between -0\.5 and 0\.5|above 1\.5 times",  # where an instrument of the monitor is healthy
    r"10\^11 operations.{,40} 1\.25 GB a second, 0\.3 %",  # by arithmetic
]
# The alarms' table is compared with its results by test_cockpit_alarms.py.
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "support"),
    *sorted((ROOT / "docs" / "howto").glob("*.md")),
]


def unaccounted(page: str, text: str) -> list[str]:
    """Numbers in prose and tables that are from no results, and of no run that is named."""
    text = re.sub(r"<!-- (\w+): written by.*?<!-- end[ \w]*-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = []
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE):
        rest = words(section)
        if re.search(r"[Oo]ne run of `[^`]+`, 20\d\d-\d\d-\d\d|`python -m benchmarks\.alarms`", rest):
            continue
        for where, sentence in CLAIMS:
            rest = rest.replace(sentence, "") if where == page else rest
        for other in [r"`[^`]*`", r"\]\([^)]*\)", r"arXiv:[\d.]+", *OTHERS]:
            rest = re.sub(other, "", rest)
        found += [rest[max(0, each.start() - 30) : each.end() + 10] for each in MEASURED.finditer(rest)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers(page: Path) -> None:
    found = unaccounted(page.relative_to(ROOT).as_posix(), page.read_text())
    remedy = (
        "write 'one run of `command`, 2026-01-31', or take them from results (CONTRIBUTING.md, Habits)"
    )
    assert not found, f"{found}: {remedy}"


def test_numbers_are_found() -> None:
    table, run = "| MLP | 1.52 |", "One run of `python -m benchmarks.share`, 2026-11-27:"
    assert len(unaccounted("docs/costs.md", f"# Costs\n\n{table}\n\ntakes 3 ms")) == 2
    assert unaccounted("docs/costs.md", f"# Costs\n\n{run}\n\n{table}") == []
    assert len(unaccounted("docs/costs.md", f"# Costs\n\n{run}\n\n# More\n\n{table}")) == 1
