"""Figures of spectra and of noise, by one call each. They need matplotlib.

Each function draws into ``ax``, or into axes of a new figure, and returns these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backpack.vivit.lanczos import Density
from backpack.vivit.lowrank import Derivatives

__all__ = ["draw_noise", "draw_overlaps", "draw_spectrum"]


def draw_spectrum(values: Tensor | Density, ax: Any = None, *, bins: int = 60) -> Any:
    """Eigenvalues by size, with how many there are of each: points of a Gram matrix, or a density.

    Args:
        values: eigenvalues (``curvature.eigvalsh()``), or a density (``spectral_density(...)``).
        ax: axes.
        bins: number of bins, of equal width in the logarithm.
    """
    ax = _axes(ax)
    weights = values.weights * values.size if isinstance(values, Density) else None
    places = (values.values if isinstance(values, Density) else values).detach().double().cpu()
    largest = float(places.max().clamp(min=1e-300)) if len(places) else 1.0
    positive = places > largest * 1e-8
    logs, rest = places[positive].log10(), int((~positive).sum())
    if not len(logs):
        raise ValueError("draw_spectrum: no eigenvalue is positive")
    edges = torch.linspace(float(logs.min()) - 0.05, float(logs.max()) + 0.05, bins + 1).double()
    shares = torch.ones(len(logs)).double() if weights is None else weights.double().cpu()[positive]
    counts = torch.zeros(bins).double()
    counts.index_add_(0, torch.bucketize(logs, edges, right=True).clamp(1, bins) - 1, shares)
    ax.stairs(counts.numpy(), (10**edges).numpy(), fill=True, alpha=0.6)
    ax.set(xscale="log", xlabel="eigenvalue", ylabel="number")
    if weights is None:
        ax.plot(places[positive].numpy(), [-0.03 * float(counts.max())] * len(logs), "k|", ms=8)
        ax.set_title(f"{len(logs)} eigenvalues, {rest} below 1e-8 of the largest")
    return ax


def draw_noise(found: Derivatives, values: Tensor | None = None, axes: Any = None) -> Any:
    """Slopes and curvatures of all samples along each direction: quartiles, means and every sample.

    Args:
        found: slopes and curvatures.
        values: eigenvalues of the directions, for labels.
        axes: two axes, for slopes and for curvatures.

    Returns:
        The two axes.
    """
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")[1]
    names = r"slope $\gamma_{nk}$", r"curvature $\lambda_{nk}$"
    for ax, each, name, snr in zip(axes, found[:2], names, found.snr, strict=True):
        each = each.detach().double().cpu()
        places = torch.arange(1, each.shape[1] + 1)
        low, middle, high = torch.quantile(each, torch.tensor([0.25, 0.5, 0.75]).double(), dim=0)
        own = torch.Generator().manual_seed(0)  # a picture takes none of the program's random numbers
        spread = places + 0.5 * (torch.rand(each.shape, generator=own) - 0.5)
        ax.plot(spread.flatten().numpy(), each.flatten().numpy(), ".", ms=2, alpha=0.4, color="0.6")
        ax.vlines(places.numpy(), low.numpy(), high.numpy(), lw=4, color="C0", alpha=0.7)
        ax.plot(places.numpy(), middle.numpy(), "_", color="white", ms=8)
        ax.plot(places.numpy(), each.mean(0).numpy(), "o", color="C1", label="mean")
        labels = [f"{k}: {float(s):.2g}" for k, s in zip(places.tolist(), snr, strict=True)]
        if values is not None:
            labels = [f"{a}, {float(v):.2g}" for a, v in zip(labels, values, strict=True)]
        # Upright, so that many directions do not lie on each other.
        ax.set_xticks(places.numpy(), labels, fontsize=7, rotation=90)
        what = "direction: signal-to-noise ratio" + ", eigenvalue" * (values is not None)
        ax.set(xlabel=what, ylabel=name)
        ax.axhline(0, color="k", lw=0.5)
    axes[0].legend()
    return axes


def draw_overlaps(overlaps: Tensor, labels: Sequence[str] | None = None, ax: Any = None) -> Any:
    """A matrix of overlaps between spaces, or over training: numbers between zero and one.

    Args:
        overlaps: ``[spaces, spaces]``.
        labels: names of the spaces.
        ax: axes.
    """
    ax = _axes(ax)
    image = ax.imshow(overlaps.detach().cpu().numpy(), vmin=0, vmax=1, cmap="viridis")
    ax.figure.colorbar(image, ax=ax, label="overlap")
    if labels is not None:
        ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        ax.set_yticks(range(len(labels)), labels)
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(5, 3.5), layout="constrained")[1]
