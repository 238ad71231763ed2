"""Random small architectures against the oracle: what nobody thought of writing down as a case.

A model is drawn as a chain of *steps*, each a small module that keeps samples apart; steps nest (a
residual branch holds steps). ``Draft`` draws them through one function that picks from a list, which
is hypothesis here, and may be ``random.Random(n).choice`` to look at many draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from backpack import extensions as E
from backpack.testing.oracle import Oracle, check
from tests.cases import Apply, P, classes, norm

QUANTITIES = (
    *(E.BatchGrad(), E.BatchL2Grad(), E.SumGradSquared(), E.Variance()),
    *(E.DiagGGNExact(), E.BatchDiagGGNExact(), E.SqrtGGNExact()),
)
HESSIANS = (E.DiagHessian(), E.BatchDiagHessian())
SMALL, LARGE = 60, 400  # what the oracle can afford: the model's Hessian, a parameter's GGN
# Where terms of order one cancel (a softmax over equal logits), neither side has correct digits.
ROUNDING = 1e-11
REFUSED = "cannot tell which axis"
LOSSES = [
    (kind, target, reduction)
    for kind, target in (
        (nn.CrossEntropyLoss, classes),
        (nn.MSELoss, torch.randn_like),
        (nn.BCEWithLogitsLoss, torch.rand_like),
    )
    for reduction in ("mean", "sum")
]

Shape = tuple[int, ...]  # without the sample axis: [d], [t, d] or [c, h, w]
Built = tuple[nn.Module, Shape]
Pick = Callable[[Sequence[Any]], Any]


class Step(Apply):
    """A module from parts and a function, with a name to be read in a failing draw."""

    def __init__(self, name: str, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__(forward, **parts)
        self.name = name

    def _get_name(self) -> str:
        return self.name

    def extra_repr(self) -> str:
        return ", ".join(f"{n} {list(p.shape)}" for n, p in self.named_parameters(recurse=False))


STEPS: dict[int, list[Callable[[Draft, Shape, int], Built]]] = {1: [], 2: [], 3: []}
POINTWISE: list[Callable[[Draft, Shape, int], Built]] = []  # act on the last axis, whatever the others
Method = Callable[["Draft", Shape, int], Built]


def step(*ranks: int, pointwise: bool = False) -> Callable[[Method], Method]:
    """Register a way to draw a step for values with that many axes beside the samples'."""

    def register(method: Method) -> Method:
        for rank in ranks:
            STEPS[rank].append(method)
        if pointwise:
            POINTWISE.append(method)
        return method

    return register


class Draft:
    """Draws modules; every method returns a module and the shape of what it returns."""

    def __init__(self, pick: Pick) -> None:
        self.pick = pick

    def size(self) -> int:
        return self.pick([1, 2, 3, 4])

    def yes(self) -> bool:
        return self.pick([False, True])

    def any(self, shape: Shape, depth: int) -> Built:
        """One step."""
        choices = STEPS[len(shape)]
        return self.pick(choices if depth else choices[: _SIMPLE[len(shape)]])(self, shape, depth)

    def chain(self, shape: Shape, depth: int, length: int) -> Built:
        modules = []
        for _ in range(length):
            module, shape = self.any(shape, depth)
            modules.append(module)
        return (modules[0] if length == 1 else nn.Sequential(*modules)), shape

    def to(self, shape: Shape, wanted: Shape, depth: int) -> nn.Module:
        """One or two steps and, if need be, a linear layer that gives the wanted shape."""
        module, got = self.chain(shape, depth, self.pick([1, 2]))
        return module if got == wanted else nn.Sequential(module, fit(got, wanted))

    def same(self, shape: Shape, depth: int) -> nn.Module:
        return self.to(shape, shape, depth)

    def pointwise(self, width: int) -> Built:
        module, (out,) = self.pick(POINTWISE)(self, (width,), 0)
        return module, (out,)

    def model(self, depth: int = 2) -> tuple[nn.Module, Callable[[int], Tensor]]:
        """A model and its input for a number of samples."""
        rank = self.pick([1, 2, 3])
        shape = tuple(self.size() for _ in range(rank))
        parts: list[nn.Module] = []
        if rank < 3 and self.pick([False, False, True]):
            rows, width, times = self.size(), self.size(), shape[: rank - 1]
            parts.append(nn.Embedding(rows, width))
            make = lambda n: torch.randint(rows, (n, *times))
            shape = (*times, width)
        else:
            given = shape
            make = lambda n: torch.randn(n, *given)
        body, shape = self.chain(shape, depth, self.pick([1, 2, 3]))
        parts.append(body)
        if len(shape) == 3 or self.yes():
            parts.append(fit(shape, (self.pick([2, 3]),)))
        elif not any(p.requires_grad for p in body.parameters()):
            parts.append(nn.Linear(shape[-1], 2))
        return nn.Sequential(*parts), make


