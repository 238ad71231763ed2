"""Individual gradients where rows are not samples, beside a loop over samples: time and memory.

    python -m benchmarks.rows [--rounds 7] [--kinds GCN ...]

Graphs, packed and nested sequences, bags, lists of images, episodes, tokens, users, derivatives inside
the loss. The loop runs model and loss on each sample alone. Ratios are to one backward pass of the
whole batch without quantities, of processor time on one thread: the least of all turns, which
alternate. A second loop goes back twice for each sample, as many times as a gradient and one sampled
column of curvature take. Memory is the peak beyond what is there before the pass. Writes
``benchmarks/results/rows.json`` and ``rows.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import backpack as bp
from backpack import extensions
from benchmarks.worker import peak_bytes, reset_peak

RESULTS = Path(__file__).parent / "results"
QUANTITIES = ("BatchGrad", "BatchL2Grad", "DiagGGNMC", "KFAC")
# What is measured on a model that is not extended.
PLAIN = ("gradient", "loop", "loop, twice")
COLUMNS = ("loop", "loop, twice", *QUANTITIES)


class Kind(NamedTuple):
    """A program.

    Attributes:
        model: its model.
        loss: the loss of all samples, a mean over them.
        share: that of one sample, run alone.
        samples: how many there are.
        say: how it is said which row belongs to which sample.
        options: of ``backpack(...)``.
    """

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    share: Callable[[nn.Module, int], Tensor]
    samples: int
    say: Callable[[nn.Module], Any] = lambda model: bp.extend(model)
    options: dict[str, Any] = {}


def lengths(count: int, least: int, most: int) -> list[int]:
    """The same each time."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(least, most + 1, (count,), generator=generator).tolist()


def summed(x: Tensor, index: Tensor, size: int) -> Tensor:
    return x.new_zeros(size, *x.shape[1:]).index_add(0, index, x)


class GCN(nn.Module):
    """Sums over neighbours and over the nodes of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
        self.head = nn.Linear(64, 10)

    def mix(self, layer: nn.Module, x: Tensor, edges: Tensor) -> Tensor:
        return layer(x + summed(x[edges[0]], edges[1], len(x)) / 3)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor, count: int) -> Tensor:
        for layer in self.layers:
            x = self.mix(layer, x, edges).relu()
        return self.head(summed(x, graph, count))


class GAT(GCN):
    """Four heads, softmax over neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(64, 4), nn.Linear(64, 4)

    def mix(self, layer: nn.Module, x: Tensor, edges: Tensor) -> Tensor:
        h = layer(x).view(len(x), 4, 16)
        score = F.leaky_relu(self.left(x)[edges[0]] + self.right(x)[edges[1]], 0.2).exp()
        weight = score / (summed(score, edges[1], len(x))[edges[1]] + 1e-6)
        return summed(h[edges[0]] * weight[..., None], edges[1], len(x)).flatten(1)


def graphs(model: nn.Module) -> Kind:
    sizes = lengths(64, 10, 30)
    nodes, targets = [torch.randn(n, 64) for n in sizes], torch.randint(10, (64,))
    edges = [torch.randint(n, (2, 3 * n)) for n in sizes]
    first = torch.tensor([0, *sizes[:-1]]).cumsum(0).tolist()
    graph = torch.arange(64).repeat_interleave(torch.tensor(sizes))
    x, all_edges = torch.cat(nodes), torch.cat([e + n for e, n in zip(edges, first, strict=True)], 1)
    return Kind(
        model,
        lambda m: F.cross_entropy(m(x, all_edges, graph, 64), targets),
        lambda m, n: (
            F.cross_entropy(
                m(nodes[n], edges[n], torch.zeros(sizes[n], dtype=torch.long), 1), targets[n : n + 1]
            )
            / 64
        ),
        64,
        lambda m: bp.extend(m, samples=lambda x, edges, graph, count: (x, graph)),
    )


