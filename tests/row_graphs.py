"""Graph networks as they are written with torch alone: layers, normalisation, readout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backpack as bp
from tests.row_cases import ADJACENCY, EDGES, GRAPH, NODES, SIZES, RowCase, data, scatter

EDGE = data(EDGES.shape[1], 2, seed=11)  # features of edges
OF_EDGE = GRAPH[EDGES[0]]
KIND = torch.arange(EDGES.shape[1]) % 2  # of an edge
TYPES = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1, 0])  # of a node
POSITIONS = data(9, 3, seed=12)


def add(x: Tensor, index: Tensor, size: int) -> Tensor:
    return x.new_zeros(size, *x.shape[1:]).index_add(0, index, x)


def softmax(score: Tensor, index: Tensor, size: int) -> Tensor:
    """Over the rows of each segment, for each head."""
    places = index[:, None].expand_as(score)
    highest = score.new_full((size, score.shape[1]), -torch.inf)
    highest = highest.scatter_reduce(0, places, score.detach(), "amax")
    exp = (score - highest[index]).exp()
    return exp / (add(exp, index, size)[index] + 1e-16)


class Network(nn.Module):
    """Layers with edges, and a head on the sums over graphs."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 3), nn.Linear(width, 2)

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        raise NotImplementedError

    def pool(self, x: Tensor, batch: Tensor) -> Tensor:
        return add(x, batch, 3)

    def forward(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        h = self.embed(x).tanh()
        return self.head(self.pool(self.layer(h, edges, features, batch), batch))


class GATWithEdges(Network):
    """Two heads of additive attention, which looks at the edge too; softmax over neighbours."""

    def __init__(self) -> None:
        super().__init__(4)
        self.project, self.edge = nn.Linear(3, 4), nn.Linear(2, 4)
        self.left = nn.Parameter(torch.randn(1, 2, 2))
        self.right = nn.Parameter(torch.randn(1, 2, 2))
        self.bias = nn.Parameter(torch.randn(4))

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        source, target = edges
        h = self.project(x).view(-1, 2, 2)
        left, right = (h * self.left).sum(-1), (h * self.right).sum(-1)
        edge = self.edge(features).view(-1, 2, 2)
        score = F.leaky_relu(left[source] + right[target] + edge.sum(-1), 0.2)
        weight = softmax(score, target, len(x))
        return (add(h[source] * weight[..., None], target, len(x)).flatten(1) + self.bias).tanh()


class GATv2(Network):
    """The score is a product with what a nonlinearity makes of both ends."""

    def __init__(self) -> None:
        super().__init__(6)
        self.left, self.right = nn.Linear(3, 6), nn.Linear(3, 6)
        self.attend = nn.Parameter(torch.randn(1, 2, 3))

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        left, right = self.left(x).view(-1, 2, 3), self.right(x).view(-1, 2, 3)
        both = F.leaky_relu(left[edges[0]] + right[edges[1]], 0.2)
        weight = softmax((both * self.attend).sum(-1), edges[1], len(x))
        out = torch.zeros_like(right).index_add_(0, edges[1], left[edges[0]] * weight.unsqueeze(-1))
        return F.elu(out.flatten(1))


class SAGE(Network):
    """Means and largest of neighbours; rows of length one."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.largest, self.own = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        near = x.index_select(0, edges[0])
        mean = scatter(near, edges[1], len(x), "mean")
        largest = scatter(near, edges[1], len(x), "amax")
        return F.normalize(self.mean(mean) + self.largest(largest) + self.own(x), dim=-1)


class EdgeNetwork(Network):
    """A matrix for each edge, made from its features."""

    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 9))
        self.gru = nn.GRUCell(3, 3)

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        matrices = self.edge(features).view(-1, 3, 3)
        for _ in range(2):
            messages = torch.bmm(x[edges[0]].unsqueeze(1), matrices).squeeze(1)
            x = self.gru(add(messages, edges[1], len(x)), x)
        return x


class GINE(Network):
    def __init__(self) -> None:
        super().__init__()
        self.edge, self.eps = nn.Linear(2, 3), nn.Parameter(torch.zeros(()))
        self.mlp = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        messages = F.softplus(x[edges[0]] + self.edge(features))
        return self.mlp((1 + self.eps) * x + add(messages, edges[1], len(x)))


class GraphNorm(Network):
    """Normalised within graphs; how much of the mean is taken away is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.alpha, self.scale = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))
        self.shift = nn.Parameter(torch.rand(3))

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        h = self.lin(x + add(x[edges[0]], edges[1], len(x)))
        count = torch.bincount(batch).to(x)[:, None]
        out = h - (add(h, batch, 3) / count)[batch] * self.alpha
        deviation = (add(out.pow(2), batch, 3) / count + 1e-2).sqrt()[batch]
        return (self.scale * out / deviation + self.shift).tanh()


