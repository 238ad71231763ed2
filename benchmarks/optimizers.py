"""What a step of each optimizer costs: ``python -m benchmarks.optimizers [--rounds 4]``.

Forward pass, backward pass and update of one MLP by turns, in processor time of one thread, so that
other work on the machine counts little; the least of all rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backpack import extend, optim
from benchmarks.pages import OPTIMIZERS
from benchmarks.problems import make, setting
from benchmarks.suite import machine

# Small steps: what is timed is the work, and that must not diverge.
DAMPED = {"lr": 1e-4, "damping": 1.0}
PRIVATE = {"lr": 1e-4, "noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 128}
MADE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-4),
    "DiagGGNMC": partial(optim.DiagGGNMC, **DAMPED),
    "DiagGGNExact": partial(optim.DiagGGNExact, **DAMPED),
    "DiagHessian": partial(optim.DiagHessian, **DAMPED),
    "SumGradSquared": partial(optim.SumGradSquared, **DAMPED),
    "DPSGD": partial(optim.DPSGD, **PRIVATE),
    "KFAC": partial(optim.KFAC, **DAMPED),
    "KFAC, update_every=10": partial(optim.KFAC, **DAMPED, update_every=10),
    "KFLR": partial(optim.KFLR, **DAMPED),
    "EKFAC": partial(optim.EKFAC, **DAMPED),
    "EKFAC, update_every=10": partial(optim.EKFAC, **DAMPED, update_every=10),
    "CGNewton, max_iter=5": partial(optim.CGNewton, **DAMPED, max_iter=5),
}
STEPS = 10  # of a turn, so that what is done in every tenth step counts once


def step(optimizer: Any, model: nn.Module, lossfunc: nn.Module, X: Tensor, y: Tensor) -> None:
    """One step, as :doc:`/optim` writes it."""
    optimizer.zero_grad()
    if isinstance(optimizer, torch.optim.SGD):
        lossfunc(model(X), y).backward()
    elif isinstance(optimizer, optim.DPSGD):
        optimizer.backward(nn.functional.cross_entropy(model(X), y, reduction="none"))
    else:
        loss = lossfunc(model(X), y)
        with optimizer.backpack():
            loss.backward()
    optimizer.step()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=OPTIMIZERS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "DPSGD: ")  # that this is no Poisson sampling
    tried = {}
    for name, made in MADE.items():
        model, X, y = make(setting("mlp"))
        lossfunc: nn.Module = nn.CrossEntropyLoss()
        if name != "SGD":
            model, lossfunc = extend(model), extend(lossfunc)
        tried[name] = partial(step, made(model), model, lossfunc, X, y)
    least = dict.fromkeys(tried, float("inf"))
    for turn in range(given.rounds + 1):
        for name, run in tried.items():
            start = time.process_time()
            for _ in range(STEPS):
                run()
            if turn:  # the first one does not count
                least[name] = min(least[name], (time.process_time() - start) / STEPS)
    found = {
        **{"date": datetime.date.today().isoformat(), "torch": torch.__version__},
        **{"cpu": machine("cpu")["cpu"], "rounds": given.rounds},
        "milliseconds": {name: 1e3 * seconds for name, seconds in least.items()},
    }
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
