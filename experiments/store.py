"""Records of runs: kept as files, and chosen from."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from experiments.optimizers import OPTIMIZERS
from experiments.training import Record

# Hyper-parameters are chosen by this seed's runs; others are reported where there are any.
SEARCH_SEED = 0
FINAL = -1


def write(path: Path, content: Any) -> None:
    """Write JSON whole or not at all: a run that is interrupted leaves no file that looks finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> tuple[list[Record], list[Record]]:
    """Records of runs and of step times, from a folder of files or from one that was packed.

    Raises:
        FileNotFoundError: if there are none.
    """
    if path.is_file():
        packed = json.loads(path.read_text())
        for record in (*packed["runs"], *packed["times"]):
            record["environment"] = packed["environments"][record["environment"]]
        return packed["runs"], packed["times"]
    records = [json.loads(file.read_text()) for file in sorted(path.rglob("*.json"))]
    if not records:
        raise FileNotFoundError(f"no results in {path}; make some by: python -m experiments run")
    runs = [each for each in records if "setting" in each]
    return runs, [each for each in records if "seconds" in each]


def only(
    optimizers: list[str], runs: list[Record], times: list[Record]
) -> tuple[list[Record], list[Record]]:
    """What there is of some optimizers."""
    kept = [{n: s for n, s in each["seconds"].items() if n in optimizers} for each in times]
    return (
        [run for run in runs if run["setting"]["optimizer"] in optimizers],
        [{**each, "seconds": seconds} for each, seconds in zip(times, kept, strict=True) if seconds],
    )


def pack(runs: list[Record], times: list[Record]) -> Record:
    """All records in one; runs that are not shown keep the ends of their curves only."""
    environments: list[Record] = []
    shown = {id(run) for chosen in choose(runs).values() for each in chosen for run in each.runs}

    def shorten(record: Record) -> Record:
        if record["environment"] not in environments:
            environments.append(record["environment"])
        record = {**record, "environment": environments.index(record["environment"])}
        return record

    packed: Record = {"environments": environments, "runs": [], "times": [shorten(t) for t in times]}
    for run in runs:
        short = shorten(run)
        if id(run) not in shown:
            short["curves"] = {name: values[FINAL:] for name, values in run["curves"].items()}
        packed["runs"].append(short)
    return packed


class Chosen(NamedTuple):
    """The hyper-parameters of an optimizer on a problem, and what they led to.

    Args:
        setting: of the first run.
        runs: those that are reported, one for each seed.
        tried: number of settings they were chosen from.
        edges: for ``lr`` and ``damping``: ``"inside"`` the grid, at its ``"lower edge"`` or
            ``"upper edge"``, or ``"fixed"``.
    """

    setting: Record
    runs: list[Record]
    tried: int
    edges: dict[str, str]

    def final(self, name: str) -> float:
        """Median over seeds of the last value of a curve; a run that diverged ends early."""
        return median(run["curves"][name][FINAL] for run in self.runs)


Budget = tuple[str, int, int, int | None]


def choose(runs: list[Record]) -> dict[Budget, list[Chosen]]:
    """For every problem and budget, the best setting of each optimizer.

    The best is that with the highest validation accuracy after the last epoch, ties broken by the
    lower validation loss, among the runs with ``SEARCH_SEED``. Runs that diverged come last. What is
    reported of it are its runs with other seeds, if there are any.
    """
    found: dict[Budget, dict[str, dict[tuple[Any, ...], list[Record]]]] = defaultdict(dict)
    for run in runs:
        s = run["setting"]
        budget = (s["problem"], s["epochs"], s["batch"], s["samples"])
        settings = found[budget].setdefault(s["optimizer"], defaultdict(list))
        settings[s["lr"], s["damping"]].append(run)
    return {
        budget: [_best(found[budget][name]) for name in OPTIMIZERS if name in found[budget]]
        for budget in sorted(found, key=str)
    }


def _best(settings: dict[tuple[Any, ...], list[Record]]) -> Chosen:
    searched = {
        key: run
        for key, several in settings.items()
        for run in several
        if run["setting"]["seed"] == SEARCH_SEED
    }
    best = max(searched, key=lambda key: merit(searched[key]))
    edges = {}
    for j, name in enumerate(("lr", "damping")):
        values = sorted({key[j] for key in searched if key[j] is not None})
        if values:
            edges[name] = _edge(best[j], values)
    others = [run for run in settings[best] if run["setting"]["seed"] != SEARCH_SEED]
    reported = sorted(others or settings[best], key=lambda run: run["setting"]["seed"])
    return Chosen(searched[best]["setting"], reported, len(searched), edges)


def merit(run: Record) -> tuple[bool, float, float]:
    """What runs are ranked by."""
    accuracy, loss = (run["curves"][f"validation_{name}"][FINAL] for name in ("accuracy", "loss"))
    return run["diverged"] is None, accuracy, -loss


def _edge(value: float, values: list[float]) -> str:
    if len(values) == 1:
        return "fixed"
    return {values[0]: "lower edge", values[-1]: "upper edge"}.get(value, "inside")
