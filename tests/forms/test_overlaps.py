"""Kronecker factors of convolutions from what windows share, against patches written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backpack import backpack, extend
from backpack.extensions import KFLR
from backpack.forms import layout, overlaps
from backpack.forms.layout import Patches
from backpack.forms.overlaps import overlap_of, overlapping_gram
from backpack.rules.convolution import unfold

# Space, kernel, stride, padding, dilation; axis and shift along which windows overlap.
CASES: list[tuple[tuple[int, ...], Any, Any, int, Any, tuple[int, int] | None]] = [
    ((12,), (3,), (1,), 1, (1,), (0, 1)),
    ((24,), (3,), (1,), 0, (3,), (0, 3)),
    ((24,), (3,), (2,), 1, (4,), (0, 2)),
    ((24,), (3,), (2,), 1, (3,), None),
    ((9, 8), (3, 3), (1, 1), 1, (1, 1), (0, 1)),
    ((9, 12), (2, 4), (1, 1), 0, (1, 1), (1, 1)),
    ((9, 12), (4, 3), (2, 1), 2, (1, 1), (1, 1)),
    ((20, 20), (3, 3), (1, 2), 1, (2, 3), (0, 2)),
    ((9, 9), (3, 3), (3, 3), 0, (1, 1), None),
    ((6, 6), (5, 5), (1, 1), 0, (1, 1), None),
    ((6, 7, 8), (2, 3, 2), (1, 1, 1), 1, (1, 1, 1), (1, 1)),
]


def patches(space: tuple[int, ...], kernel: Any, stride: Any, padding: int, dilation: Any) -> Tensor:
    """Windows of two groups of three channels of five samples."""
    x = torch.rand(5, 6, *space, dtype=torch.float64)
    margins = [(padding, padding)] * len(space)
    return unfold(x, kernel, stride, margins, dilation).unflatten(1, (2, -1))


def by_patches(windows: Tensor, ndim: int) -> Tensor:
    """``sum a a^T``, of patches written out."""
    a = Patches(windows, ndim).written().flatten(0, 2)
    return a.mT @ a


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("step", [2, 5])
def test_every_shift(case: Any, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlaps, "NARROW", 1)
    *sizes, expected = case
    windows, ndim = patches(*sizes), len(case[0])
    overlap = overlap_of(windows, ndim)
    assert (None if overlap is None else (overlap.axis, overlap.shift)) == expected
    if overlap is not None:
        found = overlapping_gram(windows, ndim, overlap, step)
        torch.testing.assert_close(found, by_patches(windows, ndim), rtol=1e-12, atol=0)


@pytest.mark.parametrize("change", ["copied", "flipped", "expanded"])
def test_windows_that_are_no_view_of_an_input(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they overlap is said by where they lie, not by who made them."""
    monkeypatch.setattr(overlaps, "NARROW", 1)
    windows = patches((9, 8), (3, 3), (1, 1), 1, (1, 1))
    if change == "copied":
        windows = torch.rand_like(windows.contiguous())
    elif change == "flipped":
        windows = windows.flip(3, 4)
    else:
        windows = windows[:1, :, :, :, :, :1, :1].expand(*windows.shape)
    overlap = overlap_of(windows, 2)
    assert overlap is None


LAYERS: dict[str, tuple[nn.Conv1d | nn.Conv2d | nn.Conv3d, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(16, 4, 5, padding=2), (40,)),
    "2d": (nn.Conv2d(16, 4, 3, padding=1), (9, 8)),
    "groups": (nn.Conv2d(16, 4, (2, 4), padding=1, dilation=(1, 2), groups=2, bias=False), (9, 16)),
    "3d": (nn.Conv3d(8, 4, (2, 3, 2)), (7, 9, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("approx", [None, "expand"])
def test_kronecker_factors(name: str, approx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor of the inputs is that of patches, in a whole pass."""
    torch.manual_seed(0)
    layer, space = LAYERS[name]
    x = torch.rand(6, layer.in_channels, *space, dtype=torch.float64)
    head = nn.Linear(layer.double()(x).flatten(1).shape[1], 3)
    model = extend(nn.Sequential(layer, nn.Flatten(), head).double())
    calls = []
    original = layout.overlapping_gram
    monkeypatch.setattr(layout, "MIRRORED", 1)
    monkeypatch.setattr(overlaps, "NARROW", 1)
    monkeypatch.setattr(layout, "overlapping_gram", lambda *a: calls.append(a) or original(*a))

    def factor() -> Tensor:
        with backpack(KFLR(kfac_approx=approx)):
            nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
        return layer.weight.kflr[1]

    found = factor()
    assert len(calls) == 1
    monkeypatch.setattr(layout, "MIRRORED", float("inf"))
    torch.testing.assert_close(found, factor(), rtol=1e-12, atol=0)
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize("kernel", [3, 5])
def test_products_are_made_once(kernel: int) -> None:
    """A kernel of five places along an axis takes a third of the multiplications."""
    margins = [(kernel // 2, kernel // 2)] * 2
    x = torch.rand(8, 32, 24, 24)
    windows = unfold(x, (kernel, kernel), (1, 1), margins, (1, 1)).unsqueeze(1)
    with FlopCounterMode(display=False) as counter:
        found = Patches(windows, 2).gram()
    wanted = by_patches(windows, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    pairs = 8 * 24**2 * (32 * kernel**2) ** 2  # two operations for each, of half of them
    assert counter.get_total_flops() < 1.4 * 2 / (kernel + 1) * pairs


@torch.no_grad()
def test_what_keeps_to_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products, less precise numbers."""
    monkeypatch.setattr(layout, "overlapping_gram", lambda *_: pytest.fail("taken"))
    x = torch.rand(2, 32, 8, 8)
    Patches(unfold(x, (3, 3), (1, 1), [(1, 1)] * 2, (1, 1)).unsqueeze(1), 2).gram()
    monkeypatch.setattr(layout, "MIRRORED", 1)
    Patches(unfold(x.bfloat16(), (3, 3), (1, 1), [(1, 1)] * 2, (1, 1)).unsqueeze(1), 2).gram()