def fit(shape: Shape, wanted: Shape) -> nn.Module:
    if len(shape) == 1 == len(wanted):
        return nn.Linear(shape[0], wanted[0])
    layer = nn.Linear(prod(shape), prod(wanted))
    return Step("fit", lambda m, a: m.l(a.flatten(1)).reshape(len(a), *wanted), l=layer)


# --------------------------------------------------------------------------------------
# Steps without steps inside

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    *(nn.Tanh, nn.ReLU, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU, nn.LeakyReLU),
    lambda: Step("square", lambda m, a: a * a * 0.5),
    lambda: Step("sin", lambda m, a: a.sin()),
    lambda: Step("detached", lambda m, a: a * a.detach().sigmoid()),
    lambda: Step("tanh_", lambda m, a: (a * 1).tanh_()),
    lambda: Step("iadd", lambda m, a: _iadd(a.tanh() * 1, a)),
    lambda: Step("relu_", lambda m, a: (a - 0.1).relu_()),
    lambda: Step("where", lambda m, a: torch.where(a > 0, a, a.sin())),
    lambda: Step("masked_fill", lambda m, a: a.masked_fill(a < -1, -1.0)),
    lambda: Step("no_grad", lambda m, a: a / (_norm(a) + 1)),
]


def _iadd(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


def _norm(a: Tensor) -> Tensor:
    with torch.no_grad():
        return a.norm(dim=-1, keepdim=True)


@step(1, 2, 3, pointwise=True)
def activation(d: Draft, shape: Shape, depth: int) -> Built:
    return d.pick(ACTIVATIONS)(), shape


@step(1, 2, 3, pointwise=True)
def linear(d: Draft, shape: Shape, depth: int) -> Built:
    i, o = shape[-1], d.size()
    kind = d.pick(["linear", "nobias", "matmul", "addmm", "einsum", "mT", "inplace", "inplace2", "glu"])
    out = (*shape[:-1], o)
    if kind in ("linear", "nobias"):
        return nn.Linear(i, o, bias=kind == "linear"), out
    if kind == "inplace":
        return nn.Sequential(nn.Linear(i, o), nn.ReLU(inplace=True)), out
    if kind == "inplace2":
        return Step(kind, lambda m, a: m.l(a).tanh_(), l=nn.Linear(i, o)), out
    if kind == "glu":
        forward = lambda m, a: torch.mul(*(z.sigmoid() for z in m.l(a).chunk(2, -1)))
        return Step(kind, forward, l=nn.Linear(i, 2 * o)), out
    forward = {
        "matmul": lambda m, a: a @ m.w,
        "addmm": lambda m, a: torch.addmm(m.b, a.reshape(-1, i), m.w).view(*a.shape[:-1], o),
        "einsum": lambda m, a: torch.einsum("n...i,io->n...o", a, m.w),
        "mT": lambda m, a: a @ m.w.mT.mT,
    }[kind]
    return Step(kind, forward, w=P(i, o), **({"b": P(o)} if kind == "addmm" else {})), out


@step(1, 2, 3, pointwise=True)
def last_axis_norm(d: Draft, shape: Shape, depth: int) -> Built:
    kind = d.pick(["layer", "rms", "hand", "softmax"])
    if kind == "hand":
        forward = lambda m, a: (a - a.mean(-1, keepdim=True)) / (a.var(-1, False)[..., None] + 1).sqrt()
        return Step("standardised", lambda m, a: forward(m, a) * m.w, w=P(shape[-1])), shape
    if kind == "softmax":
        return nn.Softmax(-1), shape
    return norm((nn.LayerNorm if kind == "layer" else nn.RMSNorm)(shape[-1], eps=0.1)), shape


@step(1, 2, 3, pointwise=True)
def bias(d: Draft, shape: Shape, depth: int) -> Built:
    """Arithmetic with a parameter that is broadcast."""
    where = d.pick(range(len(shape) + 1))
    own = tuple(size if d.yes() else 1 for size in shape[where:])
    forward = d.pick(
        [
            lambda m, a: a + m.b,
            lambda m, a: m.b * a,
            lambda m, a: a - m.b,
            lambda m, a: m.b - a,
            lambda m, a: a * m.b.exp(),
            lambda m, a: a / (F.softplus(m.b) + 1),
            lambda m, a: _iadd(a * 1, m.b),
            lambda m, a: torch.maximum(a, m.b),
            lambda m, a: a.lerp(m.b, 0.3),
            lambda m, a: a + m.b.expand_as(a),
            lambda m, a: torch.addcmul(a, a, m.b),
        ]
    )
    return Step("bias", forward, b=P(*own)), shape


@step(1, 2, 3)
def any_norm(d: Draft, shape: Shape, depth: int) -> Built:
    c, inside = shape[0], prod(shape[1:])  # torch refuses groups of one number
    kinds = ["layer", "batch"] + ["group"] * (c * inside > 2) + ["instance"] * (inside > 1)
    kind = d.pick(kinds)
    if kind == "layer":
        return norm(nn.LayerNorm(shape, eps=0.1)), shape
    if kind == "group":
        return norm(nn.GroupNorm(2 if c % 2 == 0 and d.yes() else 1, c, eps=0.1)), shape
    if kind == "instance":
        made = (nn.InstanceNorm1d, nn.InstanceNorm2d)[len(shape) - 2](c, affine=True, eps=0.1)
        return norm(made), shape
    return norm((nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[len(shape) - 1](c)), shape


@step(1, 2, 3)
def prelu(d: Draft, shape: Shape, depth: int) -> Built:
    return nn.PReLU(shape[0] if d.yes() else 1), shape


@step(1)
def left_matrix(d: Draft, shape: Shape, depth: int) -> Built:
    o = d.size()
    return Step("left", lambda m, a: (m.w @ a.T).T, w=P(o, *shape)), (o,)


@step(1, 2)
def tied(d: Draft, shape: Shape, depth: int) -> Built:
    """A matrix and its transpose, or a matrix twice."""
    i, o = shape[-1], d.size()
    forward = d.pick(
        [
            lambda m, a: F.linear(F.linear(a, m.w).tanh(), m.w.T),
            lambda m, a: (a @ m.w.mT).relu() @ m.w,
            lambda m, a: F.linear(F.linear(a, m.w).sigmoid(), m.w.t() * 2),
            lambda m, a: F.linear(F.linear(a, m.w.T @ m.w).sigmoid(), m.w.transpose(0, 1) @ m.w),
        ]
    )
    return Step("tied", forward, w=P(o, i)), shape


@step(1)
def to_sequence(d: Draft, shape: Shape, depth: int) -> Built:
    t, (i,) = d.size(), shape
    kind = d.pick(["outer", "grow", "expand", "unsqueeze", "token", "unflatten", "stack"])
    if kind == "outer":
        return Step(kind, lambda m, a: a[:, None] * m.w, w=P(t, 1)), (t, i)
    if kind == "grow":
        return Step(kind, lambda m, a: a.unsqueeze(1) + m.w, w=P(1, t, i)), (t, i)
    if kind == "expand":
        return Step(kind, lambda m, a: a.unsqueeze(1).expand(-1, t, -1) * m.w, w=P(t, i)), (t, i)
    if kind == "token":
        forward = lambda m, a: torch.cat([m.w.expand(len(a), -1, -1), a[:, None]], 1)
        return Step(kind, forward, w=P(1, t, i)), (t + 1, i)
    if kind == "unflatten":
        forward = lambda m, a: m.l(a).view(len(a), t, 2)
        return Step(kind, forward, l=nn.Linear(i, t * 2)), (t, 2)
    if kind == "stack":
        return Step(kind, lambda m, a: torch.stack([a, m.l(a)], 1), l=nn.Linear(i, i)), (2, i)
    return Step(kind, lambda m, a: a.unsqueeze(2)), (i, 1)


@step(2)
def from_sequence(d: Draft, shape: Shape, depth: int) -> Built:
    t, i = shape
    kind = d.pick(["mean", "sum", "max", "last", "flatten", "weights", "mT", "amax", "image"])
    if kind == "flatten":
        return nn.Flatten(), (t * i,)
    if kind == "mT":
        return Step(kind, lambda m, a: a.mT), (i, t)
    if kind == "image":
        return Step(kind, lambda m, a: a.unsqueeze(1)), (1, t, i)
    forward = {
        "mean": lambda m, a: a.mean(1),
        "sum": lambda m, a: a.sum(dim=1),
        "max": lambda m, a: a.max(1).values,
        "amax": lambda m, a: a.amax(1),
        "last": lambda m, a: a[:, -1],
        "weights": lambda m, a: a.mT @ m.w.softmax(0),
    }[kind]
    return Step(kind, forward, **({"w": P(t)} if kind == "weights" else {})), (i,)


@step(2)
def conv1d(d: Draft, shape: Shape, depth: int) -> Built:
    t, i = shape
    over_time = d.yes()
    c, length = (i, t) if over_time else (t, i)
    k = d.pick(range(1, min(2, length) + 1))
    kind = d.pick(["plain", "padded", "depthwise", "transposed"])
    o, pad = (c if kind == "depthwise" else d.size()), int(kind == "padded")
    if kind == "transposed":
        layer: nn.Module = nn.ConvTranspose1d(c, o, k)
        length = length + k - 1
    else:
        layer = nn.Conv1d(c, o, k, padding=pad, groups=c if kind == "depthwise" else 1)
        length = length + 2 * pad - k + 1
    if over_time:
        return Step("over time", lambda m, a: m.l(a.transpose(1, 2)).transpose(1, 2), l=layer), (
            length,
            o,
        )
    return layer, (o, length)


@step(2)
def positions(d: Draft, shape: Shape, depth: int) -> Built:
    t, i = shape
    forward = d.pick(
        [
            lambda m, a: a + m.p(torch.arange(t)),
            lambda m, a: a + m.p(torch.arange(a.shape[1]).unsqueeze(0)),
            lambda m, a: a + m.p.weight[:t],
            lambda m, a: a * m.p(torch.arange(t)).sigmoid(),
            lambda m, a: a + m.p(torch.arange(t).expand(len(a), t)),
        ]
    )
    return Step("positions", forward, p=nn.Embedding(t + d.pick([0, 1]), i)), shape


@step(2)
def attention(d: Draft, shape: Shape, depth: int) -> Built:
    t, i = shape
    kind = d.pick(["self", "causal", "queries", "heads"])
    if kind == "queries":
        forward = d.pick(
            [
                lambda m, a: (m.w.expand(len(a), -1, -1) @ m.k(a).mT).softmax(-1) @ a,
                lambda m, a: (m.w.unsqueeze(0).repeat(len(a), 1, 1) @ m.k(a).mT).softmax(-1) @ a,
                lambda m, a: (m.w @ m.k(a).mT).softmax(-1) @ a,
                lambda m, a: torch.einsum("qi,nti->nqt", m.w, m.k(a)).softmax(-1) @ a,
            ]
        )
        q = d.size()
        return Step(kind, forward, w=P(q, i), k=nn.Linear(i, i)), (q, i)
    if kind == "heads":
        return Step(kind, _heads, l=nn.Linear(i, 3 * i * 2), o=nn.Linear(2 * i, i)), shape

    def forward(m: Any, a: Tensor) -> Tensor:  # type: ignore[no-redef]
        q, k, v = m.l(a).chunk(3, -1)
        scores = torch.bmm(q, k.transpose(1, 2)) / i**0.5
        if kind == "causal":
            scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -1e9)
        return torch.bmm(scores.softmax(-1), v)

    return Step(kind, forward, l=nn.Linear(i, 3 * i)), shape


def _heads(m: Any, a: Tensor) -> Tensor:
    n, t, i = a.shape
    q, k, v = m.l(a).view(n, t, 3, 2, i).permute(2, 0, 3, 1, 4)
    return m.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(n, t, 2 * i))


