"""The monitor beside training loops of all kinds, and what it leaves behind: nothing."""

from __future__ import annotations

import copy
import gc
import json
import math
import pickle
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.cockpit import (
    CSV,
    History,
    Spike,
    passes,
    small,
    watch,
)
from backpack.cockpit.budget import Clock
from backpack.cockpit.monitor import Monitor
from backpack.extensions import BatchGrad, DiagGGNExact


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    gc.collect()
    passes.sweep()
    assert torch.Tensor.backward is passes._tensor_backward
    assert torch.autograd.backward is passes._function_backward
    assert not passes._listeners


def problem() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4), torch.randint(3, (n,))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for _ in range(steps):
        X, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()


def state_of(model: nn.Module) -> Any:
    """All that hooks and attributes may change."""
    return [
        (
            sorted(key for key in each.__dict__ if not key.startswith("_backward")),
            *(list(getattr(each, name).values()) for name in ("_forward_pre_hooks", "_forward_hooks")),
        )
        for each in model.modules()
    ] + [sorted(p.__dict__) for p in model.parameters()]


# --------------------------------------------------------------------------------------
# Nothing is left behind, nothing is changed


@pytest.mark.parametrize("quantities", ["economy", "business"])
def test_training_is_what_it_was(quantities: str) -> None:
    """Bit for bit, also its random numbers; afterwards the model is as it was before."""
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, optimizer = problem()
        model.insert(2, nn.Dropout(0.3))
        before = state_of(model)
        if watched:
            monitor = watch(model, optimizer, quantities=quantities, every=2)
        train(model, optimizer, 5)
        if watched:
            monitor.close()
            assert monitor.left_out == {} and monitor.history().steps == [0, 2, 4]
            monitor.close()  # once more is harmless
        assert state_of(model) == before
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
        results.append([p.detach() for p in model.parameters()] + [torch.get_rng_state()])
    for plain, watched_ in zip(*results, strict=True):
        assert torch.equal(plain, watched_)


def test_only_tracked_steps_are_looked_at() -> None:
    model, optimizer = problem()
    plain = state_of(model)
    monitor = watch(model, optimizer, quantities=["loss", "norm_test"], every=3)
    seen = []
    for _ in range(7):
        seen.append(state_of(model) != plain)
        train(model, optimizer, 1)
    monitor.close()
    assert seen == [True, False, False, True, False, False, True]
    assert monitor.history().steps == [0, 3, 6]


def test_a_model_that_was_extended_stays_so() -> None:
    model, optimizer = problem()
    extend(model)
    before = state_of(model)
    monitor = watch(model, optimizer)
    train(model, optimizer)
    monitor.close()
    assert state_of(model) == before


def test_a_part_that_was_extended_stays_so() -> None:
    model, optimizer = problem()
    extend(model[0])
    before = state_of(model)
    monitor = watch(model, optimizer, every=2)
    train(model, optimizer)
    monitor.close()
    assert state_of(model) == before


