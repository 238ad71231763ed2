"""What is done with outputs: reshapes, sorts and cats, then one or several losses."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import extend
from tests.fuzz.operations.special import Squash

Path = Callable[[list[Tensor]], Tensor]


def _first(function: Callable[[Tensor], Tensor]) -> Path:
    return lambda os: function(os[0])


def _shifted(o: Tensor) -> Tensor:
    """In place through views: rows are added to those after them."""
    c = o.clone()
    c[1:].add_(c[:-1].clone())
    return c


def _halved(o: Tensor) -> Tensor:
    """In place through a view that keeps samples apart."""
    c = o.clone()
    c.narrow(-1, 0, 1).mul_(0.5)
    return c


def _rolled(o: Tensor) -> Tensor:
    return o[torch.arange(len(o)).roll(1)]


# Paths from outputs to a loss, with the fewest axes of an output. Those of the second table mix samples
# if they are on the first axis.
PLAIN: dict[str, tuple[Path, int]] = {
    "o": (_first(lambda o: o), 1),
    "view(-1, C)": (_first(lambda o: o.reshape(-1, o.shape[-1])), 3),
    "flatten(0, 1)": (_first(lambda o: o.flatten(0, 1)), 3),
    "transpose(1, -1)": (_first(lambda o: o.transpose(1, -1)), 3),
    "time first": (_first(lambda o: o.transpose(0, 1).reshape(-1, o.shape[-1])), 3),
    "[:, -1]": (_first(lambda o: o[:, -1]), 3),
    "[:, :-1]": (_first(lambda o: o[:, :-1].flatten(0, 1)), 3),
    "sorted rows": (_first(_rolled), 2),
    "masked rows": (_first(lambda o: o[torch.arange(len(o)) % 3 != 1]), 2),
    "masked positions": (_first(lambda o: o[(torch.arange(o.shape[:2].numel()) % 3 != 1).view(o.shape[:2])]), 3),
    "t": (_first(lambda o: o.t()), 2),
    "tanh": (_first(torch.tanh), 1),
    "scaled": (_first(lambda o: 0.7 * o + 0.1), 1),
    "function": (_first(Squash.apply), 1),
    "halved in place": (_first(_halved), 2),
    "column": (_first(lambda o: o[:, 0]), 2),
    "cat": (torch.cat, 1),
    "stack": (lambda os: torch.stack(os, 1).flatten(0, 1), 2),
    "second": (lambda os: os[-1], 1),
    "difference": (lambda os: os[0] - os[-1].detach(), 1),
}  # fmt: skip


def _normalised(o: Tensor) -> Tensor:
    """Batch norm by hand: for some strides torch's second derivative of its own is wrong."""
    axes = [d for d in range(o.dim()) if d != 1]
    return (o - o.mean(axes, True)) / (o.var(axes, unbiased=False, keepdim=True) + 0.1).sqrt()


MIXING: dict[str, tuple[Path, int]] = {
    "centred": (_first(lambda o: o - o.mean(0)), 1),
    "gram": (_first(lambda o: o @ o.t()), 2),
    "shifted in place": (_first(_shifted), 2),
    "batch norm": (_first(_normalised), 2),
    "views": (lambda os: os[0] @ os[-1].t(), 2),
}


def _labels(f: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(f.numel())
    return torch.randint(f.shape[1], (len(f), *f.shape[2:]), generator=generator)


def _reals(f: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(f.numel())
    return torch.randn(f.shape, generator=generator, dtype=f.dtype)


def _bits(f: Tensor) -> Tensor:
    return (_reals(f) > 0).to(f)


KINDS: dict[str, tuple[type[nn.Module], Callable[..., Tensor], Callable[[Tensor], Tensor], int]] = {
    "ce": (nn.CrossEntropyLoss, F.cross_entropy, _labels, 2),
    "mse": (nn.MSELoss, F.mse_loss, _reals, 1),
    "bce": (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, _bits, 1),
    "huber": (nn.HuberLoss, F.huber_loss, _reals, 1),
    "poisson": (nn.PoissonNLLLoss, F.poisson_nll_loss, lambda f: _bits(f) + 1, 1),
}


@dataclass
class Term:
    """A loss at the end of a path.

    Attributes:
        path, kind: rows of the tables.
        reduction: of the loss.
        way: ``"extended"``, ``"module"`` or ``"function"``.
        weight: what it is multiplied by.
    """

    path: str
    kind: str
    reduction: str
    way: str
    weight: float

    def __call__(self, outputs: list[Tensor], plain: bool) -> Tensor:
        module, function, targets, _ = KINDS[self.kind]
        f = (PLAIN | MIXING)[self.path][0](outputs)
        y = targets(f.detach())
        if plain or self.way == "function":
            return self.weight * function(f, y, reduction=self.reduction)
        made: Any = module(reduction=self.reduction)
        return self.weight * (extend(made) if self.way == "extended" else made)(f, y)

    def __str__(self) -> str:
        return f"{self.weight} {self.kind}({self.path}, {self.reduction}, {self.way})"


@dataclass
class Above:
    """All that comes after the model: a sum of losses.

    Attributes:
        terms: the losses.
        forwards: forward passes.
    """

    terms: list[Term] = field(default_factory=list)
    forwards: int = 1

    def truth(self, outputs: list[Tensor]) -> Tensor:
        """The loss by plain functions."""
        return torch.stack([term(outputs, True) for term in self.terms]).sum()

    def loss(self, outputs: list[Tensor]) -> Tensor:
        """The loss as it is called."""
        first, *rest = (term(outputs, False) for term in self.terms)
        for each in rest:
            first = first + each
        return first

    def __str__(self) -> str:
        return f"{' + '.join(map(str, self.terms))} of {self.forwards} forward passes"


def draw(rng: random.Random, dims: int, classes: bool, direct: bool = False) -> Above:
    """Draw what comes after a model.

    Args:
        rng: choices.
        dims: axes of its output.
        classes: whether the output has an axis of classes.
        direct: whether one loss takes the output as it is.
    """
    above = Above(forwards=2 if rng.random() < 0.15 and not direct else 1)
    for _ in range(2 if rng.random() < 0.12 and not direct else 1):
        table = MIXING if rng.random() < 0.08 else PLAIN
        paths = [name for name, (_, with_minimal_root) in table.items() if with_minimal_root <= dims]
        path = "o" if not paths or rng.random() < 0.35 or direct else rng.choice(paths)
        kinds = [
            k
            for k, (*_, with_minimal_root) in KINDS.items()
            if with_minimal_root <= dims and (k != "ce" or classes)
        ]
        above.terms.append(
            Term(
                path,
                rng.choice(kinds),
                rng.choice(["mean", "sum"]),
                rng.choice(["extended", "extended", "module", "function"]),
                rng.choice([1.0, 1.0, 0.5]),
            )
        )
    return above
