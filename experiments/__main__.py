"""Compare optimizers on the paper's test problems.

    python -m experiments run --problem digits-cnn --optimizer SGD KFAC   train, with a grid search
    python -m experiments time --problem digits-cnn                       seconds of a step
    python -m experiments plot                                            figures
    python -m experiments table                                           chosen settings, final metrics
    python -m experiments pack results.json                               all records in one file

`run` tries every learning rate and damping of the grid with seed 0, chooses by validation accuracy
after the last epoch (ties: lower validation loss), and trains with the chosen ones from seeds 1, 2
and so on, which are what is reported. Every finished run is a file, and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import report, store
from experiments.data import FOLDER_VARIABLE, Data
from experiments.optimizers import LEARNING_RATES, OPTIMIZERS
from experiments.problems import PROBLEMS
from experiments.training import Setting, step_times, train

OUTPUT = Path(__file__).parent / "output"


def _names(problem: str, given: argparse.Namespace) -> list[str]:
    """The optimizers that were asked for, or all that the problem offers."""
    skip = PROBLEMS[problem].skip
    for name in given.optimizer or ():
        if name in skip:
            raise ValueError(f"{name} is not offered on {problem}: {skip[name]}")
    return given.optimizer or [name for name in OPTIMIZERS if name not in skip]


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def run(given: argparse.Namespace, console: Console) -> int:
    """Grid search with one seed, then the chosen setting with others; the number of runs made."""
    made = 0
    for problem, names in [(each, _names(each, given)) for each in given.problem]:
        # Files are read only if there is something to do.
        load = cache(partial(PROBLEMS[problem].load, given.data))
        sizes = {
            "epochs": given.epochs or PROBLEMS[problem].epochs,
            "batch": given.batch or PROBLEMS[problem].batch,
            "samples": given.samples,
        }
        for name in names:
            grid = list(product(given.lr, OPTIMIZERS[name].dampings(given.damping)))
            with _bars(console) as bars:
                whole = bars.add_task(f"[bold]{problem} {name}", total=len(grid) + given.seeds)
                for lr, damping in grid:
                    searched = Setting(problem, name, lr, damping, store.SEARCH_SEED, **sizes)
                    made += _once(searched, load, given, bars)
                    bars.advance(whole)
                # Among all that were ever tried, as in tables and figures.
                files = (given.output / searched.path.parent).glob(
                    f"{name},*seed={store.SEARCH_SEED}.json"
                )
                best = max((json.loads(file.read_text()) for file in files), key=store.merit)["setting"]
                for seed in range(1, given.seeds + 1):
                    made += _once(Setting(**{**best, "seed": seed}), load, given, bars)
                    bars.advance(whole)
    console.print(f"{made} runs made; all that were asked for are in {given.output}")
    return made


def _once(
    setting: Setting, load: Callable[[], Data], given: argparse.Namespace, bars: Progress
) -> bool:
    """Make a run unless its file is there; whether it was made."""
    path = given.output / setting.path
    if path.exists():
        return False
    data = load()
    steps = setting.epochs * (len(data.first(setting.samples).train.y) // setting.batch)
    damping = "" if setting.damping is None else f", damping {setting.damping:g}"
    task = bars.add_task(f"  lr {setting.lr:g}{damping}, seed {setting.seed}", total=steps)
    store.write(path, train(setting, data, given.device, partial(bars.advance, task)))
    bars.remove_task(task)
    return True


def measure(given: argparse.Namespace, console: Console) -> None:
    """Seconds of a step of every optimizer."""
    for problem, names in [(each, _names(each, given)) for each in given.problem]:
        batch = given.batch or PROBLEMS[problem].batch
        # Small steps: what is timed is the work, and that must not diverge.
        settings = [
            Setting(problem, name, 1e-4, 10.0 if OPTIMIZERS[name].damped else None, 0, 0, batch)
            for name in names
        ]
        data = PROBLEMS[problem].load(given.data)
        with _bars(console) as bars:
            task = bars.add_task(f"{problem}, steps", total=len(settings) * (given.rounds + 2))
            advance = partial(bars.advance, task)
            record = step_times(settings, data, given.device, given.rounds, advance)
        store.write(given.output / problem / f"times,batch={batch}.json", record)


def _above(low: int, kind: type) -> Callable[[str], float]:
    """A finite number greater than ``low``, for argparse."""

    def number(text: str) -> float:
        value = kind(text)
        if not low < value < float("inf"):
            raise ValueError
        return value

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--problem", nargs="+", required=True, choices=list(PROBLEMS), metavar="NAME")
    common.add_argument("--optimizer", nargs="+", choices=list(OPTIMIZERS), metavar="NAME")
    common.add_argument("--batch", type=_above(0, int), help="samples of a step")
    common.add_argument("--device", default="cpu")
    common.add_argument("--threads", type=_above(0, int), default=1)
    variable = os.environ.get(FOLDER_VARIABLE)
    common.add_argument(
        "--data",
        type=Path,
        default=Path(variable) if variable else None,
        help=f"folder of the data, by default ${FOLDER_VARIABLE}",
    )
    common.add_argument("--output", type=Path, default=OUTPUT, help="folder of the results")
    names = "problems: " + ", ".join(PROBLEMS) + "; optimizers: " + ", ".join(OPTIMIZERS)

    training = commands.add_parser("run", parents=[common], epilog=names, help="train")
    training.add_argument("--lr", nargs="+", type=_above(0, float), default=LEARNING_RATES)
    training.add_argument("--damping", nargs="+", type=_above(0, float))
    training.add_argument(
        "--seeds", type=_above(-1, int), default=3, help="runs with the chosen setting"
    )
    training.add_argument("--epochs", type=_above(0, int), help="passes over the training set")
    training.add_argument("--samples", type=_above(0, int), help="cut each set to as many")

    timing = commands.add_parser("time", parents=[common], epilog=names, help="time steps")
    timing.add_argument("--rounds", type=_above(0, int), default=20)

    for name, help in (("plot", "draw figures"), ("table", "print tables")):
        command = commands.add_parser(name, help=help)
        command.add_argument("--results", type=Path, default=OUTPUT, help="a folder, or a packed file")
        command.add_argument("--optimizer", nargs="+", choices=list(OPTIMIZERS), metavar="NAME")
        if name == "plot":
            command.add_argument(
                "--figures", type=Path, help="folder of figures, by default the results'"
            )
    packing = commands.add_parser("pack", help="all records in one file")
    packing.add_argument("--results", type=Path, default=OUTPUT)
    packing.add_argument("file", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Read the command line and do it; the exit status."""
    given, console = _parser().parse_args(arguments), console or Console()
    try:
        if given.command in ("run", "time"):
            torch.set_num_threads(given.threads)
            (run if given.command == "run" else measure)(given, console)
        else:
            runs, times = store.read(given.results)
            if given.command == "pack":
                store.write(given.file, store.pack(runs, times))
                return 0
            if given.optimizer:
                runs, times = store.only(given.optimizer, runs, times)
            if given.command == "table":
                for each in report.tables(runs, times):
                    console.print(each, soft_wrap=True, highlight=False)
            else:
                folder = given.results if given.results.is_dir() else given.results.parent
                for path in report.draw(runs, times, given.figures or folder):
                    console.print(f"wrote {path}")
    except (FileNotFoundError, ImportError, ValueError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
