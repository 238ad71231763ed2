"""What ``extend`` alone costs: forward and backward, plain and extended in turns.

    python -m benchmarks.overhead [--rounds 200] [--profile]

Ratios of the fastest and of the median round. Both models do the same work in the same process, in
turns whose order alternates, so that other processes slow down both.
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


def steps(make: Callable[[], tuple]) -> tuple[Callable[[], None], Callable[[], None]]:
    """The same training step with a plain and an extended copy."""

    def step(model: nn.Module, lossfunc: nn.Module) -> Callable[[], None]:
        def run() -> None:
            for p in model.parameters():
                p.grad = None
            lossfunc(model(X), y).backward()

        return run

    torch.manual_seed(0)
    model, lossfunc, X, y = make()
    return step(copy.deepcopy(model), copy.deepcopy(lossfunc)), step(extend(model), extend(lossfunc))


def measure(pair: tuple[Callable[[], None], Callable[[], None]], rounds: int) -> tuple[list, list]:
    """Seconds of every round of both."""
    times: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    for j in range(-5, rounds):
        for which in (0, 1) if j % 2 else (1, 0):
            start = time.perf_counter()
            pair[which]()
            if j >= 0:
                times[which].append(time.perf_counter() - start)
    gc.enable()
    return times


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
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(f"{'model':8}{'plain ms':>10}{'extended':>10}{'min ratio':>11}{'median':>8}{'target':>8}")
    for name, (make, target) in MODELS.items():
        pair = steps(make)
        for _ in range(arguments.repeats):
            plain, extended = measure(pair, arguments.rounds)
            fastest, middle = min(extended) / min(plain), median(extended) / median(plain)
            print(
                f"{name:8}{1e3 * min(plain):10.2f}{1e3 * min(extended):10.2f}"
                f"{fastest:11.3f}{middle:8.3f}{target:8.2f}"
            )
        if arguments.profile:
            profile(pair[1])


if __name__ == "__main__":
    main()
