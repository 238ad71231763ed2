"""Where ``p.grad`` comes from: first-order quantities with autograd's gradient, or the forms'.

    python -m benchmarks.gradients [--problems allcnnc wrn-16-4 vit gpt2] [--quantities ...]
                                   [--rounds 20] [--batch N]

In one process on one thread, in turns whose order rotates: the plain gradient, an ordinary block, one
with ``gradient="forms"``, one with ``gradient=False`` (without ``p.grad``), and torch.func, which adds
up the individual gradients. Multiples of the plain gradient: the fastest turns, in processor time,
which other programs on the machine disturb less than the clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.libraries import (
    FIRST_ORDER,
    Alone,
    Backpack,
    FromForms,
    Functional,
    Library,
    Step,
    distance,
)
from benchmarks.problems import PROBLEMS, make, setting

WAYS: dict[str, type[Library]] = {
    "ordinary": Backpack,
    "forms": FromForms,
    "alone": Alone,
    "torch.func": Functional,
}


def fastest(steps: dict[str, tuple[Step, Callable[[], None]]], rounds: int) -> dict[str, float]:
    """Seconds of processor time of each step's fastest turn; what is left of a turn is forgotten."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for j in range(-2, rounds):
        shift = j % len(names)
        for name in names[shift:] + names[:shift]:
            step, forget = steps[name]
            forget()
            start = time.process_time()
            step()
            if j >= 0:
                times[name].append(time.process_time() - start)
            forget()
    return {name: min(found) for name, found in times.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        *("--problems",),
        nargs="*",
        default=["allcnnc", "wrn-16-4", "vit", "gpt2"],
        choices=list(PROBLEMS),
    )
    parser.add_argument("--quantities", nargs="*", default=FIRST_ORDER, choices=FIRST_ORDER)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'problem':10}{'quantity':16}{'ms':>8}" + "".join(f"{name:>12}" for name in WAYS))
    for problem in given.problems:
        for quantity in given.quantities:
            libraries = {
                name: way(*make(setting(problem, batch=given.batch)))
                for name, way in WAYS.items()
                if quantity in way.quantities
            }
            ordinary = libraries["ordinary"]
            steps = {name: (each.step(quantity), each.reset) for name, each in libraries.items()}
            found = {}
            for name, (step, _) in steps.items():
                step()
                found[name] = libraries[name].values(quantity)
            worst = max(distance(each, found["ordinary"])[0] for each in found.values())
            assert worst < 1e-2, f"{problem}, {quantity}: numbers differ by {worst:.1e}"
            del found
            times = fastest({"": (ordinary.gradient, ordinary.reset), **steps}, given.rounds)
            base = times.pop("")
            ratios = "".join(f"{times[n] / base:12.2f}" if n in times else f"{'':12}" for n in WAYS)
            print(f"{problem:10}{quantity:16}{1e3 * base:8.1f}{ratios}", flush=True)


if __name__ == "__main__":
    main()
