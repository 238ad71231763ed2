"""The ways of usual calls through the capture find what a closer look finds."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backpack import backpack, extend
from backpack.capture.recorder import Recorder
from backpack.extensions import BatchGrad, DiagHessian
from backpack.graph.taps import NONLINEAR, TAPS, notes
from backpack.samples.axis import regular_axis, sample_axis_of


class Usual(nn.Module):
    """Layers, residual sums, products of data, several results, norms with and without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(7, 6), nn.Linear(6, 9)
        self.norm, self.plain = nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False)
        self.scale = nn.LayerNorm(6, bias=False)
        self.weight, self.bias = nn.Parameter(torch.rand(6, 6)), nn.Parameter(torch.rand(6))
        self.last = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.first(self.norm(x)).split(3, dim=2)
        heads = F.scaled_dot_product_attention(q, k, v)
        x = x + torch.cat([heads, k * v], 2)
        a, b = x.transpose(0, 1).chunk(2, 0)
        mixed = torch.addmm(self.bias, a.flatten(0, 1), self.weight)
        x = self.scale(F.layer_norm(F.gelu(mixed), (6,)).view(a.shape) + b)
        return self.last(self.plain(x.transpose(0, 1)).mean(1).tanh())


def seen(
    model: nn.Module, X: Tensor, monkeypatch: pytest.MonkeyPatch, closer: bool
) -> tuple[list[Any], list[Tensor]]:
    """Axes of all results, what is noted on their nodes, and quantities."""
    found: list[Any] = []
    see = Recorder._see

    def watched(self: Recorder, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        see(self, func, args, kwargs, out)
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor):
                kept = notes(each.grad_fn) if each.grad_fn is not None else {}
                taps = [(tap.func, tap.place, tap.batch) for tap in kept.get(TAPS, ())]
                curved = kept.get(NONLINEAR)
                found.append((func, sample_axis_of(each), taps, curved and curved[1]))

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "_see", watched)
        if closer:
            patched.setattr(Recorder, "_layer", lambda *args: False)
            patched.setattr(Recorder, "_follow", lambda *args: False)
        loss = model(X).square().sum()
    with backpack(BatchGrad(), DiagHessian()):
        loss.backward()
    return found, [q for p in model.parameters() for q in (p.grad_batch, p.diag_h)]


def test_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Axes, taps, curved operations and quantities."""
    torch.manual_seed(0)
    model = extend(Usual().double())
    X = torch.randint(7, (5, 4))
    usual, quick = seen(model, X, monkeypatch, closer=False)
    looked, slow = seen(model, X, monkeypatch, closer=True)
    again, _ = seen(model, X, monkeypatch, closer=False)  # where axes were put is known by now
    assert usual == looked == again
    assert sum(bool(taps) for _, _, taps, _ in usual) == 5
    for a, b in zip(quick, slow, strict=True):
        torch.testing.assert_close(a, b)


class Moves(nn.Module):
    """The same shapes, with samples at another place each time."""

    def forward(self, x: Tensor, first: bool) -> Tensor:
        x = x if first else x.transpose(0, 1)
        x = x.view(4, 4, 2, 2).transpose(1, 2).flatten(2).unsqueeze(1).squeeze(1)
        return x.permute((0, 2, 1)).reshape([4, 8, 2])


def test_places_are_kept_by_axis() -> None:
    """A call alike in all but the axis is another call; lists are no keys."""
    x = torch.rand(4, 4, 4)
    model = extend(nn.Sequential(nn.Linear(4, 4), Moves()))
    for _ in range(2):
        places = []
        for first in (True, False):
            model[1].forward = partial(Moves.forward, model[1], first=first)
            places.append(sample_axis_of(model(x)))
        assert places[0] == regular_axis(4)
        assert places[1] is not None and places[1].dim == 1 and not places[1].lost
