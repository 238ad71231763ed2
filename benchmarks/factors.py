"""Kronecker factors with each product of two places of a convolution's inputs made once, and by pairs.

    python -m benchmarks.factors [--problems 3c3d 2c2d ...] [--quantities KFAC KFLR] [--rounds 6]

In one process on one thread, in turns: processor time of the fastest, in multiples of the gradient.
"""

from __future__ import annotations

import argparse
import gc
import time

import torch

from backpack.forms import layout
from benchmarks.libraries import Backpack, Step
from benchmarks.problems import PROBLEMS, make, setting


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    networks = ["3c3d", "2c2d", "allcnnc", "resnet-32", "wrn-16-4"]
    parser.add_argument("--problems", nargs="*", default=networks, choices=list(PROBLEMS))
    parser.add_argument("--quantities", nargs="*", default=["KFAC"])
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    torch.set_num_threads(1)
    limits = {"once": layout.MIRRORED, "by pairs": 2**62}
    print(f"{'problem':10} {'quantity':10} {'gradient, ms':>12}" + "".join(f"{n:>10}" for n in limits))
    for problem in given.problems:
        for quantity in given.quantities:
            library = Backpack(*make(setting(problem)))
            step, best = library.steps(quantity), dict.fromkeys(["", *limits], float("inf"))
            for _ in range(given.rounds):
                for name in best:
                    layout.MIRRORED = limits.get(name, layout.MIRRORED)
                    run: Step = step if name else library.gradient
                    library.reset()
                    gc.collect()
                    start = time.process_time()
                    run()
                    best[name] = min(best[name], time.process_time() - start)
            layout.MIRRORED = limits["once"]
            gradient = best.pop("")
            ratios = "".join(f"{seconds / gradient:10.2f}" for seconds in best.values())
            print(f"{problem:10} {quantity:10} {1e3 * gradient:12.1f}{ratios}", flush=True)


if __name__ == "__main__":
    main()
