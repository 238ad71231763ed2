"""The table of programs with complex numbers: models, their data, and real losses of their outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import Apply
from tests.complex_cases import (
    CP,
    RBM,
    Attention,
    C,
    Cell,
    GlobalFilter,
    Holographic,
    Knowledge,
    ModReLU,
    P,
    R,
    Recurrence,
    Recurrent,
    Reflection,
    Spectral1d,
    Spectral2d,
    StateSpace,
    TwoReal,
    Unitary,
    Window,
    crossentropy,
    distance,
    each_row,
    energy,
    modulus,
    mse,
    overlap,
    slope,
    spins,
    triples,
    written,
    x,
    z,
)


class Program(NamedTuple):
    """A model, its input, and a real loss of its output.

    Attributes:
        convex: whether the loss is convex in the output, so that there is a square root.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Any]
    loss: Callable[[Any, Any], Tensor]
    convex: bool = True


L = nn.Linear
PROGRAMS = [
    Program(
        "linear abs",
        lambda: Apply(lambda m, a: m.l(a).abs(), l=L(4, 3, dtype=C)),
        z(5, 4),
        crossentropy,
    ),
    Program("linear, complex output", lambda: L(4, 3, dtype=C), z(5, 4), modulus),
    Program("linear, modulus", lambda: L(4, 3, dtype=C), z(5, 4), distance),
    Program(
        "linear, sequence", lambda: Apply(lambda m, a: m.l(a).imag, l=L(4, 3, dtype=C)), z(3, 2, 4), mse
    ),
    Program(
        "two layers",
        lambda: Apply(lambda m, a: m.k(torch.tanh(m.l(a))), l=L(4, 3, dtype=C), k=L(3, 2, dtype=C)),
        z(5, 4),
        modulus,
    ),
    Program(
        "split relu",
        lambda: Apply(
            lambda m, a: m.k(torch.complex(m.l(a).real.relu(), m.l(a).imag.relu())),
            l=L(4, 3, dtype=C),
            k=L(3, 2, dtype=C),
        ),
        z(5, 4),
        modulus,
    ),
    Program("wave function", lambda: RBM(4, 3), spins(5, 4), energy),
    Program("wave function, overlap", lambda: RBM(4, 3), spins(5, 4), overlap, False),
    Program(
        "convolution",
        lambda: Apply(
            lambda m, a: m.d(m.c(a).abs().flatten(1)),
            c=nn.Conv2d(2, 3, 3, padding=1, dtype=C),
            d=L(48, 3, dtype=R),
        ),
        z(3, 2, 4, 4),
        crossentropy,
    ),
    Program(
        "convolution 1d",
        lambda: Apply(
            lambda m, a: m.c(a).real.mean(2), c=nn.Conv1d(2, 4, 3, groups=2, stride=2, dtype=C)
        ),
        z(3, 2, 7),
        mse,
    ),
    Program(
        "transposed convolution",
        lambda: Apply(lambda m, a: m.c(a).abs().mean(2), c=nn.ConvTranspose1d(2, 3, 3, dtype=C)),
        z(3, 2, 5),
        mse,
    ),
    Program(
        "Fourier operator 1d",
        lambda: nn.Sequential(Spectral1d(2, 3), nn.GELU(), Spectral1d(2, 3)),
        x(3, 2, 8),
        mse,
    ),
    Program(
        "Fourier operator 2d",
        lambda: nn.Sequential(Spectral2d(2, 2), nn.GELU(), Spectral2d(2, 2)),
        x(3, 2, 6, 6),
        mse,
    ),
    Program(
        "global filter",
        lambda: nn.Sequential(GlobalFilter(), nn.Flatten(), L(32, 3, dtype=R)),
        x(3, 4, 4, 2),
        crossentropy,
    ),
    Program("recurrence", Recurrence, x(3, 4, 2), mse),
    Program(
        "state space",
        lambda: nn.Sequential(StateSpace(), nn.GELU(), nn.Flatten(), L(10, 3, dtype=R)),
        x(3, 2, 5),
        crossentropy,
    ),
    Program("modrelu", ModReLU, z(5, 4), crossentropy),
    Program("two real matrices", TwoReal, lambda: torch.randn(5, 4, dtype=C), modulus),
    Program(
        "two real matrices, real data",
        lambda: Apply(lambda m, a: m.t(a.to(C)).abs(), t=TwoReal()),
        x(5, 4),
        crossentropy,
    ),
    Program("knowledge", Knowledge, triples, mse),
    Program("recurrent", Recurrent, x(3, 3, 2), mse),
    Program("attention", Attention, z(3, 4, 4), modulus),
    Program("hologram", Holographic, z(3, 4, 4), mse),
    Program("unitary", Unitary, z(5, 3), modulus),
    Program(
        "scale", lambda: Apply(lambda m, a: (m.w * a + m.b).angle(), w=CP(4), b=CP(4)), z(5, 4), mse
    ),
    Program(
        "real data, complex scale",
        lambda: Apply(lambda m, a: (m.w * a).imag + (a / m.w).real, w=CP(4)),
        x(5, 4),
        mse,
    ),
    Program(
        "complex data, real weight",
        lambda: Apply(lambda m, a: (m.w * a).abs() + (a.real @ m.v), w=P(4), v=P(4, 4)),
        z(5, 4),
        mse,
    ),
    Program(
        "complex data, real matrix",
        lambda: Apply(lambda m, a: torch.einsum("ni,io->no", a, m.v.to(C)), v=P(4, 3)),
        z(5, 4),
        modulus,
    ),
    Program(
        "shared",
        lambda: Apply(lambda m, a: m.l(torch.tanh(m.l(a))) + m.l(a.conj()), l=L(3, 3, dtype=C)),
        z(5, 3),
        modulus,
    ),
    Program(
        "conjugated",
        lambda: Apply(lambda m, a: a @ m.w.mH + m.b.conj() + a @ m.w.T, w=CP(3, 4), b=CP(3)),
        z(5, 4),
        modulus,
    ),
    Program(
        "real part of weight",
        lambda: Apply(lambda m, a: (a @ m.w.real).exp() + a @ m.w.imag, w=CP(4, 3)),
        x(5, 4),
        mse,
    ),
    Program(
        "weight as real",
        lambda: Apply(lambda m, a: a @ torch.view_as_real(m.w).flatten(1), w=CP(4, 3)),
        x(5, 4),
        mse,
    ),
    Program(
        "doubled weight",
        lambda: Apply(lambda m, a: (2 * m.w) * a + 1j * m.w * a, w=CP(4)),
        z(5, 4),
        modulus,
    ),
    Program("modulus of weight", lambda: Apply(lambda m, a: m.w.abs() * a, w=CP(4)), x(5, 4), mse),
    Program(
        "imaginary weight",
        lambda: Apply(lambda m, a: (m.w * 1j) * a + (m.v * (2 + 1j)) * a, w=P(4), v=P(4)),
        z(5, 4),
        modulus,
    ),
    Program(
        "sum of weights",
        lambda: Apply(lambda m, a: a * (m.v + m.w) - (m.w - m.v) * a.conj(), v=P(4), w=CP(4)),
        z(5, 4),
        modulus,
    ),
    Program(
        "bilinear",
        lambda: Apply(lambda m, a: torch.einsum("ni,oij,nj->no", a, m.w, a.conj()), w=CP(3, 4, 4)),
        z(5, 4),
        modulus,
    ),
    Program(
        "batched matrices",
        lambda: Apply(
            lambda m, a: torch.baddbmm(m.b, a, m.w.expand(len(a), 4, 3)), w=CP(1, 4, 3), b=CP(3)
        ),
        z(3, 2, 4),
        modulus,
    ),
    Program(
        "matrix and vector",
        lambda: Apply(lambda m, a: torch.addmm(m.b, a, m.w) @ m.v, w=CP(4, 3), b=CP(3), v=CP(3)),
        z(5, 4),
        modulus,
    ),
    Program(
        "outer",
        lambda: Apply(lambda m, a: (a[:, :, None] * m.w[None, None, :]).abs().sum(1), w=CP(3)),
        z(5, 4),
        mse,
    ),
    Program(
        "normalized parts",
        lambda: Apply(
            lambda m, a: m.n(torch.view_as_real(m.l(a)).flatten(1)),
            l=L(4, 3, dtype=C),
            n=nn.LayerNorm(6, dtype=R),
        ),
        z(5, 4),
        mse,
    ),
    Program(
        "complex from two layers",
        lambda: Apply(
            lambda m, a: torch.complex(m.u(a), m.v(a)).abs(), u=L(4, 3, dtype=R), v=L(4, 3, dtype=R)
        ),
        x(5, 4),
        crossentropy,
    ),
    Program(
        "view as complex",
        lambda: Apply(lambda m, a: m.l(torch.view_as_complex(a)).abs(), l=L(4, 3, dtype=C)),
        x(5, 4, 2),
        crossentropy,
    ),
    Program(
        "log",
        lambda: Apply(lambda m, a: torch.log(m.l(a)).mean(1), l=L(4, 3, dtype=C)),
        z(5, 4),
        modulus,
    ),
    Program(
        "powers",
        lambda: Apply(lambda m, a: m.w**a.real + m.l(a) ** 2, w=CP(3), l=L(3, 3, dtype=C)),
        z(5, 3),
        modulus,
    ),
    Program(
        "table",
        lambda: Apply(lambda m, a: m.w[a].sum(1).abs(), w=CP(6, 3)),
        lambda: torch.randint(6, (5, 3)),
        crossentropy,
    ),
    Program("one sample", lambda: L(4, 3, dtype=C), z(1, 4), modulus),
    Program("cell", Cell, z(3, 3, 2), mse),
    Program("window", Window, x(3, 32), mse),
    Program("reflection", Reflection, z(4, 4), modulus),
    Program("written", lambda: Apply(written, w=CP(4), b=CP(2)), z(4, 4), mse),
    Program("slope", lambda: Apply(slope, l=L(3, 2, dtype=C)), z(4, 3), mse),
    Program(
        "in place",
        lambda: Apply(lambda m, a: (a * 1).mul_(m.w).add_(m.b).abs(), w=CP(4), b=CP(4)),
        z(4, 4),
        mse,
    ),
    Program(
        "rows, layer", lambda: each_row(lambda m, r: m.l(r).abs(), l=L(4, 3, dtype=C)), z(4, 4), mse
    ),
    Program(
        "rows, product",
        lambda: each_row(lambda m, r: (m.t * (r @ m.w) + m.b).abs(), w=CP(4, 3), b=CP(3), t=P(3)),
        z(4, 4),
        mse,
    ),
    Program(
        "rows, quotient",
        lambda: each_row(lambda m, r: (r / m.b - m.b / (r + 3)).abs(), b=CP(3)),
        z(4, 3),
        mse,
    ),
    Program(
        "rows, convolution",
        lambda: each_row(lambda m, r: F.conv1d(r[None, None], m.c).abs().flatten(), c=CP(2, 1, 3)),
        z(4, 5),
        mse,
    ),
    Program(
        "rows, conjugate",
        lambda: each_row(
            lambda m, r: (r @ m.w.conj()).abs() + (m.t * 1j * r[:3]).imag, w=CP(4, 3), t=P(3)
        ),
        z(4, 4),
        mse,
    ),
    Program(
        "loop",
        lambda: Apply(lambda m, a: torch.stack([m.l(r).abs() for r in a]), l=L(3, 2, dtype=C)),
        z(4, 3),
        mse,
    ),
    Program(
        "permuted weight",
        lambda: Apply(lambda m, a: torch.einsum("bti,ixo->btox", a, m.w).flatten(1), w=CP(3, 2, 2)),
        z(4, 2, 3),
        modulus,
    ),
    Program(
        "complex factors",
        lambda: Apply(
            lambda m, a: torch.add(a, m.b, alpha=2 + 1j) - torch.sub(a, m.c, alpha=1j), b=P(3), c=CP(3)
        ),
        z(4, 3),
        modulus,
    ),
    Program(
        "spectral loss",
        lambda: L(3, 6, dtype=R),
        x(4, 3),
        lambda o, y: mse(torch.fft.rfft(o).abs(), y),
        False,
    ),
]
