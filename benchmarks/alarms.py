"""Faults planted in training runs, and when an alarm finds them: ``python -m benchmarks.alarms``.

Two networks learn digits with three optimizers, ``alarms="all"`` and every step tracked. Each row is a
fault with the number of runs in which its alarm came within 20 steps, how many steps that took in the
median, and what else was raised; the first row is runs without one. ``--seeds`` says how many of each.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack.cockpit import History, watch

BATCH, WITHIN = 64, 20
# Steps that a network learns before a fault is planted.
LEARNED = 120


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
        planted: whether that is after :data:`LEARNED` steps, or from the start.
    """

    kinds: tuple[str, ...]
    planted: bool = True


FAULTS = {
    "": Fault(()),
    "nan": Fault(("not finite",)),
    "spike": Fault(("spike",)),
    "dead layer": Fault(("dead units",)),
    "vanishing lower layers": Fault(("vanishing",), planted=False),
    "10 times the learning rate": Fault(("step size",), planted=False),
    "10 % mislabelled": Fault(("hard samples",)),
}


def data() -> tuple[Tensor, Tensor]:
    """Images ``[N, 64]`` and classes."""
    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def run(network: str, optimizer: str, fault: str, seed: int) -> History:
    """Train with a fault; what the monitor has seen."""
    torch.manual_seed(seed)
    images, classes = data()
    sigmoid, large = fault == "vanishing lower layers", fault == "10 times the learning rate"
    deep = {"depth": 6} if sigmoid and network == "mlp" else {}
    model = NETWORKS[network](nn.Sigmoid if sigmoid else nn.ReLU, **deep)
    stepper = OPTIMIZERS[optimizer](model.parameters(), 10 if large else 1)
    at = LEARNED if FAULTS[fault].planted else 0
    every = (lambda step: step == 0 or step >= at - 20) if fault else 1
    monitor = watch(model, stepper, every=every, alarms="all")
    for step in range(at + (WITHIN if fault else 0)):
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
                layers[-2].bias -= 100  # type: ignore[operator]
        stepper.zero_grad()
        (factor * F.cross_entropy(model(X), y)).backward()
        stepper.step()
    monitor.close()
    return monitor.history()


def alarms(history: History) -> list[tuple[str, int]]:
    """Kind and step of each alarm."""
    return [(e["event"], e["step"]) for e in history.events if e["event"] != "left out"]


def delay(fault: str, found: list[tuple[str, int]]) -> int | None:
    """Steps until an alarm of the right kind; ``None`` if there is none in time."""
    at = LEARNED if FAULTS[fault].planted else 0
    steps = [step - at for kind, step in found if kind in FAULTS[fault].kinds and step >= at]
    return min((step for step in steps if step < WITHIN), default=None)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| fault | found | steps | other alarms |\n|---|---|---|---|")
    for fault in FAULTS:
        delays, others = [], Counter[str]()
        for network in NETWORKS:
            for optimizer in OPTIMIZERS:
                for seed in range(given.seeds):
                    found = alarms(run(network, optimizer, fault, seed))
                    delays.append(delay(fault, found))
                    others.update({kind for kind, _ in found if kind not in FAULTS[fault].kinds})
        hit = [each for each in delays if each is not None]
        count = f"{len(hit)} of {len(delays)}" if fault else f"{len(delays)} runs"
        beside = ", ".join(f"{kind} in {n}" for kind, n in others.items()) or "none"
        print(f"| {fault or 'none'} | {count} | {median(hit) if hit else ''} | {beside} |", flush=True)


if __name__ == "__main__":
    main()
