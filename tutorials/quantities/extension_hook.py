"""
Extension hook: keep what is small
==================================

Individual gradients of a whole network are ``N`` times as large as the network. An
``extension_hook`` is called with every module as soon as the quantities of its parameters are
saved, while the backward pass goes on. It can make something small of them and delete them, so that
only one module's are in memory.

Here: scalar products of individual gradients, ``[N, N]``, which tell which digits pull in the same
direction.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import BatchGrad

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
order = labels[:40].argsort(kind="stable")
X = torch.tensor(images[order]) / 16
y = torch.tensor(labels[order])

layers = (nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 30), nn.Tanh(), nn.Linear(30, 10))
model = extend(nn.Sequential(*layers).double())
lossfunc = extend(nn.CrossEntropyLoss())

# %%
# The hook
# --------
#
# It is called with each module that owns parameters; before these with the extended loss, which
# owns none.


class GramMatrix:
    """Adds up scalar products of individual gradients, layer by layer, and deletes the gradients."""

    def __init__(self, samples: int) -> None:
        self.total = torch.zeros(samples, samples, dtype=X.dtype)
        self.calls: list[str] = []
        self.largest = 0

    def __call__(self, module: nn.Module) -> None:
        self.calls.append(type(module).__name__)
        for p in module.parameters(recurse=False):
            rows = p.grad_batch.flatten(1)
            self.largest = max(self.largest, rows.numel())
            self.total += rows @ rows.T
            del p.grad_batch


gram = GramMatrix(len(X))
with backpack(BatchGrad(), extension_hook=gram):
    lossfunc(model(X), y).backward()

everything = len(X) * sum(p.numel() for p in model.parameters())
print(f"called with: {', '.join(gram.calls)}")
print(f"numbers in all individual gradients {everything:,}, in one tensor at most {gram.largest:,}")
assert not any(hasattr(p, "grad_batch") for p in model.parameters())

# %%
# The same by a loop over samples, with plain autograd.


def gradient(n: int) -> Tensor:
    """Gradient of the n-th sample's share of the loss."""
    loss = nn.functional.cross_entropy(model(X[n : n + 1]), y[n : n + 1]) / len(X)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


rows = torch.stack([gradient(n) for n in range(len(X))])
torch.testing.assert_close(gram.total, rows @ rows.T)

# %%
# Cosines of the angles between gradients, digits in order: those of a class pull together.

norms = gram.total.diag().sqrt()
cosines = gram.total / norms.outer(norms)
same = y[:, None] == y
apart = ~torch.eye(len(X), dtype=torch.bool)
within, between = cosines[same & apart].mean(), cosines[~same].mean()
print(f"mean cosine within a class {within:.2f}, between classes {between:.2f}")
assert within > between

figure, axes = plt.subplots(figsize=(5, 4))
shown = axes.imshow(cosines.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
ticks = [int((y == digit).nonzero().double().mean()) for digit in range(10)]
axes.set(xticks=ticks, yticks=ticks, xticklabels=range(10), yticklabels=range(10), xlabel="digit")
figure.colorbar(shown, label="cosine of gradients")
plt.show()
