"""Operations that change a tensor's shape, and that join tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.fuzz.draft import Given, Operation


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _sizes(t: Given) -> list[int]:
    """Some shape of as many entries."""
    rng, left, shape = t.rng, t.x.numel(), list[int]()
    while left > 1 and len(shape) < 4:
        shape.append(rng.choice([d for d in _divisors(left) if d <= 12]))
        left //= shape[-1]
    shape.append(left)
    if rng.random() < 0.3:
        rng.shuffle(shape)
    return shape


def _permutation(t: Given) -> list[int]:
    axes = list(range(t.x.dim()))
    t.rng.shuffle(axes)
    return axes


def _expanded(t: Given) -> list[int]:
    rng = t.rng
    return [size if size != 1 else rng.choice([1, 2, 3]) for size in t.x.shape]


def _repeats(t: Given) -> list[int]:
    rng = t.rng
    return [rng.choice([1, 1, 2]) for _ in range(t.x.dim() + (rng.random() < 0.3))]


def _parts(t: Given) -> tuple[int, int]:
    first = t.rng.choice(_divisors(t.size))
    return first, t.size // first


_SHAPES: dict[str, Callable[[Given], Tensor]] = {
    "reshape": lambda t: t.x.reshape(_sizes(t)),
    "view": lambda t: t.x.contiguous().view(_sizes(t)),
    "permute": lambda t: t.x.permute(_permutation(t)),
    "movedim": lambda t: t.x.movedim(t.axis, t.other_axis()),
    "transpose": lambda t: t.x.transpose(t.axis, t.other_axis()),
    "swapaxes": lambda t: t.x.swapaxes(t.other_axis(), t.axis),
    "flatten": lambda t: t.x.flatten(*sorted((t.dim, t.other_axis()))),
    "squeeze": lambda t: t.x.squeeze(),
    "squeeze axis": lambda t: t.x.squeeze(t.axis),
    "unflatten": lambda t: t.x.unflatten(t.axis, _parts(t)),
    "expand": lambda t: t.x.expand(_expanded(t)),
    "repeat": lambda t: t.x.repeat(_repeats(t)),
    "tile": lambda t: torch.tile(t.x, _repeats(t)),
    "repeat_interleave": lambda t: t.x.repeat_interleave(2, t.axis),
    "t": lambda t: t.x.t(),
    "mT": lambda t: t.x.mT,
}
_ANY: dict[str, Callable[[Given], Tensor]] = {
    "unsqueeze": lambda t: t.x.unsqueeze(t.rng.randint(-t.x.dim() - 1, t.x.dim())),
    "expand in front": lambda t: t.x.expand(t.rng.choice([1, 2, 3]), *t.x.shape),
    "broadcast_tensors": lambda t: torch.broadcast_tensors(t.x, torch.zeros(2, *t.x.shape))[0],
}
SHAPES = [Operation(name, run) for name, run in _SHAPES.items()]
SHAPES += [Operation(name, run, dims=(0, 9)) for name, run in _ANY.items()]


_JOINS: dict[str, Callable[[Given], Tensor]] = {
    "cat": lambda t: torch.cat([t.x, t.y], t.axis),
    "stack": lambda t: torch.stack([t.x, t.y], t.axis),
    "hstack": lambda t: torch.hstack([t.x, t.y]),
    "vstack": lambda t: torch.vstack([t.x, t.y]),
    "cat flipped": lambda t: torch.cat([t.x, t.x.flip(t.axis)], t.axis),
    "cat three": lambda t: torch.cat([t.x, 2 * t.x, t.x.tanh()], t.axis),
    "stack list": lambda t: torch.stack(list(t.x.unbind(t.axis)), t.axis),
    "stack reversed": lambda t: torch.stack(t.x.unbind(t.axis)[::-1], t.axis),
    "cat reversed": lambda t: torch.cat(t.x.chunk(2, t.axis)[::-1], t.axis),
    "block_diag": lambda t: torch.block_diag(t.x, t.y),
    "meshgrid": lambda t: torch.meshgrid(t.x, t.x, indexing="ij")[t.at % 2],
    "cartesian_prod": lambda t: torch.cartesian_prod(t.x, t.x),
}


def _row(t: Given) -> list[list[int]]:
    shape = list(t.x.shape)
    shape[t.axis] = t.rng.choice([1, 2])
    return [shape]


def _cat_parameter(t: Given) -> Tensor:
    both = [t.p[0], t.x]
    return torch.cat(both if t.seed % 2 else both[::-1], t.axis)


JOINS = [Operation(name, run) for name, run in _JOINS.items()]
JOINS += [
    Operation("cat parameter", _cat_parameter, _row),
    Operation("stack parameter", lambda t: torch.stack([t.x, t.p[0]], t.axis), lambda t: [t.x.shape]),
]
