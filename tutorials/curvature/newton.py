"""
Newton steps, exactly
=====================

The generalized Gauss-Newton matrix of a mini-batch has low rank, so that systems with it can be
solved exactly, with all blocks between layers. This script takes such steps, in the space of a few
eigenvectors or in all of it, and trains with them.
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from backpack import extend, optim
from backpack.vivit import GGN, LowRank

images, labels = load_digits(return_X_y=True)
X = torch.tensor(images, dtype=torch.float32) / 16
y = torch.tensor(labels)
TRAIN, SIZE = 1400, 100
torch.manual_seed(0)
start = extend(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)))
lossfunc = extend(nn.CrossEntropyLoss())

# %%
# One step
# --------
#
# ``newton`` stays in the space of some eigenvectors; with ``bulk``, what is left of the gradient is
# added at a fixed rate. ``solve`` is what that becomes with all eigenvectors.

model, damping = copy.deepcopy(start), 0.05
with LowRank() as curvature:
    lossfunc(model(X[:SIZE]), y[:SIZE]).backward()
pairs = curvature.eigh(k=10)
steps = {
    "gradient": [-p.grad for p in model.parameters()],
    "top 10": curvature.newton(pairs, damping),
    "top 10 and bulk": curvature.newton(pairs, damping, bulk=damping),
    "exact": [-s for s in curvature.solve(damping)],
}

# %%
# The exact one is the solution of a system that products with plain autograd can check:

ggn = GGN(model, nn.CrossEntropyLoss(), [(X[:SIZE], y[:SIZE])])
s = torch.cat([each.flatten() for each in steps["exact"]])
gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
residual = (ggn @ s + damping * s + gradient).norm() / gradient.norm()
print(f"relative residual {residual:.1e}")
assert residual < 1e-4

# %%
# How far does each lead down?


def after(step: list[torch.Tensor], length: float) -> float:
    """The mini-batch's loss at some length of a step."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, s in zip(moved.parameters(), step, strict=True):
            p += length * s
        return nn.functional.cross_entropy(moved(X[:SIZE]), y[:SIZE]).item()


figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
lengths = torch.linspace(0, 1.5, 31)
best = {}
for name, step in steps.items():
    losses = [after(step, float(length)) for length in lengths]
    best[name] = min(losses)
    axes.plot(lengths, losses, label=name)
    print(f"{name}: {losses[0]:.2f} -> {min(losses):.2f}")
axes.set(xlabel="length", ylabel="loss")
axes.legend()
plt.show()
assert best["exact"] < best["gradient"] and best["top 10 and bulk"] < best["top 10"]

# %%
# Training
# --------
#
# :class:`backpack.optim.GramNewton` takes the exact step each time. ``columns="mc"`` takes random
# columns instead of nine exact ones. That is cheaper, and needs more damping: random columns miss
# directions along which the loss is curved.


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 60) -> list[float]:
    """Losses of the mini-batches."""
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        index = torch.randint(TRAIN, (SIZE,))
        optimizer.zero_grad()
        loss = lossfunc(model(X[index]), y[index])
        if isinstance(optimizer, optim.GramNewton):
            with optimizer.backpack():
                loss.backward()
        else:
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


curves = {}
for name in ("SGD", "exact columns", "random columns"):
    model = copy.deepcopy(start)
    if name == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    else:
        kind, damping = ("exact", 0.02) if name.startswith("exact") else ("mc", 0.1)
        optimizer = optim.GramNewton(model, lr=0.5, damping=damping, columns=kind, mc_samples=4)
    curves[name] = train(model, optimizer)
    with torch.no_grad():
        right = (model(X[TRAIN:]).argmax(1) == y[TRAIN:]).float().mean()
    print(f"{name}: accuracy {right:.1%}")
    assert right > 0.85

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, losses in curves.items():
    axes.semilogy(torch.tensor(losses).unfold(0, 5, 1).mean(1), label=name)
axes.set(xlabel="step", ylabel="loss, mean of 5 steps")
axes.legend()
plt.show()
first = {name: sum(losses[5:15]) for name, losses in curves.items()}
assert first["exact columns"] < first["SGD"]
