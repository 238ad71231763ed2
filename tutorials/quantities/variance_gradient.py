"""
Gradient of the variance
========================

Quantities can be differentiated. In a backward pass with ``create_graph=True`` they are part of a
graph, and a function of them is a loss like any other. Here the noise of the gradient, the sum of
the variance over all parameters, is made small.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import DiagGGNExact, Variance

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images[:32]) / 16, torch.tensor(labels[:32])
model = extend(nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double())
lossfunc = extend(nn.CrossEntropyLoss())
parameters = list(model.parameters())

# %%
# A function of the variance, and its gradient
# --------------------------------------------
#
# ``torch.autograd.grad`` computes gradients without adding them to ``.grad``, and saves quantities
# as ``backward`` does.


def noise() -> tuple[Tensor, Tensor]:
    """Loss, and the summed variance of its individual gradients, both differentiable."""
    loss = lossfunc(model(X), y)
    with backpack(Variance()):
        torch.autograd.grad(loss, parameters, create_graph=True)
    return loss, torch.stack([p.variance.sum() for p in parameters]).sum()


loss, total = noise()
gradient = torch.autograd.grad(total, parameters)
print(f"loss {loss.item():.3f}, noise {total.item():.2e}")

# %%
# The same with plain autograd: a gradient for each sample, their variance, and its gradient.

rows = []
for n in range(len(X)):
    share = nn.functional.cross_entropy(model(X[[n]]), y[[n]]) / len(X)
    gradients = torch.autograd.grad(share, parameters, create_graph=True)
    rows.append(torch.cat([g.flatten() for g in gradients]))
reference = torch.stack(rows).var(0, unbiased=False).sum()
torch.testing.assert_close(total, reference)
for ours, theirs in zip(gradient, torch.autograd.grad(reference, parameters), strict=True):
    torch.testing.assert_close(ours, theirs)

# %%
# Curvature can be differentiated too: here the gradient of the trace of the GGN, compared with a
# finite difference in the direction of that gradient.


def trace() -> Tensor:
    """Trace of the GGN."""
    with backpack(DiagGGNExact()):
        torch.autograd.grad(lossfunc(model(X), y), parameters, create_graph=True)
    return torch.stack([p.diag_ggn_exact.sum() for p in parameters]).sum()


gradient = torch.autograd.grad(trace(), parameters)
slope = sum(g.square().sum() for g in gradient).item()
step, values = 1e-5, []
for sign in (1, -2):  # to +step, then on to -step
    with torch.no_grad():
        for p, g in zip(parameters, gradient, strict=True):
            p += sign * step * g
    values.append(trace().item())
with torch.no_grad():
    for p, g in zip(parameters, gradient, strict=True):
        p += step * g
difference = (values[0] - values[1]) / (2 * step)
print(f"slope {slope:.6f}, finite difference {difference:.6f}")
assert abs(slope - difference) < 1e-5 * slope

# %%
# Training with a penalty on noise
# --------------------------------
#
# The same network trained with and without it: at the same loss, its gradients differ less.


def train(penalty: float) -> tuple[list[float], list[float]]:
    """Loss and noise at each step of training."""
    torch.manual_seed(0)
    for layer in (model[0], model[2]):
        layer.reset_parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    losses, noises = [], []
    for _ in range(80):
        loss, total = noise()
        optimizer.zero_grad()
        (loss + penalty * total).backward()
        optimizer.step()
        losses.append(loss.item())
        noises.append(total.item())
    return losses, noises


figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
at_half = {}
for penalty in (0, 100):
    losses, noises = train(penalty)
    axes.loglog(losses, noises, ".-", label=f"penalty {penalty}")
    at_half[penalty] = next(v for loss, v in zip(losses, noises, strict=True) if loss < 0.5)
    print(f"penalty {penalty:3}: noise {at_half[penalty]:.1e} where the loss is 0.5")
assert at_half[100] < at_half[0]
axes.invert_xaxis()
axes.set(xlabel="loss", ylabel="summed variance of gradients")
axes.legend()
plt.show()
