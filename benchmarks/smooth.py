"""The Hessian's diagonal of small smooth networks, beside torch.func's.

    python -m benchmarks.smooth [--rounds 10]

Multiples of the plain gradient in processor time on one thread: the fastest of turns in rotation.
torch.func differentiates the gradient along every unit vector (``vmap`` over ``jvp`` of ``grad``), for
the sum over samples; that of single samples costs it as many times more as there are samples.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from backpack import backpack, extend, extensions
from benchmarks.gradients import fastest
from benchmarks.libraries import Step

Task = tuple[nn.Module, Tensor, Tensor]


def chain(activation: type[nn.Module], *sizes: int, samples: int) -> Task:
    """A chain of layers with an activation between each."""
    layers: list[nn.Module] = []
    for inside, outside in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inside, outside), activation()]
    return (
        nn.Sequential(*layers[:-1]),
        torch.randn(samples, sizes[0]),
        torch.randint(sizes[-1], (samples,)),
    )


def images() -> Task:
    """Two convolutions."""
    first = [nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AvgPool2d(2)]
    second = [nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*first, *second), torch.randn(8, 1, 14, 14), torch.randint(5, (8,))


TASKS = {
    "tanh, 20-16-5, 8 samples": lambda: chain(nn.Tanh, 20, 16, 5, samples=8),
    "tanh, 20-32-32-10, 32 samples": lambda: chain(nn.Tanh, 20, 32, 32, 10, samples=32),
    "GELU, 100-64-64-64-10, 32 samples": lambda: chain(nn.GELU, 100, 64, 64, 64, 10, samples=32),
    "tanh, 2 convolutions, 8 images": images,
}


def by_unit_vectors(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Tensor]:
    """torch.func's way."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def gradient(name: str, value: Tensor) -> Tensor:
        def loss(p: Tensor) -> Tensor:
            output = functional_call(model, values | {name: p}, (X,))
            return nn.functional.cross_entropy(output, y)

        return grad(loss)(value)

    found = {}
    for name, value in values.items():

        def entry(unit: Tensor, name: str = name, value: Tensor = value) -> Tensor:
            return (jvp(lambda p: gradient(name, p), (value,), (unit,))[1] * unit).sum()

        units = torch.eye(value.numel()).reshape(-1, *value.shape)
        found[name] = vmap(entry, chunk_size=256)(units).reshape(value.shape)
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'network':36}{'ms':>8}{'DiagHessian':>13}{'torch.func':>12}{'parameters':>12}")
    for name, make in TASKS.items():
        torch.manual_seed(0)
        model, X, y = make()
        plain = copy.deepcopy(model)
        extend(model)

        def ours(model: nn.Module = model, X: Tensor = X, y: Tensor = y) -> None:
            with backpack(extensions.DiagHessian()):
                nn.functional.cross_entropy(model(X), y).backward()

        def gradient(model: nn.Module = plain, X: Tensor = X, y: Tensor = y) -> None:
            nn.functional.cross_entropy(model(X), y).backward()

        steps: dict[str, Step] = {
            "func": partial(by_unit_vectors, plain, X, y),
            "ours": ours,
            "": gradient,
        }
        forget = {"func": plain.zero_grad, "ours": model.zero_grad, "": plain.zero_grad}
        times = fastest({key: (step, forget[key]) for key, step in steps.items()}, given.rounds)
        wanted = by_unit_vectors(plain, X, y)
        ours()
        for key, p in model.named_parameters():
            error = (extensions.DiagHessian.of(p) - wanted[key]).norm() / wanted[key].norm()
            assert error < 1e-3, f"{name}, {key}: numbers differ by {error:.1e}"
        count = sum(p.numel() for p in model.parameters())
        ratios = f"{times['ours'] / times['']:13.1f}{times['func'] / times['']:12.1f}"
        print(f"{name:36}{1e3 * times['']:8.2f}{ratios}{count:12}", flush=True)


if __name__ == "__main__":
    main()
