"""Quantities of losses that contain derivatives of the model, beside torch.func and a loop: time.

    python -m benchmarks.derivatives [--rounds 7] [--kinds Poisson ...]

Differential equations (residuals inside, values on the boundary), Sobolev losses, gradient penalties,
score matching, steps of meta-learning. Each is written twice: by ``torch.autograd.grad`` for all
samples, which is what a plain pass, the loop and this library run, and by ``torch.func`` for one
sample, which ``vmap`` maps over all. Ratios are to one backward pass without quantities, of processor
time on one thread: the least of all turns, which alternate. Writes
``benchmarks/results/derivatives.json`` and ``derivatives.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap

from backpack import backpack, extend, extensions
from benchmarks.rows import RESULTS, processor

# Shares of the loss, [n], of a model and rows of data: of all samples.
Shares = Callable[..., Tensor]
# One sample's, of a function ``u(x) -> [outputs]`` of one input without an axis of samples.
Share = Callable[..., Tensor]
QUANTITIES = ("BatchGrad", "BatchL2Grad", "DiagGGNExact", "DiagGGNMC", "KFAC")
COLUMNS = ("loop", "torch.func", *QUANTITIES)


class Term(NamedTuple):
    """A part of the loss: the mean of its samples' shares."""

    shares: Shares
    alone: Share
    rows: tuple[Tensor, ...]


class Kind(NamedTuple):
    """A program: a model, and the terms of its loss, each with samples of its own."""

    model: nn.Module
    terms: list[Term]


def slope(f: Tensor, x: Tensor) -> Tensor:
    """``df_n / dx_n`` of all samples."""
    return torch.autograd.grad(f.sum(), x, create_graph=True)[0]


