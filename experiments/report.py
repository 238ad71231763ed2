"""Tables and figures of results."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.pictures import INK, plain_ticks, save, style
from benchmarks.report import number, table
from experiments.optimizers import OPTIMIZERS
from experiments.problems import PROBLEMS
from experiments.store import Budget, Chosen, choose
from experiments.training import Record

# First-order optimizers are grey; one hue for diagonals, one for Kronecker factors.
COLORS = {
    "SGD": "#222b36",
    "Adam": "#929ca8",
    "DiagGGNExact": "#0b5394",
    "DiagGGNMC": "#4fa3d8",
    "DiagHessian": "#2a9d8f",
    "SumGradSquared": "#8ac926",
    "KFAC": "#e4572e",
    "KFLR": "#9c1c1c",
    "KFRA": "#f4a259",
    "EKFAC": "#c77dff",
    "EKFLR": "#6a3d9a",
    "CGNewton": "#bc5090",
}
FIRST_ORDER = "SGD", "Adam"
PANELS = {
    "train_loss": "training loss",
    "train_accuracy": "training accuracy",
    "validation_loss": "validation loss",
    "validation_accuracy": "validation accuracy",
}


def budget_text(budget: Budget, chosen: list[Chosen]) -> str:
    """Epochs, batch size, sizes of the sets, and what is special about them."""
    _, epochs, batch, _ = budget
    data = chosen[0].runs[0]["data"]
    sizes = " / ".join(f"{data[name]:,}" for name in ("train", "validation", "test"))
    note = f" ({data['note']})" if data["note"] else ""
    return f"{epochs} epochs, batch {batch}, {sizes} samples{note}"


def machine_text(record: Record) -> str:
    """What it ran on."""
    about = record["environment"]
    threads = about["threads"]
    place = about["gpu"] or f"{about['cpu']}, {threads} thread" + "s" * (threads > 1)
    return f"{place}; torch {about['torch']}"


def _label(chosen: Chosen) -> str:
    name, lr, damping = (chosen.setting[key] for key in ("optimizer", "lr", "damping"))
    damped = "" if damping is None else f", damping {damping:g}"
    return f"{name}: lr {lr:g}{damped}{_diverged(chosen)}"


def _diverged(chosen: Chosen) -> str:
    count = sum(run["diverged"] is not None for run in chosen.runs)
    return f", {count} of {len(chosen.runs)} diverged" if count else ""


def _curve(chosen: Chosen, name: str) -> np.ndarray:
    """Values ``[seeds, epochs]``, as far as all seeds go: one that diverged ends the curve."""
    curves = [run["curves"][name] for run in chosen.runs]
    length = min(map(len, curves))
    return np.array([curve[:length] for curve in curves])


# --------------------------------------------------------------------------------------
# Tables


def tables(runs: list[Record], times: list[Record]) -> Iterator[str]:
    """One Markdown table for each problem and budget, and one of step times for each problem."""
    for budget, chosen in choose(runs).items():
        yield f"### {PROBLEMS[budget[0]].title}\n\n{budget_text(budget, chosen)}\n\n{finals(chosen)}\n"
    for record in times:
        head = ["optimizer", "ms / step", "x SGD"]
        fastest = {name: min(seconds) for name, seconds in record["seconds"].items()}
        base = fastest.get("SGD")
        rows = [
            [name, number(1e3 * seconds), number(seconds / base if base else None)]
            for name, seconds in fastest.items()
        ]
        title = f"{PROBLEMS[record['problem']].title}, batch {record['batch']}"
        yield f"### Time of a step: {title}\n\n{table(head, rows)}\n"


def finals(chosen: list[Chosen]) -> str:
    """Chosen settings, medians over seeds, and how soon the first-order optimizers' loss is reached."""
    head = ["optimizer", "lr", "damping", "settings", "train loss", "validation accuracy"]
    head += ["test accuracy (range)", "s / epoch", "epochs to target", "s to target"]
    losses = [c.final("train_loss") for c in chosen if c.setting["optimizer"] in FIRST_ORDER]
    target = min(losses, default=None)
    rows = []
    for each in chosen:
        row = [each.setting["optimizer"], _hyper(each, "lr"), _hyper(each, "damping"), f"{each.tried}"]
        row += [f"{each.final('train_loss'):.3g}", f"{each.final('validation_accuracy'):.1%}"]
        tests = sorted(run["test"]["accuracy"] for run in each.runs if run["test"])
        test = f"{median(tests):.1%} ({tests[0]:.1%} - {tests[-1]:.1%})" if tests else ""
        seconds, loss = (np.median(_curve(each, name), 0) for name in ("seconds", "train_loss"))
        pace = f"{seconds[-1] / (len(seconds) - 1):.2g}" if len(seconds) > 1 else ""
        reached = [j for j in range(len(loss)) if target is not None and loss[j] <= target][:1]
        soon = [f"{j} {seconds[j]:.2g}" for j in reached] or ["- -"]
        rows.append([*row, test + _diverged(each), pace, *soon[0].split()])
    return table(head, rows)


def _hyper(chosen: Chosen, name: str) -> str:
    value, edge = chosen.setting[name], chosen.edges.get(name, "")
    return "" if value is None else f"{value:g}" + f" ({edge})" * ("edge" in edge)


