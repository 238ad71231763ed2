"""Large models, each in a process of its own: ``python -m benchmarks.large`` (``make bench-large``).

GPT-2 small (124 M parameters, random weights, 2 x 128 tokens, a tied head of 50257 words), ViT-B/16 and
ResNet-50 (batch norm in evaluation mode), as published (transformers, torchvision). Times are processor
times of one forward and backward pass on one thread, in turns with the plain gradient, the least of
some rounds; the first pass, which tries out that samples are apart, has a column of its own. Memory is
the most that the process has in a pass beyond the model; values of the pass before are still there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack import backpack, extend, extensions
from benchmarks.worker import peak_bytes, reset_peak
from tests.zoo.packages import torchvision_models

QUANTITIES = "BatchL2Grad SumGradSquared Variance DiagGGNMC KFAC".split()
# Name, samples.
MODELS = {"gpt2": 2, "vit_b_16": 4, "resnet50": 4}


def problem(name: str, samples: int) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """A model and a function that computes its loss."""
    torch.manual_seed(0)
    images = torchvision_models()
    if name == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        language = GPT2LMHeadModel(GPT2Config()).eval()
        ids = torch.randint(language.config.vocab_size, (samples, 128))
        return language, lambda: language(input_ids=ids, labels=ids).loss
    model = getattr(images, name)().eval()
    X, y = torch.randn(samples, 3, 224, 224), torch.randint(1000, (samples,))
    return model, lambda: F.cross_entropy(model(X), y)


def bytes_of(value: Any) -> int:
    """What a value takes."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    return sum(map(bytes_of, value))


def measure(name: str, samples: int, quantity: str, rounds: int) -> dict[str, Any]:
    """Times of one quantity and of the plain gradient in this process; without rounds, memory."""
    torch.set_num_threads(1)
    model, loss = problem(name, samples)

    def plain() -> None:
        loss().backward()

    def with_quantity() -> None:
        with backpack(getattr(extensions, quantity)()):
            loss().backward()

    def timed(step: Callable[[], None]) -> float:
        model.zero_grad()
        start = time.process_time()
        step()
        return time.process_time() - start

    def peak(step: Callable[[], None]) -> int:
        model.zero_grad()
        reset_peak()
        step()
        return peak_bytes() - before

    plain()
    model.zero_grad()
    before = reset_peak()
    gradient = 0 if rounds else peak(plain)
    extend(model)
    if rounds:
        first, turns = (
            timed(with_quantity),
            [(timed(plain), timed(with_quantity)) for _ in range(rounds)],
        )
        return {"seconds": [min(each) for each in zip(*turns, strict=True)], "first": first}
    sizes = {"gradient": gradient, "first_pass": peak(with_quantity)}
    field = getattr(extensions, quantity).savefield
    sizes["values"] = sum(bytes_of(getattr(p, field)) for p in model.parameters())
    return {"bytes": {**sizes, "pass": peak(with_quantity)}}


def in_a_process(name: str, samples: int, quantity: str, rounds: int) -> dict[str, Any]:
    """What :func:`measure` finds in a process of its own."""
    options = f"--models {name} --quantities {quantity} --samples {samples} --rounds {rounds} --child"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.large", *options.split()]
    # Where memory is measured, what is freed goes back to the system.
    frugal = {} if rounds else {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **frugal})
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip().splitlines()[-1])
    return json.loads(ran.stdout.splitlines()[-1])


def row(name: str, samples: int, quantity: str, rounds: int) -> str:
    """A line of the table."""
    times = in_a_process(name, samples, quantity, rounds)
    sizes = in_a_process(name, samples, quantity, 0)["bytes"]
    plain, seconds = times["seconds"]
    giga = [f"{sizes[key] / 2**30:.2f}" for key in ("gradient", "pass", "values", "first_pass")]
    numbers = [f"{plain:.2f}", f"{seconds / plain:.2f}", f"{times['first'] / plain:.2f}", *giga]
    numbers.append(f"{(sizes['pass'] - sizes['values']) / sizes['gradient']:.2f}")
    return " | ".join(("| " + name, quantity, *numbers)) + " |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--quantities", nargs="*", default=QUANTITIES)
    parser.add_argument("--samples", type=int, help="of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        (name,), (quantity,) = given.models, given.quantities
        print(json.dumps(measure(name, given.samples, quantity, given.rounds)))
        return
    print(
        "| model | quantity | gradient, s | multiple | first pass | gradient, GB | GB | values, GB | "
        "first pass, GB | multiple without values |\n" + "|---" * 10 + "|"
    )
    for name in given.models:
        for quantity in given.quantities:
            try:
                print(row(name, given.samples or MODELS[name], quantity, given.rounds), flush=True)
            except RuntimeError as error:
                print(f"| {name} | {quantity} | {error} |", flush=True)


if __name__ == "__main__":
    main()
