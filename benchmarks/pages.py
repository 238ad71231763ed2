"""Puts tables of results into the pages that show them: ``python -m benchmarks.pages``.

A page has a pair of comments where a table of this file's belongs; what is between them is replaced.
Single numbers in sentences are compared with the same results by ``tests/project/test_numbers.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.libraries import COMBINED, EXTEND, GRADIENT, QUANTITIES
from benchmarks.report import TITLES, Cell, Entry, cell, number, standard

ROOT = Path(__file__).parents[1]
COSTS = ROOT / "benchmarks" / "results" / "2026-11-21-2-cores.json"
OPTIMIZERS = ROOT / "benchmarks" / "results" / "optimizers.json"
TRAINING = ROOT / "experiments" / "results" / "2026-11-21-2-cores.json"
LOW_RANK = ROOT / "benchmarks" / "results" / "vivit.json"
LOW_RANK_COLUMNS = {
    "all eigenvalues, s": ("eigenvalues", "minimum", 1),
    "ten pairs, s": ("pairs", "minimum", 1),
    "their slopes and curvatures, s": ("derivatives", "minimum", 1),
    "a damped Newton step, s": ("newton", "minimum", 1),
    "its memory, GB": ("newton", "bytes", 1e-9),
}
PAGES = {
    **{"networks": "docs/costs.md", "optimizers": "docs/optim.md"},
    **{"low_rank": "docs/vivit.md", "digits": "docs/experiments.md"},
}
NETWORKS = {
    "3c3d": "3C3D, 32 images",
    "mlp": "MLP 784-512-256-10, 128 samples",
    "char-lstm": "char-LSTM, 50 x 50",
    "2c2d": "2C2D, 32 images",
    "allcnnc": "All-CNN-C, 100 classes, 4 images",
    "wrn-16-4": "WideResNet 16-4, 8 images",
    "logreg": "logistic regression, 128 samples",
    "gpt2": "GPT-2 of 4 layers, 8 x 64 tokens",
    "vit": "ViT of 4 layers, 16 images",
}
ORIGINAL, OURS, ALONE = "backpack-for-pytorch", "ours", "ours-no-gradient"
OTHERS = "opacus", "opacus-ghost", "torch.func", "curvlinops"
NONE = "–"


@cache
def results(path: Path = COSTS) -> Entry:
    """What a benchmark found."""
    return json.loads(path.read_text())


def entry(problem: str) -> Entry:
    """A network at its standard size."""
    return next(each for each in standard(results()) if each["problem"] == problem)


def multiple(found: Cell) -> str:
    """Of the gradient's time; a dash for what was not tried."""
    return number(found["ratio"]) if "ratio" in found else "fails" if "failed" in found else NONE


def fastest(problem: str, quantity: str) -> Cell:
    """Of the libraries that are neither this one nor the original."""
    found = [cell(entry(problem), library, quantity) for library in OTHERS]
    return min((each for each in found if "ratio" in each), key=lambda each: each["ratio"], default={})


def of_network(problem: str) -> str:
    """A heading and a table; columns and rows with numbers only."""
    about = entry(problem)
    limits = {name: number(found.get("limit")) for name, found in about["limits"].items()}
    columns: dict[str, Callable[[str], str]] = {
        "this library": lambda name: multiple(cell(about, OURS, name)),
        "`gradient=False`": lambda name: multiple(cell(about, ALONE, name)),
        ORIGINAL: lambda name: multiple(cell(about, ORIGINAL, name)),
        "others": lambda name: multiple(fastest(problem, name)),
        "limit": lambda name: limits.get(name) or NONE,
    }
    names = {EXTEND: "`extend` alone", COMBINED: "`Variance`, `BatchL2Grad`, `DiagGGNMC` in one pass"}
    tried = [name for name in QUANTITIES if name != GRADIENT and columns["this library"](name) != NONE]
    cells = {head: [column(name) for name in tried] for head, column in columns.items()}
    shown = {head: column for head, column in cells.items() if set(column) - {NONE}}
    rows = [
        [names.get(name, f"`{name}`"), *(column[j] for column in shown.values())]
        for j, name in enumerate(tried)
    ]
    return f"### {NETWORKS[problem]}\n\n" + plain(["", *shown], rows)


