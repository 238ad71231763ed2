"""Cases that were slow without a reason: ``python -m benchmarks.cliffs``.

Each row is a model on which a quantity cost many times what there is to compute. Times are those of one
forward and backward pass (processor time, one thread, the least of some rounds), beside the plain
gradient's.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend, extensions
from backpack.extensions import BackpropExtension


class Apply(nn.Module):
    """A model from a function and its parts."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        """The function of the model and its inputs."""
        return self.function(self, *inputs)


class Row(NamedTuple):
    """One case: a model and its data, with the quantity that was slow on it."""

    name: str
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...], Tensor]]
    quantities: tuple[Callable[[], BackpropExtension], ...]


def parameter(*shape: int) -> nn.Parameter:
    """Small random numbers."""
    return nn.Parameter(torch.randn(shape) * 0.1)


def head(classes: int, samples: int) -> Callable[[], tuple[nn.Module, tuple[Tensor, ...], Tensor]]:
    """A last layer over many classes."""

    def make() -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
        model = nn.Sequential(nn.Linear(64, classes))
        return model, (torch.randn(samples, 64),), torch.randint(classes, (samples,))

    return make


def table() -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    """A table of 20,000 rows of which few are read."""
    model = Apply(
        lambda m, x: m.head(m.table(x).mean(1)), table=nn.Embedding(20000, 32), head=nn.Linear(32, 5)
    )
    return model, (torch.randint(20000, (32, 16)),), torch.randint(5, (32,))


def bag(offsets: bool) -> Callable[[], tuple[nn.Module, tuple[Tensor, ...], Tensor]]:
    """Bags of rows of a table."""

    def make() -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
        def forward(m: Apply, x: Tensor) -> Tensor:
            if offsets:
                return m.head(m.bag(x.flatten(), torch.arange(0, x.numel(), x.shape[1])))
            return m.head(m.bag(x))

        model = Apply(forward, bag=nn.EmbeddingBag(2000, 32), head=nn.Linear(32, 5))
        return model, (torch.randint(2000, (32, 16)),), torch.randint(5, (32,))

    return make


def heads() -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    """Attention's projections as weights with three axes (Flax, einops)."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        q = torch.einsum("btd,dhk->bthk", x, m.q)
        return m.head(torch.einsum("bthk,hkd->btd", q.tanh(), m.o).mean(1))

    model = Apply(forward, q=parameter(64, 4, 16), o=parameter(4, 16, 64), head=nn.Linear(64, 5))
    return model, (torch.randn(16, 16, 64),), torch.randint(5, (16,))


def small() -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    """A small network."""
    model = nn.Sequential(nn.Linear(20, 16), nn.Sigmoid(), nn.Linear(16, 5))
    return model, (torch.randn(8, 20),), torch.randint(5, (8,))


def factorised() -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    """Weights made from parameters: mean plus deviation times noise (Bayes by backprop)."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        for j in range(2):
            mean, rho, noise = getattr(m, f"mean{j}"), getattr(m, f"rho{j}"), getattr(m, f"noise{j}")
            x = F.linear(x, mean + F.softplus(rho) * noise)
            x = x if j else x.tanh()
        return x

    sizes = ((64, 100), (10, 64))
    parts = {f"{name}{j}": parameter(*sizes[j]) for name in ("mean", "rho") for j in (0, 1)}
    model = Apply(forward, **parts)
    for j, size in enumerate(sizes):
        model.register_buffer(f"noise{j}", torch.randn(size))
    return model, (torch.randn(32, 100),), torch.randint(10, (32,))


def low_rank() -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    """A weight that is a product of two thin ones."""
    model = Apply(
        lambda m, x: m.head(F.linear(x, m.u @ m.v).tanh()),
        u=parameter(128, 8),
        v=parameter(8, 128),
        head=nn.Linear(128, 10),
    )
    return model, (torch.randn(32, 128),), torch.randint(10, (32,))


def smooth() -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    """A smooth network: every layer adds curvature."""
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    return model, (torch.randn(32, 20),), torch.randint(10, (32,))


E = extensions
FIRST = (E.BatchL2Grad, E.SumGradSquared, E.Variance)
ROWS = [
    Row(
        "head over 1,000 classes", head(1000, 32), (E.DiagGGNExact, E.KFLR, E.DiagGGNMC, E.DiagHessian)
    ),
    Row("head over 5,000 classes", head(5000, 32), (E.DiagGGNExact,)),
    Row("table of 20,000 rows", table, (E.SumGradSquared, E.Variance)),
    Row("bags of rows", bag(False), (*FIRST, E.KFAC, E.DiagGGNMC)),
    Row("bags of rows with offsets", bag(True), FIRST),
    Row("einsum with a weight of three axes", heads, (*FIRST, E.KFAC, E.DiagGGNMC)),
    Row("10,000 draws", small, (lambda: E.BatchDiagGGNMC(10000), lambda: E.DiagGGNMC(10000))),
    Row("weights drawn from a normal", factorised, (*FIRST, E.DiagGGNMC, E.KFAC, E.DiagGGNExact)),
    Row("weight that is a product", low_rank, (*FIRST, E.DiagGGNMC, E.KFAC)),
    Row("smooth network", smooth, (E.DiagHessian,)),
]


def seconds(run: Callable[[], None], rounds: int, most: float = 10.0) -> float:
    """The least processor time of some rounds, of which the first is not counted, if it is short."""
    best, spent = math.inf, 0.0
    for _ in range(rounds):
        start = time.process_time()
        run()
        best, spent = min(best, time.process_time() - start), spent + time.process_time() - start
        if spent > most:
            break
    return best


def measure(row: Row, rounds: int) -> None:
    """Print a row's times."""
    torch.manual_seed(0)
    model, inputs, target = row.make()
    lossfunc = nn.CrossEntropyLoss()

    def gradient() -> None:
        lossfunc(model(*inputs), target).backward()

    base = seconds(gradient, rounds * 3)
    extend(model)
    for make in row.quantities:

        def step() -> None:
            with backpack(make()):  # noqa: B023
                gradient()

        time_of = seconds(step, rounds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        times = f"{time_of * 1e3:10.2f} ms {time_of / base:9.1f} gradients"
        print(f"{row.name:36} {str(make()):34} {times} {peak:8.0f} MB so far", flush=True)


def main() -> None:
    """Measure all rows, or those whose names contain what is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for row in ROWS:
        if not given.names or any(name in row.name for name in given.names):
            measure(row, given.rounds)


if __name__ == "__main__":
    sys.exit(main())
