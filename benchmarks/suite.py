"""What every quantity costs, here and in other libraries: ``make bench``.

    python -m benchmarks.suite [--quick] [--problems ...] [--quantities ...] [--libraries ...]
                               [--rounds 20] [--batch N] [--device cuda] [--resume]

Every library works in a process of its own, and all processes live at the same time. In each round
every (library, quantity) pair of a problem has one turn, in an order that rotates; while one is
measured the others wait. All have the same network, in the same state, and the same batch. A turn is
one forward and backward pass from no gradients, or several where a pass is short. Ratios are to the
plain gradient measured in the same process and the same rounds.

Before its turns each pair's numbers are compared with this library's. A pair that fails, runs out of
memory or takes too long leaves its error in the results. Pairs leave the rounds once they have used up
their budget of seconds. Results are written after every problem; ``--resume`` goes on with them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import report
from benchmarks.libraries import (
    COMBINED,
    EXTEND,
    FIRST_ORDER,
    FOLDERS,
    GRADIENT,
    LIBRARIES,
    QUANTITIES,
    SAMPLED,
)
from benchmarks.limits import limits, machine_rates
from benchmarks.problems import PROBLEMS, Setting, make, setting, sweeps

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers"
RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-3
OURS = "ours", "low-rank"  # what the others are compared with
SWEPT = (GRADIENT, *FIRST_ORDER, "DiagGGNMC", "DiagGGNExact", "KFAC")
SWEPT_LIBRARIES = ("ours", "backpack-for-pytorch")
QUICK = {"mlp": 32, "3c3d": 4, "char-lstm": 8}
QUICK_QUANTITIES = (GRADIENT, EXTEND, *FIRST_ORDER, "DiagGGNMC", "KFAC", COMBINED)


class WorkerError(Exception):
    """A worker that gave no answer."""


class Handle:
    """The parent's end of a worker, which is started anew where it was lost."""

    def __init__(self, library: str, given: argparse.Namespace, frugal: bool = False) -> None:
        folder = FOLDERS.get(library, library)
        if folder and not (PEERS / folder).is_dir():
            raise FileNotFoundError(f"{library} is not installed; see `make bench`")
        place = str(PEERS / folder) if folder else ""
        self.command = [sys.executable, "-m", "benchmarks.worker", library, given.device]
        self.command += [str(given.threads), place]
        # Where peaks are measured, all memory that is freed goes back to the system.
        self.environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if frugal else {})}
        self.library = library
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """The process, which may still be importing."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self.process

    def ask(self, do: str, limit: float = 600.0, **given: Any) -> dict[str, Any]:
        """One question, one answer.

        Raises:
            WorkerError: if there is none in time; the worker is ended.
        """
        process = self.start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": do, **given}).encode() + b"\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], limit)[0]:
                raise WorkerError(f"took longer than {limit:.0f} s")
            line = process.stdout.readline()
            if not line:
                raise WorkerError("the process ended, most likely for lack of memory")
        except (WorkerError, BrokenPipeError) as error:
            self.close()
            raise WorkerError(str(error)) from error
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


Pair = tuple[str, str]


class Measurement:
    """One problem, measured with all libraries."""

    def __init__(
        self, given: argparse.Namespace, handles: dict[str, Handle], chosen: Setting, folder: Path
    ) -> None:
        self.given, self.handles, self.chosen = given, handles, chosen
        self.state, self.reference = str(folder / "state.pt"), folder / "reference"
        self.model, self.X, y = make(chosen)
        torch.save((self.model.state_dict(), self.X, y), self.state)
        self.cells: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in handles}
        self.lost: set[str] = set()

    def open(self, library: str) -> None:
        """Give a library the problem."""
        handle = self.handles[library]
        answer = handle.ask("open", state=self.state, setting=list(self.chosen))
        if "failed" in answer:
            raise WorkerError(answer["failed"])
        self.lost.discard(library)

    def ask(self, library: str, do: str, quantity: str, **given: Any) -> dict[str, Any]:
        """Ask about a pair; a failure goes to its cell, and the next question to a new worker."""
        try:
            if library in self.lost:
                self.open(library)
            answer = self.handles[library].ask(do, quantity=quantity, limit=self.given.limit, **given)
        except WorkerError as error:
            self.lost.add(library)
            answer = {"failed": str(error)}
        if "failed" in answer:
            self.cells[library].setdefault(quantity, {})["failed"] = answer["failed"]
        return answer

    def check(self, quantities: list[str]) -> list[Pair]:
        """Run every pair once, and compare; those that work."""
        pairs: list[Pair] = []
        # The one that all others are compared with comes first.
        for library in sorted(self.handles, key=lambda name: name not in OURS):
            try:
                self.open(library)
            except WorkerError as error:
                self.cells[library] = {"": {"failed": str(error)}}
                continue
            for quantity in quantities:
                offered = (GRADIENT, *LIBRARIES[library].quantities)
                if quantity not in offered:
                    continue
                self.given.progress(f"{self.chosen.key}  {library}  {quantity}: compare")
                if quantity in PROBLEMS[self.chosen.problem].skip:
                    why = PROBLEMS[self.chosen.problem].skip[quantity]
                    self.cells[library][quantity] = {"skipped": why}
                    continue
                cell: dict[str, Any] = {}
                self.cells[library][quantity] = cell
                path = f"{self.reference}-{quantity}.pt"
                answer = self.ask(library, "check", quantity, reference=path, save=library in OURS)
                if "failed" in answer:
                    continue
                pairs.append((library, quantity))
                if answer.get("compared"):
                    cell["error"], cell["compared"] = answer["error"], answer["compared"]
                    cell["agrees"] = answer["error"] <= TOLERANCE
                elif "compared" in answer:
                    cell["agreement"] = "not comparable"
                elif quantity in SAMPLED:
                    cell["agreement"] = "sampled, not compared"
        for file in self.reference.parent.glob(self.reference.name + "*"):
            file.unlink()
        return pairs

    def rounds(self, pairs: list[Pair]) -> None:
        """Turn after turn."""
        times: dict[Pair, list[list[float]]] = {pair: [] for pair in pairs}
        for j in range(max(3, self.given.rounds // 2) if self.chosen.sweep else self.given.rounds):
            active = [
                pair
                for pair, found in times.items()
                if "failed" not in self.cells[pair[0]][pair[1]]
                and (
                    pair[1] == GRADIENT
                    or sum(map(sum, found)) < self.given.budget * (3 if j < 3 else 1)
                )
            ]
            if all(quantity == GRADIENT for _, quantity in active) and j >= 3:
                break
            shift = j * 7 % len(active)
            for library, quantity in active[shift:] + active[:shift]:
                self.given.progress(f"{self.chosen.key}  {library}  {quantity}: round {j + 1}")
                answer = self.ask(library, "measure", quantity)
                times[library, quantity].append(answer.get("times", []))
        for (library, quantity), found in times.items():
            gradient = times.get((library, GRADIENT), [])[: len(found)]
            self.summarise(self.cells[library][quantity], found, gradient)

    @staticmethod
    def summarise(cell: dict[str, Any], found: list[list[float]], gradient: list[list[float]]) -> None:
        """Figures of one pair, and its ratio to the gradient of the rounds it took part in."""
        flat, base = ([t for turn in each for t in turn] for each in (found, gradient))
        if flat:
            cell |= {"minimum": min(flat), "median": median(flat), "rounds": len(found)}
            cell["runs"] = len(flat)
        if flat and base:
            cell["ratio"] = min(flat) / min(base)
            cell["ratio_median"] = median(flat) / median(base)

    def memory(self, pairs: list[Pair], frugal: dict[str, Handle]) -> None:
        """Peaks, in workers that do nothing else."""
        for library, quantity in pairs:
            cell = self.cells[library][quantity]
            if "failed" in cell:
                continue
            self.given.progress(f"{self.chosen.key}  {library}  {quantity}: memory")
            given = {"state": self.state, "setting": list(self.chosen), "quantity": quantity}
            try:
                answer = frugal[library].ask("memory", self.given.limit, **given)
            except WorkerError as error:
                answer = {"failed": str(error)}
            cell["bytes" if "bytes" in answer else "memory_failed"] = next(iter(answer.values()))

    def figures(self, rates: Any) -> dict[str, Any]:
        """All of it."""
        columns = self.chosen.classes * (self.chosen.steps or 1)
        least = limits(self.model, self.X, columns, rates)
        skipped = PROBLEMS[self.chosen.problem].skip
        return {
            **self.chosen._asdict(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "limits": {name: each for name, each in least.items() if name not in skipped},
            "libraries": self.cells,
        }


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found.group(1) if found else name
    gpu = torch.cuda.get_device_name() if device != "cpu" else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    system = f"{platform.system()} {platform.machine()}"
    about = {"cpu": name, "cores": os.cpu_count(), "memory": memory, "gpu": gpu, "system": system}
    return {**about, "load": os.getloadavg()[0]}  # what else ran when this began


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS))
    parser.add_argument("--quantities", nargs="+", choices=QUANTITIES)
    parser.add_argument("--libraries", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--batch", type=int, help="number of samples, in place of each problem's own")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=15, help="seconds of turns, for each pair")
    parser.add_argument("--limit", type=float, default=120, help="seconds that one answer may take")
    parser.add_argument("--quick", action="store_true", help="three small problems in two minutes")
    parser.add_argument("--no-sweeps", action="store_true", help="do not vary sizes")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no-pictures", action="store_true", help="do not draw")
    parser.add_argument("--label", help="of the machine, for the file's name")
    parser.add_argument("--resume", action="store_true", help="keep the problems already in the file")
    parser.add_argument("--output", type=Path, help="the file of results")
    given = parser.parse_args()
    given.problems = given.problems or list(QUICK if given.quick else PROBLEMS)
    given.rounds = given.rounds or (2 if given.quick else 20)
    if given.quick:
        given.quantities = given.quantities or list(QUICK_QUANTITIES)
        aside = ("ours-no-gradient", "ours-forms")
        given.libraries = [each for each in given.libraries if each not in aside]
        given.budget = min(given.budget, 2)
        given.no_memory = given.no_sweeps = True
    # Always there: everything is measured in its multiples.
    given.quantities = [
        each for each in QUANTITIES if each in (GRADIENT, *(given.quantities or QUANTITIES))
    ]
    return given


def show(given: argparse.Namespace, total: int) -> Any:
    """A progress bar where ``rich`` is installed, and a function that moves it."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
    except ImportError:
        given.progress = lambda text: None
        return None
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bar = Progress(*columns, transient=True)
    task = bar.add_task("", total=total)
    given.progress = lambda text: bar.update(task, description=f"{text:60}")
    given.advance = lambda: bar.advance(task)
    bar.start()
    return bar


