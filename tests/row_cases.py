"""Programs whose rows are not samples: graphs, bags, lists of images, tokens, users."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
)

import backpack as bp


class RowCase(NamedTuple):
    """A program whose rows are not samples.

    Attributes:
        model: makes the model; each of its weights has a bias beside it.
        run: the model's output, all rows of all forward passes.
        owner: the sample of each row of the output.
        samples: how many samples there are.
        say: how the user says which row belongs to which sample.
        options: of ``backpack(...)``.
    """

    model: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    owner: list[int]
    samples: int
    say: Callable[[nn.Module], Any] = lambda model: bp.extend(model)
    options: dict[str, Any] = {}


def data(*shape: int, seed: int = 3) -> Tensor:
    """The same numbers each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scatter(x: Tensor, index: Tensor, size: int, reduce: str = "sum") -> Tensor:
    """Rows put together by ``scatter_reduce``, as graph libraries do."""
    places = index[:, None].expand_as(x)
    return x.new_zeros(size, x.shape[1]).scatter_reduce(0, places, x, reduce, include_self=False)


# --------------------------------------------------------------------------------------
# Graphs: nodes of three graphs, one after the other

GRAPH = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
EDGES = torch.tensor([[0, 1, 2, 1, 3, 4, 5, 6, 7, 8, 8], [1, 0, 1, 2, 4, 3, 6, 7, 8, 5, 6]])
NODES = data(9, 3)


class GCN(nn.Module):
    """Two graph convolutions, the mean of a graph's nodes, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2)

    def convolve(self, layer: nn.Module, x: Tensor, edges: Tensor) -> Tensor:
        loops = torch.arange(len(x))
        source, target = torch.cat([edges[0], loops]), torch.cat([edges[1], loops])
        degree = torch.zeros(len(x)).to(x).scatter_add(0, target, torch.ones(len(target)).to(x))
        norm = (degree[source] * degree[target]).rsqrt()
        messages = layer(x).index_select(0, source) * norm[:, None]
        return torch.zeros(len(x), messages.shape[1]).to(x).index_add(0, target, messages)

    def forward(self, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        h = self.convolve(self.first, x, edges).tanh()
        h = self.convolve(self.second, h, edges).sigmoid()
        size = int(batch.max()) + 1
        counts = torch.bincount(batch, minlength=size).clamp(min=1)
        return self.head(scatter(h, batch, size) / counts[:, None])


class Directed(nn.Module):
    """Edges in one direction, so that nobody writes to some rows."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.own, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.again = nn.Linear(3, 3)

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        x, edges, batch = data["x"], data["edges"], data["batch"]
        h = (self.near(scatter(x[edges[0]], edges[1], len(x))) + self.own(x)).tanh()
        h = self.again(torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])).tanh() + h
        return self.head(scatter(h, batch, 3))


ADJACENCY = torch.eye(9, dtype=torch.float64)
ADJACENCY[EDGES[1], EDGES[0]] = 1
SIZES = torch.bincount(GRAPH)


