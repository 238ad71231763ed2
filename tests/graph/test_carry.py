"""Columns are carried at once where torch does that without mistakes, and one by one elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from backpack import backpack, extend
from backpack.extensions import BatchDiagHessian, DiagHessian
from backpack.graph import carry as carrying


@pytest.mark.parametrize("shape", [(2, 4, 1, 2), (4, 4, 4, 4), (2, 2, 2, 2), (3, 4, 4, 1), (2, 4, 3)])
@pytest.mark.parametrize("groups", [1, 2])
def test_second_derivative_of_group_norm(shape: tuple[int, ...], groups: int) -> None:
    """Batched, torch gets it wrong where sizes happen to fit, and says so elsewhere."""
    torch.manual_seed(0)
    channels = shape[1]
    convolution = {3: nn.Conv1d, 4: nn.Conv2d}[len(shape)]
    model = nn.Sequential(convolution(channels, channels, 1), nn.GroupNorm(groups, channels), nn.Tanh())
    model, X, y = extend(model.double()), torch.randn(*shape).double(), torch.randn(*shape).double()
    with backpack(DiagHessian()):
        nn.functional.mse_loss(model(X), y).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.diag_h, by_brute_force(model, X, y, p))


def by_brute_force(model: nn.Module, X: Tensor, y: Tensor, p: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(nn.functional.mse_loss(model(X), y), p, create_graph=True)
    rows = [torch.autograd.grad(g, p, retain_graph=True)[0] for g in gradient.flatten()]
    return torch.stack([row.flatten()[j] for j, row in enumerate(rows)]).reshape(p.shape)


class Picks(nn.Module):
    """A parameter that is used in a curved way, and a batch of which one sample goes on, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(2, 2))
        self.norm, self.head = nn.GroupNorm(1, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm((x * self.scale.exp())[[1, 1]]))


def test_a_sample_without_a_share_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of zeros agree whatever torch does; those of the next sample are tried all the same."""
    monkeypatch.setattr(carrying, "_batchable", {})
    torch.manual_seed(0)
    model = extend(Picks().double())
    X, y = torch.randn(2, 2, 2).double(), torch.randn(2, 2, 3).double()
    with backpack(BatchDiagHessian()):
        nn.functional.mse_loss(model(X), y).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.diag_h_batch[1], by_brute_force(model, X, y, p))
        assert not p.diag_h_batch[0].any()


def way() -> tuple[list[Any], list[Any], list[Tensor]]:
    x = torch.randn(3, dtype=torch.double, requires_grad=True)
    y = x.tanh() * 2
    return [get_gradient_edge(y)], [get_gradient_edge(x)], [torch.randn(6, 3, dtype=torch.double)]


def test_mistakes_of_batching_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, targets, columns = way()
    calls: list[bool] = []
    plain = carrying._carried

    def wrong(starts: Any, targets: Any, column: Sequence[Tensor], batched: bool = False) -> Any:
        calls.append(batched)
        found = plain(starts, targets, column, batched)
        return [found[0].flip(0)] if batched else found

    monkeypatch.setattr(carrying, "_batchable", {})
    (expected,) = carrying.carry(starts, targets, columns)
    monkeypatch.setattr(carrying, "_batchable", {})
    monkeypatch.setattr(carrying, "_carried", wrong)
    (found,) = carrying.carry(starts, targets, columns)
    torch.testing.assert_close(found, expected)
    assert calls == [True, *[False] * 7]
    carrying.carry(starts, targets, columns)
    assert calls[8:] == [False] * 6  # and are remembered


def test_batching_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrying, "_batchable", {})
    calls: list[bool] = []
    plain = carrying._carried
    monkeypatch.setattr(
        carrying,
        "_carried",
        lambda *args, batched=False: calls.append(batched) or plain(*args, batched),  # type: ignore[call-arg]
    )
    for _ in range(3):
        carrying.carry(*way())
    assert calls == [True, False, True, True]
