"""``python -m backpack.cockpit report run.jsonl -o run.html`` and ``... compare a.jsonl b.jsonl``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from backpack.cockpit import report, terminal
from backpack.cockpit.history import History
from backpack.cockpit.instruments import number, words


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser("backpack.cockpit", description="Look at a run that was watched.")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("report", help="write a report of a run")
    one.add_argument("run", type=Path, help="the file of JSON lines")
    one.add_argument("-o", "--output", type=Path, help=".html, .png, .pdf or .svg")
    one.set_defaults(command=_report)
    two = commands.add_parser("show", help="print a run as a table")
    two.add_argument("run", type=Path)
    two.add_argument("--follow", action="store_true", help="go on as the run does")
    two.set_defaults(command=_show)
    more = commands.add_parser("compare", help="several runs side by side")
    more.add_argument("runs", type=Path, nargs="+")
    more.add_argument("-o", "--output", type=Path, help="a page, .html")
    more.set_defaults(command=_compare)
    options = parser.parse_args(arguments)
    options.command(options)


def _report(options: argparse.Namespace) -> None:
    output = options.output or options.run.with_suffix(".html")
    print(f"wrote {report.write(History.read(options.run), output, options.run.stem)}")


def _show(options: argparse.Namespace) -> None:
    if not options.follow:
        terminal.show(History.read(options.run), options.run.stem)
        return
    from rich.live import Live

    with Live(refresh_per_second=1) as live:
        while True:
            live.update(terminal.rendered(History.read(options.run), options.run.stem))
            time.sleep(2)


def _compare(options: argparse.Namespace) -> None:
    runs = [(path.stem, History.read(path)) for path in options.runs]
    if len({name for name, _ in runs}) < len(runs):
        runs = [(str(path), history) for path, (_, history) in zip(options.runs, runs, strict=True)]
    print(table(runs))
    if options.output is not None:
        options.output.write_text(report.compared(runs))
        print(f"wrote {options.output}")


def table(runs: Sequence[tuple[str, History]]) -> str:
    """Medians of the last quarter of each run, by quantity."""
    keys = dict.fromkeys(key for _, history in runs for key in history.names())
    lines = [["median of the last quarter", *(name for name, _ in runs)]]
    for key in keys:
        if "/" in key or key == "time":
            continue
        cells = [_late(history, key) for _, history in runs]
        if any(cell is not None for cell in cells):
            lines.append([words(key), *map(number, cells)])
    widths = [max(len(line[k]) for line in lines) for k in range(len(runs) + 1)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _late(history: History, key: str) -> float | None:
    _, values = history.column(key)
    values = sorted(v for v in values[-max(1, len(values) // 4) :] if isinstance(v, (int, float)))
    return values[len(values) // 2] if values else None


if __name__ == "__main__":
    main()
