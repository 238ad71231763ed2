"""Programs with complex numbers, as they are written for waves, spectra and quantum states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import Apply

C = torch.complex128
R = torch.float64


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


class Cell(nn.Module):
    """A gated recurrence with complex states."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = CP(2, 12), CP(3, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], 3, dtype=C)
        for t in range(x.shape[1]):
            i, f, g, o = (x[:, t] @ self.inner + h @ self.outer).chunk(4, 1)
            i, f, o = (torch.complex(gate.real.sigmoid(), gate.imag.sigmoid()) for gate in (i, f, o))
            c = f * c + i * torch.tanh(g)
            h = o * torch.tanh(c)
        return h.abs()


class Window(nn.Module):
    """A filter of short-time spectra, with a learned window."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.mask = P(8), CP(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(x, 8, 4, window=self.window.exp(), return_complex=True)
        ones = torch.ones(8, dtype=R)
        return torch.istft(spectrum * self.mask, 8, 4, window=ones, length=x.shape[1])


class Reflection(nn.Module):
    """Phases, and a reflection."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.phase = CP(4), P(4)

    def forward(self, x: Tensor) -> Tensor:
        v, x = self.v / self.v.norm(), torch.exp(1j * self.phase) * x
        return x - 2 * (x @ v.conj())[:, None] * v


def each_row(function: Callable[[Any, Tensor], Tensor], **parts: Any) -> Apply:
    """A function of one sample, in ``vmap``."""
    return Apply(lambda m, a: torch.func.vmap(lambda r: function(m, r))(a), **parts)


def written(m: Any, a: Tensor) -> Tensor:
    y = torch.zeros_like(a)
    y[:, :2] = a[:, :2] * m.w[:2]
    y[:, 2:] = m.b
    return y.abs()


def slope(m: Any, a: Tensor) -> Tensor:
    a = a.detach().requires_grad_()
    (g,) = torch.autograd.grad(torch.tanh(m.l(a)).abs().sum(), a, create_graph=True)
    return g.abs()


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