def plain(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0].replace("|  |", "| |"), "|---" * len(head) + "|", *lines[1:]]) + "\n"


def networks() -> str:
    """All of them."""
    return "\n".join(of_network(problem) for problem in NETWORKS)


def digits() -> str:
    """Optimizers on the small network, as :mod:`experiments` chose and trained them."""
    from experiments import report, store

    runs, _ = store.read(TRAINING)
    chosen = store.choose(runs)["digits-cnn", 10, 64, None]
    head, _, *lines = report.finals(chosen).splitlines()
    names = [name.strip() for name in head.strip("|").split("|")]
    kept = {"optimizer": "optimizer", "lr": "lr", "damping": "damping", "train loss": "training loss"}
    kept |= {"validation accuracy": "validation", "test accuracy (range)": "test (range)"}
    kept |= {"s / epoch": "s / epoch"}
    rows = [[each.strip() for each in line.strip("|").split("|")] for line in lines]
    return plain(list(kept.values()), [[row[names.index(name)] for name in kept] for row in rows])


def low_rank() -> str:
    """Eigenvalues, eigenvectors and steps, beside the original."""
    found: dict[str, Any] = results(LOW_RANK)
    about = found["machine"]
    rows = []
    for problem, each in found["problems"].items():
        ours, theirs = (each["libraries"][name] for name in ("low-rank", "vivit-for-pytorch"))
        kind = "exact" if "newton, exact" in ours else "sampled"
        row = [
            f"{TITLES[problem]}, {each['batch']} samples" + ", sampled columns" * (kind == "sampled")
        ]
        for name, field, scale in LOW_RANK_COLUMNS.values():
            pair = [each.get(f"{name}, {kind}", {}).get(field) for each in (ours, theirs)]
            texts = [f"{scale * value:.2g}" if value else "fails" for value in pair]
            row.append(f"{texts[0]} ({texts[1]})")
        rows.append(row)
    return (
        "In parentheses vivit-for-pytorch "
        f"{found['versions']['vivit-for-pytorch']}; memory is beyond the network's\n"
        f"({about['cpu']}, {about['cores']} cores, torch {about['torch']}, {found['date']}; "
        "the least\nof several turns):\n\n" + plain(["", *LOW_RANK_COLUMNS], rows)
    )


def optimizers() -> str:
    """Steps of the library's optimizers in multiples of plain SGD's."""
    found: dict[str, Any] = results(OPTIMIZERS)
    times = found["milliseconds"]
    about = (
        "A step with its forward and backward pass in multiples of plain SGD's "
        f"({times['SGD']:.1f} ms), for the MLP\n784-512-256-10 with 128 samples in float32: processor "
        f"time of one thread\n({found['cpu']}, torch {found['torch']}, {found['date']}), the fastest "
        f"of {found['rounds']} rounds beside other work; `python -m benchmarks.optimizers`.\n\n"
    )
    rows = [
        [f"`{name}`".replace(", ", "`, `"), number(value / times["SGD"])]
        for name, value in times.items()
    ]
    return about + plain(["optimizer", "multiple"], [row for row in rows if row[0] != "`SGD`"])


def with_tables(text: str) -> str:
    """The page with its tables as they are now."""

    def replace(found: re.Match[str]) -> str:
        return f"{found[1]}{globals()[found[2]]()}{found[3]}"

    marks = r"(<!-- (\w+): written by python -m benchmarks\.pages -->\n).*?(<!-- end -->)"
    return re.sub(marks, replace, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in {ROOT / each for each in PAGES.values()}:
        page.write_text(with_tables(page.read_text()))
