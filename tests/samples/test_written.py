"""Parameters written to picked entries, and axes inside of a sample that hold nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, tensor

from backpack.testing.oracle import check

Use = Callable[[Tensor, Tensor], Tensor]


class Uses(nn.Module):
    """Activations ``[3, 4]`` and a parameter in one expression."""

    def __init__(self, use: Use, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.l, self.use = nn.Linear(3, 4), use
        self.p = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.l(x).clone(), self.p)


def at(index: Any) -> Use:
    def write(h: Tensor, p: Tensor) -> Tensor:
        h[index] = p
        return h

    return write


CELLS = tensor([[0, 1], [2, 0]]), tensor([[0, 1], [2, 3]])  # two of sample 0, on no axis
MASK = tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 0]]).bool()
ROWS, NO_ROWS = tensor([1, 0, 1]).bool(), torch.zeros(3).bool()

WRITES: dict[str, tuple[Use, tuple[int, ...]]] = {
    "cells": (at(CELLS), (2, 2)),
    "cells, row": (at(CELLS), (2,)),
    "cells, column": (at(CELLS), (2, 1)),
    "cells, one": (at(CELLS), ()),
    "mask": (at(MASK), (6,)),
    "mask, one": (at(MASK), ()),
    "rows": (at(ROWS), (2, 4)),
    "rows, one row": (at(ROWS), (4,)),
    "rows, one column": (at(ROWS), (2, 1)),
    "rows, lead": (at(ROWS), (1, 1, 4)),
    "columns": (at((slice(1, None), tensor([0, 2]))), (2,)),
    "no rows": (at(NO_ROWS), (4,)),
    "no rows, one": (at(NO_ROWS), ()),
    "no rows, lead": (at(NO_ROWS), (1, 4)),
    "nowhere": (at(MASK & False), ()),
    "empty slice": (at(slice(1, 1)), (4,)),
    "no columns": (at((slice(None), torch.zeros(4).bool())), (1,)),
    "index_put": (lambda h, p: h.index_put((tensor([0, 0, 2]),), p, accumulate=True), (4,)),
    "masked_scatter": (lambda h, p: h.masked_scatter(MASK, p), (6,)),
    "masked_fill": (lambda h, p: h.masked_fill(MASK, p), ()),
}
EMPTY: dict[str, tuple[Use, tuple[int, ...]]] = {
    "matmul over nothing": (lambda h, p: h + h[:, :0] @ p[:0], (4, 4)),
    "matmul over nothing at positions": (lambda h, p: h + (h[:, None, :0] @ p[:0]).sum(1), (4, 4)),
    "linear over nothing": (lambda h, p: h + F.linear(h[:, None, :0], p[:, :0]).sum(1), (4, 4)),
    "linear at no position": (lambda h, p: h + F.linear(h[:, None][:, :0], p).sum(1), (4, 4)),
    "factor at no position": (lambda h, p: h + (h[:, None][:, :0] * p).sum(1), (4,)),
    "no words": (lambda h, p: h + p[torch.zeros(3, 0, dtype=torch.long)].sum(1), (5, 4)),
    "norm of nothing": (lambda h, p: h + F.layer_norm(h[:, None][:, :0], (4,), p).sum(1), (4,)),
}


@pytest.mark.parametrize("name", [*WRITES, *EMPTY])
def test_against_brute_force(name: str) -> None:
    torch.manual_seed(0)
    model = Uses(*(WRITES | EMPTY)[name])
    report = check(model, F.cross_entropy, torch.randn(3, 3), torch.tensor([0, 3, 1]))
    assert report.ok, report