def mlp(inputs: int, outputs: int = 1, width: int = 48) -> nn.Module:
    layers = (nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def poisson(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    du = slope(net(x), x)
    return (slope(du[:, 0], x)[:, 0] + slope(du[:, 1], x)[:, 1] + 1).square()


def poisson_alone(u: Share, x: Tensor) -> Tensor:
    return (hessian(lambda x: u(x)[0])(x).diagonal().sum() + 1).square()


def heat(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    du = slope(net(x), x)
    return (du[:, 1] - 0.1 * slope(du[:, 0], x)[:, 0]).square()


def heat_alone(u: Share, x: Tensor) -> Tensor:
    def along(x: Tensor) -> Tensor:
        return grad(lambda x: u(x)[0])(x)

    du, second = jvp(along, (x,), (x.new_tensor([1.0, 0.0]),))
    return (du[1] - 0.1 * second[0]).square()


def burgers(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    u = net(x)
    du = slope(u, x)
    return (du[:, 1] + u[:, 0] * du[:, 0] - 0.01 * slope(du[:, 0], x)[:, 0]).square()


def burgers_alone(u: Share, x: Tensor) -> Tensor:
    def along(x: Tensor) -> Tensor:
        return grad(lambda x: u(x)[0])(x)

    du, second = jvp(along, (x,), (x.new_tensor([1.0, 0.0]),))
    return (du[1] + u(x)[0] * du[0] - 0.01 * second[0]).square()


def boundary(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().sum(1)


def boundary_alone(u: Share, x: Tensor) -> Tensor:
    return u(x).square().sum()


def sobolev(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    u = net(x)
    return (u[:, 0] - x.detach().sum(1)).square() + (slope(u, x) - 1).square().sum(1)


def sobolev_alone(u: Share, x: Tensor) -> Tensor:
    return (u(x)[0] - x.sum()).square() + (grad(lambda x: u(x)[0])(x) - 1).square().sum()


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    u = net(x)
    return u[:, 0] + 10 * (slope(u, x).flatten(1).norm(dim=1) - 1).square()


def penalty_alone(u: Share, x: Tensor) -> Tensor:
    return u(x)[0] + 10 * (grad(lambda x: u(x)[0])(x).flatten().norm() - 1).square()


def denoising(net: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    """Of an energy: its slope at a noisy point is the noise."""
    x = (x + 0.1 * noise).requires_grad_()
    return (slope(net(x), x) - noise / 0.1).square().sum(1) / 2


def denoising_alone(u: Share, x: Tensor, noise: Tensor) -> Tensor:
    x = x + 0.1 * noise
    return (grad(lambda x: u(x)[0])(x) - noise / 0.1).square().sum() / 2


def sliced(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """Of an energy, in one direction for each sample."""
    x = x.clone().requires_grad_()
    along = (slope(net(x), x) * v).sum(1)
    return along.square() / 2 - (slope(along, x) * v).sum(1)


def sliced_alone(u: Share, x: Tensor, v: Tensor) -> Tensor:
    def along(x: Tensor) -> Tensor:
        return (grad(lambda x: u(x)[0])(x) * v).sum()

    return along(x).square() / 2 - (grad(along)(x) * v).sum()


class Meta(nn.Module):
    """A step of its own for each task, one task after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2)

    def forward(self, x: Tensor, y: Tensor, new: Tensor) -> Tensor:
        weights, found = dict(self.net.named_parameters()), []
        for a, b, c in zip(x, y, new, strict=True):
            error = (functional_call(self.net, weights, (a,)) - b).square().mean()
            slopes = torch.autograd.grad(error, list(weights.values()), create_graph=True)
            moved = {key: w - 0.1 * s for (key, w), s in zip(weights.items(), slopes, strict=True)}
            found.append(functional_call(self.net, moved, (c,)))
        return torch.stack(found)


class Mapped(Meta):
    """The same, in a transform over tasks."""

    def forward(self, x: Tensor, y: Tensor, new: Tensor) -> Tensor:
        weights = dict(self.net.named_parameters())

        def task(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
            def error(weights: dict[str, Tensor]) -> Tensor:
                return (functional_call(self.net, weights, (x,)) - y).square().mean()

            slopes = grad(error)(weights)
            moved = {name: w - 0.1 * slopes[name] for name, w in weights.items()}
            return functional_call(self.net, moved, (new,))

        return vmap(task)(x, y, new)


def meta(net: nn.Module, x: Tensor, y: Tensor, new: Tensor, wanted: Tensor) -> Tensor:
    return (net(x, y, new) - wanted).square().mean((1, 2))


class Critic(nn.Module):
    """Convolutions of images of 16 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 3, 2, 1)),
            *(nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(512, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def equation(shares: Shares, alone: Share) -> Kind:
    inside, edge = torch.rand(256, 2), torch.rand(64, 2)
    terms = [Term(shares, alone, (inside,)), Term(boundary, boundary_alone, (edge,))]
    return Kind(mlp(2), terms)


def of_points(shares: Shares, alone: Share, directions: bool = False) -> Kind:
    x = torch.randn(256, 4)
    rows = (x, torch.randn(256, 4)) if directions else (x,)
    return Kind(mlp(4), [Term(shares, alone, rows)])


def tasks(model: Meta) -> Kind:
    x, y, new, wanted = (torch.rand(16, 10, k) for k in (2, 1, 2, 1))
    return Kind(model, [Term(meta, lambda u, *row: row[0], (x, y, new, wanted))])


KINDS: dict[str, Callable[[], Kind]] = {
    "Poisson's equation": lambda: equation(poisson, poisson_alone),
    "heat equation": lambda: equation(heat, heat_alone),
    "Burgers' equation": lambda: equation(burgers, burgers_alone),
    "Sobolev loss": lambda: of_points(sobolev, sobolev_alone),
    "gradient penalty, convolutions": lambda: Kind(
        Critic(), [Term(penalty, penalty_alone, (torch.randn(32, 3, 16, 16),))]
    ),
    "denoising score matching": lambda: of_points(denoising, denoising_alone, True),
    "sliced score matching": lambda: of_points(sliced, sliced_alone, True),
    "meta-learning, a loop over tasks": lambda: tasks(Meta()),
    "meta-learning, vmap over tasks": lambda: tasks(Mapped()),
}


def made(name: str) -> Kind:
    torch.manual_seed(0)
    return KINDS[name]()


def loss_of(kind: Kind, model: nn.Module) -> Tensor:
    return torch.stack([term.shares(model, *term.rows).mean() for term in kind.terms]).sum()


def looped(kind: Kind) -> list[Tensor]:
    """Every sample's gradient by plain autograd, one after the other, ``[N, *p]``."""
    parameters = list(kind.model.parameters())
    rows = []
    for term in kind.terms:
        count = len(term.rows[0])
        for n in range(count):
            share = term.shares(kind.model, *(x[n : n + 1] for x in term.rows)).sum() / count
            rows.append(torch.autograd.grad(share, parameters, materialize_grads=True))
    return [torch.stack(each) for each in zip(*rows, strict=True)]


def mapped(kind: Kind) -> list[Tensor]:
    """The same by ``vmap(grad(...))``."""
    model = kind.model
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = []
    for term in kind.terms:
        count = len(term.rows[0])

        def share(parameters: dict[str, Tensor], *row: Tensor, term: Term = term) -> Tensor:
            if isinstance(model, Meta):
                return _meta_alone(model.net, parameters, *row)

            def u(x: Tensor) -> Tensor:
                return functional_call(model, parameters, (x.unsqueeze(0),))[0]

            return term.alone(u, *row)

        gradients = vmap(grad(share), (None, *(0 for _ in term.rows)))(parameters, *term.rows)
        found.append([gradients[name] / count for name in parameters])
    return [torch.cat(each) for each in zip(*found, strict=True)]


def _meta_alone(
    net: nn.Module, parameters: dict[str, Tensor], x: Tensor, y: Tensor, new: Tensor, wanted: Tensor
) -> Tensor:
    own = {name.removeprefix("net."): p for name, p in parameters.items()}

    def error(own: dict[str, Tensor]) -> Tensor:
        return (functional_call(net, own, (x,)) - y).square().mean()

    slopes = grad(error)(own)
    moved = {name: p - 0.1 * slopes[name] for name, p in own.items()}
    return F.mse_loss(functional_call(net, moved, (new,)), wanted)


def options(kind: Kind) -> dict[str, Any]:
    """Of ``backpack(...)``: terms have samples of their own."""
    return {"forwards": "further"} if len(kind.terms) > 1 else {}


def steps(name: str) -> dict[str, Callable[[], Any]]:
    """What is measured; the plain pass, the loop and torch.func have a model that is not extended."""
    plain = made(name)
    kind = plain._replace(model=extend(copy.deepcopy(plain.model)))

    def computing(quantity: str) -> Callable[[], None]:
        def step() -> None:
            with backpack(getattr(extensions, quantity)(), **options(kind)):
                loss_of(kind, kind.model).backward()

        return step

    def gradient() -> None:
        plain.model.zero_grad()
        loss_of(plain, plain.model).backward()

    return {
        "gradient": gradient,
        "loop": lambda: looped(plain),
        "torch.func": lambda: mapped(plain),
        **{quantity: computing(quantity) for quantity in QUANTITIES},
    }


def times(name: str, rounds: int) -> dict[str, float]:
    """Seconds of a plain pass, and all else as a multiple of it."""
    torch.set_num_threads(1)
    run = steps(name)
    found: dict[str, list[float]] = {key: [] for key in run}
    for turn in range(rounds + 1):  # the first finds where samples are
        for key, step in run.items():
            if key == "loop" and turn > 2:
                continue
            start = time.process_time()
            step()
            found[key].append(time.process_time() - start)
    least = {key: min(values[1:]) for key, values in found.items()}
    return {"seconds": least["gradient"], **{key: least[key] / least["gradient"] for key in COLUMNS}}


def table(results: dict[str, Any]) -> str:
    lines = [
        f"# Derivatives of the model inside the loss, {results['date']}",
        "",
        f"{results['processor']}; torch {results['torch']}; one thread. Processor time as a multiple "
        f"of one backward pass without quantities (the least of {results['rounds']} turns). `loop` and "
        "`torch.func` compute individual gradients.",
        "",
        f"| | samples | gradient | {' | '.join(COLUMNS)} |",
        f"|---{'|---' * (len(COLUMNS) + 2)}|",
    ]
    for name, row in results["kinds"].items():
        cells = [f"{row['times'][key]:.1f}" for key in COLUMNS]
        first = f"{row['times']['seconds'] * 1e3:.1f} ms"
        lines.append(f"| {name} | {row['samples']} | {first} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for name in given.kinds:
        samples = sum(len(term.rows[0]) for term in made(name).terms)
        found[name] = {"samples": samples, "times": times(name, given.rounds)}
        print(name, {key: f"{value:.2f}" for key, value in found[name]["times"].items()}, flush=True)
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "torch": torch.__version__,
        "rounds": given.rounds,
        "kinds": found,
    }
    if given.kinds == list(KINDS):
        (RESULTS / "derivatives.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "derivatives.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
