"""How much memory the monitor takes: ``python -m benchmarks.cockpit_memory``.

Tensors that live at the same time during a training step, at most, with a monitor and without; torch's
profiler sees every one of them. What is there before the step counts: parameters, the state of the
optimizer, copies that the monitor keeps. Numbers are written to
``benchmarks/results/cockpit-memory.json``, and the table of them into ``docs/cockpit.md``.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from backpack.cockpit import watch
from backpack.cockpit.configurations import CONFIGURATIONS
from benchmarks.cockpit_table import PAGE, in_page
from benchmarks.problems import make, setting
from benchmarks.report import TITLES
from benchmarks.suite import machine

RESULTS = Path(__file__).parent / "results" / "cockpit-memory.json"
MARKS = (
    "<!-- memory: written by python -m benchmarks.cockpit_memory -->\n",
    "<!-- end of memory -->\n",
)
BATCH = {"mlp": 128, "2c2d": 32, "3c3d": 128, "char-lstm": 50, "gpt2": 8}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
}
# The step that is looked at: two before it are tracked too.
BEFORE = 2
STEP = "the step"


def peak(training: Callable[[], Callable[[], None]]) -> int:
    """The most bytes of tensors that live at once in a training step.

    Args:
        training: makes model, optimizer and monitor, and gives a function that makes a step.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = training()
        for _ in range(BEFORE):
            step()
        gc.collect()
        with record_function(STEP):
            step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    here = next(e for e in events if e.get("name") == STEP and "dur" in e)
    changes = [(e["ts"], n, e["args"]) for n, e in enumerate(events) if e.get("name") == "[memory]"]
    live = largest = 0
    for time, _, change in sorted(changes, key=lambda each: each[:2]):
        live += change["Bytes"]
        if here["ts"] <= time <= here["ts"] + here["dur"]:
            largest = max(largest, live)
    return largest


def trainer(
    problem: str, batch: int, optimizer: str, quantities: Any = None
) -> Callable[[], Callable[[], None]]:
    """Makes a training run of a problem, with a monitor if quantities are given."""

    def training() -> Callable[[], None]:
        model, X, y = make(setting(problem, batch=batch))
        stepper, lossfunc = OPTIMIZERS[optimizer](model.parameters()), nn.CrossEntropyLoss()
        monitor = None
        if quantities is not None:
            monitor = watch(model, stepper, quantities=quantities, every=1, per="model")

        def step() -> None:
            stepper.zero_grad()
            lossfunc(model(X), y).backward()
            stepper.step()
            assert monitor is None or monitor.history().steps

        return step

    return training


def measured(
    problem: str, batch: int, optimizer: str, names: Iterable[str] = tuple(CONFIGURATIONS)
) -> dict[str, Any]:
    """Bytes of a step, of individual gradients, and what each configuration takes besides."""
    model, _, _ = make(setting(problem, batch=1))
    for quantities in (None, *names):  # what is made once, when first used
        trainer(problem, 2, optimizer, quantities)()()
    plain = peak(trainer(problem, batch, optimizer))
    individual = batch * sum(p.numel() * p.element_size() for p in model.parameters())
    found = {name: peak(trainer(problem, batch, optimizer, name)) for name in names}
    return {
        "batch": batch,
        "step": plain,
        "individual": individual,
        "more": {name: bytes_ - plain for name, bytes_ in found.items()},
    }


def table(found: dict[str, Any]) -> str:
    """What the page says."""
    about = found["about"]
    lines = [
        "Tensors that live at once in a tracked step, at most, beside a step that nobody watches, in "
        f"MB (torch {about['torch']}, {about['date']}); in parentheses what is added, as a share of "
        "the individual gradients, which are never there.",
        "",
        "| | batch | individual gradients | a step | " + " | ".join(CONFIGURATIONS) + " |",
        "|---|---|---|---|" + "---|" * len(CONFIGURATIONS),
    ]
    for row in found["rows"]:
        cells = [f"{row['individual'] / 1e6:.1f}", f"{row['step'] / 1e6:.1f}"]
        for name in CONFIGURATIONS:
            more = row["more"][name]
            cells.append(f"+{more / 1e6:.1f} ({100 * more / row['individual']:.0f} %)")
        title = f"{TITLES[row['problem']]}, {row['optimizer']}"
        lines.append(f"| {title} | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page with the numbers of the results."""
    return in_page(page, MARKS, table(json.loads(RESULTS.read_text())))


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=list(BATCH), default=list(BATCH))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    known = {(row["problem"], row["optimizer"]): row for row in rows}
    for problem in given.problems:
        for optimizer in OPTIMIZERS:
            row = measured(problem, BATCH[problem], optimizer)
            known[problem, optimizer] = {"problem": problem, "optimizer": optimizer, **row}
    about = {**machine("cpu"), "torch": torch.__version__, "date": str(datetime.date.today())}
    rows = [known[pair] for pair in ((p, o) for p in BATCH for o in OPTIMIZERS) if pair in known]
    RESULTS.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text()))
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
