"""Python's share of a pass: what ``extend`` and a block take beside what a quantity computes.

    python -m benchmarks.share [--problems mlp gpt2] [--batch N] [--rounds 100] [--profile]

In one process on one thread, in turns whose order rotates: a plain step, one of an extended model, and
one in a block whose quantity computes nothing. Of the block's time, that in which rules make forms
(tensor operations on output gradients, which each quantity needs) is shown by itself. Processor time of
the fastest turns, in milliseconds; with a batch of one, hardly anything else is left.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import time
from typing import Any

import torch
from torch import Tensor

from backpack import extensions
from backpack.engine import reducing
from backpack.forms.base import Form
from benchmarks.gradients import fastest
from benchmarks.libraries import EXTEND, Backpack, Step
from benchmarks.problems import PROBLEMS, make, setting


class Nothing(extensions.BackpropExtension):
    """A quantity that computes nothing."""

    savefield = "nothing"
    needs_gradient = False
    written_out = True

    def reduce(self, form: Form, sign: Tensor | None = None) -> None:
        return None

    def zero(self, context: Any) -> None:
        return None


class Empty(Backpack):
    """This library, asked for nothing."""

    def steps(self, quantity: str) -> Step:
        if quantity == EXTEND:
            return super().steps(quantity)

        def step() -> None:
            with self.context(Nothing()):
                self.extended(self.model(self.X), self.y).backward()

        return step


def forms(step: Step, rounds: int) -> float:
    """Seconds in which rules make forms."""
    spent, best, original = 0.0, float("inf"), reducing.form_of_source

    def timed(*args: Any) -> Form:
        nonlocal spent
        start = time.process_time()
        form = original(*args)
        spent += time.process_time() - start
        return form

    reducing.form_of_source = timed
    try:
        for _ in range(rounds):
            spent = 0.0
            step()
            best = min(best, spent)
    finally:
        reducing.form_of_source = original
    return best


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="*", default=["mlp", "gpt2"], choices=list(PROBLEMS))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = "samples", "plain", "extend", "ratio", "block", "forms", "rest"
    print(f"{'problem':10}" + "".join(f"{name:>9}" for name in names))
    for problem in given.problems:
        for batch in (given.batch,) if given.batch else (1, None):
            chosen = setting(problem, batch=batch)
            library = Empty(*make(chosen))
            block = library.steps("")
            steps = {"plain": library.gradient, "extend": library.steps(EXTEND), "block": block}
            gc.collect()
            gc.disable()
            times = fastest({name: (s, library.reset) for name, s in steps.items()}, given.rounds)
            made = forms(block, given.rounds)
            gc.enable()
            plain, extended, whole = (1e3 * times[name] for name in steps)
            above, made = whole - plain, 1e3 * made
            figures = f"{plain:9.2f}{extended - plain:+9.2f}{extended / plain:9.2f}"
            figures += f"{above:+9.2f}{made:9.2f}{above - made:9.2f}"
            print(f"{problem:10}{chosen.batch:9}{figures}", flush=True)
            if given.profile:
                with cProfile.Profile() as profiler:
                    for _ in range(50):
                        block()
                pstats.Stats(profiler).sort_stats("tottime").print_stats("backpack", 30)


if __name__ == "__main__":
    main()