@pytest.mark.parametrize("where", ["forward", "loss", "backward", "step"])
def test_an_error_leaves_nothing(where: str) -> None:
    """Neither fields nor blocks; the next step is as if nothing had been."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise ZeroDivisionError

    model, optimizer = problem()
    monitor = watch(model, optimizer, every=1)
    fields = [sorted(p.__dict__) for p in model.parameters()]
    handle = None
    if where == "forward":
        handle = model[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        X, y = batch()
        f = model(X)
        if where == "backward":
            f = Fails.apply(f)
        loss = F.cross_entropy(f, y)
        if where == "loss":
            raise ZeroDivisionError
        loss.backward()
        optimizer.register_step_pre_hook(lambda *_: 1 / 0)
        optimizer.step()
    assert [sorted(p.__dict__) for p in model.parameters()] == fields
    assert torch.overrides._get_current_function_mode_stack() == []
    if handle is not None:
        handle.remove()
    for key in list(optimizer._optimizer_step_pre_hooks)[1:]:
        del optimizer._optimizer_step_pre_hooks[key]
    reference = copy.deepcopy(model)
    torch.manual_seed(5)
    train(model, optimizer, 1)
    monitor.close()
    torch.manual_seed(5)
    again = watch(reference, torch.optim.SGD(reference.parameters(), lr=0.1), every=1)
    train(reference, again.optimizer, 1)
    again.close()
    found, expected = monitor.history().at(0), again.history().at(0)
    for name in ("loss", "grad_norm", "norm_test", "inner_test"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_forward_passes_that_are_no_training() -> None:
    model, optimizer = problem()
    monitor = watch(model, optimizer, every=1)
    for _ in range(2):
        train(model, optimizer, 1)
        with torch.no_grad():
            model(batch()[0])
        model(batch(3)[0])  # whose result is thrown away
    monitor.close()
    assert monitor.left_out == {} and len(monitor.history()) == 2


def test_memory_is_let_go() -> None:
    """Forms and gradients of a step do not outlive the next one."""
    model, optimizer = problem()
    monitor = watch(model, optimizer, every=1)
    train(model, optimizer, 3)
    assert monitor._passes == []
    monitor.close()
    assert monitor._start is None and monitor._moves.reference is None


# --------------------------------------------------------------------------------------
# Ways to train


def brute(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, float]:
    """Loss, gradient norm and norm test of a batch, by a loop."""
    rows = []
    for n in range(len(X)):
        loss = F.cross_entropy(model(X[n : n + 1]), y[n : n + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    g_n = torch.stack(rows)
    g, B = g_n.mean(0), len(X)
    test = ((g_n**2).sum() / (g @ g) - B) / (B * (B - 1))
    with torch.no_grad():
        loss = F.cross_entropy(model(X), y)
    return {"loss": float(loss), "grad_norm": float(g.norm()), "norm_test": float(test.sqrt())}


def check(monitor: Monitor, expected: dict[str, float], step: int = 0) -> None:
    values = monitor.history().at(step)
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=2e-4), name


NAMES = ["loss", "grad_norm", "norm_test", "inner_test", "update_size"]


def test_without_an_optimizer() -> None:
    model, optimizer = problem()
    X, y = batch()
    expected = brute(model, X, y)
    monitor = watch(model, quantities=NAMES, every=2)
    for _ in range(4):
        with monitor.step():
            F.cross_entropy(model(X), y).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
    monitor.close()
    check(monitor, expected | {"update_size": 0.1 * expected["grad_norm"]})
    assert monitor.history().steps == [0, 2]
    other = watch(*problem())
    with pytest.raises(RuntimeError, match="listens to its optimizer"), other.step():
        pass
    other.close()


@pytest.mark.filterwarnings("ignore:cockpit. update_size")
def test_an_error_in_a_step_without_an_optimizer() -> None:
    model, _ = problem()
    before = state_of(model)
    monitor = watch(model, quantities=NAMES, every=1)
    with pytest.raises(ZeroDivisionError), monitor.step():
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        raise ZeroDivisionError
    assert state_of(model) == before and len(monitor.history()) == 0
    monitor.close()


def test_a_closure() -> None:
    """The backward pass is inside the optimizer's step."""
    model, optimizer = problem()
    X, y = batch()
    expected = brute(model, X, y)
    monitor = watch(model, optimizer, quantities=NAMES, every=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    monitor.close()
    check(monitor, expected | {"update_size": 0.1 * expected["grad_norm"]})


def test_many_passes_inside_a_step() -> None:
    """Of an optimizer that looks around, the first counts: it is where the step begins."""
    model, _ = problem()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    X, y = batch()
    expected = brute(model, X, y)
    monitor = watch(model, optimizer, quantities=NAMES[:4], every=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    monitor.close()
    values = monitor.history().at(0)
    assert values["loss"] == pytest.approx(expected["loss"])
    assert values["norm_test"] == pytest.approx(expected["norm_test"], rel=1e-4)


def test_clipping_comes_later() -> None:
    model, optimizer = problem()
    X, y = batch()
    expected = brute(model, X, y)
    monitor = watch(model, optimizer, quantities=[*NAMES, "alpha", "mean_gsnr"], every=1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    monitor.close()
    check(monitor, expected | {"update_size": 0.1 * 0.01})
    assert "alpha" in monitor.history().at(0) and monitor.left_out == {}


@pytest.mark.parametrize("first", [0, 2])
def test_a_gradient_that_is_changed(first: int) -> None:
    """Clipped by value: the step is no longer along the gradient, and forms are kept the next time."""
    model, optimizer = problem()
    monitor = watch(model, optimizer, quantities=["loss", "alpha"], every=1)
    for step in range(6):
        X, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        if step >= first:
            nn.utils.clip_grad_value_(model.parameters(), 0.01)
        if step == first > 0:
            with pytest.warns(UserWarning, match=f"alpha is left out at step {first}: .* was clipped"):
                optimizer.step()
        else:
            optimizer.step()
    monitor.close()
    steps, _ = monitor.history().column("alpha")
    # In the first step forms are kept, and so they are once a step was not along the gradient.
    assert steps == [step for step in range(5) if step != first or first == 0]


@pytest.mark.parametrize("explicit", [True, False])
def test_a_gradient_scaler(explicit: bool) -> None:
    """Numbers are those of the loss without its factor."""
    model, optimizer = problem()
    X, y = batch()
    expected = brute(model, X, y)
    monitor = watch(model, optimizer, quantities=NAMES, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(F.cross_entropy(model(X), y)).backward()
    if explicit:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    monitor.close()
    check(monitor, expected)


def test_a_step_that_a_scaler_skips() -> None:
    """What was seen of it is not mixed into the next."""
    model, optimizer = problem()
    monitor = watch(model, optimizer, quantities=NAMES, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflows in (True, False):
        X, y = batch()
        expected = brute(model, X, y)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(X), y)).backward()
        if overflows:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    monitor.close()
    assert monitor.history().steps == [0]
    assert monitor.history().at(0)["norm_test"] == pytest.approx(expected["norm_test"], rel=1e-3)


@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_that_is_given_up(to_none: bool) -> None:
    model, optimizer = problem()
    monitor = watch(model, optimizer, quantities=NAMES, every=1)
    for _ in range(3):
        X, y = batch()
        expected = brute(model, X, y)
        optimizer.zero_grad(set_to_none=to_none)
        F.cross_entropy(model(X), y).backward()
    optimizer.step()
    monitor.close()
    check(monitor, expected)


def test_the_users_own_quantities() -> None:
    """Computed beside the monitor's, wherever their block is opened."""
    model, optimizer = problem()
    lossfunc = extend(nn.CrossEntropyLoss())
    X, y = batch()
    expected = brute(model, X, y)
    monitor = watch(model, optimizer, quantities=NAMES, every=1)
    extend(model)
    with backpack(DiagGGNExact(), BatchGrad()):
        lossfunc(model(X), y).backward()
    for p in model.parameters():
        assert p.grad_batch.shape[0] == 5 and p.diag_ggn_exact.shape == p.shape
    optimizer.step()
    monitor.close()
    check(monitor, expected)


def test_the_function_of_autograd() -> None:
    model, optimizer = problem()
    X, y = batch()
    expected = brute(model, X, y)
    monitor = watch(model, optimizer, quantities=NAMES, every=1)
    torch.autograd.backward(F.cross_entropy(model(X), y))
    optimizer.step()
    monitor.close()
    check(monitor, expected)


def test_two_monitors() -> None:
    """Of two models, one of which feeds the other; each sees what is its own."""
    first, optimizer = problem()
    second = nn.Linear(3, 3)
    other = torch.optim.SGD(second.parameters(), lr=0.1)
    X, y = batch()
    expected = brute(nn.Sequential(first, second), X, y)
    monitors = [
        watch(model, opt, quantities=NAMES[:4], every=1)
        for model, opt in ((first, optimizer), (second, other))
    ]
    F.cross_entropy(second(first(X)), y).backward()
    optimizer.step()
    other.step()
    # A pass that is none of theirs.
    nn.Linear(2, 1)(torch.rand(2)).sum().backward()
    for monitor in monitors:
        monitor.close()
        assert monitor.left_out == {}
    together = [monitor.history().at(0) for monitor in monitors]
    norm = sum(each["grad_norm"] ** 2 for each in together) ** 0.5
    assert norm == pytest.approx(expected["grad_norm"])
    assert together[0]["loss"] == together[1]["loss"] == pytest.approx(expected["loss"])


def test_an_optimizer_in_a_wrapper() -> None:
    """Its step calls that of the one inside, perhaps not each time."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.count = optimizer, 0

        def step(self, closure: Any = None) -> None:
            self.count += 1
            if self.count % 2 == 0:
                self.optimizer.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            if self.count % 2 == 0:
                self.optimizer.zero_grad(set_to_none)

    model, optimizer = problem()
    wrapper = Wrapper(optimizer)
    with watch(model, wrapper, every=1) as monitor:
        train(model, wrapper, 6)
    assert monitor.history().steps == [0, 1, 2] and monitor.left_out == {}
    assert not optimizer._optimizer_step_pre_hooks


def test_some_parameters() -> None:
    model, optimizer = problem()
    model[2].bias.requires_grad_(False)
    monitor = watch(model, optimizer, quantities=NAMES, every=1, include=r"^2\.", per="parameter")
    train(model, optimizer, 1)
    monitor.close()
    values = monitor.history().at(0)
    assert [key for key in values if "/" in key] == [f"{name}/2.weight" for name in NAMES[1:]]
    assert values["grad_norm"] == pytest.approx(float(model[2].weight.grad.norm()))
    with pytest.raises(ValueError, match="no trained parameter whose name matches 'nothing'"):
        watch(model, optimizer, include="nothing")


def test_groups() -> None:
    for per, expected in (
        ("layer", ["0", "2"]),
        ("parameter", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("model", []),
        (lambda name: name.split(".")[1], ["weight", "bias"]),
    ):
        model, optimizer = problem()
        monitor = watch(model, optimizer, quantities=["grad_norm"], every=1, per=per)
        train(model, optimizer, 1)
        monitor.close()
        assert monitor.history().layers("grad_norm") == expected
        total = monitor.history().at(0)["grad_norm"]
        parts = [monitor.history().at(0)[f"grad_norm/{name}"] for name in expected]
        assert not parts or sum(x**2 for x in parts) ** 0.5 == pytest.approx(total)
    with pytest.raises(ValueError, match="per must be one of"):
        watch(*problem(), per="neuron")


def test_unknown_names() -> None:
    with pytest.raises(KeyError, match="no quantity 'grad'"):
        watch(*problem(), quantities=["grad"])
    with pytest.raises(KeyError, match="no configuration 'rich'"):
        watch(*problem(), quantities="rich")


# --------------------------------------------------------------------------------------
# What cannot be computed


class Mixes(nn.Module):
    """Samples are mixed by an operation before the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) - self.a(x).flip(0))


def test_samples_that_are_mixed() -> None:
    """No error: a warning for each quantity of samples, the others are there; training goes on."""
    model = Mixes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        monitor = watch(model, optimizer, quantities=NAMES, every=1, per="model")
        train(model, optimizer, 3)
        monitor.close()
    texts = [str(w.message) for w in found]
    assert len(texts) == 2 and "cockpit: norm_test is left out at step 0" in texts[0]
    assert "sub combines different sample axes" in texts[0]
    for step in range(3):
        assert set(monitor.history().at(step)) == {"time", "loss", "grad_norm", "update_size"}
    assert [e["quantity"] for e in monitor.history().events] == ["norm_test", "inner_test"]


@pytest.mark.filterwarnings("ignore:batch norm in training mode")
def test_batch_norm() -> None:
    """First-order numbers are of each row's contribution; curvature of mixed samples is left out."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = watch(model, optimizer, quantities=[*NAMES, "hess_trace"], every=1)
    with pytest.warns(UserWarning, match="hess_trace is left out at step 0: .*batch norm"):
        train(model, optimizer, 2)
    monitor.close()
    assert set(NAMES) <= set(monitor.history().at(1)) and "hess_trace" not in monitor.history().at(1)


def test_a_loss_that_is_not_finite() -> None:
    model, optimizer = problem()
    monitor = watch(model, optimizer, quantities=NAMES, every=1, alarms=["non_finite"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        X, y = batch()
        (F.cross_entropy(model(X), y) * math.nan).backward()
        optimizer.step()
    monitor.close()
    (event,) = [e for e in monitor.history().events if e["event"] == "not finite"]
    assert event["quantity"] == "loss" and "loss is nan" in event["message"]


def test_a_sink_that_fails() -> None:
    model, optimizer = problem()
    monitor = watch(model, optimizer, quantities=["loss"], every=1, log=lambda values, step: 1 / 0)
    with pytest.warns(UserWarning, match="a sink is dropped, as it raised ZeroDivisionError"):
        train(model, optimizer, 2)
    monitor.close()
    assert len(monitor.history()) == 2


def test_an_alarm_that_fails() -> None:
    class Fails(Spike):
        def find(self, *args: Any) -> None:
            raise ZeroDivisionError

    model, optimizer = problem()
    monitor = watch(model, optimizer, quantities=["loss"], every=1, alarms=Fails())
    with pytest.warns(UserWarning, match="an alarm is dropped, as it raised ZeroDivisionError"):
        train(model, optimizer, 2)
    monitor.close()
    assert len(monitor.history()) == 2


@pytest.mark.parametrize("where", ["begins", "ended", "_conclude"])
def test_errors_of_the_monitor_itself(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on, unwatched."""
    model, optimizer = problem()
    before = state_of(model)
    monitor = watch(model, optimizer, quantities=["loss", "norm_test"], every=1)
    train(model, optimizer, 1)
    monkeypatch.setattr(monitor, where, lambda *args: 1 / 0)
    with pytest.warns(UserWarning, match="the monitor is closed, as it raised ZeroDivisionError"):
        train(model, optimizer, 3)
    assert state_of(model) == before and monitor.history().steps == [0]


def test_too_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where forms take more than they may, projections are made at once, and only alpha is left out."""
    monkeypatch.setattr(small, "SMALL", 30)  # biases alone are small
    model, _ = problem()
    optimizer = torch.optim.Adam(model.parameters())
    monitor = watch(model, optimizer, quantities=[*NAMES, "alpha"], every=1, hold=8)
    X, y = batch()
    expected = brute(model, X, y)
    with pytest.warns(UserWarning, match="alpha is left out .* more memory than `hold` allows"):
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
    train(model, optimizer, 1)
    monitor.close()
    check(monitor, expected)
    assert all("inner_test" in record for record in monitor.history())


def test_inputs_that_are_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms that are kept notice it."""
    monkeypatch.setattr(small, "SMALL", 0)
    model, _ = problem()
    optimizer = torch.optim.Adam(model.parameters())
    monitor = watch(model, optimizer, quantities=["loss", "inner_test"], every=1)
    X, y = batch()
    with pytest.warns(UserWarning, match="inner_test is left out .* was written to"):
        for _ in range(2):
            F.cross_entropy(model(X), y).backward()
            X.copy_(torch.randn_like(X))
        optimizer.step()
    monitor.close()


# --------------------------------------------------------------------------------------
# Histories and sinks


def test_sinks(tmp_path: Path) -> None:
    class Writer:
        def __init__(self) -> None:
            self.scalars: list[Any] = []
            self.histograms: list[Any] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.scalars.append((tag, value, step))

        def add_histogram_raw(self, tag: str, global_step: int, **more: Any) -> None:
            assert len(more["bucket_limits"]) == len(more["bucket_counts"])
            assert more["num"] == sum(more["bucket_counts"]) > 0
            self.histograms.append((tag, global_step))

    logged: list[Any] = []
    writer, table = Writer(), CSV(tmp_path / "run.csv")
    model, optimizer = problem()
    names = ["loss", "grad_norm", "alpha", "grad_hist"]
    sinks = [lambda values, step: logged.append((values, step)), writer, table]
    with watch(model, optimizer, quantities=names, every=2, log=sinks) as monitor:
        train(model, optimizer, 4)
    assert [(set(values) - {"grad_norm/0", "grad_norm/2"}, step) for values, step in logged] == [
        ({"loss", "grad_norm"}, 0),
        ({"alpha"}, 0),
        ({"loss", "grad_norm"}, 2),
        ({"alpha"}, 2),
    ]
    assert ("cockpit/loss", logged[0][0]["loss"], 0) in writer.scalars
    assert writer.histograms == [("cockpit/grad_hist", 0), ("cockpit/grad_hist", 2)]
    head, *lines = (tmp_path / "run.csv").read_text().splitlines()
    assert head == "step,loss,grad_norm,grad_norm/0,grad_norm/2,alpha" and len(lines) == 2
    written = [float(line.split(",")[-1]) for line in lines]
    assert written == monitor.history().column("alpha")[1]
    with pytest.raises(TypeError, match="a sink is a function"):
        watch(*problem(), log=[3])


def test_a_history_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "run.jsonl"
    model, optimizer = problem()
    with watch(model, optimizer, every=2, path=path) as monitor:
        train(model, optimizer, 5)
    found = History.read(path)
    assert list(found) == list(monitor.history())
    assert found.header == monitor.history().header and found.header["optimizer"] == "SGD"
    # A line that the process did not come to finish.
    path.write_text(path.read_text() + '{"step": 6, "lo')
    assert list(History.read(path)) == list(monitor.history())


def test_numbers_that_are_not_finite_are_read_back(tmp_path: Path) -> None:
    history = History(tmp_path / "run.jsonl")
    history.begin()
    history.add(0, {"loss": math.inf, "x": math.nan, "counts": [1, -math.inf]})
    for line in (tmp_path / "run.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
    values = History.read(tmp_path / "run.jsonl").at(0)
    assert values["loss"] == math.inf and math.isnan(values["x"]) and values["counts"] == [1, -math.inf]


def test_a_run_that_is_killed(tmp_path: Path) -> None:
    """What it had seen is in the file."""
    program = f"""
import torch
from backpack.cockpit import watch
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
watch(model, optimizer, quantities=["loss"], every=1, path={str(tmp_path / "run.jsonl")!r})
while True:
    optimizer.zero_grad()
    model(torch.rand(5, 4)).square().mean().backward()
    optimizer.step()
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.time() + 60
        while time.time() < deadline:
            path = tmp_path / "run.jsonl"
            if path.exists() and path.read_text().count("\n") > 20:
                break
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    history = History.read(tmp_path / "run.jsonl")
    assert history.steps == list(range(len(history))) and len(history) >= 19


def test_a_run_goes_on(tmp_path: Path) -> None:
    """From a checkpoint: numbers are those of a run without interruption."""
    path = tmp_path / "run.jsonl"

    def fresh(path: Path | None) -> tuple[nn.Module, torch.optim.Optimizer, Monitor]:
        torch.manual_seed(0)
        model, optimizer = problem()
        names = ["loss", "distance", "noise_scale"]
        return model, optimizer, watch(model, optimizer, quantities=names, every=2, path=path)

    model, optimizer, whole = fresh(None)
    for step in range(8):
        torch.manual_seed(step)
        train(model, optimizer, 1)
    whole.close()

    model, optimizer, monitor = fresh(path)
    for step in range(6):
        if step == 4:
            saved = copy.deepcopy((model.state_dict(), monitor.state_dict()))
        torch.manual_seed(step)
        train(model, optimizer, 1)
    monitor.close()
    model, optimizer, monitor = fresh(path)
    model.load_state_dict(saved[0])
    monitor.load_state_dict(pickle.loads(pickle.dumps(saved[1])))
    for step in range(4, 8):
        torch.manual_seed(step)
        train(model, optimizer, 1)
    monitor.close()

    for history in (monitor.history(), History.read(path)):
        assert history.steps == whole.history().steps == [0, 2, 4, 6]
        for step in history.steps:
            for name, value in whole.history().at(step).items():
                if name != "time":
                    assert history.at(step)[name] == pytest.approx(value, rel=1e-5), (step, name)


def test_a_run_that_begins_again_replaces_the_former(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for steps in (6, 2):
        model, optimizer = problem()
        with watch(model, optimizer, quantities=["loss"], every=1, path=path):
            train(model, optimizer, steps)
    assert History.read(path).steps == [0, 1]


# --------------------------------------------------------------------------------------
# Schedules, budget


def test_a_schedule_of_ones_own() -> None:
    model, optimizer = problem()
    with watch(model, optimizer, quantities=["loss"], every=lambda step: step in (0, 1, 4)) as monitor:
        train(model, optimizer, 6)
    assert monitor.history().steps == [0, 1, 4]


def simulated(budget: float | None, steps: int = 500, cost: float = 3.0) -> tuple[Clock, list[int]]:
    """Steps of one second, ``cost`` more if tracked."""
    at = [0.0]
    clock = Clock(lambda step: True, budget, lambda: at[0])
    tracked = []
    for step in range(steps):
        if clock.tracks(step):
            tracked.append(step)
            at[0] += 1 + cost
            clock.stepped(True)
        else:
            at[0] += 1
            clock.stepped(False)
    return clock, tracked


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.5])
def test_a_budget(budget: float) -> None:
    clock, tracked = simulated(budget)
    spent = 3.0 * len(tracked)
    assert tracked[0] == 0
    assert 0.8 * budget < spent / (500 + spent) <= budget * 1.1
    assert clock.overhead == pytest.approx(spent / (500 + spent), rel=0.1)


def test_no_budget() -> None:
    assert len(simulated(None)[1]) == 500
    with pytest.raises(ValueError, match="budget must be"):
        watch(*problem(), budget=0.0)


def test_a_real_and_a_generated_batch() -> None:
    """Of two forward passes whose rows the user's block says: the numbers of one pass of all rows."""
    values = []
    for together in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = watch(model, optimizer, every=1, quantities="business")
        for _ in range(3):
            X, t = torch.randn(10, 4), (torch.arange(10) < 5).float().unsqueeze(1)
            optimizer.zero_grad()
            loss: Any = F.binary_cross_entropy_with_logits
            with backpack(forwards="further"):
                if together:
                    loss(model(X), t).backward()
                else:
                    parts = zip(X.split(5), t.split(5), strict=True)
                    sum(loss(model(x), part) / 2 for x, part in parts).backward()
            optimizer.step()
        assert not monitor.left_out
        values.append(torch.tensor(monitor.history().column("noise_scale")[1]))
        monitor.close()
    torch.testing.assert_close(*values)
