"""Callbacks for trainers, with stand-ins that call them as trainers do; `tests/zoo` has real ones."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack.cockpit import History, LightningCockpit, TransformersCockpit


class Callback:
    """What trainers derive callbacks from."""

    def on_log(self) -> str:
        return "inherited"


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, request.param, "Callback")


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "transformers", "TrainerCallback")


def _install(monkeypatch: pytest.MonkeyPatch, name: str, base: str) -> None:
    for other in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, other, None)
    module = ModuleType(name)
    setattr(module, base, Callback)
    if "." in name:
        monkeypatch.setitem(sys.modules, name.partition(".")[0], ModuleType(name.partition(".")[0]))
    monkeypatch.setitem(sys.modules, name, module)


class Wrapped:
    """An optimizer around another, as some trainers have it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        self.optimizer.step(closure)


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,)))


def fit(callback: Any, trainer: Any, module: nn.Module, steps: int) -> None:
    """As Lightning does it: everything inside a closure of the optimizer's step."""
    (optimizer,) = trainer.optimizers
    callback.on_train_start(trainer, module)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(module)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        trainer.global_step += 1
    callback.on_train_end(trainer, module)


def trainer_of(model: nn.Module, optimizer: Any) -> Any:
    logged: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda values, step: logged.append((values, step)))
    strategy = SimpleNamespace(model=model)
    return SimpleNamespace(
        strategy=strategy, optimizers=[optimizer], loggers=[logger], global_step=0, logged=logged
    )


@pytest.mark.usefixtures("lightning")
def test_lightning(tmp_path: Path) -> None:
    model, optimizer = parts()
    trainer = trainer_of(model, optimizer)
    callback = LightningCockpit(every=2, path=tmp_path / "run.jsonl")
    assert isinstance(callback, Callback) and isinstance(callback, LightningCockpit)
    assert callback.on_log() == "inherited"
    fit(callback, trainer, model, 5)
    assert callback.monitor.history().steps == [0, 2, 4] and callback.monitor.left_out == {}
    assert {step for _, step in trainer.logged} == {0, 2, 4}
    assert History.read(tmp_path / "run.jsonl").steps == [0, 2, 4]
    assert not optimizer._optimizer_step_pre_hooks
    # A checkpoint goes on.
    again = LightningCockpit(every=2)
    again.load_state_dict(pickle.loads(pickle.dumps(callback.state_dict())))
    trainer.global_step = 5
    fit(again, trainer, model, 3)
    assert again.monitor.history().steps == [0, 2, 4, 6]
    assert again.monitor.history().at(2) == callback.monitor.history().at(2)


@pytest.mark.usefixtures("lightning")
def test_an_exception_in_lightning() -> None:
    model, optimizer = parts()
    callback = LightningCockpit(every=1)
    assert callback.state_dict() == {}
    callback.on_train_start(trainer_of(model, optimizer), model)
    callback.on_exception(None, model, KeyboardInterrupt())
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.usefixtures("transformers")
def test_transformers(tmp_path: Path) -> None:
    """Accumulated gradients, clipped, and an optimizer that is wrapped."""
    model, optimizer = parts()
    names, path = ["loss", "norm_test"], tmp_path / "r.jsonl"
    callback: Any = TransformersCockpit(every=2, quantities=names, path=path)
    assert isinstance(callback, Callback)
    state = SimpleNamespace(global_step=4)
    callback.on_train_begin(None, state, None, model=model, optimizer=Wrapped(optimizer))
    for _ in range(3):
        for _ in range(2):
            (loss_of(model) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        Wrapped(optimizer).step()
        model.zero_grad()
    callback.on_train_end(None, state, None)
    history = History.read(path)
    assert history.steps == [4, 6] and "norm_test" in history.at(4)


@pytest.mark.usefixtures("transformers")
def test_callbacks_are_pickled() -> None:
    callback: Any = pickle.loads(pickle.dumps(TransformersCockpit(every=3)))
    assert isinstance(callback, TransformersCockpit) and callback.options == {"every": 3}


@pytest.mark.parametrize("callback", [LightningCockpit, TransformersCockpit])
def test_packages_that_are_not_there(callback: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="needs the package (lightning|transformers)"):
        callback()