class GlobalAttention(Network):
    """A gate, softmax over the nodes of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.value = nn.Linear(3, 3)

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        return x + scatter(x[edges[0]], edges[1], len(x))

    def pool(self, x: Tensor, batch: Tensor) -> Tensor:
        return add(softmax(self.gate(x), batch, 3) * self.value(x), batch, 3)


class Set2Set(GlobalAttention):
    """A recurrent cell asks the nodes, three times."""

    def __init__(self) -> None:
        super().__init__()
        del self.gate, self.value
        self.cell, self.head = nn.LSTMCell(6, 3), nn.Linear(6, 2)

    def pool(self, x: Tensor, batch: Tensor) -> Tensor:
        state = x.new_zeros(3, 3), x.new_zeros(3, 3)
        asked = x.new_zeros(3, 6)
        for _ in range(3):
            state = self.cell(asked, state)
            weight = softmax((x * state[0][batch]).sum(-1, keepdim=True), batch, 3)
            asked = torch.cat([state[0], add(weight * x, batch, 3)], -1)
        return asked


class EdgeConv(Network):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        x_j, x_i = x[edges[0]], x[edges[1]]
        return scatter(self.mlp(torch.cat([x_i, x_j - x_i], -1)), edges[1], len(x), "amax")


class PNA(Network):
    """Several ways to put neighbours together, times powers of the degree."""

    def __init__(self) -> None:
        super().__init__()
        self.post = nn.Linear(3 * 4 * 3, 3)

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        near, size = x[edges[0]], len(x)
        ways = [scatter(near, edges[1], size, how) for how in ("mean", "amax", "amin")]
        square = scatter(near * near, edges[1], size, "mean")
        ways.append((F.relu(square - ways[0] ** 2) + 1e-2).sqrt())
        joined = torch.cat(ways, -1)
        degree = torch.bincount(edges[1], minlength=size).to(x)[:, None]
        scale = (degree + 1).log()
        return self.post(torch.cat([joined, joined * scale, joined / scale.clamp(min=0.1)], -1))


class Relational(Network):
    """A weight for each kind of edge, picked by the kind; a table of kinds of nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Parameter(torch.randn(2, 3, 3))
        self.types, self.own = nn.Embedding(3, 3), nn.Linear(3, 3)

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        x = x + self.types(TYPES)
        messages = torch.einsum("ei,eij->ej", x[edges[0]], self.kinds[KIND])
        out = self.own(x)
        for kind in range(2):  # and as loops over kinds do it
            at = kind == KIND
            out = out + add(x[edges[0, at]] @ self.kinds[kind], edges[1, at], len(x))
        return (out + add(messages, edges[1], len(x))).tanh()


class VirtualNode(Network):
    """A node that all nodes of a graph are joined to, and what all layers have made."""

    def __init__(self) -> None:
        super().__init__(9)
        self.virtual = nn.Embedding(1, 3)
        self.convs = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
        self.update = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        node = self.virtual(torch.zeros(3, dtype=torch.long))
        made = [x]
        for conv in self.convs:
            h = made[-1] + node[batch]
            made.append(conv(h + add(h[edges[0]], edges[1], len(x))).tanh())
            node = node + self.update(add(h, batch, 3) + node)
        return torch.cat(made, -1) + node[batch].repeat(1, 3)


