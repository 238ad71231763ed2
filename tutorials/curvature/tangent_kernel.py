"""
The tangent kernel
==================

Linearized about its parameters, a network is a kernel machine. Its kernel, inner products of the
outputs' gradients, comes from one backward pass over each batch without any Jacobian being written out.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

from backpack.vivit import draw_spectrum, ntk

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1))
X = torch.linspace(-2, 2, 12).unsqueeze(1)
y = torch.sin(3 * X)
new = torch.linspace(-3, 3, 100).unsqueeze(1)

kernel = ntk(model, X)  # [N, C, N, C]
print(kernel.shape)

# %%
# It is the product of Jacobians, which here are small enough to be written out:

parameters = {name: p.detach() for name, p in model.named_parameters()}


def output(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Of one sample."""
    return functional_call(model, p, (x.unsqueeze(0),))[0]


jacobians = vmap(jacrev(output), (None, 0))(parameters, X)
J = torch.cat([j.flatten(2) for j in jacobians.values()], 2)
assert torch.allclose(kernel, torch.einsum("ncp,mdp->ncmd", J, J), rtol=1e-4, atol=1e-4)

# %%
# Regression with the kernel, about the network's own output: what long training of the linearized
# network would give.

K = ntk(model, X, trace=True)
cross = ntk(model, new, X, trace=True, batch_size=25)  # in pieces, the same numbers
with torch.no_grad():
    before, at_new = model(X), model(new)
    weights = torch.linalg.solve(K + 1e-3 * torch.eye(len(X)), y - before)
    predicted = at_new + cross @ weights
    fitted = before + K @ weights
assert torch.allclose(cross, ntk(model, new, X, trace=True), rtol=1e-4)
assert (fitted - y).abs().max() < 0.2 * y.abs().max()

figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
axes[0].plot(new, at_new, ":", label="network as initialized")
axes[0].plot(new, predicted, label="kernel regression")
axes[0].plot(X, y, "ko", label="data")
axes[0].legend()
draw_spectrum(torch.linalg.eigvalsh(K), axes[1])
plt.show()

# %%
# How well does it tell what training does? A small step along the gradient changes outputs by the
# kernel times the residuals.

lr = 1e-4
nn.functional.mse_loss(model(X), y, reduction="sum").mul(0.5).backward()
with torch.no_grad():
    for p in model.parameters():
        p -= lr * p.grad
    change = model(X) - before
expected = -lr * K @ (before - y)
print(f"change of outputs: relative error {(change - expected).norm() / expected.norm():.1%}")
assert (change - expected).norm() < 0.05 * expected.norm()