class Multiplied(nn.Module):
    """Neighbours are summed by an adjacency matrix, nodes of graphs in one way or another."""

    def __init__(self, multiply: Callable[..., Tensor], pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.multiply, self.pool = multiply, pool
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = self.multiply(adjacency, self.first(x)).tanh()
        return self.head(self.pool(self.multiply(adjacency, self.second(h))))


def multiplied(
    adjacency: Tensor, multiply: Callable[..., Tensor], pool: Callable[[Tensor], Tensor]
) -> RowCase:
    return RowCase(
        *(lambda: Multiplied(multiply, pool), lambda m: m(NODES, adjacency), [0, 1, 2], 3),
        lambda m: bp.extend(m, samples=lambda x, adjacency: (x, GRAPH)),
    )


class GIN(nn.Module):
    """Sums over neighbours, an MLP, normalisation within each graph, the largest of a graph's nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.tensor([0.3]))
        self.mlp = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        size = int(batch.max()) + 1
        around = torch.zeros_like(x).index_add_(0, edges[1], x[edges[0]])
        h = self.mlp((1 + self.eps) * x + around)
        mean = scatter(h, batch, size, "mean")
        h = h - mean[batch]
        h = h / (scatter(h * h, batch, size, "mean") + 0.1).sqrt().index_select(0, batch)
        return self.head(scatter(h, batch, size, "amax") + scatter(h.exp(), batch, size))


def directed(model: nn.Module) -> Tensor:
    one_way = EDGES[:, EDGES[0] < EDGES[1]]
    return model({"x": NODES, "edges": one_way, "batch": GRAPH})


def by_graph(model: nn.Module) -> None:
    bp.extend(model, samples=lambda x, edges, batch: (x, batch))


def marked_nodes(model: nn.Module) -> Tensor:
    return model(bp.mark(NODES.clone(), GRAPH), EDGES, GRAPH)


# --------------------------------------------------------------------------------------
# Bags: instances of three bags

BAG = torch.tensor([0, 1, 1, 1, 2, 2])
INSTANCES = data(6, 3, seed=4)


class Pooling(nn.Module):
    """Attention over the instances of a bag, by a softmax over segments."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score, self.head = nn.Linear(3, 3), nn.Linear(3, 1), nn.Linear(3, 2)

    def weights(self, h: Tensor, bag: Tensor) -> Tensor:
        score = self.score(h)[:, 0]
        highest = score.new_zeros(3).scatter_reduce(0, bag, score, "amax", include_self=False)
        exp = (score - highest[bag]).exp()
        return exp / torch.zeros(3).to(h).index_add(0, bag, exp)[bag]

    def forward(self, x: Tensor, bag: Tensor) -> Tensor:
        h = self.embed(x).tanh()
        return self.head(torch.zeros(3, 3).to(h).index_add(0, bag, h * self.weights(h, bag)[:, None]))


class EachBag(Pooling):
    """The same in a loop over a list of bags."""

    def forward(self, bags: list[Tensor]) -> Tensor:
        pooled = []
        for bag in bags:
            h = self.embed(bag).tanh()
            pooled.append((self.score(h).softmax(0) * h).sum(0))
        return self.head(torch.stack(pooled))


def bags() -> list[Tensor]:
    return list(INSTANCES.split([1, 3, 2]))


# --------------------------------------------------------------------------------------
# Images of different sizes

IMAGES = [data(2, 3, 4, seed=5), data(2, 5, 3, seed=6), data(2, 3, 3, seed=7)]


class EachImage(nn.Module):
    """One image at a time; the outputs are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 2), nn.Linear(2, 2)

    def forward(self, images: list[Tensor]) -> Tensor:
        pooled = [self.conv(image.unsqueeze(0)).tanh().mean((2, 3)) for image in images]
        return self.head(torch.cat(pooled))


# --------------------------------------------------------------------------------------
# Tokens, sentences one after the other, users

LENGTHS = [2, 1, 3]
SENTENCE = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
TOKENS = data(6, 3, seed=8)
IDS = torch.tensor([0, 2, 1, 4, 0, 2])
SEQUENCES = data(2, 3, 3, seed=9)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))


class Packed(nn.Module):
    """A recurrent layer on packed sequences, and what is made of its results."""

    def __init__(self, kind: type[nn.RNNBase], result: str, **options: Any) -> None:
        super().__init__()
        self.rnn, self.result = kind(3, 2, batch_first=True, **options), result
        width = options.get("proj_size", 2) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor | PackedSequence, lengths: list[int] | None = None) -> Tensor:
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        rows, last = self.rnn(x)
        if self.result == "data":
            return self.head(rows.data)
        if self.result == "padded":
            return self.head(pad_packed_sequence(rows, batch_first=True)[0].tanh().sum(1))
        last = last[0] if self.result == "hidden" else last[1] if self.result == "cell" else last
        width = self.head.in_features // last.shape[2]
        return self.head(last[-width:].transpose(0, 1).flatten(1))


def packed_case(kind: type[nn.RNNBase], result: str, **options: Any) -> RowCase:
    owner = [0, 1, 2]
    if result == "data":  # steps of the longest sequences come first
        order = sorted(range(3), key=lambda n: -LENGTHS[n])
        owner = [n for t in range(max(LENGTHS)) for n in order if LENGTHS[n] > t]
    given = pack_sequence(list(TOKENS.split(LENGTHS)), enforce_sorted=False)
    padded = torch.nn.utils.rnn.pad_sequence(list(TOKENS.split(LENGTHS)), batch_first=True)

    def run(model: nn.Module) -> Tensor:
        return model(given) if result in ("data", "cell") else model(padded, LENGTHS)

    return RowCase(lambda: Packed(kind, result, **options), run, owner, 3)


class Embedded(nn.Module):
    """Ids of tokens that are packed; the sequence is made anew from its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(5, 3), nn.GRU(3, 2), nn.Linear(2, 2)

    def forward(self, packed: PackedSequence) -> Tensor:
        data = self.embed(packed.data)
        rows = self.rnn(PackedSequence(data, *packed[1:]))[0]
        return torch.stack([self.head(row).sum(0) for row in unpack_sequence(rows)])


class Masked(nn.Module):
    """Attention by a mask with a block for each sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(3, 6), nn.Linear(2, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x)[None].chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0])


class Attention(nn.Module):
    """Attention within each of several sentences that lie one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        q, k, v = (layer(x).split(lengths) for layer in (self.q, self.k, self.v))
        mixed = [(a @ b.T).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)]
        return self.head(torch.cat(mixed))


def episodes(model: nn.Module) -> Tensor:
    """One forward pass for each of three episodes, of one row each."""
    return torch.cat([model(TOKENS[n : n + 1]) for n in range(3)])


def batches(model: nn.Module) -> Tensor:
    """Forward passes of one, three and two rows."""
    return torch.cat([model(part) for part in TOKENS.split([1, 3, 2])])


