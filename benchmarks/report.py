"""Tables and pictures of results.

python -m benchmarks.report benchmarks/results/<date>-<machine>.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.libraries import COMBINED, EXTEND, FIRST_ORDER, GRADIENT, LIBRARIES, QUANTITIES

Cell = dict[str, Any]
Entry = dict[str, Any]

# Multiples of the plain gradient that this library should not exceed.
GOALS_FOR = ("3c3d", "mlp", "char-lstm")
GOALS: dict[str, tuple[float | None, float | None, float | None]] = {
    EXTEND: (1.03, 1.05, 1.1),
    "BatchGrad": (2.5, 25, 3),
    "BatchL2Grad": (1.5, 1.25, 3),
    "SumGradSquared": (1.6, 1.3, 3),
    "Variance": (1.65, 1.35, 3),
    "DiagGGNMC": (1.8, 1.6, 5),
    "DiagGGNExact": (7.5, 2.5, None),
    "KFAC": (2.2, 2.0, None),
    "KFLR": (5, 5, None),
}
SECOND_ORDER = ("DiagGGNMC", "DiagGGNExact", "KFAC", "KFLR", "DiagHessian")
TITLES = {
    "logreg": "logistic regression",
    "mlp": "MLP",
    "2c2d": "2C2D",
    "3c3d": "3C3D",
    "allcnnc": "All-CNN-C",
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


def mark(found: Cell) -> str:
    """The ratio, or why there is none."""
    if "ratio" in found:
        return number(found["ratio"]) + (" (differs)" if found.get("agrees") is False else "")
    return "fails" if "failed" in found else "skipped" if "skipped" in found else ""


def goals(results: Entry) -> str:
    """The table that says how far there is to go."""
    entries = {each["problem"]: each for each in standard(results)}
    head = ["quantity"]
    for name in GOALS_FOR:
        head += [f"{TITLES[name]}: backpack-for-pytorch", "ours", "to reach"]
    rows = []
    for quantity in (*GOALS, "DiagHessian", COMBINED):
        row = [quantity]
        for j, name in enumerate(GOALS_FOR):
            entry = entries.get(name)
            goal = GOALS[quantity][j] if quantity in GOALS else None
            theirs, ours = (
                cell(entry, library, quantity) for library in ("backpack-for-pytorch", "ours")
            )
            reached = goal is not None and ours.get("ratio", goal + 1) <= goal
            row += [mark(theirs), f"**{mark(ours)}**" if reached else mark(ours), number(goal) or "-"]
        rows.append(row)
    return table(head, rows)


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
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    goal = goals(results)
    parts = [
        f"# {results['date']}, {place}",
        f"{versions}.",
        "One forward and one backward pass, as a multiple of the plain gradient's: fastest run to"
        " fastest run, both in the same process and the same rounds (see `benchmarks/suite.py`)."
        " Bold: reached. KFAC and DiagGGNMC are sampled, and their numbers not compared.",
        goal,
        "Limits: what the arithmetic takes, in multiples of the gradient's (see"
        f" `benchmarks/limits.py`). Matrix products: {2 * about['macs'] / 1e9:.0f} GFLOP/s, copies:"
        f" {about['bytes'] / 1e9:.0f} GB/s.",
        counts(results),
        *(problem(each) for each in standard(results)),
    ]
    more = scaling(results)
    return "\n\n".join([*parts, *(["## Sizes", more] if more else [])]) + "\n"


COLOURS = {
    "ours": "tab:orange",
    "ours-no-gradient": "tab:red",
    "ours-forms": "tab:brown",
    "backpack-for-pytorch": "tab:blue",
    "torch.func": "tab:green",
    "opacus": "tab:purple",
    "opacus-ghost": "tab:pink",
    "curvlinops": "tab:olive",
}


def bars(axes: Any, entry: Entry, quantities: tuple[str, ...], field: str = "ratio") -> None:
    """A group of bars for each quantity; a cross where a library fails."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    present = [each for each in quantities if any(cell(entry, lib, each) for lib in LIBRARIES)]
    scale = cell(entry, "ours", GRADIENT).get("bytes") or 1
    for place, quantity in enumerate(present):
        tried = [lib for lib in COLOURS if cell(entry, lib, quantity)]
        for j, library in enumerate(tried):
            found = cell(entry, library, quantity)
            at = place + 0.8 * ((j + 0.5) / len(tried) - 0.5)
            value = found.get(field)
            if value is None:
                axes.plot([at], [1.02], "x", color=COLOURS[library], clip_on=False)
                continue
            value = value / scale if field == "bytes" else value
            axes.bar(at, value, 0.8 / len(tried), color=COLOURS[library], log=True)
            axes.annotate(number(value), (at, value), ha="center", va="bottom", fontsize=6)
        limit = entry["limits"].get(quantity, {}).get("limit")
        if limit and field == "ratio":
            axes.plot([place - 0.4, place + 0.4], [limit, limit], color="black", linewidth=1)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(present)), [each.replace("+", "+\n") for each in present], fontsize=7)
    axes.tick_params(axis="x", rotation=20)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{TITLES[entry['problem']]}, batch {entry['batch']}", fontsize=9)


