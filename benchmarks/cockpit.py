"""This library's monitor beside cockpit-for-pytorch: numbers, and what they cost.

    python -m benchmarks.cockpit agree [--folder FOLDER]
    python -m benchmarks.cockpit cost [--folder FOLDER] [--problems ...] [--rounds 5] [--alone ...]

``agree`` trains the same small networks with the same optimizers under both, in double precision, full
configuration, and prints the largest relative difference of each quantity. The folder is where
``benchmarks/peers/cockpit-for-pytorch.txt`` is installed.

``cost`` measures multiples of a training step that nobody watches, in processor time of one thread;
both libraries take turns. Those at intervals above 1 are sums: a tracked step, the one after it (which
knows where the step before has ended), and others. What has used up its ``--seconds`` takes no further
turn. Each problem's numbers are written to ``benchmarks/results/cockpit-cost.json`` as it is finished;
``python -m benchmarks.cockpit_table`` puts them into ``docs/cockpit.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from backpack.cockpit.configurations import CONFIGURATIONS
from benchmarks.cockpit_table import RESULTS, of_problem
from benchmarks.suite import machine

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-peers" / "cockpit-for-pytorch"
KINDS = "original", "names", "watch"
OPTIMIZERS = "sgd", "adam"
# Eigenvalues are compared with brute force: the original's power method may stop early.
EIGENVALUES = {
    "HessMaxEV": "HessMaxEV beside brute force",
    "hess_max_ev": "hess_max_ev beside brute force",
}
THEIRS = "the original's HessMaxEV beside brute force"
TOLERANCES = {**dict.fromkeys(EIGENVALUES.values(), 2e-3), THEIRS: math.inf}
# This library's keys, and the original's names; lists have an entry for each parameter.
KEYS = {
    "loss": "Loss",
    "grad_norm": "GradNorm",
    "distance": "Distance",
    "update_size": "UpdateSize",
    "alpha": "Alpha",
    "norm_test": "NormTest",
    "inner_test": "InnerTest",
    "ortho_test": "OrthoTest",
    "mean_gsnr": "MeanGSNR",
    "hess_trace": "HessTrace",
    "tic_diag": "TICDiag",
    "tic_trace": "TICTrace",
}
OTHERS = {
    "grad_hist": ["GradHist1d"],
    "grad_hist_2d": ["GradHist2d"],
    "hess_max_ev": ["HessMaxEV"],
}
# Of 128 samples of 2C2D the original's full configuration takes 10 GB.
BATCH = {"mlp": 128, "2c2d": 32, "3c3d": 128, "char-lstm": 50, "gpt2": 8}
# Problems that the original does not take: ours alone.
ALONE = "char-lstm", "gpt2"
INTERVALS = 1, 4, 16, 64


class Handle:
    """The parent's end of a worker."""

    def __init__(self, kind: str, folder: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.cockpit_worker", kind]
        self.kind = kind
        self.process = subprocess.Popen(
            command + ([str(folder)] if kind == "original" else []),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, do: str, **given: Any) -> Any:
        """One question, one answer.

        Raises:
            RuntimeError: if the worker failed.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"failed": "the process has ended"}
        if "failed" in answer:
            raise RuntimeError(f"{self.kind}: {answer['failed']}")
        return answer["is"]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def numbers(value: Any) -> Iterator[float]:
    """All of them, in lists of any depth."""
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    else:
        yield value


def difference(found: Any, expected: Any) -> float:
    """The largest difference beside the largest number."""
    a, b = (torch.tensor(list(numbers(x)), dtype=torch.float64) for x in (found, expected))
    if a.shape != b.shape:
        return math.inf
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if len(b) else 0.0


def whole(name: str, value: Any) -> Any:
    """A number for the model from one for each parameter."""
    if not isinstance(value, list):
        return value
    return sum(value) if name == "HessTrace" else math.hypot(*value)


def pairs(original: Any, names: Any, watch: Any) -> Iterator[tuple[str, Any, Any]]:
    """What is compared in a step: whose, ours, the original's."""
    for name, expected in original.items():
        if name in ("Time", "HessMaxEV"):
            continue
        if isinstance(expected, dict):
            for part in ("hist", "edges"):
                yield f"{name} ({part})", names[name][part], expected[part]
        else:
            yield name, names[name], expected
    for key, name in KEYS.items():
        if name in original and key in watch:
            yield key, watch[key], whole(name, original[name])
    yield EIGENVALUES["HessMaxEV"], names["HessMaxEV"], watch["magnitude"]
    yield EIGENVALUES["hess_max_ev"], watch["hess_max_ev"], watch["largest"]
    yield THEIRS, original["HessMaxEV"], watch["magnitude"]


def agree(folder: Path, steps: int = 10, batch: int = 8) -> dict[str, float]:
    """The largest relative difference of each quantity, over networks, optimizers and steps."""
    handles = {kind: Handle(kind, folder) for kind in KINDS}
    largest: dict[str, float] = {}
    try:
        for problem in ("mlp", "cnn"):
            for optimizer in OPTIMIZERS:
                given = {"problem": problem, "optimizer": optimizer, "steps": steps, "batch": batch}
                runs = {kind: each.ask("values", **given) for kind, each in handles.items()}
                for step in runs["original"]:
                    for name, a, b in pairs(*(runs[kind][step] for kind in KINDS)):
                        largest[name] = max(largest.get(name, 0.0), difference(a, b))
    finally:
        for each in handles.values():
            each.close()
    return largest


def multiples(steps: dict[str, list[float]], plain: float) -> list[float]:
    """Of a plain step, at each interval."""
    found = [min(steps["every"]) / plain]
    for interval in INTERVALS[1:]:
        cycle = min(steps["tracked"]) + min(steps["after"]) + (interval - 2) * min(steps["between"])
        found.append(cycle / (interval * plain))
    return found


def measured(
    handles: list[Handle], tracked: dict[str, Any], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """A row for each thing that is tracked, and each library; they take turns."""
    times: dict[tuple[str, str], dict[str, list[float]]] = {}
    failed: dict[tuple[str, str], str] = {}
    used: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        for name, each in {"": None, **tracked}.items():
            for handle in handles:
                pair = handle.kind, name
                given = each.get(handle.kind) if isinstance(each, dict) else each
                if pair in failed or used.get(pair, 0.0) > seconds or (name and given is None):
                    continue
                start = time.perf_counter()
                try:
                    found = handle.ask("time", tracked=given, rounds=1)
                except RuntimeError as error:
                    failed[pair] = str(error)
                    continue
                used[pair] = used.get(pair, 0.0) + time.perf_counter() - start
                for part, values in found.items():
                    times.setdefault(pair, {}).setdefault(part, []).extend(values)
    rows: list[dict[str, Any]] = []
    for name in tracked:
        for handle in handles:
            row = {"tracked": name, "monitor": handle.kind}
            if (handle.kind, name) in failed:
                rows.append(row | {"failed": failed[handle.kind, name]})
            elif (handle.kind, name) in times:
                plain = min(times[handle.kind, ""]["every"])
                steps = times[handle.kind, name]
                rows.append(row | {"multiples": multiples(steps, plain), "step": plain})
    return rows


def alone() -> dict[str, Any]:
    """Each quantity by itself, under both names where it has two."""
    found: dict[str, Any] = {}
    for name in CONFIGURATIONS["full"]:
        theirs = [KEYS[name]] if name in KEYS else None
        theirs = OTHERS.get(name, theirs)
        found[name] = {"watch": [name], "original": theirs}
    return found


def cost(given: argparse.Namespace) -> None:
    """Measure each problem, and write what was found."""
    before = json.loads(given.output.read_text())["problems"] if given.output.exists() else {}
    problems = {name: each for name, each in before.items() if name not in given.problems}
    for problem in given.problems:
        tracked: dict[str, Any] = {name: name for name in CONFIGURATIONS}
        if problem in given.alone:
            tracked |= alone()
        kinds = ["watch"] if problem in ALONE else ["watch", "original"]
        handles = [Handle(kind, given.folder) for kind in kinds]
        try:
            for handle in handles:
                handle.ask("open", problem=problem, batch=BATCH[problem], optimizer=given.optimizer)
            rows = measured(handles, tracked, given.rounds, given.seconds)
        finally:
            for handle in handles:
                handle.close()
        about = {**machine("cpu"), "torch": torch.__version__, "date": str(datetime.date.today())}
        about |= {"optimizer": given.optimizer, "batch": BATCH[problem], "rows": rows}
        problems[problem] = about
        found = {"intervals": INTERVALS, "problems": {k: problems[k] for k in BATCH if k in problems}}
        given.output.write_text(json.dumps(found, indent=1) + "\n")
        print("\n".join(of_problem(problem, found)), flush=True)


def main() -> None:
    """Compare, or measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("agree", "cost"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--problems", nargs="+", choices=list(BATCH), default=list(BATCH))
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="of turns, for each row")
    parser.add_argument(
        "--alone",
        nargs="*",
        choices=list(BATCH),
        default=["mlp", "2c2d"],
        help="problems on which each quantity by itself is measured too",
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not given.folder.is_dir():
        parser.error(
            f"cockpit-for-pytorch is not installed in {given.folder}; see `make bench-cockpit`"
        )
    if given.what == "cost":
        cost(given)
        return
    print("| quantity | largest relative difference | |\n|---|---|---|")
    wrong = 0
    for name, found in agree(given.folder).items():
        good = found <= TOLERANCES.get(name, 1e-6)
        wrong += not good
        verdict = "" if name == THEIRS else "agrees" if good else "DIFFERS"
        print(f"| {name} | {found:.1e} | {verdict} |")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