class DenseBatch(Network):
    """Nodes are put into a padded batch, where heads attend with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        first = torch.cumsum(SIZES, 0) - SIZES
        place = torch.arange(len(x)) - first[batch]
        padded = x.new_zeros(3, 4, 3)
        padded[batch, place] = x
        mask = torch.ones(3, 4, dtype=torch.bool)
        mask[batch, place] = False
        out = self.attention(padded, padded, padded, key_padding_mask=mask)[0]
        return x + out[~mask]


class EachGraph(Network):
    """Readout in a loop over graphs, by masks; deviations too."""

    def __init__(self) -> None:
        super().__init__(6)

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        return x + add(x[edges[0]] * features.sum(-1, keepdim=True), edges[1], len(x))

    def pool(self, x: Tensor, batch: Tensor) -> Tensor:
        graphs = [x[batch == g] for g in range(3)]
        return torch.stack([torch.cat([h.mean(0), h.std(0)]) for h in graphs])


class TopK(Network):
    """The two nodes of each graph that a projection likes most, and how much."""

    def __init__(self) -> None:
        super().__init__()
        self.like = nn.Parameter(torch.randn(3))

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        return x + add(x[edges[0]], edges[1], len(x))

    def pool(self, x: Tensor, batch: Tensor) -> Tensor:
        score = (x * self.like).sum(-1) / self.like.norm()
        best = [torch.where(batch == g)[0][score[batch == g].topk(2)[1]] for g in range(3)]
        kept = torch.cat(best)
        return add(x[kept] * score[kept].tanh()[:, None], batch[kept], 3)


class Distances(Network):
    """Filters made from distances, and positions that are moved (equivariantly)."""

    def __init__(self) -> None:
        super().__init__(4)
        self.filter = nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 3))
        self.move = nn.Linear(3, 1)

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        position = bp.mark(POSITIONS.clone(), batch)
        for _ in range(2):
            between = position[edges[1]] - position[edges[0]]
            far = between.pow(2).sum(-1, keepdim=True)
            basis = torch.exp(-((far - torch.arange(4)) ** 2))
            messages = x[edges[0]] * self.filter(basis)
            position = position + scatter(
                between / (far + 1).sqrt() * self.move(messages).tanh(), edges[1], len(x), "mean"
            )
            x = x + add(messages, edges[1], len(x))
        return torch.cat([x, position.pow(2).sum(-1, keepdim=True)], -1)


class Polynomial(Network):
    """Chebyshev polynomials of a sparse Laplacian."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])

    def layer(self, x: Tensor, edges: Tensor, features: Tensor, batch: Tensor) -> Tensor:
        degree = ADJACENCY.sum(1).rsqrt()
        laplacian = (torch.eye(9).to(x) - degree[:, None] * ADJACENCY * degree).to_sparse()
        terms = [x, laplacian @ x]
        terms.append(2 * (laplacian @ terms[1]) - terms[0])
        return torch.stack([lin(t) for lin, t in zip(self.weights, terms, strict=True)]).sum(0).tanh()


class Nodes(GINE):
    """A prediction for each node."""

    def pool(self, x: Tensor, batch: Tensor) -> Tensor:
        return x


class Links(GINE):
    """A prediction for each edge, from both of its ends."""

    def pool(self, x: Tensor, batch: Tensor) -> Tensor:
        return x[EDGES[0]] * x[EDGES[1]]


def whose(model: nn.Module) -> None:
    """Nodes and edges belong to graphs."""
    bp.extend(
        model,
        samples=lambda x, edges, features, batch: [(x, batch), (features, batch[edges[0]])],
    )


def graphs(model: Callable[[], nn.Module], owner: Tensor | None = None, **more: Any) -> RowCase:
    owners = list(range(3)) if owner is None else owner.tolist()
    return RowCase(model, lambda m: m(NODES, EDGES, EDGE, GRAPH), owners, 3, whose, **more)


GRAPH_CASES: dict[str, RowCase] = {
    f"graphs, {kind.__name__}": graphs(kind)
    for kind in (
        *(GATWithEdges, GATv2, SAGE, EdgeNetwork, GINE, GraphNorm, GlobalAttention, Set2Set),
        *(EdgeConv, PNA, Relational, VirtualNode, DenseBatch, EachGraph, TopK, Distances),
        Polynomial,
    )
} | {
    "graphs, Nodes": graphs(Nodes, GRAPH),
    "graphs, Links": graphs(Links, OF_EDGE),
}
