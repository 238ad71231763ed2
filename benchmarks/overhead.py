"""What ``extend`` alone costs: forward and backward, plain and extended in turns.

    python -m benchmarks.overhead [--models cnn gpt2] [--rounds 200] [--profile]

Three copies do the same work in the same process, in turns whose order rotates: two plain ones and an
extended one. Ratios to the first plain copy of the fastest round, and one plus the median of the
differences within a round; the second plain copy shows how far such numbers are to be trusted.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import gc
import pstats
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from backpack import extend
from benchmarks.models import GPT2, small_cnn


class TokenLoss(nn.CrossEntropyLoss):
    """Cross-entropy of ``[N, T, words]`` and ``[N, T]``."""

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return super().forward(f.flatten(0, 1), y.flatten())


def cnn() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """32 images of 32 x 32."""
    return (
        *(small_cnn(), nn.CrossEntropyLoss()),
        *(torch.randn(32, 3, 32, 32), torch.randint(10, (32,))),
    )


def gpt2(words: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """8 sequences of 64 tokens."""
    return (
        *(GPT2(words=words), TokenLoss()),
        *(torch.randint(words, (8, 64)), torch.randint(words, (8, 64))),
    )


# GPT-2's own vocabulary, and one so small that hardly any arithmetic is left beside the overhead.
MODELS = {
    "cnn": (cnn, 1.05),
    "gpt2": (lambda: gpt2(50257), 1.10),
    "gpt2-512": (lambda: gpt2(512), 1.10),
}


def steps(make: Callable[[], tuple]) -> list[Callable[[], None]]:
    """The same training step with two plain copies and an extended one."""

    def step(model: nn.Module, lossfunc: nn.Module) -> Callable[[], None]:
        def run() -> None:
            for p in model.parameters():
                p.grad = None
            lossfunc(model(X), y).backward()

        return run

    torch.manual_seed(0)
    model, lossfunc, X, y = make()
    copies = [copy.deepcopy((model, lossfunc)) for _ in range(3)]
    copies[2] = (extend(copies[2][0]), extend(copies[2][1]))
    return [step(*each) for each in copies]


def measure(runs: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of every round of each."""
    times: list[list[float]] = [[] for _ in runs]
    gc.collect()
    gc.disable()
    for j in range(-5, rounds):
        order = [(j + k) % len(runs) for k in range(len(runs))]
        for which in order if j % 2 else reversed(order):
            start = time.perf_counter()
            runs[which]()
            if j >= 0:
                times[which].append(time.perf_counter() - start)
    gc.enable()
    return times


def ratios(plain: list[float], other: list[float]) -> str:
    """Fastest to fastest, and from the median difference within a round."""
    difference = median(b - a for a, b in zip(plain, other, strict=True))
    return f"{min(other) / min(plain):10.3f}{1 + difference / median(plain):8.3f}"


def profile(step: Callable[[], None], count: int = 50) -> None:
    """Where the Python side of the extended step goes."""
    for _ in range(5):
        step()
    with cProfile.Profile() as profiler:
        for _ in range(count):
            step()
    pstats.Stats(profiler).sort_stats("tottime").print_stats("backpack", 20)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(f"{'':10}{'plain':>10}{'plain again':>18}{'extended':>18}{'':>8}")
    print(f"{'model':10}{'median ms':>10}" + f"{'fastest':>10}{'median':>8}" * 2 + f"{'target':>8}")
    for name in arguments.models:
        make, target = MODELS[name]
        runs = steps(make)
        for _ in range(arguments.repeats):
            plain, again, extended = measure(runs, arguments.rounds)
            print(
                f"{name:10}{1e3 * median(plain):10.2f}{ratios(plain, again)}{ratios(plain, extended)}"
                f"{target:8.2f}"
            )
        if arguments.profile:
            profile(runs[2])


if __name__ == "__main__":
    main()