class Policy(nn.Module):
    """A layer and a state; a loop inside over the rows of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(self.body(row).tanh()) for row in x])


FURTHER = {"forwards": "further"}
SAME = {"forwards": "same"}
USERS = torch.tensor([1, 0, 1, 2, 0, 1])

CASES: dict[str, RowCase] = {
    "GCN": RowCase(GCN, lambda m: m(NODES, EDGES, GRAPH), [0, 1, 2], 3, by_graph),
    "GCN, marked": RowCase(GCN, marked_nodes, [0, 1, 2], 3),
    "directed": RowCase(
        *(Directed, directed, [0, 1, 2], 3),
        lambda m: bp.extend(m, samples=lambda data: (data["x"], data["batch"])),
    ),
    "GIN": RowCase(GIN, lambda m: m(NODES, EDGES, GRAPH), [0, 1, 2], 3, by_graph),
    "dense adjacency": multiplied(
        *(ADJACENCY, torch.matmul, lambda h: F.one_hot(GRAPH).T.to(h) @ h),
    ),
    "sparse adjacency": multiplied(
        *(ADJACENCY.to_sparse(), torch.spmm, lambda h: scatter(h, GRAPH, 3)),
    ),
    "adjacency without loops": multiplied(
        (ADJACENCY - torch.eye(9)).to_sparse(),
        *(torch.matmul, lambda h: scatter(h, GRAPH, 3, "amin")),
    ),
    "einsum adjacency": multiplied(
        ADJACENCY,
        *(lambda A, h: torch.einsum("ij,jd->id", A, h), lambda h: scatter(h.exp(), GRAPH, 3, "mean")),
    ),
    "masked attention": RowCase(
        *(Masked, lambda m: m(TOKENS, SENTENCE[:, None] == SENTENCE), SENTENCE.tolist(), 3),
        lambda m: bp.extend(m, samples=lambda x, mask: (x, SENTENCE)),
    ),
    "bags": RowCase(
        *(Pooling, lambda m: m(INSTANCES, BAG), [0, 1, 2], 3),
        lambda m: bp.extend(m, samples=lambda x, bag: (x, bag)),
    ),
    "list of bags": RowCase(
        EachBag, lambda m: m(bags()), [0, 1, 2], 3, lambda m: bp.extend(m, samples="bags")
    ),
    "list of images": RowCase(
        EachImage, lambda m: m(IMAGES), [0, 1, 2], 3, lambda m: bp.extend(m, samples=0)
    ),
    "tokens": RowCase(mlp, lambda m: m(SEQUENCES.flatten(0, 1)), list(range(6)), 6),
    "sentences": RowCase(mlp, lambda m: m(bp.mark(TOKENS.clone(), SENTENCE)), SENTENCE.tolist(), 3),
    "packed tokens": RowCase(
        *(Attention, lambda m: m(TOKENS, LENGTHS), SENTENCE.tolist(), 3),
        lambda m: bp.extend(m, samples=lambda x, lengths: (x, SENTENCE)),
    ),
    "packed LSTM": packed_case(nn.LSTM, "hidden"),
    "packed LSTM, rows": packed_case(nn.LSTM, "data"),
    "packed LSTM, cells": packed_case(nn.LSTM, "cell"),
    "packed LSTM, projected": packed_case(nn.LSTM, "padded", proj_size=1),
    "packed LSTM, both ways": packed_case(nn.LSTM, "padded", num_layers=2, bidirectional=True),
    "packed GRU": packed_case(nn.GRU, "last"),
    "packed GRU, rows": packed_case(nn.GRU, "data"),
    "packed GRU, both ways": packed_case(nn.GRU, "last", bidirectional=True),
    "packed RNN": packed_case(nn.RNN, "padded"),
    "packed RNN, relu": packed_case(nn.RNN, "data", nonlinearity="relu"),
    "packed ids": RowCase(
        *(Embedded, lambda m: m(pack_sequence(list(IDS.split(LENGTHS)), enforce_sorted=False))),
        *([0, 1, 2], 3),
    ),
    "episodes": RowCase(mlp, episodes, [0, 1, 2], 3, options=FURTHER),
    "further batches": RowCase(mlp, batches, list(range(6)), 6, options=FURTHER),
    "further loops": RowCase(Policy, batches, list(range(6)), 6, options=FURTHER),
    "further images": RowCase(
        *(EachImage, lambda m: torch.cat([m(IMAGES[:2]), m(IMAGES[2:])]), [0, 1, 2], 3),
        *(lambda m: bp.extend(m, samples=0), FURTHER),
    ),
    "two views": RowCase(
        *(mlp, lambda m: torch.cat([m(TOKENS[:3]), m(TOKENS[3:])]), [0, 1, 2, 0, 1, 2], 3),
        options=SAME,
    ),
    "users": RowCase(mlp, lambda m: m(bp.mark(TOKENS.clone(), USERS)), USERS.tolist(), 3),
}
