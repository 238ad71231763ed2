"""
Trace of the Hessian
====================

Four ways to the trace of the Hessian, one exact and three with random vectors ``z`` of signs, for
which ``E[z^T H z]`` is the trace (Hutchinson, 1990). They differ in cost and in noise.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import HMP, DiagHessian, DiagHessianMC
from backpack.hessianfree import hessian_vector_product

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images[:32]) / 16, torch.tensor(labels[:32])
model = extend(nn.Sequential(nn.Linear(64, 10), nn.Sigmoid(), nn.Linear(10, 10)).double())
lossfunc = extend(nn.CrossEntropyLoss())
parameters = list(model.parameters())
DRAWS = 100

# %%
# Exact
# -----
#
# The sum of ``DiagHessian``; and of the diagonal of the whole Hessian, by plain autograd.

with backpack(DiagHessian()):
    lossfunc(model(X), y).backward()
exact = sum(p.diag_h.sum() for p in parameters).item()

gradients = torch.autograd.grad(lossfunc(model(X), y), parameters, create_graph=True)
reference = 0.0
for p, g in zip(parameters, gradients, strict=True):
    for j, entry in enumerate(g.flatten()):
        (row,) = torch.autograd.grad(entry, p, retain_graph=True)
        reference += row.flatten()[j].item()
print(f"DiagHessian {exact:.6f}, autograd {reference:.6f}")
assert abs(exact - reference) < 1e-10

# %%
# Products with the whole Hessian
# -------------------------------
#
# ``hessian_vector_product`` needs no extended model; the gradient is computed once.


def signs(like: Tensor, *more: int) -> Tensor:
    """Random signs of a tensor's shape."""
    return torch.randint(2, (*more, *like.shape)).to(like) * 2 - 1


loss = lossfunc(model(X), y)
gradients = torch.autograd.grad(loss, parameters, create_graph=True)
draws: list[float] = []
for _ in range(DRAWS):
    z = [signs(p) for p in parameters]
    product = hessian_vector_product(loss, parameters, z, grad_params=gradients)
    draws.append(sum((a * b).sum() for a, b in zip(z, product, strict=True)).item())
estimates = {"whole Hessian": torch.tensor(draws)}

# %%
# Products with the blocks
# ------------------------
#
# ``HMP`` gives a function per parameter, the product with that parameter's block, for many vectors
# at once. Terms between different parameters, which have mean zero, do not arise.

with backpack(HMP()):
    lossfunc(model(X), y).backward()
total = torch.zeros(DRAWS, dtype=X.dtype)
for p in parameters:
    z = signs(p, DRAWS)
    total += (z * p.hmp(z)).flatten(1).sum(1)
estimates["blocks"] = total

# %%
# Signs at the layers' outputs
# ----------------------------
#
# ``DiagHessianMC`` draws the signs at the outputs of the layers, for every sample anew, and
# estimates the diagonal itself.

draws = []
for _ in range(DRAWS):
    with backpack(DiagHessianMC()):
        lossfunc(model(X), y).backward()
    draws.append(sum(p.diag_h_mc.sum() for p in parameters).item())
estimates["DiagHessianMC"] = torch.tensor(draws)

# %%
# Comparison
# ----------
#
# All are right on average; each mean of 100 draws lies within four standard errors. The less a
# method mixes entries, the less noise it has.

print(f"{'exact':15} {exact:.3f}")
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, values in estimates.items():
    spread = values.std().item()
    print(f"{name:15} {values.mean():.3f} +- {spread / DRAWS**0.5:.3f}, of one draw {spread:.3f}")
    assert abs(values.mean() - exact) < 4 * spread / DRAWS**0.5
    axes.plot(values.cumsum(0) / torch.arange(1, DRAWS + 1), label=name)
axes.axhline(exact, color="black", linestyle="--", label="exact")
axes.set(xlabel="draws", ylabel="mean of estimates", ylim=(0.5 * exact, 1.5 * exact))
axes.legend()
plt.show()
assert estimates["DiagHessianMC"].std() < estimates["whole Hessian"].std()