@step(2)
def over_time(d: Draft, shape: Shape, depth: int) -> Built:
    """A cell in a loop."""
    t, i = shape
    o, start, all_steps = (
        d.size(),
        d.pick(["zeros", "new_zeros", "none", "parameter", "expanded"]),
        d.yes(),
    )

    def forward(m: Any, a: Tensor) -> Tensor:
        h: Any = {
            "zeros": lambda: torch.zeros(len(a), o, dtype=a.dtype),
            "new_zeros": lambda: a.new_zeros(len(a), o),
            "none": lambda: 0,
            "parameter": lambda: m.s,
            "expanded": lambda: m.s.expand(len(a), o),
        }[start]()
        outs = []
        for x in a.unbind(1):
            h = (m.i(x) + (0 if isinstance(h, int) else m.h(h))).tanh()
            outs.append(h)
        return torch.stack(outs, dim=1) if all_steps else h

    parts = {"s": P(o)} if start in ("parameter", "expanded") else {}
    made = Step(f"loop-{start}", forward, i=nn.Linear(i, o), h=nn.Linear(o, o), **parts)
    return made, ((t, o) if all_steps else (o,))


@step(2)
def rows_of_time(d: Draft, shape: Shape, depth: int) -> Built:
    """Time and samples on one axis, or time first, around something that acts on the last axis."""
    t, i = shape
    inner, (o,) = d.pointwise(i)
    forward = d.pick(
        [
            lambda m, a: m.f(a.reshape(-1, i)).reshape(-1, t, o),
            lambda m, a: m.f(a.flatten(0, 1)).unflatten(0, (-1, t)),
            lambda m, a: m.f(a.transpose(0, 1)).transpose(0, 1),
            lambda m, a: m.f(a.transpose(0, 1).flatten(0, 1)).view(t, -1, o).transpose(0, 1),
            lambda m, a: m.f(a.mT.reshape(-1, t).reshape(-1, i, t).mT),
            lambda m, a: m.f(a.permute(1, 0, 2)).permute(1, 0, 2),
            lambda m, a: torch.stack([m.f(x) for x in a.unbind(1)], 1),
            lambda m, a: torch.stack([m.f(a[:, j]) for j in range(t)]).movedim(0, 1),
            lambda m, a: torch.cat([m.f(x) for x in a.split(1, 1)], 1),
            lambda m, a: torch.cat([m.f(a[:, j]) for j in range(t)]).view(t, -1, o).transpose(0, 1),
        ]
    )
    return Step("rows of time", forward, f=inner), (t, o)


