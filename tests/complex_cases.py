"""Programs with complex numbers, as they are written for waves, spectra and quantum states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import Apply

C = torch.complex128
R = torch.float64


class Program(NamedTuple):
    """A model, its input, and a real loss of its output.

    Attributes:
        exact: whether the loss is convex in the output, so that there is a square root.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Any]
    loss: Callable[[Any, Any], Tensor]
    convex: bool = True


def P(*shape: int, scale: float = 0.5) -> nn.Parameter:
    """A real parameter."""
    return nn.Parameter(scale * torch.randn(*shape, dtype=R))


def CP(*shape: int, scale: float = 0.5) -> nn.Parameter:
    """A complex parameter."""
    return nn.Parameter(scale * torch.randn(*shape, dtype=C))


def x(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=R)


def z(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=C)


def lncosh(t: Tensor) -> Tensor:
    """As written for wave functions: no overflow."""
    s = torch.where(t.real < 0, -1.0, 1.0) * t
    return s + torch.log1p(torch.exp(-2 * s)) - torch.log(torch.tensor(2.0, dtype=R))


class RBM(nn.Module):
    """The logarithm of a wave function with complex weights (Carleo and Troyer, 2017)."""

    def __init__(self, sites: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = CP(sites, scale=0.3), CP(hidden, scale=0.3)
        self.w = CP(hidden, sites, scale=0.3)

    def forward(self, spins: Tensor) -> Tensor:
        spins = spins.to(C)
        return spins @ self.a + lncosh(F.linear(spins, self.w, self.b)).sum(-1)


class Spectral1d(nn.Module):
    """A layer of a Fourier neural operator (Li et al., 2021)."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weights = CP(channels, channels, modes)
        self.w = nn.Conv1d(channels, channels, 1, dtype=R)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        out = torch.zeros_like(spectrum)
        out[:, :, : self.modes] = torch.einsum(
            "bix,iox->box", spectrum[:, :, : self.modes], self.weights
        )
        return torch.fft.irfft(out, n=x.shape[-1]) + self.w(x)


class Spectral2d(nn.Module):
    """Two corners of the spectrum, as in the authors' program."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weights1 = CP(channels, channels, modes, modes)
        self.weights2 = CP(channels, channels, modes, modes)

    def forward(self, x: Tensor) -> Tensor:
        m, spectrum = self.modes, torch.fft.rfft2(x)
        out = torch.zeros(
            x.shape[0], x.shape[1], x.size(-2), x.size(-1) // 2 + 1, dtype=C, device=x.device
        )
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :m, :m], self.weights1)
        out[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -m:, :m], self.weights2)
        return torch.fft.irfft2(out, s=(x.size(-2), x.size(-1)))


