"""A run as a table on a terminal, with sparklines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from backpack.cockpit.findings import statements
from backpack.cockpit.history import History
from backpack.cockpit.instruments import number, words

BLOCKS = "▁▂▃▄▅▆▇█"
_COLOURS = {"good": "green", "note": "blue", "warning": "yellow", "severe": "red"}


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """A line of blocks, the higher the larger; on a logarithmic scale if values differ by much.

    Example:
        >>> sparkline([1, 2, 3, 4], 4), sparkline([1, 10, 100], 3)
        ('▁▃▆█', '▁▅█')
    """
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return ""
    if min(known) > 0 and max(known) > 20 * min(known):
        values = [math.log(v) if v > 0 else math.nan for v in values]
    size = -(-len(values) // width)
    pieces = [
        [v for v in values[k : k + size] if math.isfinite(v)] for k in range(0, len(values), size)
    ]
    means = [sum(p) / len(p) if p else math.nan for p in pieces]
    known = [m for m in means if m == m]
    low, high = min(known), max(known)
    return "".join(
        " " if m != m else BLOCKS[round((m - low) / (high - low) * 7) if high > low else 0]
        for m in means
    )


def rows(history: History) -> list[tuple[str, str, str, str]]:
    """Quantity, last value, median, sparkline, of the whole model's numbers."""
    found = []
    for key in history.names():
        _, values = history.column(key)
        if "/" in key or key == "time" or not isinstance(values[-1], (int, float)):
            continue
        known = sorted(float(v) for v in values if v == v)
        middle = known[len(known) // 2] if known else math.nan
        line = sparkline([float(v) for v in values])
        found.append((words(key), number(float(values[-1])), number(middle), line))
    return found


def text(history: History) -> str:
    """The table and what the numbers say, without colours."""
    table = [("quantity", "last", "median", ""), *rows(history)]
    widths = [max(len(row[k]) for row in table) for k in range(3)]
    lines = [
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {line}".rstrip()
        for a, b, c, line in table
    ]
    lines.append("")
    lines += [f"{s.severity}: {s.text} ({s.evidence})" for s in statements(history)]
    return "\n".join(lines)


def show(history: History, title: str = "") -> None:
    """Print it, by rich if that is installed."""
    try:
        from rich.console import Console
    except ImportError:
        print(text(history))
        return
    console = Console()
    console.print(rendered(history, title))


def rendered(history: History, title: str = "") -> Any:
    """For rich: a table, and what the numbers say."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left")
    table.add_column("quantity")
    table.add_column("last", justify="right")
    table.add_column("median", justify="right")
    table.add_column("")
    for row in rows(history):
        table.add_row(*row)
    said = [
        Text.assemble((f"{s.severity}: ", _COLOURS[s.severity]), s.text, (f" ({s.evidence})", "dim"))
        for s in statements(history)
    ]
    return Group(table, *said)
