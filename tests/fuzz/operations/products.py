"""Operations that are linear in parameters: matrices, einsum, tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.draft import Given, Operation

Shapes = Callable[[Given], Sequence[Sequence[int]]]


def _right(t: Given) -> list[list[int]]:
    """A matrix, or a vector, to the right of ``x``."""
    rng, last = t.rng, t.x.shape[-1]
    shape = rng.choice([[last, rng.choice([1, 2, 3])], [last]])
    return [[rng.choice([1, 2]), *shape] if rng.random() < 0.2 else shape]


def _left(t: Given) -> list[list[int]]:
    rng = t.rng
    shape = [rng.choice([1, 2, 3]), t.x.shape[-2] if t.x.dim() > 1 else t.x.shape[0]]
    return [[rng.choice([1, 2]), *shape] if rng.random() < 0.2 else shape]


def _equation(t: Given) -> tuple[str, list[int]]:
    """An equation for ``x`` and a second tensor, and that tensor's shape."""
    rng, own = t.rng, "abcd"[: t.x.dim()]
    sizes = dict(zip(own, t.x.shape, strict=True)) | {"x": rng.choice([1, 2, 3, 4])}
    if rng.random() < 0.25:
        first = rng.random() < 0.5
        letter = own[0] if first else own[-1]
        left = f"{letter}..." if first else f"...{letter}"
        right = rng.choice(["x...", "...x"])
        return f"{left},{letter}x->{right}", [sizes[letter], sizes["x"]]
    second = rng.sample(list(own), rng.randint(1, len(own))) + ["x"] * (rng.random() < 0.7)
    rng.shuffle(second)
    result = sorted(letter for letter in {*own, *second} if rng.random() < 0.7)
    rng.shuffle(result)
    return f"{own},{''.join(second)}->{''.join(result)}", [sizes[letter] for letter in second]


def _einsum(t: Given, other: Tensor) -> Tensor:
    equation, _ = _equation(t)
    if t.seed % 4 or "..." in equation:
        return torch.einsum(equation, t.x, other)
    inputs, result = equation.split("->")
    first, second = inputs.split(",")
    return torch.einsum(f"{second},{first}->{result}", other, t.x)


def _linear(t: Given) -> nn.Module:
    rng = t.rng
    return nn.Linear(t.x.shape[-1], rng.choice([1, 2, 3, 4]), bias=rng.random() < 0.7)


def _token(t: Given, count: int = 5) -> Tensor:
    """Indices made from data, which change with it."""
    return (t.x.detach() * 37).long().abs() % count


def _batched(t: Given) -> list[list[int]]:
    return [[t.x.shape[0], t.x.shape[2], 2], [2]]


_LINEAR: dict[str, tuple[Shapes, Callable[[Given], Tensor], tuple[int, int]]] = {
    "matmul": (_right, lambda t: torch.matmul(t.x, t.p[0]), (1, 9)),
    "@": (_right, lambda t: t.x @ t.p[0], (1, 9)),
    "matmul left": (_left, lambda t: torch.matmul(t.p[0], t.x), (1, 9)),
    "F.linear": (lambda t: [[2, t.x.shape[-1]], [2]], lambda t: F.linear(t.x, *t.p), (1, 9)),
    "linear of transposed": (
        lambda t: [[t.x.shape[-1], 2]],
        lambda t: F.linear(t.x, t.p[0].t()),
        (1, 9),
    ),
    "tied": (
        lambda t: [[2, t.x.shape[-1]]],
        lambda t: F.linear(F.linear(t.x, t.p[0]).tanh(), t.p[0].T),
        (1, 9),
    ),
    "einsum": (lambda t: [_equation(t)[1]], lambda t: _einsum(t, t.p[0]), (1, 4)),
    "einsum again": (lambda t: [_equation(t)[1]], lambda t: _einsum(t, t.p[0]), (1, 4)),
    "einsum constant": (lambda t: [], lambda t: _einsum(t, t.constant(*_equation(t)[1])), (1, 4)),
    "tensordot": (
        lambda t: [[t.size, 2]],
        lambda t: torch.tensordot(t.x, t.p[0], dims=([t.axis], [0])),
        (1, 4),
    ),
    "bmm": (lambda t: _batched(t)[:1], lambda t: torch.bmm(t.x, t.p[0]), (3, 3)),
    "baddbmm": (_batched, lambda t: torch.baddbmm(t.p[1], t.x, t.p[0], alpha=0.5), (3, 3)),
    "addmm": (
        lambda t: [[t.x.shape[1], 2], [2]],
        lambda t: torch.addmm(t.p[1], t.x, t.p[0], beta=0.5, alpha=2.0),
        (2, 2),
    ),
    "addmm left": (
        lambda t: [[2, t.x.shape[0]], [2, 1]],
        lambda t: torch.addmm(t.p[1], t.p[0], t.x, beta=0.3, alpha=2.0),
        (2, 2),
    ),
    "addmv": (
        lambda t: [[t.x.shape[1]], [t.x.shape[0]]],
        lambda t: torch.addmv(t.p[1], t.x, t.p[0]),
        (2, 2),
    ),
    "outer": (lambda t: [[2]], lambda t: torch.outer(t.x, t.p[0]), (1, 1)),
    "outer left": (lambda t: [[3]], lambda t: torch.outer(t.p[0], t.x), (1, 1)),
    "kron": (lambda t: [[2, 1]], lambda t: torch.kron(t.x, t.p[0]), (1, 3)),
    "kron left": (lambda t: [[2, 1]], lambda t: torch.kron(t.p[0], t.x), (1, 3)),
    "cdist": (lambda t: [[2, t.x.shape[-1]]], lambda t: torch.cdist(t.x, t.p[0]), (2, 3)),
    "table of data": (lambda t: [[5, 2]], lambda t: t.p[0][_token(t)], (1, 3)),
    "complex": (
        lambda t: [[t.x.shape[-1]]],
        lambda t: (torch.fft.fft(t.x) * torch.fft.fft(t.p[0])).real,
        (1, 4),
    ),
}
LINEAR = [Operation(name, run, shapes, dims=dims) for name, (shapes, run, dims) in _LINEAR.items()]
MODULES = [
    Operation("linear", lambda t: t.layer(t.x), layer=_linear),
    Operation(
        "bilinear",
        lambda t: t.layer(t.x, t.x.tanh()),
        layer=lambda t: nn.Bilinear(t.x.shape[-1], t.x.shape[-1], 2),
    ),
    Operation(
        "embedding",
        lambda t: t.layer(_token(t)),
        layer=lambda t: nn.Embedding(5, 2, padding_idx=t.choose(None, 1)),
    ),
    Operation(
        "embedding bag",
        lambda t: t.layer(_token(t)),
        layer=lambda t: nn.EmbeddingBag(5, 2, mode=str(t.choose("sum", "mean", "max"))),
        dims=(2, 2),
    ),
]