# --------------------------------------------------------------------------------------
# Figures


def draw(runs: list[Record], times: list[Record], folder: Path) -> Iterator[Path]:
    """Curves of every problem and budget, and bars of step times, as PNG files; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for budget, chosen in choose(runs).items():
        problem, epochs, batch, samples = budget
        name = f"{problem}-{epochs}-epochs-batch-{batch}" + f"-{samples}-samples" * bool(samples)
        yield save(curves(budget, chosen), folder / f"{name}.png", 100)
    if times:
        yield save(bars(times), folder / "step-times.png", 100)


def curves(budget: Budget, chosen: list[Chosen]) -> Figure:
    """Losses and accuracies by epoch (above) and by seconds of training (below).

    Lines are medians over seeds, areas reach from the lower to the upper quartile.
    """
    rows = ceil(len(chosen) / 3)
    legend = 0.3 + 0.25 * rows
    height = 7 + legend
    figure = Figure(figsize=(14, height), facecolor="white")
    grid = figure.subplots(2, len(PANELS))
    figure.subplots_adjust(
        **{"left": 0.05, "right": 0.985, "top": 1 - 0.95 / height, "bottom": (0.55 + legend) / height},
        **{"hspace": 0.33, "wspace": 0.22},
    )
    first = chosen[0].runs[0]
    seeds = sorted({len(each.runs) for each in chosen})
    counted = f"median and quartiles of {'-'.join(map(str, seeds))} seeds"
    figure.text(0.05, 1 - 0.28 / height, PROBLEMS[budget[0]].title, size=15, weight="bold", color=INK)
    subtitle = f"{budget_text(budget, chosen)}; {counted}; {machine_text(first)}"
    figure.text(0.05, 1 - 0.52 / height, subtitle, size=9.5, color=INK)
    for row, against in zip(grid, ("epoch", "seconds"), strict=True):
        for axes, (name, title) in zip(row, PANELS.items(), strict=True):
            style(axes, title)
            axes.set_xlabel("epoch" if against == "epoch" else "seconds of training", color=INK)
            for each in chosen:
                _line(axes, each, against, name)
            _scale(axes, chosen, name)
            if against == "seconds":
                axes.set_xscale("log")
                plain_ticks(axes.xaxis)
    handles, _ = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        [_label(each) for each in chosen],
        loc="lower center",
        ncols=min(3, len(chosen)),
        frameon=False,
        fontsize=10,
    )
    return figure


def _line(axes: Axes, chosen: Chosen, against: str, name: str) -> None:
    color = COLORS[chosen.setting["optimizer"]]
    x, values = np.median(_curve(chosen, against), 0), _curve(chosen, name)
    # Before the first step no time has passed, which a logarithm cannot show.
    start = int(against == "seconds")
    low, middle, high = (np.quantile(values, q, axis=0)[start:] for q in (0.25, 0.5, 0.75))
    axes.plot(x[start:], middle, color=color, lw=1.8, label=chosen.setting["optimizer"])
    if len(values) > 2:
        axes.fill_between(x[start:], low, high, color=color, alpha=0.15, lw=0)


def _scale(axes: Axes, chosen: list[Chosen], name: str) -> None:
    """Losses by their logarithm; accuracies from where the best half of the first epochs begins."""
    if name.endswith("loss"):
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        return
    after_one = [float(np.median(_curve(each, name), 0)[1]) for each in chosen if _lasts(each)]
    if after_one:
        axes.set_ylim(max(0.0, median(after_one) - 0.1), min(1.005, axes.get_ylim()[1]))


def _lasts(chosen: Chosen) -> bool:
    return _curve(chosen, "epoch").shape[1] > 1


def bars(times: list[Record]) -> Figure:
    """Milliseconds of each optimizer's fastest step, a panel for each problem."""
    longest = max(len(record["seconds"]) for record in times)
    height = 2.2 + 0.33 * longest
    figure = Figure(figsize=(14, height), facecolor="white")
    grid = figure.subplots(1, len(times), squeeze=False)[0]
    figure.subplots_adjust(
        left=0.09, right=0.985, top=1 - 1.15 / height, bottom=0.6 / height, wspace=0.42
    )
    title = "Time of a step: forward, backward and update"
    figure.text(0.01, 1 - 0.3 / height, title, size=15, weight="bold", color=INK)
    about = f"the fastest of several rounds in turns; {machine_text(times[0])}"
    figure.text(0.01, 1 - 0.55 / height, about, size=9.5, color=INK)
    for axes, record in zip(grid, times, strict=True):
        style(axes, f"{PROBLEMS[record['problem']].title}, batch {record['batch']}")
        names = [name for name in OPTIMIZERS if name in record["seconds"]]
        values = [1e3 * min(record["seconds"][name]) for name in names]
        axes.barh(names, values, color=[COLORS[name] for name in names], height=0.65)
        base = values[names.index("SGD")] if "SGD" in names else None
        for j, value in enumerate(values):
            ratio = "" if base is None else f" ({value / base:.1f})"
            text = f"{number(value)}{ratio}"
            axes.annotate(text, (value, j), (4, 0), textcoords="offset points", va="center", size=9)
        axes.invert_yaxis()
        axes.set_xlim(right=1.28 * max(values))
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("milliseconds (in multiples of SGD's)", color=INK)
    return figure
