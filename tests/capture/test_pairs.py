"""Matrices of all pairs of rows, of which a mask leaves those within a sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import BatchGrad
from backpack.testing.oracle import check
from tests.cases import Apply, P

GRAPH = torch.tensor([0, 0, 0, 1, 1, 2, 2])
ORDERS = {"in order": torch.arange(7), "in any order": torch.tensor([4, 0, 6, 2, 1, 3, 5])}
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _softmax(mask: Callable[[Tensor, Tensor], Tensor]) -> Attend:
    return lambda q, k, v, same: mask(q @ k.T / 3**0.5, same).softmax(-1) @ v


def _assigned(scores: Tensor, same: Tensor) -> Tensor:
    scores[~same] = -torch.inf
    return scores


def _weighted(q: Tensor, k: Tensor, v: Tensor, same: Tensor) -> Tensor:
    weights = (q @ k.T).exp() * same
    return (weights / weights.sum(-1, keepdim=True)) @ v


def _heads(q: Tensor, k: Tensor, v: Tensor, same: Tensor) -> Tensor:
    q, k, v = (each.view(len(each), 3, 1).transpose(0, 1) for each in (q, k, v))
    weights = (q @ k.mT).masked_fill(~same, -torch.inf).softmax(-1)
    return (F.dropout(weights, 1e-12) @ v).transpose(0, 1).reshape(-1, 3)


def _by_einsum(q: Tensor, k: Tensor, v: Tensor, same: Tensor) -> Tensor:
    q, k, v = (each.view(len(each), 3, 1) for each in (q, k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k).masked_fill(~same, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(-1, 3)


def _distances(q: Tensor, k: Tensor, v: Tensor, same: Tensor) -> Tensor:
    return (torch.exp(-(q[:, None] - k[None]).square().sum(-1)) * same) @ v


def _messages(q: Tensor, k: Tensor, v: Tensor, same: Tensor) -> Tensor:
    return ((q[:, None] - k[None]).tanh() * same[..., None]).sum(1) + v


def _affinities(q: Tensor, k: Tensor, same: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.T) * same


def _squared_often(q: Tensor) -> Tensor:
    """Each node is reached in two ways: 2^25 of them lead down."""
    W = 1 + 1e-9 * q.tanh()
    for _ in range(25):
        W = W * W
    return W


def _both_sides(q: Tensor, k: Tensor, v: Tensor, same: Tensor) -> Tensor:
    """Messages of a graph whose edges are learned, as in a convolution of it."""
    W = _affinities(q, k, same)
    return (W / W.sum(1, keepdim=True).sqrt() / W.sum(0).sqrt()) @ v


def _heads_over_rows(q: Tensor, k: Tensor, v: Tensor, same: Tensor) -> Tensor:
    q, k, v = (each.view(len(each), 3, 1).transpose(0, 1) for each in (q, k, v))
    W = torch.sigmoid(q @ k.mT) * same
    found = W.transpose(1, 2) @ v + torch.einsum("hij,hid->hjd", W, v)
    return found.transpose(0, 1).reshape(-1, 3)


ATTENTION: dict[str, Attend] = {
    "transposed": lambda q, k, v, same: _affinities(q, k, same).T @ v,
    "over columns": lambda q, k, v, same: (
        (q @ k.T).masked_fill(~same, -torch.inf).softmax(0).permute(1, 0) @ v
    ),
    "column sums": lambda q, k, v, same: v * _affinities(q, k, same).sum(0)[:, None],
    "mean of a transpose": lambda q, k, v, same: v * _affinities(q, k, same).mT.mean(-1, True),
    "largest": lambda q, k, v, same: v * _affinities(q, k, same).amax(0).unsqueeze(1),
    "both sides": _both_sides,
    "heads over rows": _heads_over_rows,
    "einsum over rows": lambda q, k, v, same: torch.einsum("ij,id->jd", _affinities(q, k, same), v),
    "filled": _softmax(lambda s, same: s.masked_fill(~same, -torch.inf)),
    "filled in place": _softmax(lambda s, same: s.masked_fill_(~same, -torch.inf)),
    "assigned": _softmax(_assigned),
    "finite": _softmax(lambda s, same: s.masked_fill(~same, -1e9)),
    "added": _softmax(lambda s, same: s + torch.zeros_like(s).masked_fill(~same, -torch.inf)),
    "chosen": _softmax(lambda s, same: torch.where(same, s, torch.full_like(s, -9e15))),
    "batch of one": lambda q, k, v, same: _softmax(lambda s, same: s.masked_fill(~same, -torch.inf))(
        q, k, v, same
    )[None][0],
    "weighted": _weighted,
    "heads": _heads,
    "einsum": _by_einsum,
    "distances": _distances,
    "messages": _messages,
}


def _network(attend: Attend) -> nn.Module:
    def forward(m: nn.Module, x: Tensor, graph: Tensor) -> Tensor:
        q, k, v = m.first(x).chunk(3, -1)
        return m.last(attend(q, k, v, graph[:, None] == graph[None]))

    return Apply(forward, first=nn.Linear(3, 9), last=nn.Linear(3, 3))


def _neighbours(layers: int) -> nn.Module:
    """Attention over the neighbours of each node, scores from a part for each of the two."""

    def forward(m: nn.Module, x: Tensor, graph: Tensor) -> Tensor:
        edges = graph[:, None] == graph[None]
        for first in m.first:
            h = first(x)
            scores = F.leaky_relu(h @ m.here + (h @ m.there).T, 0.2)
            scores = torch.where(edges, scores, -9e15 * torch.ones_like(scores))
            x = F.elu(F.softmax(scores, dim=1) @ h)
        return m.last(x)

    first = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(layers)])
    return Apply(forward, first=first, here=P(3, 1), there=P(3, 1), last=nn.Linear(3, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda attend=attend: _network(attend) for name, attend in ATTENTION.items()},
    "neighbours": lambda: _neighbours(1),
    "neighbours of neighbours": lambda: _neighbours(2),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MODELS)
def test_quantities(name: str, order: str) -> None:
    torch.manual_seed(0)
    graph = GRAPH[ORDERS[order]]
    report = check(
        *(MODELS[name](), nn.CrossEntropyLoss(), (torch.randn(7, 3), graph), torch.arange(7) % 3),
        samples=lambda x, graph: (x, graph),
        sample_of_row=graph,
    )
    assert report.ok, f"\n{report}"


def _one_edge_too_many(s: Tensor, same: Tensor) -> Tensor:
    same = same.clone()
    same[0, -1] = True
    return s.masked_fill(~same, -torch.inf)


def _normalised_before(q: Tensor, k: Tensor, v: Tensor, same: Tensor) -> Tensor:
    scores = q @ k.T
    return (scores / scores.abs().sum(-1, keepdim=True) * same) @ v


def _zero(q: Tensor, k: Tensor, v: Tensor, same: Tensor) -> Tensor:
    """Entries of different samples are zero, but depend on both."""
    scores = q @ k.T
    return (scores - scores.detach()) @ v


def _of_all(q: Tensor, k: Tensor, v: Tensor, same: Tensor) -> Tensor:
    """Pairs within samples, times what is computed from all rows."""
    return (q @ k.T * same * v.mean()) @ v


def _one_for_each(q: Tensor, k: Tensor, v: Tensor, same: Tensor) -> Tensor:
    """The pairs within samples, once for each row of any sample."""
    return q @ k.T * same * v[:, :1, None]


MIXING: dict[str, Attend] = {
    "times a mean": _of_all,
    "for each row": lambda q, k, v, same: torch.einsum("kij,jc->ic", _one_for_each(q, k, v, same), v),
    "for each row, over both": lambda q, k, v, same: torch.einsum(
        "kij,ic->kc", _one_for_each(q, k, v, same), v
    ),
    "many factors": lambda q, k, v, same: _squared_often(q) @ _squared_often(k).T @ v,
    "transposed, no mask": lambda q, k, v, same: (q @ k.T).T @ v,
    "all columns": lambda q, k, v, same: v * (q @ k.T * same).sum(),
    "columns, no mask": lambda q, k, v, same: v * (q @ k.T).sum(0)[:, None],
    "no mask": _softmax(lambda s, same: s),
    "mask before softmax": _softmax(lambda s, same: s * same),
    "one edge too many": _softmax(_one_edge_too_many),
    "normalised before": _normalised_before,
    "zero": _zero,
    "zero by its inputs": lambda q, k, v, same: (0 * q @ k.T) @ v,
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_samples(name: str) -> None:
    model = extend(_network(MIXING[name]), samples=lambda x, graph: (x, graph))
    loss = F.cross_entropy(model(torch.randn(7, 3), GRAPH), torch.arange(7) % 3)
    where = (
        r"(matmul|mul|einsum)? ?(combines different|a reduction over the|a product over the) sample ax"
    )
    with (
        pytest.raises(RuntimeError, match=f"'last.weight'.*holds the samples: {where}"),
        backpack(BatchGrad(), certify="never"),
    ):
        loss.backward()
