"""
Any loss
========

A loss may be any function of the model's output that autograd can differentiate. If it is none of
torch's, it is differentiated twice for the generalized Gauss-Newton matrix (GGN). Three losses
written here: one that has all quantities, one whose GGN does not exist, and one that mixes samples.
"""

# sphinx_gallery_thumbnail_path = "_static/thumbs/any_loss.svg"

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack import backpack, check, extend
from backpack.extensions import (
    KFLR,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    Variance,
)

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X = torch.tensor(images[:200]).reshape(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1) / 16  # 4 x 4 pixels
y = torch.tensor(labels[:200])


def network(outputs: int) -> nn.Module:
    """A small network in float64."""
    return extend(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, outputs)).double())


# %%
# Focal loss
# ----------
#
# Cross-entropy in which well-classified samples count less (Lin et al., 2017, arXiv:1708.02002).
# Nothing needs to be extended or registered: the model's output is where the loss begins.


def focal_loss(logits: Tensor, target: Tensor, gamma: float = 1.0) -> Tensor:
    """``-(1 - p)^gamma log p``, averaged; ``p`` is the target's probability."""
    log_p = logits.log_softmax(1).gather(1, target[:, None]).squeeze(1)
    return (-((1 - log_p.exp()) ** gamma) * log_p).mean()


model = network(10)
with backpack(Variance(), DiagGGNExact(), DiagGGNMC(mc_samples=10), KFLR()):
    loss = focal_loss(model(X), y)
    loss.backward()
weight = model[0].weight
traces = [p.sum().item() for p in (weight.diag_ggn_exact, weight.diag_ggn_mc)]
print(f"loss {loss.item():.3f}")
print("trace of the GGN of the first weight: {:.4f}, Monte-Carlo {:.4f}".format(*traces))
print("Kronecker factors", [list(factor.shape) for factor in weight.kflr])

quantities = [BatchGrad(), BatchL2Grad(), Variance(), DiagGGNExact(), DiagHessian()]
report = check(model, focal_loss, X[:4], y[:4], quantities)
print(report)
assert report.ok

# %%
# Mixture density
# ---------------
#
# The output parametrises a mixture of three Gaussians (Bishop, 1994) for a number: here the mean
# brightness of a digit. The likelihood of a mixture is not convex in its parameters, so that the
# GGN has no square root: an error for what needs one. Its diagonal is defined all the same.


def mixture_density(output: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood; ``output [N, 9]`` holds log-weights, means and log-deviations."""
    weights, means, deviations = output.chunk(3, dim=1)
    density = torch.distributions.Normal(means, deviations.exp())
    each = weights.log_softmax(1) + density.log_prob(target[:, None])
    return -each.logsumexp(1).mean()


brightness = X.mean(1)
model = network(9)
try:
    with backpack(SqrtGGNExact()):
        mixture_density(model(X), brightness).backward()
except ValueError as error:
    print(f"ValueError: {error}")
else:
    raise AssertionError("the likelihood of a mixture is not convex")

quantities = [BatchGrad(), BatchL2Grad(), Variance(), DiagGGNExact(), DiagHessian()]
report = check(model, mixture_density, X[:4], brightness[:4], quantities)
print(report)
assert report.ok

# %%
# Contrastive loss
# ----------------
#
# Two views of each image; every embedding in the batch is another one's negative (van den Oord et
# al., 2018, arXiv:1807.03748). The loss is no sum over samples. An individual gradient is still
# defined: that of the loss through one sample's output, the others held constant. They sum to the
# gradient.


def contrastive(z: Tensor, temperature: float = 0.5) -> Tensor:
    """Two views of a sample, ``z[n] [2, d]``, should be closer than views of two samples."""
    a, b = F.normalize(z, dim=2).unbind(1)
    return F.cross_entropy(a @ b.T / temperature, torch.arange(len(z)))


views = torch.stack([X[:6], X[:6] + 0.1 * torch.randn_like(X[:6])], 1)
model = network(5)
with backpack(BatchGrad(), Variance()):
    contrastive(model(views)).backward()

for n in range(len(views)):
    z = model(views)
    own = (torch.arange(len(views)) == n)[:, None, None]
    loss = contrastive(torch.where(own, z, z.detach()))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for p, g in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad_batch[n], g)
for p in model.parameters():
    torch.testing.assert_close(p.grad_batch.sum(0), p.grad)

try:
    with backpack(DiagGGNExact()):
        contrastive(model(views)).backward()
except ValueError as error:
    print(f"ValueError: {error}")
else:
    raise AssertionError("the loss mixes samples")

# %%
# With negatives from a fixed memory (He et al., 2019, arXiv:1911.05722) and scores that are linear
# in the embedding, the loss is a sum over samples and convex, and has all quantities.

memory = F.normalize(torch.randn(20, 5, dtype=X.dtype), dim=1)


def with_memory(z: Tensor, positive: Tensor) -> Tensor:
    """Cross-entropy of scores with a positive ``[N, d]`` and the memory's negatives."""
    scores = torch.cat([(z * positive).sum(1, keepdim=True), z @ memory.T], 1)
    return (scores.logsumexp(1) - scores[:, 0]).mean()


positive = F.normalize(torch.randn(4, 5, dtype=X.dtype), dim=1)
quantities = [BatchGrad(), BatchL2Grad(), Variance(), DiagGGNExact(), DiagHessian()]
report = check(model, with_memory, X[:4], positive, quantities)
print(report)
assert report.ok
