"""
The spectrum of a mini-batch
============================

What curvature does a mini-batch show? This script finds eigenvalues and eigenvectors of the generalized
Gauss-Newton matrix of a small network from one backward pass, checks them by brute force, and looks at
how they differ between layers and with random columns instead of exact ones.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from backpack import extend
from backpack.vivit import GGN, LowRank

images, labels = load_digits(return_X_y=True)
X = torch.tensor(images[:64], dtype=torch.float64) / 16
y = torch.tensor(labels[:64])
torch.manual_seed(0)
layers = nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 10)
model = extend(nn.Sequential(*layers).double())
lossfunc = extend(nn.CrossEntropyLoss())

# %%
# One pass
# --------
#
# The matrix has as many rows as the network has parameters, but rank at most 64 samples times nine: the
# cross-entropy of ten classes is flat along one direction of the output. ``eigvalsh`` gives the
# eigenvalues that are not zero, ``eigh`` the leading ones with their eigenvectors.

with LowRank() as curvature:
    lossfunc(model(X), y).backward()
values = curvature.eigvalsh()
pairs = curvature.eigh(k=10)
size = sum(p.numel() for p in model.parameters())
print(f"{size} parameters, {len(values)} eigenvalues; the largest: {values[:3].tolist()}")
assert len(values) == 64 * 9 and torch.allclose(values[:10], pairs.values)

# %%
# Are they right? Products with the matrix by plain autograd say so: :math:`G e = \lambda e`.

ggn = GGN(model, nn.CrossEntropyLoss(), [(X, y)])
for k in range(3):
    e = torch.cat([v[k].flatten() for v in pairs.vectors])
    residual = (ggn @ e - pairs.values[k] * e).norm() / pairs.values[k]
    print(f"eigenvalue {pairs.values[k]:.4f}: residual {residual:.1e}")
    assert residual < 1e-8

# %%
# Layer by layer
# --------------
#
# Groups are chosen afterwards: blocks of the matrix for each layer come from the same pass. Their
# traces add up to the trace of the whole; their spectra do not.

whole = float(curvature.trace())
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.semilogy(values.clamp(min=1e-10), label="all layers")
parts = 0.0
for name, layer in model.named_children():
    if list(layer.parameters()):
        parts += float(curvature.trace(layer))
        axes.semilogy(curvature.eigvalsh(layer).clamp(min=1e-10), label=f"layer {name}", alpha=0.7)
axes.set(xlabel="eigenvalue, by size", ylabel="eigenvalue", ylim=(1e-7, None))
axes.legend()
plt.show()
assert abs(parts - whole) < 1e-9 * whole

# %%
# Random columns
# --------------
#
# ``columns="mc"`` takes columns from labels that the model draws itself, here one and ten for each
# sample, instead of nine exact ones. The trace is right on average; the largest eigenvalues are too
# large by chance, less so with more draws.

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(values[:30], "k", label="exact")
errors = {}
for draws in (1, 10):
    torch.manual_seed(1)
    with LowRank(columns="mc", mc_samples=draws) as sampled:
        lossfunc(model(X), y).backward()
    found = sampled.eigvalsh()
    axes.plot(found[:30], label=f"{draws} random columns for each sample")
    errors[draws] = float((found[:10] - values[:10]).abs().sum() / values[:10].sum())
    print(f"{draws} draws: the ten largest are off by {errors[draws]:.0%}")
axes.set(xlabel="eigenvalue, by size", ylabel="eigenvalue")
axes.legend()
plt.show()
assert errors[10] < errors[1]
