"""Reductions of an axis, and operations along one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz.draft import Given, Operation


def _reduce(name: str) -> Callable[[Given], Tensor]:
    return lambda t: getattr(torch, name)(t.x, t.axes(), t.keeps())


def _values(name: str) -> Callable[[Given], Tensor]:
    return lambda t: getattr(t.x, name)(t.axis, t.keeps())[0]


def _along(name: str) -> Callable[[Given], Tensor]:
    return lambda t: getattr(torch, name)(t.x, t.axis)


_REDUCING: dict[str, Callable[[Given], Tensor]] = {
    **{name: _reduce(name) for name in "sum mean amax amin logsumexp nansum".split()},
    **{name: _values(name) for name in "max min median mode".split()},
    "var": lambda t: (t.x + 0.1 * t.x.square()).var(t.axes(), unbiased=False, keepdim=t.keeps()),
    "std": lambda t: (t.x.var(t.axes(), unbiased=False, keepdim=t.keeps()) + 0.1).sqrt(),
    "var_mean": lambda t: torch.var_mean(t.x, t.axis, unbiased=False, keepdim=t.keeps())[1],
    "norm": lambda t: torch.norm(t.x, 2, t.axis, t.keeps()),
    "vector_norm": lambda t: torch.linalg.vector_norm(t.x, 3, t.axes(), t.keeps()),
    "prod": lambda t: t.x.prod(t.axis, t.keeps()),
    "kthvalue": lambda t: t.x.kthvalue(1, t.axis, t.keeps())[0],
    "quantile": lambda t: t.x.quantile(0.4, t.axis, t.keeps()),
    "cummax": lambda t: t.x.cummax(t.axis)[0],
    "sum all": lambda t: t.x.sum().expand(t.size),
}
REDUCING = [Operation(name, run) for name, run in _REDUCING.items()]


def _sign(t: Given) -> int:
    return (1, -1, 2)[t.seed % 3]


_ALONG: dict[str, Callable[[Given], Tensor]] = {
    **{name: _along(name) for name in "cumsum cumprod softmax log_softmax logcumsumexp".split()},
    "fliplr": lambda t: torch.fliplr(t.x),
    "flipud": lambda t: torch.flipud(t.x),
    "msort": lambda t: torch.msort(t.x),
    "softmin": lambda t: F.softmin(t.x, t.axis),
    "flip": lambda t: t.x.flip(t.axis),
    "roll": lambda t: t.x.roll(_sign(t), t.axis),
    "roll all": lambda t: t.x.roll(_sign(t)),
    "sort": lambda t: t.x.sort(t.axis)[0],
    "topk": lambda t: t.x.topk(min(2, t.size), t.axis)[0],
    "normalize": lambda t: F.normalize(t.x + 0.3, dim=t.axis),
    "rot90": lambda t: torch.rot90(t.x, _sign(t), (t.axis, t.other_axis())),
    "gather sorted": lambda t: t.x.gather(t.axis, t.x.argsort(t.axis)),
    "diff": lambda t: torch.diff(t.x, dim=t.axis),
    "glu": lambda t: F.glu(t.x, t.axis),
    "renorm": lambda t: t.x.renorm(2, t.axis, 0.5),
    "trapezoid": lambda t: torch.cumulative_trapezoid(t.x, dim=t.axis),
    "centre": lambda t: t.x - t.x.mean(t.axis, keepdim=True),
    "times mean": lambda t: t.x * t.x.mean(t.axis, keepdim=True),
    "fft": lambda t: torch.fft.fft(t.x, dim=t.axis).abs(),
    "rfft": lambda t: torch.view_as_real(torch.fft.rfft(t.x, dim=t.axis)),
    "unfold": lambda t: t.x.unfold(t.axis, min(2, t.size), 1),
    "cross": lambda t: torch.linalg.cross(t.x, t.x.roll(1, t.axis) + 1, dim=t.axis),
    "there and back": lambda t: (
        t.x.index_select(t.axis, t.order()).tanh().index_select(t.axis, t.order().argsort())
    ),
}
ALONG = [Operation(name, run) for name, run in _ALONG.items()]