@step(3)
def conv2d(d: Draft, shape: Shape, depth: int) -> Built:
    c, *space = shape
    k = d.pick(range(1, min(2, *space) + 1))
    kind = d.pick(["plain", "padded", "stride", "depthwise", "transposed"])
    o = c if kind == "depthwise" else d.size()
    if kind == "transposed":
        return nn.ConvTranspose2d(c, o, k), (o, *(n + k - 1 for n in space))
    pad, stride = int(kind == "padded"), 2 if kind == "stride" else 1
    layer = nn.Conv2d(c, o, k, stride, pad, groups=c if kind == "depthwise" else 1, bias=d.yes())
    return layer, (o, *((n + 2 * pad - k) // stride + 1 for n in space))


@step(3)
def pool(d: Draft, shape: Shape, depth: int) -> Built:
    c, h, w = shape
    kind = d.pick(["max", "avg", "adaptive", "mean", "flatten", "patches", "frames", "squeeze"])
    if kind in ("max", "avg"):
        k = (min(2, h), min(2, w))
        return (nn.MaxPool2d if kind == "max" else nn.AvgPool2d)(k), (c, h // k[0], w // k[1])
    if kind == "adaptive":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), (c,)
    if kind == "flatten":
        return nn.Flatten(), (c * h * w,)
    if kind == "patches":
        return Step(kind, lambda m, a: a.flatten(2).transpose(1, 2)), (h * w, c)
    if kind == "frames":
        forward = lambda m, a: m.l(a.flatten(0, 1).unsqueeze(1)).view(-1, c, h, w)
        return Step(kind, forward, l=nn.Conv2d(1, 1, 1)), shape
    if kind == "squeeze":
        gate = lambda m, a: a * m.l(a.mean((2, 3))).sigmoid()[:, :, None, None]
        return Step(kind, gate, l=nn.Linear(c, c)), shape
    return Step(kind, lambda m, a: a.mean((2, 3))), (c,)


_SIMPLE = {rank: len(methods) for rank, methods in STEPS.items()}

# --------------------------------------------------------------------------------------
# Steps with steps inside


@step(1, 2, 3)
def residual(d: Draft, shape: Shape, depth: int) -> Built:
    forward = d.pick(
        [
            lambda m, a: a + m.f(a),
            lambda m, a: m.f(a) - a,
            lambda m, a: _iadd(m.f(a) * 1, a),
            lambda m, a: torch.add(a, m.f(a), alpha=0.5),
        ]
    )
    if d.yes():
        scaled = lambda m, a: a + m.s * m.f(a)
        return Step("scaled residual", scaled, f=d.same(shape, depth - 1), s=P(1)), shape
    return Step("residual", forward, f=d.same(shape, depth - 1)), shape


@step(1, 2, 3)
def gate(d: Draft, shape: Shape, depth: int) -> Built:
    forward = d.pick(
        [lambda m, a: m.f(a).sigmoid() * m.g(a), lambda m, a: torch.lerp(m.f(a), a, m.g(a).sigmoid())]
    )
    return Step("gate", forward, f=d.same(shape, depth - 1), g=d.same(shape, depth - 1)), shape


@step(1, 2, 3)
def concatenation(d: Draft, shape: Shape, depth: int) -> Built:
    parts = {"f": d.same(shape, depth - 1), "g": d.same(shape, depth - 1)}
    axis = d.pick([1, -1])
    out = list(shape)
    out[0 if axis == 1 else -1] *= 3
    return Step("cat", lambda m, a: torch.cat((m.f(a), a, m.g(a)), axis), **parts), tuple(out)


@step(1, 2, 3)
def reuse(d: Draft, shape: Shape, depth: int) -> Built:
    forward = d.pick(
        [
            lambda m, a: m.f(m.f(a).tanh()),
            lambda m, a: m.f(a) + m.f(2 * a),
            lambda m, a: m.f(a) * m.f(a.sin()),
            lambda m, a: m.f(m.f(m.f(a).tanh()) + a),
        ]
    )
    return Step("reuse", forward, f=d.same(shape, depth - 1)), shape


@step(1, 2, 3)
def rows(d: Draft, shape: Shape, depth: int) -> Built:
    """Two copies of each sample on the sample axis: ``[2 N, ...]`` and back."""
    inner = d.same(shape, depth - 1)
    forward = d.pick(
        [
            lambda m, a: m.f(a.repeat_interleave(2, 0)).unflatten(0, (-1, 2)).sum(1),
            lambda m, a: m.f(torch.cat([a, a])).unflatten(0, (2, -1)).sum(0),
            lambda m, a: torch.stack([m.f(z) for z in (a, -a)], 1).prod(1),
        ]
    )
    return Step("rows", forward, f=inner), shape


@step(2)
def per_step(d: Draft, shape: Shape, depth: int) -> Built:
    """Steps for vectors, on every time step: ``[N * t, d]``."""
    t, i = shape
    o = d.size()
    inner = d.to((i,), (o,), depth - 1)
    forward = d.pick(
        [
            lambda m, a: m.f(a.reshape(-1, i)).reshape(-1, t, o),
            lambda m, a: torch.stack([m.f(z) for z in a.unbind(1)], 1),
        ]
    )
    return Step("per step", forward, f=inner), (t, o)


# --------------------------------------------------------------------------------------
# The check


def draw_and_check(pick: Pick) -> str:
    """Draw one model, loss and batch, and compare: ``agrees``, ``too large`` or ``refused: why``."""
    torch.manual_seed(0)
    model, make = Draft(pick).model()
    samples = pick([2, 3, 4, 1])
    kind, target, reduction = pick(LOSSES)
    X, model = make(samples), model.double().eval()
    X = X.double() if X.is_floating_point() else X
    with torch.no_grad():
        output = model(X)
    if kind is nn.CrossEntropyLoss and output.dim() < 2:
        kind, target = nn.MSELoss, torch.randn_like
    y = target(output)
    sizes = [p.numel() for p in model.parameters()]
    if max(sizes) > LARGE:
        return "too large"
    small = sum(sizes) <= SMALL
    quantities = QUANTITIES + HESSIANS * small
    try:
        report = check(model, kind(reduction=reduction), X, y, quantities)
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise AssertionError(f"{describe(model, X, kind, reduction)}\n{error}") from error
        return "refused: " + str(error)
    if not report.ok:
        oracle = Oracle(model, kind(reduction=reduction), X, y)
        size = {e.savefield: _largest(oracle.value(e.savefield)) for e in quantities}
        wrong = [q for (_, q), e in report.errors.items() if e > 1e-8 and e * size[q] > ROUNDING]
        assert not wrong, f"{describe(model, X, kind, reduction)}\n{report}"
    return "agrees"


def _largest(values: dict[str, Tensor]) -> float:
    return max(float(value.abs().max()) for value in values.values())


def describe(model: nn.Module, X: Tensor, kind: type, reduction: str) -> str:
    return f"\n{model}\ninput {list(X.shape)}, {kind.__name__}(reduction={reduction!r})"


def draws(examples: int, number: int | None, shrink: bool = True) -> Counter[str]:
    """Check that many models."""
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        derandomize=number is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        outcome = draw_and_check(lambda options: data.draw(st.sampled_from(options)))
        outcomes[outcome.partition(":")[0]] += 1

    (one if number is None else seed(number)(one))()
    return outcomes


def test_random_architectures() -> None:
    outcomes = draws(40, None)
    assert outcomes["refused"] <= 0.1 * outcomes.total(), outcomes


@pytest.mark.slow
@pytest.mark.parametrize("number", [0])
def test_many_random_architectures(number: int) -> None:
    outcomes = draws(500, number)
    assert outcomes["refused"] <= 0.05 * outcomes.total(), outcomes
