"""Pictures of results: bars from one plain gradient, and how they grow with one size."""

from __future__ import annotations

from io import BytesIO
from math import log
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.libraries import COMBINED, EXTEND, FIRST_ORDER, GRADIENT, QUANTITIES
from benchmarks.report import SECOND_ORDER, TITLES, Entry, cell, number, standard, versions

INK, FAINT = "#222b36", "#d9dee4"
# This library is orange; what else a colour means is the same in all pictures.
COLOURS = {
    "ours": "#d55e00",
    "ours-no-gradient": "#f0a978",
    "ours-forms": "#8c3d00",
    "backpack-for-pytorch": "#0072b2",
    "torch.func": "#009e73",
    "opacus": "#6a3d9a",
    "opacus-ghost": "#b9a3d6",
    "curvlinops": "#b08d00",
}
NAMES = {
    "ours": "this library",
    "ours-no-gradient": "this library, gradient=False",
    "ours-forms": 'this library, gradient="forms"',
    "opacus-ghost": "opacus, ghost norms",
}
LINES = ("#0072b2", "#d55e00", "#009e73", "#6a3d9a", "#b08d00", "#929ca8", "#c0588f", "#8c3d00")
SHOWN = {EXTEND: "extend alone", COMBINED: "Variance,\nBatchL2Grad,\nDiagGGNMC"}
BAR, GAP = 0.135, 0.9  # inches for each bar; bars of space between quantities


def style(axes: Any, title: str = "") -> None:
    """Axes as in all pictures of benchmarks and experiments."""
    axes.set_title(title, loc="left", size=11, weight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, color=FAINT)
    axes.tick_params(which="minor", color=FAINT)


