"""
What a first step's histograms say
==================================

Two mistakes that training with a bad loss would show after an hour, and the entries of individual
gradients show in one step: inputs that nobody scaled, and gradients that do not arrive at the lower
layers. The network is 3C3D, the monitor :func:`backpack.cockpit.watch`. (Both cases are those of
Schneider, Dangel, Hennig, 2021, arXiv:2102.06604.)
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from backpack.cockpit import watch

# %%
# Patches of two photographs: which of them does a patch come from?

photos = torch.tensor(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
patches = photos.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5)
X = patches.reshape(-1, 3, 32, 32) / 255
y = torch.arange(2).repeat_interleave(len(X) // 2)
batch = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))[:64]


def net(act: type[nn.Module]) -> nn.Sequential:
    """Three convolutions, three linear layers."""
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 5), act(), pool, nn.Conv2d(16, 24, 3), act(), pool),
        *(nn.Conv2d(24, 32, 3, padding=1), act(), pool, nn.Flatten()),
        *(nn.Linear(288, 64), act(), nn.Linear(64, 32), act(), nn.Linear(32, 2)),
    )


def first_step(act: type[nn.Module], scale: float) -> dict[str, dict[str, Tensor]]:
    """Histograms of all entries of the individual gradients: of the network, and of each layer.

    A monitor looks at what its ``include`` names, and several may watch the same step.
    """
    torch.manual_seed(0)
    model = net(act)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    layers = [name for name, each in model.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    include = {"all": None, **{name: rf"^{name}\." for name in layers}}
    monitors = {
        name: watch(model, optimizer, quantities=["grad_hist"], include=each)
        for name, each in include.items()
    }
    F.cross_entropy(model(scale * X[batch]), y[batch]).backward()
    optimizer.step()
    found = {}
    for name, monitor in monitors.items():
        monitor.close()
        hist = monitor.history().at(0)["grad_hist"]
        found[name] = {key: torch.tensor(value, dtype=torch.float64) for key, value in hist.items()}
    return found


def share(hist: dict[str, Tensor], low: float, high: float) -> float:
    """The part of the entries whose size is between two powers of ten; zeros are below ``1e-12``."""
    a, b = hist["edges"][:-1].abs(), hist["edges"][1:].abs()
    inside = (torch.minimum(a, b) >= 0.9 * low) & (torch.maximum(a, b) <= 1.1 * high)
    return float(hist["counts"][inside].sum() / hist["counts"].sum())


# %%
# Raw data
# --------
#
# Bins are powers of ten, on both sides of zero. The middle one is for what is below ``1e-12``: entries
# of units that a ReLU has switched off. With inputs in [0, 1] all others are small. With inputs times
# 255 a third of all entries leave the inner bins, and some arrive in the outer ones, where the step of
# any learning rate that suits the others is too long.

scaled, raw = first_step(nn.ReLU, 1.0)["all"], first_step(nn.ReLU, 255.0)["all"]
INNER, OUTER = (0.0, 1e-2), (1.0, float("inf"))
for name, hist in (("in [0, 1]", scaled), ("times 255", raw)):
    print(
        f"{name}: {share(hist, *INNER):.1%} of all entries below 0.01, "
        f"{share(hist, *OUTER):.2%} of size 1 or more"
    )

assert share(scaled, *INNER) > 0.99 and share(scaled, *OUTER) == 0
assert share(raw, *INNER) < 0.8 and share(raw, *OUTER) > 0.001


def draw(ax: Axes, hist: dict[str, Tensor], label: str) -> None:
    """A histogram as a line, with its edges' powers below."""
    shares = hist["counts"] / hist["counts"].sum()
    ax.stairs(shares.clamp(min=1e-7).tolist(), label=label, baseline=1e-7, linewidth=1.5)
    names = {1: "$-10^{2}$", 8: "$-10^{-5}$", 15.5: "0", 23: "$10^{-5}$", 30: "$10^{2}$"}
    ax.set(yscale="log", ylim=(1e-6, 2), xlim=(0, 31))
    ax.set_xticks(list(names), list(names.values()))


fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
draw(ax, scaled, "inputs in [0, 1]")
draw(ax, raw, "inputs times 255")
ax.set(xlabel="entry of an individual gradient", ylabel="share")
fig.legend(loc="outside upper center", ncols=2)

# %%
# Vanishing gradients
# -------------------
#
# Now layer by layer, with ReLU and with sigmoid. Each sigmoid multiplies what comes back by a quarter
# at most. In the first convolution all entries are below ``1e-5``, those of the last layer are as large
# as ever: one learning rate moves the one or the other.

relu, sigmoid = first_step(nn.ReLU, 1.0), first_step(nn.Sigmoid, 1.0)
layers = [name for name in relu if name != "all"]
print("layer   entries of size 1e-5 or more: ReLU, sigmoid")
large = {}
for name in layers:
    large[name] = [share(hists[name], 1e-5, float("inf")) for hists in (relu, sigmoid)]
    print(f"{name:>5}   {large[name][0]:.1%}, {large[name][1]:.1%}")

assert large["0"][0] > 0.3 and large["0"][1] < 0.01
assert large["14"][1] > 0.99

fig, axes = plt.subplots(2, 3, figsize=(9, 4.6), layout="constrained", sharex=True, sharey=True)
for ax, name in zip(axes.flat, layers, strict=True):
    draw(ax, relu[name], "ReLU")
    draw(ax, sigmoid[name], "sigmoid")
    ax.set_title(f"layer {name}", fontsize="medium")
fig.supxlabel("entry of an individual gradient")
fig.supylabel("share")
fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
