"""What lies between a model's output and its loss in ordinary training loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from tests.idioms.losses import BY_NAME, Loss
from tests.idioms.reference import Tabulated

FEATURES, HIDDEN = 2, 3


@dataclass(frozen=True)
class Sizes:
    """Samples, positions (time, pixels), classes."""

    N: int = 3
    T: int = 2
    C: int = 4

    def __str__(self) -> str:
        return f"{self.N}-{self.T}-{self.C}"


SIZES = Sizes()

# Models' outputs: shape of the input, axis of samples, axis of classes.
KINDS: dict[str, tuple[Callable[[Sizes], tuple[int, ...]], int, int]] = {
    "rows": (lambda s: (s.N, FEATURES), 0, 1),  # [N, C]
    "single": (lambda s: (s.N, FEATURES), 0, 1),  # [N, 1]
    "columns": (lambda s: (FEATURES, s.N), 1, 0),  # [C, N]
    "times": (lambda s: (s.N, s.T, FEATURES), 0, 2),  # [N, T, C]
    "times-first": (lambda s: (s.T, s.N, FEATURES), 1, 2),  # [T, N, C]
    "pixels": (lambda s: (s.N, s.T, FEATURES), 0, 1),  # [N, C, T]
}


class Net(nn.Module):
    """Two linear layers; outputs are laid out as ``kind`` says."""

    def __init__(self, kind: str, classes: int, last: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.kind, self.last = kind, last
        self.i, self.o = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.o(self.i(x.t() if self.kind == "columns" else x).tanh())
        y = y.t() if self.kind == "columns" else y.mT if self.kind == "pixels" else y
        return self.last(y, KINDS[self.kind][2])


@dataclass(frozen=True)
class Idiom:
    """What is done with outputs before the loss.

    Attributes:
        name: what it is called in the tables.
        kind: layout of the model's outputs.
        apply: outputs of all forward passes -> what losses are applied to.
        forwards: forward passes.
        classes: whether losses of classes make sense then.
    """

    name: str
    kind: str
    apply: Callable[[list[Tensor]], list[Tensor]]
    forwards: int = 1
    classes: bool = True

    def fits(self, loss: Loss, sizes: Sizes) -> bool:
        """Whether the loss can be applied."""
        if loss.classes and not self.classes:
            return False
        return not loss.rows or all(f.dim() == 2 for f in self.arguments(loss, sizes))

    def arguments(self, loss: Loss, sizes: Sizes) -> list[Tensor]:
        """What the loss is applied to, without a graph."""
        return self.apply(expanded(self.kind, self.forwards, loss.name, sizes).outputs)


def one(function: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda outputs: [function(outputs[0])]


def _mask(o: Tensor) -> Tensor:
    """A mask over samples and positions that keeps other numbers of positions for each sample."""
    return (torch.arange(o.shape[:2].numel()) % 3 != 1).reshape(o.shape[:2])


def _order(o: Tensor) -> Tensor:
    return torch.arange(len(o)).roll(1)


def _flat_and_last(outputs: list[Tensor]) -> list[Tensor]:
    """A loss of everything, and one of the last step."""
    (o,) = outputs
    return [o.reshape(-1, o.shape[-1]), o[:, -1]]


IDIOMS = [
    Idiom("plain", "rows", lambda outputs: outputs),
    Idiom("plain-times", "times", lambda outputs: outputs, classes=False),
    Idiom("plain-pixels", "pixels", lambda outputs: outputs),
    Idiom("view", "times", one(lambda o: o.reshape(-1, o.shape[-1]))),
    Idiom("flatten", "times", one(lambda o: o.flatten(0, 1))),
    Idiom("transpose", "times", one(lambda o: o.transpose(1, 2))),
    Idiom("times-outside", "times", one(lambda o: o.transpose(0, 1).reshape(-1, o.shape[-1]))),
    Idiom("times-first", "times-first", one(lambda o: o.reshape(-1, o.shape[-1]))),
    Idiom("shift", "times", one(lambda o: o[:, :-1].reshape(-1, o.shape[-1]))),
    Idiom("shift-transpose", "times", one(lambda o: o[:, :-1].transpose(1, 2))),
    Idiom("mask", "times", one(lambda o: o[_mask(o)])),
    Idiom("mask-rows", "rows", one(lambda o: o[torch.arange(len(o)) != 1])),
    Idiom("last", "times", one(lambda o: o[:, -1])),
    Idiom("pool", "times", one(lambda o: o.mean(1))),
    Idiom("classes-last", "pixels", one(lambda o: o.movedim(1, -1).reshape(-1, o.shape[1]))),
    Idiom("cat", "rows", lambda outputs: [torch.cat(outputs)], 2),
    Idiom("stack", "rows", lambda outputs: [torch.stack(outputs, 1).flatten(0, 1)], 2),
    Idiom("two-losses", "rows", lambda outputs: outputs, 2),
    Idiom("twice", "rows", lambda outputs: [outputs[0], outputs[0]]),
    Idiom("part-too", "times", _flat_and_last),
    Idiom("heads", "rows", lambda outputs: list(outputs[0].chunk(2, 1))),
    Idiom("sorted", "rows", one(lambda o: o[_order(o)])),
    Idiom("t", "rows", one(lambda o: o.t()), classes=False),
    Idiom("t-back", "columns", one(lambda o: o.t())),
    Idiom("tanh", "rows", one(lambda o: o.tanh())),
    Idiom("scaled", "rows", one(lambda o: 0.7 * o + 0.1)),
    Idiom("squeeze", "single", one(lambda o: o.squeeze(1)), classes=False),
    Idiom("column", "single", one(lambda o: o[:, 0]), classes=False),
    Idiom(
        *("chosen", "rows", one(lambda o: o.gather(1, (torch.arange(len(o)) % 2)[:, None])[:, 0])),
        classes=False,
    ),
]
BY_IDIOM = {idiom.name: idiom for idiom in IDIOMS}


def made(kind: str, forwards: int, loss: Loss, sizes: Sizes) -> tuple[Net, list[Tensor], int]:
    """A model, its inputs, and their sample axis."""
    shape, batch_dim, _ = KINDS[kind]
    generator = torch.Generator().manual_seed(sizes.N + 10 * sizes.T)
    net = Net(kind, 1 if kind == "single" else sizes.C, loss.last).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.8 * torch.randn(p.shape, generator=generator))
    draw = lambda: torch.randn(shape(sizes), generator=generator, dtype=torch.float64)
    return net, [draw() for _ in range(forwards)], batch_dim


@cache
def _expanded(kind: str, forwards: int, last: str, sizes: Sizes) -> Tabulated:
    return Tabulated(*made(kind, forwards, BY_NAME[last], sizes))


def expanded(kind: str, forwards: int, loss: str, sizes: Sizes) -> Tabulated:
    """The derivatives of a model, found once for all losses that share its last operation."""
    last = BY_NAME[loss].last
    same = next(other.name for other in BY_NAME.values() if other.last is last)
    return _expanded(kind, forwards, same, sizes)
