"""
Quantities of a part of the batch
=================================

Individual gradients and square roots of the GGN grow with the batch. With ``subsampling`` they are
computed for some of its samples only, while ``.grad`` is that of the whole batch. Other quantities
are computed for a part of the batch by a forward pass with that part.
"""

# sphinx_gallery_thumbnail_path = "_static/thumbs/subsampling.svg"

import torch
from sklearn.datasets import load_digits
from torch import nn

from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact, SqrtGGNExact

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images[:64]) / 16, torch.tensor(labels[:64])
model = extend(nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)).double())
lossfunc = extend(nn.CrossEntropyLoss())

# %%
# Gradients and square roots
# --------------------------

chosen = [3, 1, 4, 15]
with backpack(BatchGrad(subsampling=chosen), SqrtGGNExact(subsampling=chosen)):
    lossfunc(model(X), y).backward()

for name, p in model.named_parameters():
    print(f"{name:10} {list(p.grad_batch.shape)} {list(p.sqrt_ggn_exact.shape)}")

# %%
# The scale stays that of the whole batch: with a mean over 64 samples, each gradient carries 1/64.
# The gradient of each sample's own loss, by plain autograd:

for row, n in enumerate(chosen):
    own = nn.functional.cross_entropy(model(X[[n]]), y[[n]])
    gradients = torch.autograd.grad(own, list(model.parameters()))
    for p, g in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad_batch[row], g / len(X))

# %%
# Curvature of a part
# -------------------
#
# The diagonal of the GGN of these samples alone follows from their square root, or from a forward
# pass with them. Their mean loss has 1/4 where the whole batch's has 1/64.

from_root = {
    name: p.sqrt_ggn_exact.square().sum((0, 1)) * len(X) / len(chosen)
    for name, p in model.named_parameters()
}
with backpack(DiagGGNExact()):
    lossfunc(model(X[chosen]), y[chosen]).backward()
for name, p in model.named_parameters():
    torch.testing.assert_close(from_root[name], p.diag_ggn_exact)

# %%
# One optimization step can thus take its gradient from the whole batch and its curvature from a
# part. The part's backward pass adds to ``.grad``; ``torch.autograd.grad`` does not.

model.zero_grad()
lossfunc(model(X), y).backward()
before = [p.grad.clone() for p in model.parameters()]
with backpack(DiagGGNExact()):
    torch.autograd.grad(lossfunc(model(X[chosen]), y[chosen]), list(model.parameters()))
for name, p in model.named_parameters():
    torch.testing.assert_close(p.diag_ggn_exact, from_root[name])
assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))

# %%
# How well a part stands for the whole: relative error of the diagonal, for parts of growing size.

with backpack(DiagGGNExact()):
    lossfunc(model(X), y).backward()
whole = torch.cat([p.diag_ggn_exact.flatten() for p in model.parameters()])
for size in (4, 16, 32, 64):
    with backpack(DiagGGNExact()):
        lossfunc(model(X[:size]), y[:size]).backward()
    part = torch.cat([p.diag_ggn_exact.flatten() for p in model.parameters()])
    error = (part - whole).norm() / whole.norm()
    print(f"{size:2} of {len(X)} samples: relative error {error:.2f}")
assert error == 0