def plain_ticks(axis: Any) -> None:
    """Plain numbers at 1, 2, 5, 10, ... of a logarithmic axis, or at powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Any, path: Path, dpi: int) -> Path:
    """With a palette of 256 colours: a third of the size, and no difference to be seen."""
    from PIL import Image  # comes with matplotlib

    buffer = BytesIO()
    figure.savefig(buffer, dpi=dpi)
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)
    return path


def caption(results: Entry) -> str:
    """Machine, versions and date."""
    about = results["machine"]
    place = about["gpu"] or f"{about['cpu']}, {about['cores']} cores"
    return f"{place}; {versions(results)}; {results['date']}"


def noise(entries: list[Entry], quantities: tuple[str, ...]) -> str:
    """By how much ratios of medians differ from those of the fastest runs that are drawn."""
    cells = [cell(e, lib, q) for e in entries for lib in COLOURS for q in quantities]
    apart = sorted(abs(c["ratio_median"] / c["ratio"] - 1) for c in cells if "ratio_median" in c)
    high = apart[int(0.9 * (len(apart) - 1))]
    typical = median(apart)
    return f"Medians give ratios that differ by {typical:.0%}, nine in ten by at most {high:.0%}"


def bars(axes: Any, entry: Entry, quantities: tuple[str, ...], field: str) -> None:
    """A group of bars for each quantity, from 1, and what its arithmetic takes."""
    scale = 1 if field == "ratio" else cell(entry, "ours", GRADIENT).get("bytes") or 1
    ends, limits, places, labels, row = [1.0], [], {}, [], 0.0
    for quantity in quantities:
        tried = [library for library in COLOURS if cell(entry, library, quantity)]
        if not tried:
            continue
        limit = entry["limits"].get(quantity, {}).get("limit") if field == "ratio" else None
        if limit:
            extent = [row - 0.5, row + len(tried) - 0.5]
            axes.plot([limit, limit], extent, color=INK, lw=1.4, zorder=3)
            limits.append(limit)
        places[SHOWN.get(quantity, quantity)] = row + (len(tried) - 1) / 2
        for library in tried:
            found = cell(entry, library, quantity)
            if field in found:
                value = found[field] / scale
                axes.barh(row, value - 1, 0.92, left=1, color=COLOURS[library])
                labels.append((max(value, 1), row, limit, number(value), INK))
                ends.append(value)
            else:
                text = "not run" if "skipped" in found else "fails"
                labels.append((1, row, limit, text, COLOURS[library]))
            row += 1
        row += GAP
    style(axes, f"{TITLES[entry['problem']]}, batch {entry['batch']}")
    axes.set_xscale("log")
    low, high = min(ends), max(*ends, *limits)
    axes.set_xlim(low if low == 1 else 0.85 * low, high * max(1.2, (high / low) ** 0.16))
    axes.set_ylim(row - GAP, -1)
    plain_ticks(axes.xaxis)
    axes.axvline(1, color=INK, lw=0.8)
    axes.set_yticks(list(places.values()), list(places))
    axes.tick_params(axis="y", length=0)
    inches = (
        axes.get_position().width
        * axes.figure.get_figwidth()
        / log(axes.get_xlim()[1] / axes.get_xlim()[0])
    )
    for end, at, limit, text, colour in labels:
        # Beside the bar, or the line where that would cross the text.
        if limit and end <= limit and log(limit / end) * inches < 0.06 + 0.062 * len(text):
            end = limit
        axes.annotate(
            text, (end, at), (3, 0), textcoords="offset points", va="center", size=7.5, color=colour
        )


def panels(
    results: Entry, entries: list[Entry], quantities: tuple[str, ...], path: Path, field: str
) -> None:
    """One picture, a panel for each problem, two in a row; the legend takes a place of its own."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    tried = {
        library
        for library in COLOURS
        for e in entries
        for q in quantities
        if field in cell(e, library, q)
    }
    if not tried:
        return
    counts = [[sum(bool(cell(e, lib, q)) for lib in COLOURS) for q in quantities] for e in entries]
    sizes = [BAR * (sum(each) + GAP * (len(each) - each.count(0))) for each in counts]
    alone = len(entries) == 1
    rows = [max(sizes[j : j + 2]) for j in range(0, len(entries), 2)]
    head, foot, between = 1.05, (0.85 if alone else 0.4), 0.7
    height = sum(rows) + (len(rows) - 1) * between + head + foot
    figure = Figure(figsize=(10, height), facecolor="white")
    grid = figure.add_gridspec(
        len(rows),
        1 if alone else 2,
        height_ratios=rows,
        hspace=between * len(rows) / sum(rows),
        left=0.14,
        right=0.985,
        top=1 - head / height,
        bottom=foot / height,
        wspace=0.34,
    )
    for place, entry in enumerate(entries):
        bars(figure.add_subplot(grid[divmod(place, 1 if alone else 2)]), entry, quantities, field)
    handles: list[Any] = [
        Rectangle((0, 0), 1, 1, color=COLOURS[lib]) for lib in COLOURS if lib in tried
    ]
    names = [NAMES.get(library, library) for library in COLOURS if library in tried]
    if field == "ratio":
        handles.append(Line2D([], [], color=INK, lw=1.4))
        names.append("what its arithmetic takes")
    where: dict[str, Any] = {"loc": "lower center", "ncols": min(4, len(names))}
    if len(entries) % 2 and not alone:
        where = {"loc": "center", "bbox_to_anchor": grid[len(rows) - 1, 1].get_position(figure)}
    figure.legend(handles, names, frameon=False, fontsize=9.5, labelcolor=INK, **where)
    what = "Time" if field == "ratio" else "Peak memory"
    kind = {
        FIRST_ORDER[0]: "",
        EXTEND: " of first-order quantities",
        SECOND_ORDER[0]: " of second-order quantities",
    }
    title = f"{what}{kind[quantities[0]]}, in multiples of the gradient's"
    about = "One forward and backward pass, fastest of interleaved rounds. " if field == "ratio" else ""
    second = (
        about + noise(entries, quantities) if field == "ratio" else "Beyond the network and its data"
    )
    for at, text, more in (
        (0.28, title, {"size": 15, "weight": "bold"}),
        (0.5, second, {"size": 8.5}),
        (0.67, caption(results), {"size": 8.5}),
    ):
        figure.text(0.015, 1 - at / height, text, color=INK, **more)
    save(figure, path, 120)


