"""Figures are drawn by one call each; overlaps of spaces."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from backpack import extend
from backpack.vivit import (
    Derivatives,
    LowRank,
    draw_noise,
    draw_overlaps,
    draw_spectrum,
    overlap,
    spectral_density,
)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    matplotlib.use("Agg")
    yield
    plt.close("all")


def curvature() -> LowRank:
    torch.manual_seed(0)
    model, lossfunc = extend(nn.Linear(6, 4)), extend(nn.CrossEntropyLoss())
    with LowRank() as found:
        lossfunc(model(torch.rand(9, 6)), torch.randint(4, (9,))).backward()
    return found


def test_spectrum() -> None:
    found = curvature()
    ax = draw_spectrum(found.eigvalsh())
    ax.figure.canvas.draw()
    bars = ax.patches[0].get_data().values
    positive = int((found.eigvalsh() > 1e-8 * found.eigvalsh()[0]).sum())
    assert bars.sum() == positive
    assert f"{positive} eigenvalues" in ax.get_title()
    density = spectral_density(found.operator(), steps=20)
    assert draw_spectrum(density, ax) is ax
    with pytest.raises(ValueError, match="no eigenvalue"):
        draw_spectrum(torch.zeros(3))


def test_noise() -> None:
    found = curvature()
    pairs = found.eigh(4)
    state = torch.get_rng_state()
    slopes, curvatures = draw_noise(found.derivatives(pairs), pairs.values)
    assert torch.equal(torch.get_rng_state(), state)
    slopes.figure.canvas.draw()
    means = slopes.lines[2].get_ydata()
    torch.testing.assert_close(torch.as_tensor(means).float(), found.derivatives(pairs).gammas.mean(0))
    assert curvatures.get_xticklabels()[0].get_text().startswith("1: ")
    assert curvatures.get_xlabel() == "direction: signal-to-noise ratio, eigenvalue"


def test_labels_of_many_directions_are_apart() -> None:
    many = Derivatives(torch.randn(5, 14), 1e3 * torch.rand(5, 14))
    for axes in draw_noise(many, torch.rand(14)):
        axes.figure.canvas.draw()
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_overlaps() -> None:
    found = curvature()
    top, more = found.eigh(2), found.eigh(5)
    assert abs(overlap(top, top) - 1) < 1e-5
    assert abs(overlap(top, more) - 1) < 1e-5
    rest = [v[2:] for v in more.vectors]
    assert overlap(top, rest) < 1e-5
    half = [v[1:3] for v in more.vectors]
    assert abs(overlap(top, half) - 0.5) < 1e-5
    ax = draw_overlaps(torch.eye(3), ["a", "b", "c"])
    ax.figure.canvas.draw()
    with pytest.raises(ValueError, match="different parameters"):
        overlap(top, found.eigh(2, found.parameters[:1]))
