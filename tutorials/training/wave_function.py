"""
A quantum state
===============

A wave function ``psi`` is a complex function of spins, and a network with complex weights can be its
logarithm (Carleo and Troyer, Science 2017, arXiv:1606.02318). Its energy is lowered by natural
gradients: steps in the metric of the state itself, the quantum geometric tensor, which is a covariance
of the samples' own gradients. They come from one backward pass.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import BatchGrad

torch.manual_seed(0)

# %%
# A chain of spins
# ----------------
#
# Eight spins in a ring, in a field: few enough to write down all of the ``2^8`` states and the ground
# state's energy, which the network does not know.

SITES, FIELD = 8, 1.0
numbers = torch.arange(2**SITES)
states = 1 - 2 * ((numbers[:, None] >> torch.arange(SITES)) & 1).double()  # [256, 8], entries 1 and -1
flipped = numbers[:, None] ^ (1 << torch.arange(SITES))  # [256, 8]: with one spin turned round
aligned = -(states * states.roll(1, 1)).sum(1)

hamiltonian = torch.diag(aligned)
for site in range(SITES):
    hamiltonian[numbers, flipped[:, site]] -= FIELD
lowest = torch.linalg.eigvalsh(hamiltonian)[0].item()
print(f"ground state: {lowest:.4f}")


# %%
# A restricted Boltzmann machine with complex weights.


def log_cosh(x: Tensor) -> Tensor:
    """Without overflow."""
    x = torch.where(x.real < 0, -1.0, 1.0) * x
    return x + torch.log1p(torch.exp(-2 * x))


class Boltzmann(nn.Module):
    """``log psi(s) = a s + sum_j log cosh(b_j + W_j s)``, up to a constant."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.a = nn.Parameter(0.05 * torch.randn(SITES, dtype=torch.complex128))
        self.b = nn.Parameter(0.05 * torch.randn(hidden, dtype=torch.complex128))
        self.W = nn.Parameter(0.05 * torch.randn(hidden, SITES, dtype=torch.complex128))

    def forward(self, spins: Tensor) -> Tensor:
        spins = spins.to(torch.complex128)
        return spins @ self.a + log_cosh(F.linear(spins, self.W, self.b)).sum(1)


@torch.no_grad()
def local_energies(model: nn.Module, picked: Tensor) -> Tensor:
    """``<s|H|psi> / <s|psi>`` of some states."""
    log_psi = model(states)
    ratios = torch.exp(log_psi[flipped[picked]] - log_psi[picked][:, None])
    return aligned[picked] - FIELD * ratios.sum(1)


# %%
# The gradient of every sample
# ----------------------------
#
# ``log psi`` is an analytic function of the weights. The gradient of its real part, which is what torch
# gives for a complex weight, is the conjugate of the derivative ``O_n = d log psi(s_n) / d w``; so
# ``grad_batch`` holds ``conj(O_n)``, complex as the weights are. From them come the force
# ``F = cov(O, E)`` and the quantum geometric tensor ``S = cov(O, O)``; the step solves
# ``(S + damping) d = F``. With fewer samples than weights that would be a system of the samples' size.


def derivatives(model: nn.Module, spins: Tensor) -> Tensor:
    """``conj(O_n)`` of all weights, ``[samples, weights]``."""
    with backpack(BatchGrad()):
        model(spins).real.sum().backward()
    return torch.cat([p.grad_batch.flatten(1) for p in model.parameters()], 1)


def train(natural: bool, lr: float, steps: int, samples: int = 400) -> list[float]:
    """Energies along training; a sample is drawn from ``|psi|^2`` in each step."""
    torch.manual_seed(1)
    model, energies = extend(Boltzmann(SITES)), []
    for _ in range(steps):
        with torch.no_grad():
            picked = torch.multinomial((2 * model(states).real).softmax(0), samples, replacement=True)
        energy = local_energies(model, picked)
        energies.append(energy.real.mean().item())
        rows = derivatives(model, states[picked])
        rows = rows - rows.mean(0)
        step = rows.mT @ (energy - energy.mean()) / samples
        if natural:
            metric = rows.mT @ rows.conj() / samples
            step = torch.linalg.solve(metric + 1e-3 * torch.eye(len(metric), dtype=metric.dtype), step)
        with torch.no_grad():
            sizes = [p.numel() for p in model.parameters()]
            for p, d in zip(model.parameters(), step.split(sizes), strict=True):
                p -= lr * d.reshape(p.shape)
        model.zero_grad()
    return energies


# %%
# One sample's gradient by plain autograd, for the comparison that every tutorial makes. And ``W`` once
# more as two real parameters: the real and imaginary parts of the complex gradient are theirs.

model = extend(Boltzmann(SITES))
rows = derivatives(model, states[:20])
alone = torch.autograd.grad(model(states[7:8]).real.sum(), list(model.parameters()))
torch.testing.assert_close(rows[7], torch.cat([g.flatten() for g in alone]))

pairs = torch.view_as_real(model.W.detach()).clone().requires_grad_()
made = {"a": model.a, "b": model.b, "W": torch.view_as_complex(pairs)}
output = torch.func.functional_call(model, made, (states[7:8],))
(real,) = torch.autograd.grad(output.real.sum(), pairs)
torch.testing.assert_close(torch.view_as_real(model.W.grad_batch[7]), real)

# %%
# Both with the best of the learning rates 0.003, 0.01, 0.03, 0.1 and 0.3 on this seed, which is the
# same for both. Plain gradients come near to the ground state, too; natural gradients come nearer, in
# fewer steps.

STEPS = 100
natural = train(True, 0.1, STEPS)
plain = train(False, 0.1, STEPS)
for name, found in (("natural", natural), ("plain", plain)):
    end = sum(found[-10:]) / 10
    print(f"{name} gradient: energy {end:.4f}, {end - lowest:.4f} above the lowest")
assert sum(natural[-10:]) / 10 - lowest < 0.001 * abs(lowest)

plt.figure(figsize=(6, 3.5))
for name, found in (("natural gradient", natural), ("gradient", plain)):
    plt.semilogy([abs(energy - lowest) for energy in found], label=name)
plt.xlabel("step")
plt.ylabel("distance to the lowest energy")
plt.title("Eight spins in a transverse field: means of 400 samples, one seed", fontsize=10)
plt.legend()
plt.tight_layout()
plt.show()