def panels(entries: list[Entry], quantities: tuple[str, ...], path: Path, field: str = "ratio") -> None:
    """One picture, a panel for each problem."""
    import matplotlib.pyplot as plt
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    entries = [
        each
        for each in entries
        if any(field in cell(each, lib, q) for lib in LIBRARIES for q in quantities)
    ]
    if not entries:
        return
    columns = min(3, len(entries))
    rows = -(-len(entries) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(max(10, 6 * columns), 3.4 * rows), squeeze=False, layout="constrained"
    )
    for axes, entry in zip(grid.flat, entries, strict=False):
        bars(axes, entry, quantities, field)
    for axes in grid.flat[len(entries) :]:
        axes.set_visible(False)
    used = [lib for lib in COLOURS if any(cell(e, lib, q) for e in entries for q in quantities)]
    handles: list[Artist] = [Rectangle((0, 0), 1, 1, color=COLOURS[lib]) for lib in used]
    names = used
    if field == "ratio":
        handles = [*handles, Line2D([], [], color="black")]
        names = [*used, "limit"]
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=8)
    what = "time" if field == "ratio" else "peak memory"
    figure.supylabel(f"{what} / {what} of the gradient", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def lines(results: Entry, path: Path) -> None:
    """How times grow with one size: a panel for each problem and size."""
    import matplotlib.pyplot as plt

    series: dict[tuple[str, str], list[Entry]] = {}
    for entry in results["problems"].values():
        if entry["sweep"]:
            series.setdefault((entry["problem"], entry["sweep"]), []).append(entry)
    if not series:
        return
    figure, grid = plt.subplots(
        1, len(series), figsize=(4 * len(series), 3.6), squeeze=False, layout="constrained"
    )
    for axes, ((name, size), entries) in zip(grid.flat, series.items(), strict=True):
        entries.sort(key=lambda each: each[size])
        for library, style in (("ours", "-"), ("backpack-for-pytorch", ":")):
            for j, quantity in enumerate(QUANTITIES[2:]):
                points = [(each[size], cell(each, library, quantity).get("ratio")) for each in entries]
                points = [each for each in points if each[1] is not None]
                if points:
                    label = quantity if library == "ours" else None
                    xs, ys = zip(*points, strict=True)
                    axes.plot(xs, ys, style, marker=".", color=f"C{j}", label=label)
        axes.set(xscale="log", yscale="log", xlabel=size)
        axes.set_xticks([each[size] for each in entries], [each[size] for each in entries])
        axes.minorticks_off()
        axes.set_title(TITLES[name], fontsize=9)
    shown: dict[str, Any] = {}
    for axes in grid.flat:
        handles, names = axes.get_legend_handles_labels()
        shown |= dict(zip(names, handles, strict=True))
    figure.legend(shown.values(), shown, loc="outside upper center", ncols=len(shown), fontsize=8)
    figure.supylabel("multiple of the gradient's time", fontsize=9)
    figure.supxlabel("solid: ours, dotted: backpack-for-pytorch", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pictures(results: Entry, stem: Path) -> None:
    """Overheads as in the paper's and the thesis's figures, memory, and scaling."""
    import matplotlib

    matplotlib.use("Agg")
    entries = list(standard(results))
    paper = [each for each in entries if each["problem"] in ("3c3d", "allcnnc")]
    everything = (*FIRST_ORDER, *SECOND_ORDER)
    for entry in paper:
        panels([entry], everything, stem.with_name(f"{stem.name}-{entry['problem']}.png"))
    panels(entries, (EXTEND, *FIRST_ORDER), stem.with_name(f"{stem.name}-first-order.png"))
    panels(entries, (*SECOND_ORDER, COMBINED), stem.with_name(f"{stem.name}-second-order.png"))
    panels(entries, everything, stem.with_name(f"{stem.name}-memory.png"), "bytes")
    lines(results, stem.with_name(f"{stem.name}-scaling.png"))


def write(path: Path, pictures_too: bool = True) -> None:
    """Everything beside the results."""
    results = json.loads(path.read_text())
    text = markdown(results)
    path.with_suffix(".md").write_text(text)
    print(text)
    if pictures_too:
        pictures(results, path.with_suffix(""))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    write(parser.parse_args().results)
