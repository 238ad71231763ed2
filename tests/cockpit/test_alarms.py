"""Alarms: on numbers made up for them, on planted faults, on healthy runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack.cockpit import (
    AlphaRange,
    DeadUnits,
    HardSamples,
    History,
    NonFinite,
    Spike,
    UpdateRatio,
    Vanishing,
    watch,
)
from benchmarks.alarms import FAULTS, RESULTS, alarms, delay, run
from benchmarks.healthy import HEALTHY, STEPS, cancer, train


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def problem() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4), torch.randint(3, (n,))


def numbers(alarm: Any, rows: list[dict[str, float]]) -> list[int]:
    """Steps at which an alarm is raised."""
    history, found = History(), []
    for step, values in enumerate(rows):
        history.add(step, values)
        if alarm.check(step, values, history) is not None:
            found.append(step)
    return found


def test_alarms() -> None:
    falling: list[dict[str, float]] = [{"loss": 2.0 * 0.98**k, "grad_norm": 1.0} for k in range(40)]
    assert numbers(Spike(), falling) == []
    assert numbers(Spike(), [*falling, {"loss": 9.0}, {"loss": 9.0}, {"loss": 1.0}]) == [40]
    assert numbers(NonFinite(), [*falling, {"loss": math.nan}, {"loss": math.nan}]) == [40]
    dead: list[dict[str, float]] = [{"dead_units": 0.5, "dead_units/1": x} for x in (0.5, 0.95, 0.99)]
    assert numbers(DeadUnits(), dead) == [1]
    assert numbers(AlphaRange(high=0.5, window=5), [{"alpha": x} for x in (0, 0, 1, 1, 1, 1)]) == [4]
    layers = [{f"grad_norm/{k}": 10.0 ** (-k * factor) for k in range(4)} for factor in (0.5, 1.5)]
    assert numbers(Vanishing(), layers) == [1]
    hard: list[dict[str, float]] = [{"hard_samples": x} for x in (*[0.02] * 20, *[0.1] * 10)]
    assert numbers(HardSamples(), hard) == [24]
    long: list[dict[str, float]] = [{"update_ratio": 0.2, "param_norm": 1.0 + k} for k in range(16)]
    assert numbers(UpdateRatio(), long) == [11]  # before, parameters grow by more than a half
    assert numbers(UpdateRatio(), [{**each, "update_ratio": 0.05} for each in long]) == []
    # Where alpha is known, it says whether large steps are too large.
    for alpha, expected in ((-0.5, []), (0.5, [4])):
        assert numbers(UpdateRatio(), [{**each, "alpha": alpha} for each in long[:10]]) == expected


def test_an_alarm_that_goes_on_is_raised_once() -> None:
    """And again when it has been over for a while."""
    to_and_fro: list[dict[str, float]] = [{"dead_units/1": 0.95 if k % 3 else 0.5} for k in range(30)]
    assert numbers(DeadUnits(), to_and_fro) == [1]
    assert numbers(DeadUnits(), [*to_and_fro, *[{"dead_units/1": 0.5}] * 12, *to_and_fro]) == [1, 43]


def test_an_alarm_does_something() -> None:
    """Calls a function, and switches on more for a while."""
    called: list[Any] = []
    alarm = Spike(least=3, then=lambda monitor, finding: called.append(finding), deeper=("business", 2))
    model, optimizer = problem()
    monitor = watch(model, optimizer, quantities=["loss"], every=1, alarms=alarm)
    for step in range(12):
        X, y = batch()
        optimizer.zero_grad()
        ((100.0 if step == 7 else 1.0) * F.cross_entropy(model(X), y)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    monitor.close()
    (finding,) = called
    assert finding.kind == "spike" and finding.quantity == "loss"
    assert monitor.history().column("hess_trace")[0] == [8, 9]
    assert monitor.history().steps == list(range(12))
    (event,) = [e for e in monitor.history().events if e["event"] == "spike"]
    assert event["step"] == 7


def test_an_alarm_that_ends_the_watch() -> None:
    """Other hooks of the optimizer are called all the same."""
    model, optimizer = problem()
    alarm = Spike(least=3, then=lambda monitor, finding: monitor.close())
    monitor = watch(model, optimizer, quantities=["loss"], every=1, alarms=alarm)
    called: list[int] = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    for step in range(9):
        X, y = batch()
        optimizer.zero_grad()
        ((100.0 if step == 7 else 1.0) * F.cross_entropy(model(X), y)).backward()
        optimizer.step()
    assert len(called) == 9 and monitor.history().steps == list(range(8))


def test_a_learning_rate_that_is_too_large() -> None:
    torch.manual_seed(0)
    model = nn.Linear(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.9)
    monitor = watch(model, optimizer, every=1, alarms="alpha")
    for _ in range(20):
        X = torch.randn(64, 10)
        optimizer.zero_grad()
        F.mse_loss(model(X), X.sum(1, keepdim=True) + torch.randn(64, 1)).backward()
        optimizer.step()
    monitor.close()
    assert {e["event"] for e in monitor.history().events} == {"step size"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore:cockpit")
def test_planted_faults(fault: str) -> None:
    """Each is found within 20 steps, in a network that has learned, and nothing before."""
    history, at = run("mlp", "adam", fault, 0)
    found = alarms(history)
    assert delay(fault, found, at) is not None
    assert (at > 0) == FAULTS[fault].planted and all(step >= at for _, step in found)


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.filterwarnings("ignore:cockpit.*batch norm")
def test_healthy_runs(name: str) -> None:
    """Of ten, of different problems and optimizers, none raises an alarm."""
    history = train(name)
    assert alarms(history) == [] and history.steps == list(range(STEPS))
    losses = history.column("loss")[1]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_growing_from_zero(rate: float) -> None:
    """Each of the first steps is large beside the parameters, and right."""
    X, y = cancer()
    model = nn.Linear(30, 1)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with watch(model, optimizer, every=1, alarms="all") as monitor:
        for _ in range(40):
            chosen = torch.randint(len(X), (32,))
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(X[chosen]), y[chosen]).backward()
            optimizer.step()
    assert alarms(monitor.history()) == []


def test_the_page_has_the_table() -> None:
    page = (RESULTS.parents[2] / "docs" / "cockpit.md").read_text()
    assert RESULTS.read_text() in page
