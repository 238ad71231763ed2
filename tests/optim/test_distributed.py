"""Copies of a model in several processes do not drift apart: their steps are refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpack import extend, optim
from backpack.optim import base
from tests.processes import spawn

NONLINEAR: dict[str, Callable[..., Any]] = {
    name: getattr(optim, name)
    for name in (
        "DiagGGNExact DiagGGNMC DiagHessian SumGradSquared KFAC KFLR KFRA EKFAC EKFLR CGNewton"
    ).split()
}
PRIVATE = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 8.0}


def problem(rank: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """One model, and data that differ by process."""
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    torch.manual_seed(rank)
    return model, torch.randn(8, 4), torch.randint(3, (8,))


def attempt(name: str, rank: int = 0, **options: Any) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The error of a step, and parameters before and after."""
    model, X, y = problem(rank)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    if name == "DPSGD":
        optimizer: Any = optim.DPSGD(model, 0.1, **PRIVATE, **options)
        optimizer.backward(F.cross_entropy(model(X), y, reduction="none"))
    else:
        optimizer = NONLINEAR[name](model, 0.1, 0.1, **options)
        with optimizer.backpack():
            extend(nn.CrossEntropyLoss())(model(X), y).backward()
    message = ""
    try:
        optimizer.step()
    except RuntimeError as error:
        message = str(error)
    return message, before, nn.utils.parameters_to_vector(model.parameters()).detach()


def attempts(rank: int, size: int) -> dict[tuple[str, bool], tuple[str, torch.Tensor, torch.Tensor]]:
    """What each optimizer does, refused and asked to step on its own."""
    return {
        (name, local): attempt(name, rank, process_local=local)
        for name in (*NONLINEAR, "DPSGD")
        for local in (False, True)
    }


def test_two_processes(tmp_path: Path) -> None:
    first, second = spawn(attempts, 2, tmp_path)
    for (name, local), (message, before, after) in first.items():
        other, _, elsewhere = second[name, local]
        if local:
            assert message == other == ""
            assert not torch.equal(after, before)
            assert not torch.equal(after, elsewhere)  # which is why it is refused otherwise
        else:
            assert message == other
            assert message.startswith(f"{name}: torch.distributed runs 2 processes")
            assert "process_group" in message
            assert "process_local=True" in message
            assert ("noise" in message) == (name == "DPSGD")
            assert torch.equal(after, before)
            assert torch.equal(elsewhere, before)


def test_one_process(tmp_path: Path) -> None:
    """A group of one has nobody to drift away from."""
    (found,) = spawn(attempts, 1, tmp_path)
    assert found["KFAC", False][0] == found["DPSGD", False][0] == ""


@pytest.fixture
def _several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(base.distributed, "get_world_size", lambda: 2)


@pytest.mark.usefixtures("_several")
def test_nothing_runs_before() -> None:
    """Neither a closure nor anything of a scaler is left."""
    model, X, y = problem()
    optimizer = optim.SumGradSquared(model, 0.1, 0.1)

    def closure() -> None:
        raise AssertionError("was called")

    with pytest.raises(RuntimeError, match="process_local"):
        optimizer.step(closure)
    scaler = torch.amp.GradScaler("cpu")
    with optimizer.backpack():
        scaler.scale(extend(nn.CrossEntropyLoss())(model(X), y)).backward()
    with pytest.raises(RuntimeError, match="process_local"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.usefixtures("_several")
def test_copies_and_schedulers_keep_the_argument() -> None:
    model, X, y = problem()
    optimizer = optim.DiagGGNExact(model, 0.1, 0.1, process_local=True)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert copy.deepcopy(optimizer).process_local
    assert pickle.loads(pickle.dumps(optimizer)).process_local
    other = optim.DiagGGNExact(copy.deepcopy(model), 0.1, 0.1)
    other.load_state_dict(optimizer.state_dict())
    assert not other.process_local
