"""Low-rank curvature here, in vivit-for-pytorch and by Lanczos with curvlinops: ``make bench-vivit``.

    python -m benchmarks.vivit [--problems ...] [--rounds 5] [--largest] [--resume] [--output FILE]

The same machinery as :mod:`benchmarks.suite`: a process for each library, turns in rounds, peak memory
in processes that do nothing else, numbers compared before they are timed. Networks, exact and sampled:
all eigenvalues of the GGN, its ten leading pairs, first and second derivatives of each sample along
them, a damped Newton step in their space. ``--largest``: the most samples that take at most 2 GB.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.libraries import GRADIENT
from benchmarks.low_rank import EXACT, SAMPLED
from benchmarks.problems import make, setting
from benchmarks.report import TITLES
from benchmarks.suite import RESULTS, Handle, Measurement, WorkerError, machine

NAMES = "low-rank", "vivit-for-pytorch", "lanczos"
SHOWN = {"low-rank": "this library", "lanczos": "curvlinops (Lanczos)"}
# Batches on which the original works within the memory of a laptop.
BATCH = {"mlp": 128, "2c2d": 32, "3c3d": 64, "resnet-32": 16, "allcnnc": 4, "vit": 16, "gpt2": 8}
TOO_MANY = {"gpt2"}  # exact columns: one for every word at every position
LARGEST = dict.fromkeys(("mlp", "2c2d", "3c3d", "allcnnc"), tuple(EXACT[j] for j in (0, 1, 3)))
BYTES, MOST = 2e9, 4096


def quantities(problem: str) -> list[str]:
    """What is measured on a problem."""
    return [GRADIENT, *(() if problem in TOO_MANY else EXACT), *SAMPLED]


def measured(given: argparse.Namespace, problem: str, handles: Any, frugal: Any) -> dict[str, Any]:
    """Times and peaks of all libraries on one problem."""
    chosen = setting(problem, batch=given.batch or BATCH[problem])
    with tempfile.TemporaryDirectory() as folder:
        run = Measurement(given, handles, chosen, Path(folder))
        pairs = run.check(quantities(problem))
        run.rounds(pairs)
        run.memory(pairs, frugal)
    parameters = sum(p.numel() for p in run.model.parameters())
    return {**chosen._asdict(), "parameters": parameters, "libraries": run.cells}


def largest(
    given: argparse.Namespace, problem: str, library: str, quantity: str, handle: Handle
) -> int:
    """The most samples whose computation takes at most 2 GB, within a tenth; 0: not even one."""

    def fits(samples: int) -> bool:
        chosen = setting(problem, batch=samples)
        with tempfile.TemporaryDirectory() as folder:
            model, X, y = make(chosen)
            state = str(Path(folder) / "state.pt")
            torch.save((model.state_dict(), X, y), state)
            asked = {"state": state, "setting": list(chosen), "quantity": quantity}
            try:
                found = handle.ask("memory", given.limit, **asked)
            except WorkerError:
                return False
        return found.get("bytes", BYTES + 1) <= BYTES

    low, high = 0, 1
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    while high <= MOST and high - low > max(1, low // 10):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def markdown(results: dict[str, Any]) -> str:
    """Tables: seconds, megabytes beyond the network, ratios."""
    about, versions = results["machine"], results["versions"]
    lines = [
        f"# Low-rank curvature, {results['date']}",
        "",
        f"{about['cpu']}, {about['cores']} cores; torch {about['torch']}; "
        + ", ".join(f"{SHOWN.get(name, name)} {version}" for name, version in versions.items())
        + ". Seconds (the least of all turns) and peak memory beyond the network's, in MB. "
        "Ten pairs, damping 0.01. An empty cell: not offered. "
        "All-CNN-C ends in adaptive pooling here, which the original does not take.",
    ]
    for problem, entry in results["problems"].items():
        about = f"batch {entry['batch']}, {entry['parameters']:,} parameters"
        lines += ["", f"## {TITLES[problem]}, {about}", ""]
        names = list(entry["libraries"])
        lines += [
            "| | " + " | ".join(SHOWN.get(name, name) for name in names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
        for quantity in quantities(problem):
            cells = [_cell(entry["libraries"][name].get(quantity)) for name in names]
            lines.append(f"| {quantity} | " + " | ".join(cells) + " |")
    if results.get("largest"):
        lines += [
            "",
            "## Most samples within 2 GB",
            "",
            "| | " + " | ".join(SHOWN.get(name, name) for name in NAMES[:2]) + " |",
        ]
        lines.append("|---" * 3 + "|")
        for row, found in results["largest"].items():
            lines.append(f"| {row} | " + " | ".join(str(found.get(n, "")) for n in NAMES[:2]) + " |")
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if "failed" in cell:
        return "not supported" if cell["failed"].startswith("NotImpl") else cell["failed"][:60]
    peak = f", {cell['bytes'] / 1e6:.0f} MB" if "bytes" in cell else ""
    wrong = "" if cell.get("agrees", True) else f" (differs by {cell['error']:.0e})"
    return f"{cell['minimum']:.3g} s{peak}{wrong}"


def main() -> None:
    """Measure, write after every problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=list(BATCH), default=list(BATCH))
    parser.add_argument("--libraries", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, help="in place of each problem's own")
    parser.add_argument("--budget", type=float, default=8, help="seconds of turns, for each pair")
    parser.add_argument("--limit", type=float, default=90, help="seconds that one answer may take")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--largest", action="store_true", help="also the most samples within 2 GB")
    parser.add_argument("--resume", action="store_true", help="keep the problems already in the file")
    parser.add_argument("--output", type=Path, default=RESULTS / "vivit.json")
    given = parser.parse_args()
    given.device = "cpu"
    given.progress = lambda text: print(text, flush=True)
    handles = {name: Handle(name, given) for name in given.libraries}
    frugal = {name: Handle(name, given, frugal=True) for name in given.libraries}
    results: dict[str, Any] = {"problems": {}, "largest": {}}
    if given.resume and given.output.exists():
        results = json.loads(given.output.read_text())
    results |= {
        "date": datetime.date.today().isoformat(),
        "machine": {**machine("cpu"), "torch": torch.__version__},
        "versions": {name: handle.ask("hello")["version"] for name, handle in handles.items()},
    }

    def write() -> None:
        given.output.write_text(json.dumps(results, indent=1, default=str) + "\n")
        given.output.with_suffix(".md").write_text(markdown(results))

    try:
        for problem in given.problems:
            if problem not in results["problems"]:
                results["problems"][problem] = measured(given, problem, handles, frugal)
                write()
        for problem in given.problems if given.largest else ():
            for quantity in LARGEST.get(problem, ()):
                row = results["largest"].setdefault(f"{problem}: {quantity}", {})
                for name in NAMES[:2]:
                    if name in given.libraries and name not in row:
                        given.progress(f"{problem}  {name}  {quantity}: most samples")
                        row[name] = largest(given, problem, name, quantity, frugal[name])
                        write()
    finally:
        for handle in (*handles.values(), *frugal.values()):
            handle.close()


if __name__ == "__main__":
    main()
