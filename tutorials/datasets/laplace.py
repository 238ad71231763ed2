"""
Laplace posterior
=================

A trained network is the mode of a posterior over its weights. Laplace's approximation (MacKay, 1992;
with Kronecker factors Ritter et al., 2018) is the Gaussian ``N(theta, (G + tau I)^-1)``, with ``G`` the
generalized Gauss-Newton matrix of the negative log-likelihood of all the data, and ``tau`` the
precision of the prior. ``p.kflr`` is ``G``'s block for a parameter, with the algebra that takes.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.utils.data import DataLoader, TensorDataset

from backpack import accumulate, backpack, extend
from backpack.extensions import KFLR, BatchGrad

torch.manual_seed(0)
SIGMA = 0.1


def log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    """Gaussian noise of standard deviation ``SIGMA``, summed over samples."""
    squares = nn.functional.mse_loss(outputs, targets, reduction="sum") / (2 * SIGMA**2)
    return -squares - targets.numel() * math.log(SIGMA * math.sqrt(2 * math.pi))


def curvature(model: nn.Module, loader: DataLoader) -> None:
    """Save ``kflr`` of the negative log-likelihood of all samples, a sum over batches."""
    accumulate(
        *(extend(model), None, loader, [KFLR()]),
        forward=lambda model, batch: -log_likelihood(model(batch[0]), batch[1]),
        reduction="sum",
        gradient=False,
    )


# %%
# Evidence
# --------
#
# The logarithm of the marginal likelihood is ``log p(D | theta) + log p(theta) + P/2 log 2 pi
# - 1/2 log det(G + tau I)``. A block's eigendecomposition serves for all values of ``tau``.


def evidence(model: nn.Module, likelihood: Tensor, blocks: list, tau: float) -> Tensor:
    """Laplace's approximation of the log marginal likelihood."""
    squares = sum(p.detach().square().sum() for p in model.parameters())
    size = sum(p.numel() for p in model.parameters())
    prior = size / 2 * math.log(tau) - tau / 2 * squares
    return likelihood + prior - sum(block.logdet(tau) for block in blocks) / 2


# %%
# For a linear model the posterior is a Gaussian, and the block of its weight is a Kronecker product:
# the approximation is exact. Its mode is that of ridge regression, its evidence a Gaussian density of
# the targets.

features, noise, tau = torch.randn(40, 5).double(), torch.randn(40, 1).double(), 2.0
targets = features @ torch.randn(5, 1).double() + SIGMA * noise
linear = nn.Linear(5, 1, bias=False).double()
precision = features.T @ features / SIGMA**2 + tau * torch.eye(5)
linear.weight.data = torch.linalg.solve(precision, features.T @ targets / SIGMA**2).T
curvature(linear, DataLoader(TensorDataset(features, targets), batch_size=16))
block = linear.weight.kflr
torch.testing.assert_close(block.to_dense() + tau * torch.eye(5), precision)
found = evidence(linear, log_likelihood(linear(features), targets).detach(), [block], tau)
covariance = SIGMA**2 * torch.eye(40) + features @ features.T / tau
exact = MultivariateNormal(torch.zeros(40).double(), covariance).log_prob(targets[:, 0])
torch.testing.assert_close(found, exact)
print(f"log evidence of the linear model {found:.2f}, exactly")

# %%
# A network
# ---------
#
# Some noisy points of a sine, with a gap. The prior's precision is chosen by evidence.

x = torch.cat([torch.rand(60, 1) * 2 - 3, torch.rand(60, 1) * 2 + 1]).double()
y = x.sin() + SIGMA * torch.randn_like(x)
model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)).double()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
for _ in range(800):
    optimizer.zero_grad()
    decay = sum(p.square().sum() for p in model.parameters()) / 2
    (decay - log_likelihood(model(x), y)).backward()
    optimizer.step()

curvature(model, DataLoader(TensorDataset(x, y), batch_size=50))
parameters = list(model.parameters())
blocks = [p.kflr.eig() for p in parameters]
likelihood = log_likelihood(model(x), y).detach()
values = {tau: float(evidence(model, likelihood, blocks, tau)) for tau in (0.01, 0.1, 1.0, 10.0, 100.0)}
tau = max(values, key=values.__getitem__)
print("log evidence", {tau: round(value, 1) for tau, value in values.items()}, "best:", tau)

# %%
# Predictive variance
# -------------------
#
# The output is linearized, ``f(x) + J (theta' - theta)``: its variance is ``J (G + tau I)^-1 J^T``.
# ``BatchGrad`` of the summed outputs gives the Jacobians of all inputs.

grid = torch.linspace(-5, 5, 101).double().unsqueeze(1)
with backpack(BatchGrad(), gradient=False):
    model(grid).sum().backward()
pairs = [(p.grad_batch, block) for p, block in zip(parameters, blocks, strict=True)]
variance = sum((J * block.solve(J, tau)).flatten(1).sum(1) for J, block in pairs)

# %%
# The same by dense matrices and by plain autograd, for one input:

dense = torch.zeros(()).double()
for p, block in zip(parameters, blocks, strict=True):
    (J,) = torch.autograd.grad(model(grid[7]), p)
    matrix = block.to_dense() + tau * torch.eye(p.numel())
    dense = dense + J.flatten() @ torch.linalg.solve(matrix, J.flatten())
torch.testing.assert_close(variance[7], dense)

# %%
# Samples of weights have the same variance, as far as the network is linear.

draws = [block.sample_inverse(4000, tau) for block in blocks]
changes = sum((J[7] * draw).flatten(1).sum(1) for (J, _), draw in zip(pairs, draws, strict=True))
assert abs(changes.var() / variance[7] - 1) < 0.1

# %%
# The network is less certain where there were no data:

inside = variance[((grid - 2).abs() < 0.5)[:, 0]].mean()
outside = variance[(grid.abs() > 4)[:, 0]].mean()
print(f"variance {inside:.4f} among the data, {outside:.4f} outside")
assert outside > 5 * inside

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
mean, deviation = model(grid).detach()[:, 0], (variance + SIGMA**2).sqrt()
axes.plot(grid[:, 0], mean)
axes.fill_between(grid[:, 0], mean - 2 * deviation, mean + 2 * deviation, alpha=0.3)
axes.plot(x, y, "k.", markersize=2)
axes.set(xlabel="x", ylabel="y", ylim=(-3, 3))
plt.show()