def settings(given: argparse.Namespace) -> list[tuple[Setting, list[str]]]:
    """What is measured, and which quantities of it."""
    chosen = []
    for name in given.problems:
        batch = given.batch or (QUICK.get(name, 4) if given.quick else None)
        chosen.append((setting(name, given.device, batch), given.quantities))
    if not given.no_sweeps:
        swept = [each for each in given.quantities if each in SWEPT]
        chosen += [(each, swept) for each in sweeps(given.problems, given.device)]
    return chosen


def main() -> None:
    """Measure, write, print, draw."""
    given = arguments()
    about = machine(given.device)
    label = given.label or re.sub(r"[^a-z0-9]+", "-", (about["gpu"] or about["cpu"]).lower()).strip("-")
    today = datetime.date.today().isoformat()
    folder = RESULTS / "quick" if given.quick else RESULTS
    output = given.output or folder / f"{today}-{label}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    handles = {name: Handle(name, given) for name in given.libraries}
    frugal = {name: Handle(name, given, frugal=True) for name in given.libraries}
    for handle in handles.values():
        handle.start()
    greetings = {name: handle.ask("hello") for name, handle in handles.items()}
    for name, found in greetings.items():
        if "version" not in found:
            print(f"{name} is left out: {found}", file=sys.stderr)
    greetings = {name: found for name, found in greetings.items() if "version" in found}
    given.libraries = [name for name in given.libraries if name in greetings]
    options = {k: v for k, v in vars(given).items() if isinstance(v, (int, float, str, list))}
    rates = machine_rates(given.device)
    results: dict[str, Any] = {
        "date": today,
        "machine": {**about, **rates._asdict()},
        "versions": {name: found["version"] for name, found in greetings.items()},
        "options": options,
        "problems": {},
    }
    if given.resume and output.exists():
        results["problems"] = json.loads(output.read_text())["problems"]
    todo = [each for each in settings(given) if each[0].key not in results["problems"]]
    bar = show(given, len(todo))
    try:
        for chosen, quantities in todo:
            start = time.perf_counter()
            names = [each for each in given.libraries if not chosen.sweep or each in SWEPT_LIBRARIES]
            with tempfile.TemporaryDirectory() as temporary:
                several = {name: handles[name] for name in names}
                run = Measurement(given, several, chosen, Path(temporary))
                pairs = run.check(quantities)
                run.rounds(pairs)
                if not given.no_memory:
                    run.memory(pairs, frugal)
                figures = run.figures(rates)
            figures["seconds"] = time.perf_counter() - start
            results["problems"][chosen.key] = figures
            output.write_text(json.dumps(results, indent=1, allow_nan=False, default=str) + "\n")
            if bar is not None:
                given.advance()
    finally:
        if bar is not None:
            bar.stop()
        for handle in (*handles.values(), *frugal.values()):
            handle.close()
    report.write(output, pictures_too=not given.no_pictures)


if __name__ == "__main__":
    main()
