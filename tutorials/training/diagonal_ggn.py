"""
An optimizer by hand
====================

Gradient descent in which every parameter has a step size of its own, one over its curvature: the
diagonal of the generalized Gauss-Newton matrix (GGN), estimated in the same backward pass. It is a
few lines with ``torch.optim.Optimizer``; the update rule is that of Dangel, Kunstner, Hennig (2020,
arXiv:1912.10985). The page on :doc:`optimizers </tutorials/training/optimizers>` has finished ones.
"""

from collections.abc import Iterable

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack import backpack, check, extend
from backpack.extensions import DiagGGNExact, DiagGGNMC

images, labels = load_digits(return_X_y=True)
X = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
TRAIN, SIZE, STEPS = 1400, 64, 100

# %%
# The optimizer
# -------------


class DiagonalDescent(torch.optim.Optimizer):
    """``theta <- theta - lr grad / (diag(G) + damping)``.

    Args:
        parameters: of an extended model.
        lr: learning rate.
        damping: bounds the step where there is no curvature.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, damping: float) -> None:
        super().__init__(parameters, {"lr": lr, "damping": damping})

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters; needs ``p.diag_ggn_mc``."""
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad / (p.diag_ggn_mc + group["damping"])


def network() -> nn.Sequential:
    """Two convolutions and a linear layer; the same parameters each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def accuracy(model: nn.Module) -> float:
    """On digits that were not trained with."""
    with torch.no_grad():
        return (model(X[TRAIN:]).argmax(1) == y[TRAIN:]).float().mean().item()


# %%
# Training
# --------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, quantities: list) -> list[float]:
    """Losses of the mini-batches."""
    torch.manual_seed(1)
    lossfunc, losses = extend(nn.CrossEntropyLoss()), []
    for _ in range(STEPS):
        index = torch.randint(TRAIN, (SIZE,))
        optimizer.zero_grad()
        loss = lossfunc(model(X[index]), y[index])
        with backpack(*quantities):
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %%
# Beside it, plain gradient descent with three learning rates.

curves = {}
for lr in (0.1, 0.3, 1.0):
    model = network()
    curves[f"SGD, lr {lr}"] = train(model, torch.optim.SGD(model.parameters(), lr), [])
    print(f"SGD, lr {lr}: accuracy {accuracy(model):.1%}")
model = extend(network())
optimizer = DiagonalDescent(model.parameters(), lr=0.03, damping=0.01)
curves["diagonal GGN"] = train(model, optimizer, [DiagGGNMC()])
print(f"diagonal GGN: accuracy {accuracy(model):.1%}")
assert accuracy(model) > 0.85

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, losses in curves.items():
    smooth = torch.tensor(losses).unfold(0, 10, 1).mean(1)
    axes.semilogy(smooth, label=name)
axes.set(xlabel="step", ylabel="loss, mean of 10 steps")
axes.legend()
plt.show()

# %%
# The curvature it divides by
# ---------------------------
#
# ``DiagGGNMC`` draws targets from the model's own prediction: unbiased, and as cheap for a thousand
# classes as for ten. ``DiagGGNExact`` is what it estimates; ``check`` compares that with brute
# force.

with backpack(DiagGGNExact(), DiagGGNMC(mc_samples=200)):
    nn.functional.cross_entropy(model(X[:SIZE]), y[:SIZE]).backward()
exact, sampled = (
    torch.cat([getattr(p, field).flatten() for p in model.parameters()])
    for field in ("diag_ggn_exact", "diag_ggn_mc")
)
error = (exact - sampled).norm() / exact.norm()
print(f"200 draws: relative error {error:.1%}")
assert error < 0.3

report = check(model, nn.CrossEntropyLoss(), X[:2], y[:2], [DiagGGNExact()])
print(report)
assert report.ok
