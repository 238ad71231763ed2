"""
A monitor that stays on
=======================

A loss curve says how well training goes, and not why. This page looks at two runs whose losses are
the same and whose steps are not, and at a network in which gradients do not arrive, with
:func:`backpack.cockpit.watch`. The training loops are ordinary ones: nothing in them knows of the
monitor. The cases are those of Schneider, Dangel, Hennig (2021, arXiv:2102.06604); the page on
:doc:`the monitor </cockpit>` explains every number.
"""

import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack.cockpit import History, watch

# %%
# The loss is not enough
# ----------------------
#
# A noisy quadratic in two dimensions, one of them fifty times as steep as the other.

CURVATURE, STEPS, BATCH = torch.tensor([10.0, 0.2]), 60, 128


class Quadratic(nn.Module):
    """``1/2 sum_i curvature_i (w_i - x_i)^2`` for each sample ``x``."""

    def __init__(self, start: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        """Each sample's loss."""
        return (CURVATURE * (self.w - x) ** 2).sum(1) / 2


def descend(lr: float, start: list[float]) -> History:
    """Gradient descent with a monitor beside it."""
    torch.manual_seed(0)
    model = Quadratic(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    monitor = watch(model, optimizer, quantities=["loss", "alpha"], every=1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(0.01 * torch.randn(BATCH, 2)).mean().backward()
        optimizer.step()
    monitor.close()
    return monitor.history()


# %%
# One run starts in the flat direction, with a learning rate that is far too small for it. The other
# starts on the steep slope, with one that is nearly twice what it should be, so that each step
# lands on the other side.

small = descend(0.1, [0.0, 50**0.5])
large = descend(0.198, [1.0, 0.0])
losses = [torch.tensor(run.column("loss")[1]) for run in (small, large)]
alphas = [torch.tensor(run.column("alpha")[1]) for run in (small, large)]
print(
    f"losses differ by {100 * float(((losses[0] - losses[1]) / losses[0]).abs().max()):.1f} % at most"
)
print("median alpha:", [round(float(a[:40].median()), 2) for a in alphas])

# %%
# Their losses are the same. Alpha tells them apart: each step is seen as one across a valley, and
# alpha is -1 where it began, 0 at the valley's bottom and 1 as high up the other side. It is found
# from losses, slopes and their noise at both ends of a step, which the backward pass has anyway.

assert torch.allclose(*losses, rtol=0.15)
assert alphas[0][:40].median() < -0.9 and alphas[1][:40].median() > 0.9

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for run, name in ((small, "too small"), (large, "too large")):
    left.semilogy(*run.column("loss"), label=f"learning rate {name}", alpha=0.7)
    right.plot(*run.column("alpha"), ".", label=f"learning rate {name}")
left.set(xlabel="step", ylabel="loss")
right.set(xlabel="step", ylabel="alpha")
left.legend()

# %%
# Gradients that do not arrive
# ----------------------------
#
# Six layers of handwritten digits, once with ReLU and once with sigmoid. One step is enough to see
# it: the monitor has numbers for each layer.

images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def first_step(activation: type[nn.Module]) -> dict[str, float]:
    """The monitor's numbers of a network's first step."""
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (nn.Linear(64, 64), activation())]
    model, lossfunc = nn.Sequential(*layers, nn.Linear(64, 10)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, quantities="economy") as monitor:
        lossfunc(model(X[:128]), y[:128]).backward()
        optimizer.step()
    return monitor.history().at(0)


for activation in (nn.ReLU, nn.Sigmoid):
    values = first_step(activation)
    norms = {int(key.split("/")[1]): v for key, v in values.items() if key.startswith("grad_norm/")}
    ratio = norms[0] / norms[12]
    print(f"{activation.__name__:8}", {layer: f"{norm:.0e}" for layer, norm in norms.items()})
    # With each sigmoid a gradient shrinks by a factor, and the first layer hardly hears of the loss.
    assert ratio < 1e-3 if activation is nn.Sigmoid else ratio > 1e-2

# %%
# What the numbers say
# --------------------
#
# A run that is watched to its end makes a report, which begins with sentences.
# ``monitor.report("run.html")`` writes it; on a terminal, ``monitor.show()`` prints the same in
# short.

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
monitor = watch(model, optimizer, quantities="business", every=4, alarms="all")
for step in range(160):
    index = torch.randint(len(X), (64,))
    loss = nn.functional.cross_entropy(model(X[index]), y[index])
    optimizer.zero_grad()
    (50 * loss if step == 100 else loss).backward()  # somebody's mistake
    optimizer.step()
monitor.close()
monitor.show()

(spike,) = [e for e in monitor.history().events if e["event"] == "spike" and e["quantity"] == "loss"]
assert spike["step"] == 100 and math.isfinite(monitor.history().at(100)["norm_test"])
