"""Faults planted in training runs, and when an alarm finds them: ``python -m benchmarks.alarms``.

Two networks learn digits with three optimizers, ``alarms="all"`` and every step tracked. Each row is a
fault with the number of runs in which its alarm came within 20 steps, how many steps that took in the
median, and what else was raised; the first row is ten runs of different problems and optimizers without
one (:mod:`benchmarks.healthy`). ``--seeds`` says how many of each. The table is written to
``benchmarks/results/cockpit-alarms.md``.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from backpack.cockpit import History, watch
from benchmarks.healthy import HEALTHY, digits, train

RESULTS = Path(__file__).parent / "results" / "cockpit-alarms.md"
BATCH, WITHIN = 64, 20
# A network has learned when its loss was below this part of the first, in the mean of ten steps; it is
# watched for so many more before a fault is planted. One that does not learn has another fault.
LEARNED, QUIET, MOST = 0.1, 20, 1000


def mlp(act: type[nn.Module], depth: int = 2) -> nn.Sequential:
    """Layers of 64 units."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(64, 64), act()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def cnn(act: type[nn.Module]) -> nn.Sequential:
    """Two convolutions, two linear layers."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), act(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), act(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 32), act(), nn.Linear(32, 10)),
    )


NETWORKS: dict[str, Callable[..., nn.Sequential]] = {"mlp": mlp, "cnn": cnn}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, factor: torch.optim.SGD(p, lr=0.2 * factor),
    "momentum": lambda p, factor: torch.optim.SGD(p, lr=0.05 * factor, momentum=0.9),
    "adam": lambda p, factor: torch.optim.Adam(p, lr=5e-3 * factor),
}


class Fault(NamedTuple):
    """What goes wrong in a run.

    Args:
        kinds: of alarms that find it.
        planted: whether that is in a network that has learned, or from the start.
    """

    kinds: tuple[str, ...]
    planted: bool = True


FAULTS = {
    "nan": Fault(("not finite",)),
    "spike": Fault(("spike",)),
    "dead layer": Fault(("dead units",)),
    "vanishing lower layers": Fault(("vanishing",), planted=False),
    "10 times the learning rate": Fault(("step size",), planted=False),
    "10 % mislabelled": Fault(("hard samples",)),
}


def run(network: str, optimizer: str, fault: str, seed: int) -> tuple[History, int]:
    """Train with a fault; what the monitor has seen, and the step in which it was planted.

    Raises:
        RuntimeError: if the network does not learn.
    """
    torch.manual_seed(seed)
    images, classes = digits()
    sigmoid, large = fault == "vanishing lower layers", fault == "10 times the learning rate"
    deep = {"depth": 6} if sigmoid and network == "mlp" else {}
    model = NETWORKS[network](nn.Sigmoid if sigmoid else nn.ReLU, **deep)
    stepper = OPTIMIZERS[optimizer](model.parameters(), 10 if large else 1)
    at = MOST if FAULTS[fault].planted else 0
    losses: list[float] = []
    with watch(
        *(model, stepper), every=lambda step: step == 0 or step >= at - QUIET, alarms="all"
    ) as monitor:
        for step in range(MOST + WITHIN):
            if step == at + WITHIN:
                return monitor.history(), at
            chosen = torch.randint(len(images), (BATCH,))
            X, y = images[chosen], classes[chosen]
            factor = 1.0
            if step >= at and fault == "10 % mislabelled":
                y = torch.where(torch.rand(BATCH) < 0.1, (y + torch.randint(1, 10, (BATCH,))) % 10, y)
            elif step == at and fault == "nan":
                factor = math.nan
            elif step == at and fault == "spike":
                X, y = 20 * X, y.roll(1)
            elif step == at and fault == "dead layer":
                layers = [each for each in model if isinstance(each, (nn.Linear, nn.Conv2d))]
                with torch.no_grad():
                    layers[-2].bias -= 100
            stepper.zero_grad()
            loss = factor * F.cross_entropy(model(X), y)
            loss.backward()
            stepper.step()
            losses.append(loss.item())
            if at == MOST and step >= 10 and sum(losses[-10:]) / 10 < LEARNED * losses[0]:
                at = step + 1 + QUIET
    raise RuntimeError(f"{network} with {optimizer} has not learned in {MOST} steps")


def alarms(history: History) -> list[tuple[str, int]]:
    """Kind and step of each alarm."""
    return [(e["event"], e["step"]) for e in history.events if e["event"] != "left out"]


def delay(fault: str, found: list[tuple[str, int]], at: int) -> int | None:
    """Steps until an alarm of the right kind; ``None`` if there is none in time."""
    steps = [step - at for kind, step in found if kind in FAULTS[fault].kinds and step >= at]
    return min((step for step in steps if step < WITHIN), default=None)


def beside(raised: Counter[str]) -> str:
    """Other alarms, in words."""
    return ", ".join(f"{kind} in {n}" for kind, n in sorted(raised.items())) or "none"


def healthy(seeds: int) -> str:
    """The row of runs without a fault."""
    raised = Counter[str]()
    for name in HEALTHY:
        for seed in range(seeds):
            raised.update({kind for kind, _ in alarms(train(name, seed))})
    return f"| none | {seeds * len(HEALTHY)} runs | | {beside(raised)} |"


def planted(fault: str, seeds: int) -> str:
    """The row of a fault."""
    delays, others, before = [], Counter[str](), 0
    for network in NETWORKS:
        for optimizer in OPTIMIZERS:
            for seed in range(seeds):
                history, at = run(network, optimizer, fault, seed)
                found = alarms(history)
                delays.append(delay(fault, found, at))
                others.update({kind for kind, _ in found if kind not in FAULTS[fault].kinds})
                before += any(step < at for _, step in found)
    hit = [each for each in delays if each is not None]
    also = beside(others) + (f"; before the fault in {before}" if before else "")
    steps = f"{median(hit):g}, at most {max(hit)}" if hit else ""
    return f"| {fault} | {len(hit)} of {len(delays)} | {steps} | {also} |"


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| fault | found within 20 steps | after | other alarms |", "|---|---|---|---|"]
    print(*lines, sep="\n")
    for fault in ("", *FAULTS):
        lines.append(planted(fault, given.seeds) if fault else healthy(given.seeds))
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
