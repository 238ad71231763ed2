"""
Several backward passes
=======================

What is captured in a forward pass lives on its graph, as long as the graph does. A graph that is
kept (``retain_graph=True``) can be gone through again, for other quantities or another loss. A
quantity is always that of the last backward pass inside a ``with backpack(...)`` block; ``.grad``
adds up, as usual.
"""

# sphinx_gallery_thumbnail_path = "_static/thumbs/several_passes.svg"

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact, Variance

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images[:48]) / 16, torch.tensor(labels[:48])
model = extend(nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)).double())
lossfunc = extend(nn.CrossEntropyLoss())
weight = model[0].weight


def gradient(loss: Tensor) -> Tensor:
    """Gradient in the first weight, by plain autograd."""
    return torch.autograd.grad(loss, weight, retain_graph=True)[0]


# %%
# One loss, twice
# ---------------
#
# The second pass need not compute what the first has: fields of earlier passes stay.

loss = lossfunc(model(X), y)
with backpack(Variance()):
    loss.backward(retain_graph=True)
with backpack(DiagGGNExact()):
    loss.backward()
print("fields:", [name for name in ("variance", "diag_ggn_exact") if hasattr(weight, name)])
torch.testing.assert_close(weight.grad, 2 * gradient(nn.functional.cross_entropy(model(X), y)))

# %%
# After a pass that frees the graph there is nothing left to go through, for autograd and for
# quantities.

try:
    loss.backward()
except RuntimeError as error:
    print(f"RuntimeError: {str(error)[:52]}...")
else:
    raise AssertionError("the graph was freed")

# %%
# Two losses of one forward pass
# ------------------------------

output = model(X)
usual, flatter = lossfunc(output, y), lossfunc(output / 2, y)
fields = []
for each in (usual, flatter):
    model.zero_grad()
    with backpack(BatchGrad()):
        each.backward(retain_graph=True)
    torch.testing.assert_close(weight.grad_batch.sum(0), gradient(each))
    fields.append(weight.grad_batch)

# %%
# Their sum has the sum of the individual gradients, and a factor before a loss is in its gradients.

with backpack(BatchGrad()):
    (usual + 3 * flatter).backward(retain_graph=True)
torch.testing.assert_close(weight.grad_batch, fields[0] + 3 * fields[1])

# %%
# Micro-batches
# -------------
#
# A large batch in three parts: gradients add up by themselves, quantities that are sums over
# samples are added by hand. Each part's loss is divided by the number of parts, so that their sum
# is the mean over all. (Not every quantity is such a sum: ``backpack.accumulate`` and
# ``backpack.accumulating`` know the rule of each, see :doc:`/datasets`.)

model.zero_grad()
diagonal = torch.zeros_like(weight)
for inputs, targets in zip(X.chunk(3), y.chunk(3), strict=True):
    with backpack(DiagGGNExact()):
        (lossfunc(model(inputs), targets) / 3).backward()
    diagonal += weight.diag_ggn_exact
accumulated = weight.grad.clone()

model.zero_grad()
with backpack(DiagGGNExact()):
    lossfunc(model(X), y).backward()
torch.testing.assert_close(accumulated, weight.grad)
torch.testing.assert_close(diagonal, weight.diag_ggn_exact)
print("three micro-batches have the gradient and the GGN diagonal of the whole batch")

# %%
# ``retain_graph`` of ``backpack``
# --------------------------------
#
# ``backpack(..., retain_graph=True)`` keeps what was captured although ``backward`` frees the
# graph's buffers, for programs that go through a part of the graph again whose operations save
# nothing. It is seldom needed: ``loss.backward(retain_graph=True)`` keeps both.
