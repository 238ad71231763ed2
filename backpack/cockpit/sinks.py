"""Where numbers go: any function ``log(dict, step)``, TensorBoard, a table."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Sink = Callable[[dict[str, Any], int], Any]


def sink_of(target: Any) -> Sink:
    """A function of numbers and step; a ``SummaryWriter`` is taken as one.

    Raises:
        TypeError: for anything else that cannot be called.
    """
    if hasattr(target, "add_scalar"):
        return TensorBoard(target)
    if not callable(target):
        raise TypeError(f"a sink is a function log(dict, step) or a SummaryWriter, got {target!r}")
    return target


def sinks_of(log: Any) -> list[Sink]:
    """A list of functions, of one target or of several.

    Raises:
        TypeError: for a target that is none.
    """
    several = isinstance(log, Iterable) and not callable(log) and not hasattr(log, "add_scalar")
    return [sink_of(each) for each in (log if several else [log])]


class TensorBoard:
    """Numbers and histograms to a ``SummaryWriter``.

    Args:
        writer: the writer.
        prefix: put before every tag.
    """

    takes_all = True

    def __init__(self, writer: Any, prefix: str = "cockpit/") -> None:
        self.writer, self.prefix = writer, prefix

    def __call__(self, values: dict[str, Any], step: int) -> None:
        for key, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(self.prefix + key, value, step)
            elif key == "grad_hist":
                self._histogram(self.prefix + key, value, step)

    def _histogram(self, tag: str, value: dict[str, list[Any]], step: int) -> None:
        edges, counts = value["edges"], value["counts"]
        # Outer bins have no bound; their inner one stands for it.
        limits = [min(max(e, edges[1]), edges[-2]) for e in edges[1:]]
        centres = [
            (min(max(a, edges[1]), edges[-2]) + b) / 2 for a, b in zip(edges, limits, strict=False)
        ]
        self.writer.add_histogram_raw(
            tag,
            min=edges[1],
            max=edges[-2],
            num=sum(counts),
            sum=sum(c * n for c, n in zip(centres, counts, strict=True)),
            sum_squares=sum(c * c * n for c, n in zip(centres, counts, strict=True)),
            bucket_limits=limits,
            bucket_counts=counts,
            global_step=step,
        )


class CSV:
    """Numbers to a table with a row for each tracked step.

    A key that comes later makes a column of its own; the rows before are written again.

    Args:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.columns = ["step"]
        self.rows: dict[int, dict[str, Any]] = {}

    def __call__(self, values: dict[str, Any], step: int) -> None:
        known = step in self.rows
        self.rows.setdefault(step, {"step": step}).update(values)
        fresh = [key for key in values if key not in self.columns]
        self.columns += fresh
        again = fresh or known or not self.path.exists()
        with self.path.open("w" if again else "a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if again:
                writer.writeheader()
                writer.writerows(self.rows[key] for key in sorted(self.rows))
            else:
                writer.writerow(self.rows[step])
