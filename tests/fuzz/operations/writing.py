"""Operations that write entries: to places, and in place through views."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.fuzz.draft import Given, Operation


def _fixed(t: Given) -> Tensor:
    return torch.full_like(t.x, t.at, dtype=torch.long)


def _first(t: Given) -> Tensor:
    """A place for the first entries only."""
    return _fixed(t).narrow(t.axis, 0, 1)


def _row(t: Given) -> list[list[int]]:
    return [list(t.x.select(t.axis, 0).shape)]


def _assigned(t: Given, index: object, value: Tensor | float) -> Tensor:
    base = t.base().clone()
    base[t.before() + (index,)] = value
    return base


def _masked(t: Given) -> Tensor:
    base = t.base().clone()
    base[t.x.detach() > 0] = 0.3
    return base


def _index_put(t: Given) -> Tensor:
    if t.dim == 0:
        return t.base().index_put((t.order(),), t.x.tanh())
    rows = torch.arange(t.x.shape[0]).unsqueeze(1)
    return t.base().index_put((rows, torch.arange(t.x.shape[1]).unsqueeze(0)), t.x.tanh())


def _routed(t: Given) -> Tensor:
    """Rows by a mask made from data, to one of two operations."""
    mask = t.x.detach().flatten(1)[:, 0] > 0
    out = torch.zeros_like(t.x)
    out[mask] = t.x[mask].tanh()
    out[~mask] = 2 * t.x[~mask]
    return out


_WRITES: dict[str, Callable[[Given], Tensor]] = {
    "scatter_add": lambda t: t.base().scatter_add(t.axis, _fixed(t), t.x),
    "scatter": lambda t: t.base().scatter(t.axis, t.x.argsort(t.axis), t.x.tanh()),
    "scatter of larger": lambda t: torch.zeros_like(t.x).scatter(t.axis, _first(t), t.x.tanh()),
    "scatter_add of larger": lambda t: torch.zeros_like(t.x).scatter_add(t.axis, _first(t), t.x),
    "index_add": lambda t: t.base().index_add(t.axis, t.picks(t.size), t.x),
    "index_copy": lambda t: t.base().index_copy(t.axis, t.order(), t.x.tanh()),
    "index_put": _index_put,
    "assign": lambda t: _assigned(t, t.at, 2 * t.x.select(t.axis, 0)),
    "assign rows": lambda t: _assigned(t, t.order(), t.x.tanh()),
    "assign mask": _masked,
    "fill zeros": lambda t: _assigned(t, slice(0, t.size), t.x),
    "route": _routed,
    "select_scatter": lambda t: t.base().select_scatter(t.x.select(t.axis, 0).tanh(), t.axis, t.at),
    "slice_scatter": lambda t: t.base().slice_scatter(t.x.narrow(t.axis, 0, 1), t.axis, t.at, t.at + 1),
    "diagonal_scatter": lambda t: t.x.diagonal_scatter(2 * t.x.diagonal()),
    "index_fill": lambda t: t.x.index_fill(t.axis, t.picks(1), 0.5),
    "masked_fill": lambda t: t.x.masked_fill(t.x.detach() > 0.5, 0.1),
    # The mask is no data: entries would move with other samples' values.
    "masked_scatter": lambda t: t.base().masked_scatter(
        torch.arange(t.x.numel()).reshape(t.x.shape) % 3 == t.at % 3, t.x
    ),
    "put": lambda t: t.base().put(torch.arange(t.x.numel()).flip(0), t.x),
}
WRITES = [Operation(name, run) for name, run in _WRITES.items()]
WRITES += [
    Operation("assign parameter", lambda t: _assigned(t, t.at, t.p[0]), _row),
    Operation(
        "index_add parameter",
        lambda t: t.base().index_add(t.axis, t.picks(t.size), t.p[0]),
        lambda t: [t.x.shape],
    ),
]


# --------------------------------------------------------------------------------------
# In place through a view: views of a tensor, and what of another has their shape

_VIEWS: dict[str, tuple[Callable[[Given, Tensor], Tensor], Callable[[Given], Tensor]]] = {
    "select": (lambda t, b: b.select(t.axis, t.at), lambda t: t.x.select(t.axis, 0)),
    "narrow": (
        lambda t, b: b.narrow(t.axis, t.at, t.size - t.at),
        lambda t: t.x.narrow(t.axis, 0, t.size - t.at),
    ),
    "slice": (
        lambda t, b: b[t.before() + (slice(t.at, None),)],
        lambda t: t.x[t.before() + (slice(0, t.size - t.at),)],
    ),
    "transpose": (lambda t, b: b.transpose(t.axis, t.other_axis()), lambda t: t.x),
    "itself": (lambda t, b: b, lambda t: t.x),
    "flat": (lambda t, b: b.view(-1), lambda t: t.x.reshape(-1).flip(0)),
    "unbind": (lambda t, b: b.unbind(t.axis)[t.at].view_as(b.select(t.axis, t.at)), lambda t: t.x.select(t.axis, -1)),
    "chunk": (lambda t, b: b.narrow(t.axis, 0, 1), lambda t: t.x.narrow(t.axis, t.size - 1, 1)),
    "diagonal": (lambda t, b: b.diagonal(), lambda t: t.x.diagonal().flip(-1)),
}  # fmt: skip
_CHANGES: dict[str, Callable[[Tensor, Tensor, list[Tensor]], Tensor]] = {
    "mul_": lambda view, source, p: view.mul_(1.5),
    "add_": lambda view, source, p: view.add_(0.5),
    "zero_": lambda view, source, p: view.zero_(),
    "tanh_": lambda view, source, p: view.tanh_(),
    "copy_": lambda view, source, p: view.copy_(source),
    "add_ other": lambda view, source, p: view.add_(source, alpha=0.7),
    "mul_ parameter": lambda view, source, p: view.mul_(p[0]),
    "add_ parameter": lambda view, source, p: view.add_(p[0]),
}


def _through(view: str, change: str) -> Callable[[Given], Tensor]:
    """Change a copy through a view of it; the copy, or a view taken before, is the result."""
    seen, source = _VIEWS[view]

    def run(t: Given) -> Tensor:
        base = t.base().clone()
        sibling = base.view(base.shape)
        _CHANGES[change](seen(t, base), source(t), t.p)
        return sibling if t.seed % 4 == 0 else base

    return run


IN_PLACE = [
    Operation(
        f"{change} of {view}",
        _through(view, change),
        (lambda t: [[]]) if change.endswith("parameter") else None,
    )
    for view in _VIEWS
    for change in _CHANGES
]
