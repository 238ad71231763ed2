"""Layers of torch_geometric, unmodified: quantities of each graph, by brute force in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import extend, extensions, mark
from tests.idioms.compare import Comparison
from tests.idioms.reference import Expanded, Truth

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

N, D, W = 4, 3, 4


def _mlp(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, W), nn.Tanh(), nn.Linear(W, W))


# Two layers for features of 3 and 4 numbers.
LAYERS: dict[str, Callable[[Any], list[nn.Module]]] = {
    "GCN": lambda g: [g.GCNConv(D, W), g.GCNConv(W, W)],
    "GAT": lambda g: [g.GATConv(D, W, heads=2, concat=False), g.GATConv(W, W)],
    "GATv2": lambda g: [g.GATv2Conv(D, W, heads=2, concat=False), g.GATv2Conv(W, W)],
    "GIN": lambda g: [g.GINConv(_mlp(D), train_eps=True), g.GINConv(_mlp(W))],
    "SAGE": lambda g: [g.SAGEConv(D, W), g.SAGEConv(W, W, aggr="max")],
    "GraphConv": lambda g: [g.GraphConv(D, W), g.GraphConv(W, W)],
    "transformer": lambda g: [g.TransformerConv(D, W), g.TransformerConv(W, W)],
    "Chebyshev": lambda g: [g.ChebConv(D, W, 2), g.TAGConv(W, W, 2)],
    "edges": lambda g: [g.EdgeConv(_mlp(2 * D)), g.GatedGraphConv(W, 2)],
}
POOLS = ("global_mean_pool", "global_add_pool", "global_max_pool")


class Network(nn.Module):
    """Two layers, readout, a head; takes a batch of graphs as it comes from a loader."""

    def __init__(self, name: str, pool: str, norm: bool) -> None:
        import torch_geometric.nn as geometric

        super().__init__()
        self.layers = nn.ModuleList(LAYERS[name](geometric))
        self.norm = geometric.GraphNorm(W) if norm else None
        self.pool, self.head = getattr(geometric, pool), nn.Linear(W, 2)

    def forward(self, data: Any) -> Tensor:
        first, second = self.layers
        h = first(data.x, data.edge_index)
        h = h if self.norm is None else self.norm(h, data.batch)
        h = second(h.tanh(), data.edge_index).tanh()
        return self.head(self.pool(h, data.batch))


def _graphs() -> Any:
    from torch_geometric.data import Batch, Data

    torch.manual_seed(0)
    graphs = []
    for nodes in (3, 5, 4, 2):
        near = torch.rand(nodes, nodes) < 0.5
        near = (near | near.T).fill_diagonal_(False)
        near[0, 1] = near[1, 0] = True
        x = torch.randn(nodes, D, dtype=torch.float64)
        graphs.append(Data(x=x, edge_index=near.nonzero().T.contiguous()))
    return Batch.from_data_list(graphs)


def _of(*names: str) -> tuple:
    return tuple(getattr(extensions, name)() for name in names)


GROUPS = {
    "first": _of("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"),
    "ggn": _of("DiagGGNExact", "BatchDiagGGNExact", "SqrtGGNExact", "GGNMP"),
    "hessian": _of("DiagHessian", "BatchDiagHessian", "HMP"),
}


@pytest.mark.parametrize("pool, norm", [(POOLS[0], True), (POOLS[1], False), (POOLS[2], False)])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, pool: str, norm: bool) -> None:
    data, y = _graphs(), torch.arange(N) % 2
    model = Network(name, pool, norm).double().eval()
    owner = torch.arange(N).repeat_interleave(2)
    at = Expanded(dict(model.named_parameters()), [model(data)], owner, N)
    truth = Truth(at, lambda outputs: F.cross_entropy(outputs[0], y))
    if name == "GCN":
        extend(model, samples=lambda data: (data.x, data.batch))
    else:
        extend(model)
        mark(data.x, data.batch)
    backward = lambda: F.cross_entropy(model(data), y).backward()  # noqa: E731
    outcome = Comparison(truth, model, backward).outcome(GROUPS)
    assert not any(outcome.values()), outcome