def lines(results: Entry, path: Path) -> None:
    """How times grow with one size: a panel for each problem and size, beside the original."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    series: dict[tuple[str, str], list[Entry]] = {}
    for entry in results["problems"].values():
        if entry["sweep"]:
            series.setdefault((entry["problem"], entry["sweep"]), []).append(entry)
    if not series:
        return
    rows = len(series) // 2 + 1
    height = 3.1 * rows + 0.9
    figure = Figure(figsize=(10, height), facecolor="white")
    grid = figure.add_gridspec(
        rows,
        2,
        left=0.07,
        right=0.985,
        top=1 - 1.15 / height,
        bottom=0.5 / height,
        hspace=0.42,
        wspace=0.18,
    )
    drawn: dict[str, str] = {}
    for place, ((name, size), entries) in enumerate(series.items()):
        axes = figure.add_subplot(grid[divmod(place, 2)])
        entries.sort(key=lambda each: each[size])
        for library, dashes in (("ours", "-"), ("backpack-for-pytorch", ":")):
            for quantity, colour in zip(QUANTITIES[2:], LINES, strict=False):
                points = [(each[size], cell(each, library, quantity).get("ratio")) for each in entries]
                points = [each for each in points if each[1] is not None]
                if points:
                    drawn[quantity] = colour
                    axes.plot(*zip(*points, strict=True), dashes, marker=".", color=colour, lw=1.5)
        style(axes, f"{TITLES[name]}, by {size}")
        axes.set(xscale="log", yscale="log")
        axes.axhline(1, color=INK, lw=0.8)
        axes.set_ylim(bottom=min(1, axes.get_ylim()[0]))
        plain_ticks(axes.yaxis)
        axes.minorticks_off()
        axes.set_xticks([each[size] for each in entries], [each[size] for each in entries])
    handles = [Line2D([], [], color=colour, lw=2) for colour in drawn.values()]
    handles += [Line2D([], [], color=INK, ls=dashes, lw=1.5) for dashes in ("-", ":")]
    rest = grid[rows - 1, 1 if len(series) % 2 else slice(None)].get_position(figure)
    figure.legend(
        handles,
        [*drawn, "this library", "backpack-for-pytorch"],
        loc="center",
        bbox_to_anchor=rest,
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        ncols=2,
    )
    title = "Time as one size grows, in multiples of the gradient's"
    figure.text(0.015, 1 - 0.3 / height, title, size=15, weight="bold", color=INK)
    figure.text(0.015, 1 - 0.55 / height, caption(results), size=8.5, color=INK)
    save(figure, path, 120)


def draw(results: Entry, stem: Path) -> None:
    """Overheads as in the paper's and the thesis's figures, memory, and scaling."""
    entries = list(standard(results))
    everything = (*FIRST_ORDER, *SECOND_ORDER)
    first, second = (EXTEND, *FIRST_ORDER), (*SECOND_ORDER, COMBINED)
    for entry in entries:
        if entry["problem"] in ("3c3d", "allcnnc"):
            path = stem.with_name(f"{stem.name}-{entry['problem']}.png")
            panels(results, [entry], everything, path, "ratio")
    panels(results, entries, first, stem.with_name(f"{stem.name}-first-order.png"), "ratio")
    panels(results, entries, second, stem.with_name(f"{stem.name}-second-order.png"), "ratio")
    panels(results, entries, everything, stem.with_name(f"{stem.name}-memory.png"), "bytes")
    lines(results, stem.with_name(f"{stem.name}-scaling.png"))