class Recurrent(nn.Module):
    """The mean of the states of a packed sequence."""

    def __init__(self, rnn: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(width, 10)

    def forward(self, sequences: Any) -> Tensor:
        rows, counts = pad_packed_sequence(self.rnn(sequences)[0], batch_first=True)
        return self.head(rows.sum(1) / counts[:, None])


def sequences(model: nn.Module, make: Callable[[list[Tensor]], Any]) -> Kind:
    parts, targets = [torch.randn(n, 32) for n in lengths(32, 5, 40)], torch.randint(10, (32,))
    return Kind(
        model,
        lambda m: F.cross_entropy(m(make(parts)), targets),
        lambda m, n: F.cross_entropy(m(make(parts[n : n + 1])), targets[n : n + 1]) / 32,
        32,
    )


def packed(parts: list[Tensor]) -> Any:
    return pack_sequence(parts, enforce_sorted=False)


def jagged(parts: list[Tensor]) -> Any:
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


class Jagged(nn.Module):
    """A transformer's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
        self.out, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)
        self.up, self.down, self.head = nn.Linear(32, 128), nn.Linear(128, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in [f(x) for f in self.qkv])
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        x = self.norm(x + self.down(F.gelu(self.up(x))))
        return self.head(x.to_padded_tensor(0.0).sum(1))


class Bags(nn.Module):
    """Attention over the instances, one bag after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score = nn.Linear(128, 64), nn.Linear(64, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, bags: list[Tensor]) -> Tensor:
        pooled = []
        for bag in bags:
            h = self.embed(bag).tanh()
            pooled.append((self.score(h).softmax(0) * h).sum(0))
        return self.head(torch.stack(pooled))


class Images(nn.Module):
    """One image after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, images: list[Tensor]) -> Tensor:
        pooled = [self.second(self.first(x[None]).relu()).relu().mean((2, 3)) for x in images]
        return self.head(torch.cat(pooled))


def listed(model: nn.Module, parts: list[Tensor]) -> Kind:
    targets = torch.randint(10, (len(parts),))
    return Kind(
        model,
        lambda m: F.cross_entropy(m(parts), targets),
        lambda m, n: F.cross_entropy(m(parts[n : n + 1]), targets[n : n + 1]) / len(parts),
        len(parts),
        lambda m: bp.extend(m, samples=0),
    )


def mlp(
    inputs: int = 64, width: int = 128, outputs: int = 10, activation: type[nn.Module] = nn.ReLU
) -> nn.Module:
    layers = (nn.Linear(inputs, width), activation(), nn.Linear(width, width), activation())
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def episodes() -> Kind:
    parts = [torch.randn(n, 64) for n in lengths(32, 5, 40)]
    actions, total = [torch.randint(10, (len(x),)) for x in parts], sum(map(len, parts))

    def loss(m: nn.Module) -> Tensor:
        logits = torch.cat([m(bp.mark(x, 0)) for x in parts])
        return F.cross_entropy(logits, torch.cat(actions))

    def share(m: nn.Module, n: int) -> Tensor:
        return F.cross_entropy(m(parts[n]), actions[n], reduction="sum") / total

    return Kind(mlp(), loss, share, 32, options={"forwards": "further"})


def users() -> Kind:
    x, y, user = torch.randn(1024, 64), torch.randint(10, (1024,)), torch.randint(32, (1024,))
    return Kind(
        mlp(),
        lambda m: F.cross_entropy(m(bp.mark(x, user)), y),
        lambda m, n: F.cross_entropy(m(x[user == n]), y[user == n], reduction="sum") / 1024,
        32,
    )


def tokens() -> Kind:
    x, y = torch.randn(8, 32, 64), torch.randint(10, (256,))
    return Kind(
        mlp(),
        lambda m: F.cross_entropy(m(x.flatten(0, 1)), y),
        lambda m, n: F.cross_entropy(m(x.flatten(0, 1)[n : n + 1]), y[n : n + 1]) / 256,
        256,
    )


def poisson() -> Kind:
    points = torch.rand(128, 2)

    def residual(m: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (du,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        parts = [torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return parts[0] + parts[1] + 1

    return Kind(
        mlp(2, 24, 1, nn.Tanh),
        lambda m: residual(m, points).square().mean(),
        lambda m, n: residual(m, points[n : n + 1]).square().sum() / 128,
        128,
    )


KINDS: dict[str, Callable[[], Kind]] = {
    "graphs, GCN": lambda: graphs(GCN()),
    "graphs, GAT": lambda: graphs(GAT()),
    "packed LSTM": lambda: sequences(Recurrent(nn.LSTM(32, 64), 64), packed),
    "packed GRU, both ways": lambda: sequences(
        Recurrent(nn.GRU(32, 32, 2, bidirectional=True), 64), packed
    ),
    "nested, attention": lambda: sequences(Jagged(), jagged),
    "list of bags": lambda: listed(Bags(), [torch.randn(n, 128) for n in lengths(32, 5, 30)]),
    "list of images": lambda: listed(Images(), [torch.randn(3, n, n + 4) for n in lengths(16, 12, 28)]),
    "episodes": episodes,
    "users": users,
    "tokens": tokens,
    "Poisson's equation": poisson,
}


def steps(kind: Kind) -> dict[str, Callable[[], Any]]:
    """What is measured."""
    parameters = list(kind.model.parameters())

    def gradient() -> None:
        kind.loss(kind.model).backward()

    def loop() -> list[Tensor]:
        found = [
            torch.autograd.grad(kind.share(kind.model, n), parameters, allow_unused=True)
            for n in range(kind.samples)
        ]
        filled = [
            [torch.zeros_like(p) if g is None else g for g in gs]
            for p, gs in zip(parameters, zip(*found, strict=True), strict=True)
        ]
        return [torch.stack(gs) for gs in filled]

    def twice() -> list[Tensor]:
        squares = [torch.zeros_like(p) for p in parameters]
        for n in range(kind.samples):
            share = kind.share(kind.model, n)
            for last in (False, True):
                found = torch.autograd.grad(
                    share, parameters, retain_graph=not last, materialize_grads=True
                )
            for total, each in zip(squares, found, strict=True):
                total.addcmul_(each, each)
        return squares

    def computing(name: str) -> Callable[[], None]:
        def step() -> None:
            with bp.backpack(getattr(extensions, name)(), **kind.options):
                kind.loss(kind.model).backward()

        return step

    return {
        "gradient": gradient,
        "loop": loop,
        "loop, twice": twice,
        **{name: computing(name) for name in QUANTITIES},
    }


def made(name: str) -> Kind:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return KINDS[name]()


def times(name: str, rounds: int) -> dict[str, float]:
    """Ratios to the gradient."""
    kind = made(name)
    plain, kind = kind, kind._replace(model=made(name).model)
    kind.say(kind.model)
    own = steps(plain)  # the gradient and the loop, of a model that is not extended
    run = {key: own[key] if key in PLAIN else step for key, step in steps(kind).items()}
    found: dict[str, list[float]] = {key: [] for key in run}
    for _ in range(rounds + 1):
        for key, step in run.items():
            for model in (plain.model, kind.model):
                model.zero_grad()
            start = time.process_time()
            step()
            found[key].append(time.process_time() - start)
    least = {key: min(values[1:]) for key, values in found.items()}
    return {"seconds": least["gradient"], **{key: least[key] / least["gradient"] for key in COLUMNS}}


def peaks(name: str) -> dict[str, int]:
    """The most memory that each pass takes, in bytes."""
    found = {}
    for key in ("gradient", *COLUMNS):
        kind = made(name)
        if key not in PLAIN:
            kind.say(kind.model)
        step = steps(kind)[key]
        for _ in range(2):
            step()
            kind.model.zero_grad()
        before = reset_peak()
        step()
        found[key] = peak_bytes() - before
    return found


def apart(name: str) -> dict[str, int]:
    """:func:`peaks` in a process of its own, where what is freed goes back to the system."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.rows", "--peaks", name]
    frugal = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run(command, capture_output=True, text=True, env=frugal, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    lines = [
        f"# Where rows are not samples, {results['date']}",
        "",
        f"{results['processor']}; torch {results['torch']}; one thread. Processor time as a multiple "
        "of one backward pass without quantities (the least of "
        f"{results['rounds']} turns), and peak memory of a pass in MB. `loop`: each sample's gradient "
        "by plain autograd, one after the other; `loop, twice`: two passes back for each, as many as a "
        "gradient and a sampled column of curvature take.",
        "",
        f"| | samples | gradient | {' | '.join(COLUMNS)} |",
        f"|---{'|---' * (len(COLUMNS) + 2)}|",
    ]
    for name, row in results["kinds"].items():
        cells = [f"{row['times'][key]:.1f}, {row['bytes'][key] / 2**20:.0f} MB" for key in COLUMNS]
        first = f"{row['times']['seconds'] * 1e3:.1f} ms, {row['bytes']['gradient'] / 2**20:.0f} MB"
        lines.append(f"| {name} | {row['samples']} | {first} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def processor() -> str:
    """Its name, as the system gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--peaks")
    options = parser.parse_args()
    if options.peaks:
        print(json.dumps(peaks(options.peaks)))
        return
    found: dict[str, Any] = {}
    for name in options.kinds:
        found[name] = {"samples": made(name).samples, "times": times(name, options.rounds)}
        print(name, {key: f"{value:.2f}" for key, value in found[name]["times"].items()}, flush=True)
        found[name]["bytes"] = apart(name)
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "torch": torch.__version__,
        "rounds": options.rounds,
        "kinds": found,
    }
    if options.kinds == list(KINDS):
        (RESULTS / "rows.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "rows.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
