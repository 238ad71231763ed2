"""Operations that pick entries."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.draft import Given, NoSuchProgram, Operation


def _one(rng: random.Random, size: int, count: int) -> Any:
    """An index of one axis."""
    kind = rng.choice([":", ":", "int", "slice", "list", "tensor", "column", "mask", "array"])
    rows = [rng.randrange(size) for _ in range(count)]
    start = rng.randrange(size)
    return {
        ":": slice(None),
        "int": rng.randrange(-size, size),
        "slice": slice(start, None, rng.choice([None, 2])),
        "list": rows,
        "tensor": torch.tensor(rows),
        "column": torch.tensor(rows).unsqueeze(1),
        "mask": torch.tensor([rng.random() < 0.6 for _ in range(size)]),
        "array": np.array(rows),
    }[kind]


def _index(t: Given) -> Any:
    """An index of several axes, as it is written in brackets."""
    rng, index, axis = t.rng, list[Any](), 0
    count = rng.choice([1, 2, 3, 4])
    while axis < t.x.dim() and len(index) < 6:
        if rng.random() < 0.1:
            index.append(None)
            continue
        if rng.random() < 0.1:
            index.append(...)
            break
        index.append(_one(rng, t.x.shape[axis], count))
        axis += 1
        if rng.random() < 0.25:
            break
    if not index:
        raise NoSuchProgram
    return tuple(index) if len(index) != 1 or rng.random() < 0.5 else index[0]


def _fixed(t: Given) -> Tensor:
    return torch.full_like(t.x, t.at, dtype=torch.long)


def _largest_first(t: Given) -> Tensor:
    return t.x.argsort(t.axis, descending=True)


def _by_key(t: Given) -> Tensor:
    """Rows along the axis, sorted by one entry of each."""
    keys = t.x.movedim(t.axis, 0).flatten(1).detach()[:, 0]
    return t.x.index_select(t.axis, keys.argsort())


_PICKS: dict[str, Callable[[Given], Tensor]] = {
    "index": lambda t: t.x[_index(t)],
    "index again": lambda t: t.x[_index(t)],
    "index_select": lambda t: t.x.index_select(t.axis, t.picks()),
    "permute rows": lambda t: t.x.index_select(t.axis, t.order()),
    "pick rows": lambda t: t.x[t.before() + (t.picks(),)],
    "sort rows": _by_key,
    "narrow": lambda t: t.x.narrow(t.axis, t.at, t.size - t.at),
    "select": lambda t: t.x.select(t.axis, t.at),
    "chunk": lambda t: t.x.chunk(2, t.axis)[-1],
    "split": lambda t: t.x.split(t.at + 1, t.axis)[0],
    "unbind": lambda t: t.x.unbind(t.axis)[t.at],
    "tensor_split": lambda t: t.x.tensor_split(2, t.axis)[0],
    "hsplit": lambda t: torch.hsplit(t.x, [1])[0],
    "gather": lambda t: t.x.gather(t.axis, _fixed(t)),
    "take_along_dim": lambda t: torch.take_along_dim(t.x, _largest_first(t), t.axis),
    "masked_select": lambda t: t.x.masked_select(t.x.detach() > -10),
    "take": lambda t: t.x.take(t.picks()),
    "diagonal": lambda t: t.x.diagonal(dim1=0, dim2=1),
    "as_strided": lambda t: t.x.as_strided(
        (t.x.shape[0], max(1, t.x.shape[-1] - 1)), (t.x.stride(0), 1), t.x.storage_offset()
    ),
}
PICKS = [Operation(name, run) for name, run in _PICKS.items()]
