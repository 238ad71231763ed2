"""The instruments in one matplotlib figure."""

from __future__ import annotations

import math
from typing import Any

from backpack.cockpit.history import History
from backpack.cockpit.instruments import GROUPS, Panel, Series, number, panels

COLOURS = dict(zip(GROUPS, ("#2b6cb0", "#11806a", "#7a4bb5", "#b5542b", "#a33c6b"), strict=True))
MAPS = dict(zip(GROUPS, ("Blues", "Greens", "Purples", "Oranges", "RdPu"), strict=True))
STYLES = ("-", "--", ":", "-.")


def figure(history: History, title: str = "") -> Any:
    """All instruments of a history, in rows by group (matplotlib must be installed)."""
    from matplotlib.figure import Figure

    found = panels(history)
    rows = [(g, [p for p in found if p.group == g]) for g in GROUPS]
    rows = [(group, some[k : k + 4]) for group, some in rows for k in range(0, len(some), 4)]
    fig = Figure(figsize=(16, 3.2 * max(len(rows), 1) + 0.6), layout="constrained")
    if title:
        fig.suptitle(title, fontsize=15, fontweight="bold")
    grid = fig.add_gridspec(max(len(rows), 1), 4)
    events = [e["step"] for e in history.events if e["event"] != "left out"]
    for row, (group, some) in enumerate(rows):
        for column, panel in enumerate(some):
            ax = fig.add_subplot(grid[row, column])
            draw(ax, panel, events)
            if column == 0:
                ax.annotate(
                    group.upper(),
                    (0, 1),
                    xycoords="axes fraction",
                    xytext=(-6, 22),
                    textcoords="offset points",
                    color=COLOURS[group],
                    fontweight="bold",
                    fontsize=9,
                )
    return fig


def draw(ax: Any, panel: Panel, events: list[int]) -> None:
    """Draw one instrument."""
    colour = COLOURS[panel.group]
    ax.set_title(panel.title, fontsize=11, loc="left")
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    if panel.alphas:
        _alphas(ax, panel.series[0], colour)
    elif panel.heat is not None:
        _heat(ax, panel)
    elif panel.bars is not None:
        _bars(ax, panel, colour)
    elif panel.image is not None:
        _image(ax, panel)
    else:
        _lines(ax, panel, colour, events)


def _lines(ax: Any, panel: Panel, colour: str, events: list[int]) -> None:
    for k, each in enumerate(panel.series):
        ax.plot(each.steps, each.values, color=colour, alpha=0.25, linewidth=0.9)
        style = STYLES[k % len(STYLES)]
        ax.plot(each.steps, each.smoothed(), style, color=colour, linewidth=1.8, label=each.name)
    for step in events:
        ax.axvline(step, color="#b3261e", linestyle="--", linewidth=1)
    for value, text in panel.lines:
        low, high = ax.get_ylim()
        if low <= value <= high:
            ax.axhline(value, color="#68707a", linestyle=":", linewidth=1)
            ax.annotate(text, (1, value), xycoords=("axes fraction", "data"), fontsize=7, ha="right")
    if panel.log:
        ax.set_yscale("log")
    if len(panel.series) > 1:
        ax.legend(fontsize=7, frameon=False)
    ax.set_xlabel("step", fontsize=8)


def _alphas(ax: Any, series: Series, colour: str) -> None:
    curve = [k / 20 - 1.6 for k in range(65)]
    ax.plot(curve, [a * a for a in curve], color="#68707a", linewidth=1.2)
    values = [min(max(v, -1.6), 1.6) for v in series.values if math.isfinite(v)]
    late = len(values) - max(1, len(values) // 10)
    for part, alpha in ((values[:late], 0.25), (values[late:], 0.9)):
        ax.plot(part, [a * a for a in part], "o", color=colour, alpha=alpha, markersize=5)
    ax.set_xticks([-1, 0, 1], ["start", "bottom", "other side"])
    ax.set_yticks([])


def _bars(ax: Any, panel: Panel, colour: str) -> None:
    assert panel.bars is not None
    edges, counts = panel.bars
    ax.bar(range(len(counts)), [count + 1 for count in counts], width=0.9, color=colour, bottom=0)
    ax.set_yscale("log")
    marks = [k for k, e in enumerate(edges) if math.isfinite(e) and e and k % 4 == 0]
    ax.set_xticks([k - 0.5 for k in marks], [f"{edges[k]:.0e}" for k in marks], rotation=45)


def _image(ax: Any, panel: Panel) -> None:
    assert panel.image is not None
    across, up, counts = panel.image
    values = [[math.log10(1 + row[k]) for row in counts] for k in range(len(up) - 1)]
    ax.imshow(values, origin="lower", aspect="auto", cmap=MAPS[panel.group])
    for edges, ticks in ((across, ax.set_xticks), (up, ax.set_yticks)):
        last = len(edges) - 1
        ticks([0.5, last - 1.5], [number(edges[1]), number(edges[-2])])


def _heat(ax: Any, panel: Panel) -> None:
    assert panel.heat is not None
    heat, values = panel.heat, panel.heat.values
    if panel.log:
        values = [[math.log10(v) if v > 0 else math.nan for v in row] for row in values]
    image = ax.imshow(values, aspect="auto", cmap=MAPS[panel.group], interpolation="nearest")
    every = max(1, len(heat.layers) // 16)
    shown = range(0, len(heat.layers), every)
    ax.set_yticks(list(shown), [heat.layers[k][-18:] for k in shown], fontsize=6)
    ax.set_xticks([0, len(heat.steps) - 1], [str(heat.steps[0]), str(heat.steps[-1])])
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    bar.ax.tick_params(labelsize=6)
    if panel.log:
        low, high = image.get_clim()
        bar.set_ticks([low, high], labels=[number(10**low), number(10**high)])
