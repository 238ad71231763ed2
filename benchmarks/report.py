"""Tables of results; pictures of them are drawn by :mod:`benchmarks.pictures`.

python -m benchmarks.report benchmarks/results/<date>-<machine>.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.libraries import GRADIENT, LIBRARIES, QUANTITIES

Cell = dict[str, Any]
Entry = dict[str, Any]

# Other ways of a library that is listed by itself.
OPTIONS = "ours-no-gradient", "ours-forms", "opacus-ghost"
SECOND_ORDER = ("DiagGGNMC", "DiagGGNExact", "KFAC", "KFLR", "DiagHessian")
TITLES = {
    "logreg": "logistic regression",
    "mlp": "MLP",
    "2c2d": "2C2D",
    "3c3d": "3C3D",
    "allcnnc": "All-CNN-C",
    "resnet-32": "ResNet-32",
    "wrn-16-4": "WideResNet 16-4",
    "char-lstm": "char-LSTM",
    "gpt2": "GPT-2, 4 layers",
    "vit": "ViT, 4 layers",
}


def standard(results: Entry) -> Iterator[Entry]:
    """The problems at their standard sizes."""
    yield from (each for each in results["problems"].values() if not each["sweep"])


def cell(entry: Entry | None, library: str, quantity: str) -> Cell:
    """What was found; empty if nothing was tried."""
    return entry["libraries"].get(library, {}).get(quantity, {}) if entry else {}


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    lines = [head, ["---"] * len(head), *rows]
    widths = [max(len(line[j]) for line in lines) for j in range(len(head))]
    lines[1] = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def versions(results: Entry) -> str:
    """Of torch and of each library, once; `ours` and its options are this library."""
    known = {"ours": "this library", "torch.func": "torch"}
    said = {name: version for name, version in results["versions"].items() if name not in OPTIONS}
    return ", ".join(f"{known.get(name, name)} {version}" for name, version in said.items())


def mark(found: Cell) -> str:
    """The ratio, or why there is none."""
    if "ratio" in found:
        return number(found["ratio"]) + (" (differs)" if found.get("agrees") is False else "")
    return "fails" if "failed" in found else "skipped" if "skipped" in found else ""


def problem(entry: Entry) -> str:
    """All figures of one problem."""
    head = ["quantity", "library", "ms", "median", "ratio", "of medians", "limit", "ratio / limit"]
    head += ["peak MB", "error", "rounds"]
    rows = []
    for quantity in QUANTITIES:
        for library in LIBRARIES:
            found = cell(entry, library, quantity)
            if "ratio" not in found:
                continue
            limit = entry["limits"].get(quantity, {}).get("limit")
            size = found.get("bytes")
            row = [quantity, library, number(1e3 * found["minimum"]), number(1e3 * found["median"])]
            row += [number(found["ratio"]), number(found["ratio_median"]), number(limit)]
            row += [number(found["ratio"] / limit if limit else None)]
            row += [number(None if size is None else size / 1e6)]
            row += [f"{found['error']:.0e}" if "error" in found else found.get("agreement", "")]
            rows.append([*row, str(found["rounds"])])
    sizes = f"batch {entry['batch']}, {entry['classes']} classes"
    sizes += f", {entry['steps']} steps" if entry["steps"] else ""
    text = f"## {TITLES[entry['problem']]}\n\n{entry['parameters']:,} parameters, {sizes}\n\n"
    return text + table(head, rows) + "\n" + failures(entry)


def failures(entry: Entry) -> str:
    """What could not be measured, and what differs."""
    reasons: dict[str, list[str]] = {}
    for library, cells in entry["libraries"].items():
        for quantity, found in cells.items():
            why = found.get("failed") or found.get("skipped") or found.get("memory_failed")
            if why is None and found.get("agrees") is False:
                why = f"differs by {found['error']:.0e}"
            if why is not None:
                reasons.setdefault(f"{library}: {why}", []).append(quantity)
    lines = [f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def counts(results: Entry) -> str:
    """The limits by themselves."""
    head = ["network", "quantity", "multiply-adds", "bytes", "limit", "ours", "ours / limit"]
    rows = []
    for entry in standard(results):
        for quantity, found in entry["limits"].items():
            ratio = cell(entry, "ours", quantity).get("ratio")
            if quantity != GRADIENT and ratio is not None:
                row = [
                    TITLES[entry["problem"]],
                    quantity,
                    *map(number, (found["macs"], found["bytes"])),
                ]
                rows.append([*row, *map(number, (found["limit"], ratio, ratio / found["limit"]))])
    return table(head, rows)


def scaling(results: Entry) -> str:
    """Ratios where one size varies."""
    head = ["network", "varies", "value", "library", *QUANTITIES[1:]]
    rows = []
    for entry in results["problems"].values():
        if entry["sweep"]:
            value = str(entry[entry["sweep"]])
            for library in entry["libraries"]:
                ratios = [mark(cell(entry, library, quantity)) for quantity in head[4:]]
                rows.append([TITLES[entry["problem"]], entry["sweep"], value, library, *ratios])
    kept = [j for j in range(len(head)) if j < 4 or any(row[j] for row in rows)]
    return table([head[j] for j in kept], [[row[j] for j in kept] for row in rows]) if rows else ""


def markdown(results: Entry) -> str:
    """The whole report."""
    about = results["machine"]
    place = f"{about['cpu']}, {about['cores']} cores, {about['memory'] / 2**30:.0f} GB"
    place += f", {about['gpu']}" if about["gpu"] else ""
    place += f", load {about['load']:.1f} at the start"
    parts = [
        f"# What quantities cost: {results['date']}, {place}",
        f"{versions(results)}.",
        "One forward and one backward pass, as a multiple of the plain gradient's: fastest run to"
        " fastest run, both in the same process and the same rounds (see `benchmarks/suite.py`)."
        " KFAC and DiagGGNMC are sampled, and their numbers not compared.",
        "Limits: what the arithmetic takes, in multiples of the gradient's (see"
        f" `benchmarks/limits.py`). Matrix products: {2 * about['macs'] / 1e9:.0f} GFLOP/s, copies:"
        f" {about['bytes'] / 1e9:.0f} GB/s.",
        counts(results),
        *(problem(each) for each in standard(results)),
    ]
    more = scaling(results)
    return "\n\n".join([*parts, *(["## Sizes", more] if more else [])]) + "\n"


def write(path: Path, pictures_too: bool = True) -> None:
    """Everything beside the results."""
    results = json.loads(path.read_text())
    text = markdown(results)
    path.with_suffix(".md").write_text(text)
    print(text)
    if pictures_too:
        from benchmarks import pictures  # which takes names from here, and matplotlib

        pictures.draw(results, path.with_suffix(""))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    write(parser.parse_args().results)
