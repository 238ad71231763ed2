"""
Differential privacy
====================

Differentially private SGD (Abadi et al., 2016, arXiv:1607.00133) clips the gradient of every sample
to a norm ``C``, adds the clipped gradients up, and adds noise. Three ways to the clipped sum: from
individual gradients, from their norms alone, and by the optimizer ``DPSGD``.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import BatchGrad, BatchL2Grad
from backpack.optim import DPSGD

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X = torch.tensor(images).reshape(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
CLIP = 1.0

layers = (nn.Conv2d(1, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 10))
model = extend(nn.Sequential(*layers).double())
parameters = list(model.parameters())
batch, target = X[:32], y[:32]

# %%
# From individual gradients
# -------------------------
#
# With ``reduction="sum"``, ``grad_batch[n]`` is the gradient of the n-th sample's own loss. The
# norm is that over all parameters together. This writes out ``N`` gradients.

with backpack(BatchGrad()):
    F.cross_entropy(model(batch), target, reduction="sum").backward()
norms = torch.stack([p.grad_batch.flatten(1).square().sum(1) for p in parameters]).sum(0).sqrt()
factors = CLIP / norms.clamp(min=CLIP)
from_gradients = [torch.einsum("n,n...->...", factors, p.grad_batch) for p in parameters]
print(f"norms from {norms.min():.2f} to {norms.max():.2f}")
for p in parameters:
    del p.grad_batch

# %%
# The same sample by sample, with plain autograd.

reference = [torch.zeros_like(p) for p in parameters]
for n in range(len(batch)):
    gradients = torch.autograd.grad(F.cross_entropy(model(batch[[n]]), target[[n]]), parameters)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    for total, g in zip(reference, gradients, strict=True):
        total += g * min(1.0, CLIP / norm.item())
for ours, theirs in zip(from_gradients, reference, strict=True):
    torch.testing.assert_close(ours, theirs)

# %%
# From norms
# ----------
#
# ``BatchL2Grad`` computes the squared norms, most often without the gradients. The gradient of the
# losses weighted by the factors is the clipped sum: a second backward pass, but ``N`` gradients
# never exist (Li et al., 2022, arXiv:2110.05679).

losses = F.cross_entropy(model(batch), target, reduction="none")
with backpack(BatchL2Grad()):
    torch.autograd.grad(losses.sum(), parameters, retain_graph=True)
norms = torch.stack([p.batch_l2 for p in parameters]).sum(0).sqrt()
factors = CLIP / norms.clamp(min=CLIP)
from_norms = torch.autograd.grad((factors * losses).sum(), parameters)
for ours, theirs in zip(from_norms, reference, strict=True):
    torch.testing.assert_close(ours, theirs)

# %%
# The optimizer
# -------------
#
# ``DPSGD`` does that, adds the noise and takes the step. Its first step without noise is the
# clipped sum over the expected batch size. The privacy guarantee is for batches in which every
# sample is with the same probability, by itself (Poisson sampling), which a loader has to provide;
# ``backpack.optim.epsilon`` computes it. The norms that ``backward`` returns are not private.

before = [p.detach().clone() for p in parameters]
optimizer = DPSGD(model, lr=1.0, noise_multiplier=0.0, max_grad_norm=CLIP, expected_batch_size=32)
optimizer.backward(F.cross_entropy(model(batch), target, reduction="none"))
optimizer.step()
for p, old, total in zip(parameters, before, reference, strict=True):
    torch.testing.assert_close(old - p, total / 32)


def accuracy() -> float:
    """On digits that were not trained with."""
    with torch.no_grad():
        return (model(X[1400:]).argmax(1) == y[1400:]).double().mean().item()


def train(noise: float) -> list[Tensor]:
    """Medians of the norms before clipping, step by step."""
    torch.manual_seed(0)
    for layer in (model[0], model[3]):
        layer.reset_parameters()
    optimizer = DPSGD(model, lr=1.0, noise_multiplier=noise, max_grad_norm=CLIP, expected_batch_size=64)
    seen = []
    for _ in range(100):
        index = (torch.rand(1400) < 64 / 1400).nonzero().squeeze(1)
        losses = F.cross_entropy(model(X[index]), y[index], reduction="none")
        seen.append(optimizer.backward(losses).median())
        optimizer.step()
    return seen


figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for noise in (0.0, 1.0, 4.0):
    seen = train(noise)
    print(f"noise multiplier {noise}: accuracy {accuracy():.1%}")
    assert accuracy() > 0.6
    axes.semilogy(seen, label=f"noise multiplier {noise}")
axes.axhline(CLIP, color="black", linestyle="--", label="clipped to")
axes.set(xlabel="step", ylabel="median norm of a sample's gradient")
axes.legend()
plt.show()
