"""The modules and losses that the original library lists, each with every second-order quantity."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from backpack import extensions as E
from backpack.testing.oracle import check
from tests.blocks import Blocks
from tests.cases import Apply, flat, ids, norm, x

N = 3
DIAGONALS = [
    E.DiagGGNExact(),
    E.DiagGGNMC(),
    E.BatchDiagGGNExact(),
    E.BatchDiagGGNMC(),
    E.SqrtGGNExact(),
    E.SqrtGGNMC(),
    E.DiagHessian(),
    E.BatchDiagHessian(),
]
BLOCKS = [E.KFLR(), E.KFAC(), E.GGNMP(), E.HMP()]
LOSSES = {
    "MSE": (nn.MSELoss(), lambda f: torch.randn_like(f)),
    "CE": (nn.CrossEntropyLoss(), lambda f: torch.randint(f.shape[1], (len(f),))),
}


class Row(NamedTuple):
    """A module of the table in a small model."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]


def head() -> nn.Module:
    """Positions are averaged with unequal weights."""

    def forward(m: Any, a: Tensor) -> Tensor:
        a = a.flatten(2)
        return m.l((a * torch.linspace(-1, 2, a.shape[2], dtype=a.dtype)).mean(2))

    return Apply(forward, l=nn.Linear(2, 3))


def conv(dim: int, transposed: bool = False) -> Row:
    """Two such modules, and a linear layer."""
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dim}d")
    first = {"stride": 2} if transposed else {"stride": 2, "padding": 1}
    return Row(
        kind.__name__,
        lambda: nn.Sequential(kind(1, 2, 2, **first), nn.Tanh(), kind(2, 2, 2), head()),
        x(N, 1, *[2 if transposed else 4] * dim),
    )


def between(dim: int, module: Callable[[], nn.Module], size: int = 4) -> Row:
    """A module between a convolution and a linear layer, at two channels."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    return Row(
        type(module()).__name__,
        lambda: nn.Sequential(kind(1, 2, 2), module(), head()).eval(),
        x(N, 1, *[size] * dim),
    )


def flat_between(module: Callable[[], nn.Module]) -> Row:
    """A module between linear layers."""
    return Row(
        type(module()).__name__,
        lambda: nn.Sequential(nn.Linear(3, 4), module(), nn.Linear(4, 3)).eval(),
        x(N, 3),
    )


def recurrent(kind: type[nn.RNN] | type[nn.LSTM]) -> Row:
    last = lambda m, a: m.o(m.l(a)[0].flatten(1))
    return Row(
        kind.__name__,
        lambda: Apply(last, l=kind(2, 2, batch_first=True), o=nn.Linear(4, 3)),
        x(N, 2, 2),
    )


def pooling(dim: int) -> list[Row]:
    return [
        between(dim, partial(getattr(nn, f"{name}Pool{dim}d"), 2))
        for name in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax")
    ]


def padding(dim: int) -> list[Row]:
    return [
        between(dim, partial(getattr(nn, f"{name}Pad{dim}d"), 1, *value), 3)
        for name, value in (("Zero", ()), ("Constant", (0.7,)), ("Reflection", ()), ("Replication", ()))
    ]


ROWS = [
    *(conv(dim) for dim in (1, 2, 3)),
    *(conv(dim, True) for dim in (1, 2, 3)),
    *(between(d, lambda d=d: norm(getattr(nn, f"BatchNorm{d}d")(2)), 3) for d in (1, 2, 3)),
    recurrent(nn.RNN),
    recurrent(nn.LSTM),
    Row("Linear", lambda: nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 3)), x(N, 3)),
    Row("Linear, positions", lambda: flat(nn.Linear(3, 2), nn.Sigmoid(), nn.Linear(2, 2)), x(N, 2, 3)),
    Row("Embedding", lambda: nn.Sequential(*flat(nn.Embedding(5, 2)), nn.Linear(4, 3)), ids(5, N, 2)),
    *(row for dim in (1, 2, 3) for row in pooling(dim)),
    *(
        flat_between(kind)
        for kind in (
            *(nn.ELU, nn.LeakyReLU, nn.ReLU, nn.SELU, nn.Tanh, nn.Sigmoid, nn.LogSigmoid),
            *(nn.Identity, nn.Dropout),
        )
    ),
    flat_between(lambda: nn.Softmax(1)),
    flat_between(lambda: nn.Softmin(1)),
    between(2, nn.Softmax2d, 3),
    Row(
        "Flatten",
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3)),
        x(N, 1, 3, 3),
    ),
    *(row for dim in (1, 2, 3) for row in padding(dim)),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_second_order(row: Row, loss: str) -> None:
    torch.manual_seed(0)
    model, X, (lossfunc, target) = row.model(), row.inputs(), LOSSES[loss]
    with torch.no_grad():
        y = target(model(X))
    report = check(model, lossfunc, X, y, DIAGONALS)
    blocks = Blocks(model, lossfunc, X, y)
    for ext in BLOCKS:
        report.errors |= blocks.compare(ext).errors
    assert report.ok, f"\n{report}"
    assert len(report.errors) == len(dict(model.named_parameters())) * len(DIAGONALS + BLOCKS)