class GlobalFilter(nn.Module):
    """A filter in the spectrum, kept as real numbers (Rao et al., 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.complex_weight = P(4, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.complex_weight)
        return torch.fft.irfft2(
            torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * weight, s=(4, 4), dim=(1, 2)
        )


class Recurrence(nn.Module):
    """A diagonal linear recurrence in time (Orvieto et al., 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.nu, self.theta = P(3), P(3)
        self.B, self.C, self.D = CP(3, 2), CP(2, 3), P(2)

    def forward(self, u: Tensor) -> Tensor:
        decay = torch.exp(torch.complex(-self.nu.exp(), self.theta.exp()))
        state, out = torch.zeros(u.shape[0], 3, dtype=C), []
        for t in range(u.shape[1]):
            state = decay * state + u[:, t].to(C) @ self.B.T
            out.append((state @ self.C.T).real + self.D * u[:, t])
        return torch.stack(out, 1)


class StateSpace(nn.Module):
    """A convolution by a kernel of exponentials (Gu et al., 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_dt, self.A, self.B = P(2, scale=0.1), CP(2, 3), CP(2, 3)

    def forward(self, u: Tensor) -> Tensor:
        length = u.shape[-1]
        step = self.A * self.log_dt.exp().unsqueeze(-1)
        powers = torch.exp(step.unsqueeze(-1) * torch.arange(length, dtype=R))
        kernel = 2 * torch.einsum("hn,hnl->hl", self.B, powers).real
        spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        return torch.fft.irfft(spectrum, n=2 * length)[..., :length]


class ModReLU(nn.Module):
    """``relu(|z| + b) z / |z|`` between complex layers (Arjovsky et al., 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 5, dtype=C), nn.Linear(5, 3, dtype=C)
        self.b = P(5, scale=0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x)
        size = hidden.abs()
        hidden = F.relu(size + self.b) * hidden / (size + 1e-6)
        return self.two(hidden).abs()


class TwoReal(nn.Module):
    """A complex matrix made from two real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.re, self.im = P(3, 4), P(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.re + 1j * self.im).T


class Knowledge(nn.Module):
    """Scores of triples by rotation (Sun et al., 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.entity, self.relation = CP(6, 3), P(4, 3)

    def forward(self, triples: Tensor) -> Tensor:
        head, tail = self.entity[triples[:, 0]], self.entity.index_select(0, triples[:, 2])
        angle = F.embedding(triples[:, 1], self.relation)
        rotated = head * torch.polar(torch.ones_like(angle), angle)
        return -torch.sqrt((rotated - tail).abs().square() + 0.1)


class Recurrent(nn.Module):
    """A recurrent network with complex states."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.bias = CP(3, 3), CP(3, 2), CP(3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 3, dtype=C)
        for t in range(x.shape[1]):
            h = torch.tanh(h @ self.inner + x[:, t].to(C) @ self.outer.mH.conj() + self.bias)
        return torch.cat([h.real, h.imag], 1)


class Attention(nn.Module):
    """Attention whose scores are real parts of Hermitian products."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = CP(4, 3), CP(4, 3), nn.Linear(4, 3, dtype=C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x @ self.q, torch.matmul(x, self.k), self.v(x)
        weights = torch.bmm(q, k.mH).real.softmax(-1)
        return torch.bmm(weights.to(C), v).mean(1)


class Holographic(nn.Module):
    """A learned phase between two transforms (angular spectrum)."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.kernel = P(4, 4), CP(4, 4)

    def forward(self, field: Tensor) -> Tensor:
        wave = field * torch.exp(1j * self.phase)
        return torch.fft.ifft2(torch.fft.fft2(wave) * self.kernel).abs().square()


class Unitary(nn.Module):
    """Rotations by the exponential of a Hermitian matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.h = CP(3, 3)

    def forward(self, psi: Tensor) -> Tensor:
        return psi @ torch.matrix_exp(1j * (self.h + self.h.mH)).T


def triples() -> Tensor:
    return torch.tensor([[0, 1, 2], [3, 0, 1], [2, 2, 5], [0, 3, 0]])


def spins(n: int, sites: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(2, (n, sites)).to(R) * 2 - 1


def target(out: Tensor, complex_: bool = False) -> Tensor:
    """Fixed numbers of the output's shape."""
    steps = torch.arange(out.numel(), dtype=R)
    real = torch.cos(3 * steps).reshape(out.shape)
    return torch.complex(real, torch.sin(5 * steps).reshape(out.shape)) if complex_ else real


def mse(out: Tensor, y: Any) -> Tensor:
    return F.mse_loss(out, target(out))


def modulus(out: Tensor, y: Any) -> Tensor:
    """``mean |f - y|^2`` of complex outputs."""
    return (out - target(out, True)).abs().square().mean()


def crossentropy(out: Tensor, y: Any) -> Tensor:
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[1])


def energy(out: Tensor, y: Any) -> Tensor:
    """The gradient of an energy: local energies are constants."""
    local = target(out, True)
    return 2 * (out.conj() * (local - local.mean())).real.mean()


def overlap(out: Tensor, y: Any) -> Tensor:
    return ((out.exp() - target(out, True)).abs().square() + 0.1 * out.real**2).mean()


def distance(out: Tensor, y: Any) -> Tensor:
    """Not smooth at zero, curved elsewhere: the modulus of a complex number."""
    return F.l1_loss(out, target(out, True))


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
]
