"""
Which training samples matter
=============================

How would a loss change if a training sample were left out? To first order the answer is an inner
product of individual gradients in the metric of the inverse curvature (Koh, Liang, 2017,
arXiv:1703.04730). One Gram matrix has all of them at once. This script finds mislabelled digits, and
then predicts what the network is unsure of.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from backpack import extend
from backpack.vivit import LowRank

images, labels = load_digits(return_X_y=True)
X = torch.tensor(images, dtype=torch.float32) / 16
y = torch.tensor(labels)
TRAIN, TEST, WRONG = 400, 100, 30

torch.manual_seed(0)
given = y[:TRAIN].clone()
mislabelled = torch.randperm(TRAIN)[:WRONG]
given[mislabelled] = (given[mislabelled] + torch.randint(1, 10, (WRONG,))) % 10

# %%
# Training
# --------
#
# With weight decay, whose weight is the damping below: the curvature of what was trained.

model = extend(nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)))
lossfunc = extend(nn.CrossEntropyLoss())
DECAY = 1e-2
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")


def closure() -> torch.Tensor:
    """Loss and gradient of all training samples."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(X[:TRAIN]), given)
    loss = loss + DECAY / 2 * sum(p.square().sum() for p in model.parameters())
    loss.backward()
    return loss.detach()


optimizer.step(closure)
with torch.no_grad():
    right = (model(X[-TEST:]).argmax(1) == y[-TEST:]).float().mean()
print(f"accuracy on new digits {right:.1%}, with {WRONG / TRAIN:.0%} wrong labels")

# %%
# Influence of samples on themselves
# ----------------------------------
#
# A sample that the others contradict pulls against all of them: leaving it out raises its own loss
# most.

with LowRank("mc", mc_samples=2, generator=torch.Generator().manual_seed(0)) as curvature:
    lossfunc(model(X[:TRAIN]), given).backward()
influence = curvature.influence(damping=DECAY)
suspects = influence.diagonal().argsort(descending=True)
hits = torch.isin(suspects[:WRONG], mislabelled).float().mean()
print(f"of the {WRONG} samples with most influence on themselves, {hits:.0%} are mislabelled")
assert hits > 0.7

figure, axes = plt.subplots(2, 8, figsize=(9, 2.8), layout="constrained")
for ax, n in zip(axes.flat, suspects.tolist(), strict=False):
    ax.imshow(images[n].reshape(8, 8), cmap="gray_r")
    ax.set_title(f"said to be {given[n]}", fontsize=8, color="C3" if n in mislabelled else "k")
    ax.axis("off")
plt.show()

# %%
# Influence on other losses
# -------------------------
#
# Gradients of test losses need no curvature of their own. Mislabelled samples do harm: test losses
# fall if they are left out.

with LowRank(columns=None) as test:
    lossfunc(model(X[-TEST:]), y[-TEST:]).backward()
change = curvature.influence(test, damping=DECAY).sum(0)  # of the mean test loss, without each
good = torch.ones(TRAIN, dtype=torch.bool)
good[mislabelled] = False
print(f"mean change: {change[mislabelled].mean():.1e} mislabelled, {change[good].mean():.1e} others")
assert change[mislabelled].mean() < 0
assert change[mislabelled].mean() < change[good].mean()

# %%
# The numbers are those of a system that is solved for a single sample:

n = int(suspects[0])
slope = torch.autograd.grad(
    nn.functional.cross_entropy(model(X[n : n + 1]), given[n : n + 1]) / TRAIN, model.parameters()
)
solved = curvature.solve(DECAY, slope)
product = sum((a * b).sum() for a, b in zip(slope, solved, strict=True))
assert torch.allclose(product, influence[n, n], rtol=1e-3)

# %%
# How sure are predictions
# ------------------------
#
# With the curvature as precision of a Gaussian over parameters (a Laplace approximation, of low rank),
# outputs have a covariance. Curvature is that of the sum over samples, and so is the prior's precision.

curvature.scale(TRAIN)
with LowRank("jacobian", gradients=False) as outputs:
    model(torch.cat([X[-TEST:], torch.rand(TEST, 64)])).sum().backward()
covariance = curvature.covariance(outputs, damping=DECAY * TRAIN)
spread = covariance.diagonal(0, 1, 2).sum(1).sqrt()
print(f"spread of outputs: digits {spread[:TEST].mean():.2f}, noise {spread[TEST:].mean():.2f}")
assert spread[TEST:].mean() > spread[:TEST].mean()
model.zero_grad()
