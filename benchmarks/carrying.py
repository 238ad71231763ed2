"""What second order is made of: columns carried to all layers, and reduced there.

    python -m benchmarks.carrying [--problem 3c3d] [--rounds 12]

Plain torch, in one process on one thread, in turns; processor time of the fastest. *Carried* is the
pass of one column from the model's output to the outputs of its layers, without gradients of weights;
*together* the same with all columns as further samples of the batch, for each column. *Patches* are the
inputs of convolutions, written out once. *Reduced* are the products of one column with the inputs of
all layers, sample by sample, whose squares diagonals are made of. The last lines are what these add up
to, in multiples of the gradient.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.problems import PROBLEMS, make, setting

Layers = list[tuple[nn.Module, Tensor, Tensor]]


def forward(model: nn.Module, x: Tensor) -> tuple[Tensor, Layers]:
    """The output, and each layer with its input and output."""
    layers: Layers = []
    kinds = nn.Linear, nn.Conv2d
    handles = [
        module.register_forward_hook(lambda m, args, out: layers.append((m, args[0].detach(), out)))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    out = model(x)
    for handle in handles:
        handle.remove()
    return out, layers


def patches(layers: Layers) -> list[Tensor]:
    """Inputs of all layers, those of convolutions cut into patches ``[N, i, s]``."""
    found = []
    for module, x, _ in layers:
        if isinstance(module, nn.Conv2d):
            options = module.dilation, module.padding, module.stride
            x = F.unfold(x, module.kernel_size, *options)  # type: ignore[arg-type]
        found.append(x)
    return found


def reduce(inputs: list[Tensor], columns: list[Tensor]) -> None:
    """Squares of one column's products with the inputs of all layers, summed over samples.

    Products are written to the same memory, for as many samples as fit the cache.
    """
    for x, g in zip(inputs, columns, strict=True):
        if x.dim() == 2:
            torch.mm(g.square().mT, x.square())
            continue
        g, sides = g.flatten(2), (g.shape[1], x.shape[1])
        step = max(1, 2**18 // (sides[0] * sides[1]))
        memory, total = x.new_empty(step, *sides), x.new_zeros(sides)
        for left, right in zip(g.split(step), x.mT.split(step), strict=True):
            product = torch.bmm(left, right, out=memory[: len(left)])
            total += product.square_().sum(0)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problem", default="3c3d", choices=list(PROBLEMS))
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = setting(given.problem)
    model, x, y = make(chosen)
    count = chosen.classes - 1
    out, layers = forward(model, x)
    many, stacked = forward(model, x.repeat(count, *(1 for _ in x.shape[1:])))
    column, all_columns = torch.randn_like(out), torch.randn_like(many)
    carried = torch.autograd.grad(out, [o for *_, o in layers], column, retain_graph=True)

    inputs = patches(layers)

    def gradient() -> None:
        F.cross_entropy(model(x), y).backward()

    def carry(start: Tensor, where: Layers, g: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(start, [o for *_, o in where], g, retain_graph=True)

    steps: dict[str, Callable[[], object]] = {
        "gradient": gradient,
        "carried": carry(out, layers, column),
        "together": carry(many, stacked, all_columns),
        "patches": lambda: patches(layers),
        "reduced": lambda: reduce(inputs, list(carried)),
    }
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(given.rounds):
        for name, step in steps.items():
            model.zero_grad()
            start = time.process_time()
            step()
            best[name] = min(best[name], 1e3 * (time.process_time() - start))
    best["together"] /= count
    for name, milliseconds in best.items():
        print(f"{name:10} {milliseconds:8.2f} ms")
    a, c, p, r = (best[name] for name in ("gradient", "carried", "patches", "reduced"))
    print(f"DiagGGNMC    {(a + c + p + r) / a:.2f} gradients")
    print(f"DiagGGNExact {(a + p + count * (c + r)) / a:.2f}")
    print(f"KFAC         {(a + c) / a:.2f} and its factors")
    print(f"KFLR         {(a + count * c) / a:.2f} and its factors")


if __name__ == "__main__":
    main()
