"""What it costs to try out that samples are apart: first passes, and those after them.

    python -m benchmarks.certifying [--problems mlp 3c3d gpt2] [--rounds 30] [--quantity BatchL2Grad]

The same pass in one process, in turns whose order rotates: the plain gradient, a quantity without the
certificate, with one that was given before (``"once"``, every later pass), and with one given in every
pass (``"always"``, as the first pass does). Multiples of the gradient, medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from backpack import backpack, extend, extensions
from benchmarks.overhead import measure
from benchmarks.problems import PROBLEMS


def steps(name: str, quantity: str) -> list[Callable[[], None]]:
    """The gradient, and the quantity in every mode."""
    problem = PROBLEMS[name]
    torch.manual_seed(0)
    model, lossfunc = problem.build(problem.classes), nn.CrossEntropyLoss()
    batch = problem.batch[0]
    if problem.tokens:
        X = torch.randint(problem.classes, (batch, *problem.shape))
        y = torch.randint(problem.classes, (batch, *problem.shape))
    else:
        X, y = torch.randn(batch, *problem.shape), torch.randint(problem.classes, (batch,))

    def plain() -> None:
        model.zero_grad()
        lossfunc(model(X), y).backward()

    def with_quantity(mode: str) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            with backpack(getattr(extensions, quantity)(), certify=mode):  # type: ignore[arg-type]
                lossfunc(model(X), y).backward()

        return run

    extend(model)
    return [plain, *(with_quantity(mode) for mode in ("never", "once", "always"))]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--problems", nargs="*", default=["mlp", "3c3d", "gpt2"], choices=list(PROBLEMS)
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quantity", default="BatchL2Grad")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(f"{'problem':10}{'ms':>9}{'never':>9}{'later':>9}{'first':>9}")
    for name in arguments.problems:
        base, *others = measure(steps(name, arguments.quantity), arguments.rounds)
        ratios = "".join(f"{median(times) / median(base):9.2f}" for times in others)
        print(f"{name:10}{1e3 * median(base):9.2f}{ratios}")


if __name__ == "__main__":
    main()
