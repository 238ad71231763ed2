"""Training loops that do otherwise than a monitor expects: the right numbers, or none and a reason."""

from __future__ import annotations

import copy
import errno
import gc
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import _torch, backpack, extend
from backpack.cockpit import History, Monitor, passes, small, watch
from backpack.cockpit.eigenvalue import lanczos
from backpack.cockpit.passed import MissingError
from backpack.extensions import BatchGrad
from tests.cockpit.test_monitor import state_of


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    gc.collect()
    passes.sweep()
    assert torch.Tensor.backward is passes._tensor_backward and not passes._listeners


def problem(rate: float = 0.1) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return model, torch.optim.SGD(model.parameters(), lr=rate)


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4), torch.randint(3, (n,))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1, n: int = 5) -> None:
    for _ in range(steps):
        X, y = batch(n)
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()


def expected(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, float]:
    """By brute force, of the parameters that are trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for n in range(len(X)):
        loss = F.cross_entropy(model(X[n : n + 1]), y[n : n + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    g_n = torch.stack(rows)
    noise = float(g_n.var(0).sum())
    g = float(g_n.mean(0).square().sum())
    return {"grad_noise": noise, "grad_norm": g**0.5, "norm_test": (noise / (len(X) * g)) ** 0.5}


def moved(before: nn.Module, after: nn.Module) -> float:
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return float(torch.cat([(q - p).detach().flatten() for p, q in pairs]).norm())


NAMES = ["loss", "grad_norm", "grad_noise", "norm_test", "distance", "update_size"]


def check(monitor: Monitor, step: int, values: dict[str, float]) -> None:
    found = monitor.history().at(step)
    for name, value in values.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name


# --------------------------------------------------------------------------------------
# Other parameters


@pytest.mark.parametrize("change", ["frozen", "released", "replaced"])
def test_other_parameters_are_trained(change: str) -> None:
    """Numbers are of what is trained in the step; the history says since when."""
    model, optimizer = problem()
    if change == "released":
        model[0].requires_grad_(False)
    monitor = watch(model, optimizer, quantities=[*NAMES, "noise_scale", "hess_max_ev"], every=1)
    train(model, optimizer, 2)
    if change == "replaced":
        model[2] = nn.Linear(6, 3)
        optimizer.add_param_group({"params": list(model[2].parameters())})
    else:
        model[0].requires_grad_(change == "released")
    for step in (2, 3):
        before, (X, y) = copy.deepcopy(model), batch()
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
        check(monitor, step, expected(before, X, y))
        assert monitor.history().at(step)["update_size"] == pytest.approx(moved(before, model))
        assert ("grad_norm/0" in monitor.history().at(step)) == (change != "frozen")
    monitor.close()
    assert monitor.left_out == {}
    (event,) = [each for each in monitor.history().events if each["event"] == "parameters"]
    assert event["step"] == 2 and f"{2 if change == 'frozen' else 4} tensors" in event["message"]
    assert len(monitor.history().header["groups"]) == (1 if change == "frozen" else 2)


def test_distances_go_on_when_layers_are_released() -> None:
    model, optimizer = problem()
    model[0].requires_grad_(False)
    start = [p.detach().clone() for p in model.parameters()]
    monitor = watch(model, optimizer, quantities=["distance"], every=1)
    train(model, optimizer, 3)
    model[0].requires_grad_(True)
    train(model, optimizer, 3)
    before = [p.detach().clone() for p in model[2].parameters()]
    train(model, optimizer)
    monitor.close()
    far = torch.cat([(p - q).flatten() for p, q in zip(before, start[2:], strict=True)]).norm()
    assert monitor.history().at(6)["distance/2"] == pytest.approx(float(far))


def test_a_model_of_another_precision() -> None:
    model, optimizer = problem()
    monitor = watch(model, optimizer, quantities=NAMES, every=1)
    train(model, optimizer, 2)
    model.float()
    for _ in range(2):
        X, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(X.float()), y).backward()
        optimizer.step()
    monitor.close()
    assert monitor.left_out == {} and monitor.history().at(3)["distance"] > 0


# --------------------------------------------------------------------------------------
# Steps that are no ordinary ones


def test_no_step_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one trains: that is said once, and nothing piles up."""
    monkeypatch.setattr("backpack.cockpit.listening.PATIENCE", 5)
    model, watched = problem()
    monitor = watch(model, watched, quantities=NAMES, every=1)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, other, 5)
    with pytest.warns(UserWarning, match="the optimizer that is watched .SGD. has made none"):
        train(model, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, other, 8)
    assert len(monitor._passes) == 1
    monitor.close()
    assert monitor.history().steps == [] and monitor.history().events[0]["event"] == "no step"


@pytest.mark.parametrize("quantities", ["economy", "business"])
def test_many_passes_take_the_memory_of_a_few(quantities: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "SMALL", 0)
    model = nn.Sequential(nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = watch(model, optimizer, quantities=quantities, every=1)
    sizes = {}
    for k in range(12):
        X, y = torch.randn(8, 60), torch.randint(3, (8,))
        (F.cross_entropy(model(X), y) / 12).backward()
        held = [
            value
            for passed in monitor._passes
            for piece in passed.pieces.values()
            for value in (piece.gradient, piece.squares)
            if value is not None
        ]
        held += [
            diagonal
            for passed in monitor._passes
            for matrix in passed.curvature.values()
            for _, diagonal in matrix.values()
            if diagonal is not None
        ]
        sizes[k] = sum(value.numel() for value in held)
    assert sizes[11] == sizes[0] > 0
    optimizer.step()
    monitor.close()
    assert monitor.left_out == {}


def test_forms_of_all_passes_have_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "SMALL", 0)
    model, _ = problem()
    optimizer = torch.optim.Adam(model.parameters())
    names = ["inner_test", "norm_test"]
    monitor = watch(model, optimizer, quantities=names, every=1, hold=3000)
    for k in range(8):
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        kept = [p.form is not None for each in monitor._passes for p in each.pieces.values()]
        assert any(kept) == (monitor._first.held <= 3000) and (k < 7 or not any(kept))
    with pytest.warns(UserWarning, match="inner_test is left out .* more memory than `hold` allows"):
        optimizer.step()
    monitor.close()
    assert "norm_test" in monitor.history().at(0)


class Sharp(torch.optim.SGD):
    """Two evaluations of a closure, and the step of the class above: hooks are called twice."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        moves = [(p, 0.05 * p.grad) for group in self.param_groups for p in group["params"]]
        for p, move in moves:
            p.add_(move)
        with torch.enable_grad():
            closure()
        for p, move in moves:
            p.sub_(move)
        super().step()
        return loss


@pytest.mark.parametrize("keyword", [False, True])
def test_a_step_within_a_step(keyword: bool) -> None:
    """The outer one counts, with the gradient of the first evaluation."""
    model, _ = problem()
    optimizer = Sharp(model.parameters(), lr=0.1)
    monitor = watch(model, optimizer, quantities=[*NAMES, "alpha"], every=1)
    for step in range(3):
        X, y = batch()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), y)  # noqa: B023
            loss.backward()
            return loss

        before = copy.deepcopy(model)
        optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        check(monitor, step, expected(before, X, y))
        assert monitor.history().at(step)["update_size"] == pytest.approx(moved(before, model))
    monitor.close()
    assert monitor.history().steps == [0, 1, 2] and monitor.left_out == {}
    assert monitor.history().column("alpha")[0] == [0, 1]


@pytest.mark.parametrize("within", [False, True])
def test_a_step_that_fails(within: bool) -> None:
    """In the closure or elsewhere: the next step is as if it had not been."""

    class Fails(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise ZeroDivisionError
            return super().step(closure)

    model, _ = problem()
    optimizer = Fails(model.parameters(), lr=0.1)
    monitor = watch(model, optimizer, quantities=[*NAMES, "alpha"], every=1)
    train(model, optimizer, 2)
    X, y = batch()
    F.cross_entropy(model(X), y).backward()
    optimizer.fails = not within
    with pytest.raises(ZeroDivisionError):
        optimizer.step((lambda: 1 / 0) if within else None)
    optimizer.fails = False
    for step in (2, 3):
        before, (X, y) = copy.deepcopy(model), batch()
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
        check(monitor, step, expected(before, X, y))
    monitor.close()
    assert monitor.history().steps == [0, 1, 2, 3] and monitor.left_out == {}


def test_an_interruption_counts_its_step() -> None:
    """The optimizer has made it, whatever the monitor was doing."""
    model, optimizer = problem()

    def log(values: dict[str, float], step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    monitor = watch(model, optimizer, quantities=["loss"], every=1, log=log)
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, 5)
    assert monitor.step_count == 3
    train(model, optimizer, 2)
    monitor.close()
    assert monitor.history().steps == [0, 1, 2, 3, 4] and monitor.left_out == {}


def test_a_penalty_by_itself() -> None:
    """A pass without data has no samples; its loss and its gradient count as ever."""
    model, optimizer = problem()
    monitor = watch(model, optimizer, quantities=[*NAMES, "alpha", "inner_test", "hess_trace"], every=1)
    for step in range(3):
        before, (X, y) = copy.deepcopy(model), batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), y)
        penalty = 0.1 * sum(p.square().sum() for p in model.parameters())
        for each in (loss, penalty) if step < 2 else (penalty, loss):
            each.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        values = expected(before, X, y)
        values |= {"loss": float((loss + penalty).detach()), "grad_norm": float(grads.norm())}
        check(monitor, step, values)
    monitor.close()
    assert monitor.left_out == {}


@pytest.mark.parametrize("alone", [False, True])
def test_alpha_is_that_of_the_data(alone: bool) -> None:
    """Loss and slope of the parabola are of one function, with a penalty inside of the loss or not."""
    model, optimizer = problem(0.3)
    monitor = watch(model, optimizer, quantities=["alpha"], every=1)
    seen = []
    for _ in range(3):
        before, (X, y) = copy.deepcopy(model), batch(6)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), y)
        penalty = 0.1 * sum(p.square().sum() for p in model.parameters())
        if alone:
            loss.backward()
            penalty.backward()
        else:
            (loss + penalty).backward()
        optimizer.step()
        seen.append((before, X, y, copy.deepcopy(model)))
    monitor.close()
    assert monitor.left_out == {}
    for step in range(2):
        d = torch.cat(
            [
                (p - q).detach().flatten()
                for p, q in zip(seen[step][3].parameters(), seen[step][0].parameters(), strict=True)
            ]
        )
        t, ends = d.norm(), []
        for model, X, y, _ in seen[step : step + 2]:
            losses = F.cross_entropy(model(X), y, reduction="none")
            slopes = torch.stack(
                [
                    torch.cat(
                        [
                            g.flatten()
                            for g in torch.autograd.grad(x, model.parameters(), retain_graph=True)
                        ]
                    )
                    for x in losses
                ]
            ) @ (d / t)
            ends.append((losses.detach(), slopes))
        values = torch.stack(
            [ends[0][0].mean(), ends[1][0].mean(), ends[0][1].mean(), ends[1][1].mean()]
        )
        spreads = torch.stack([ends[0][0].var(), ends[1][0].var(), ends[0][1].var(), ends[1][1].var()])
        rows = torch.tensor([[1, 0, 0], [1, t, t * t], [0, 1, 0], [0, 1, 2 * t]])
        weights = torch.diag(1 / spreads)
        _, w1, w2 = torch.linalg.solve(rows.T @ weights @ rows, rows.T @ weights @ values)
        alpha = -1.0 if w2 < 0 else float(2 * t / (-w1 / w2) - 1)
        assert monitor.history().at(step)["alpha"] == pytest.approx(alpha, rel=1e-6)


def test_batches_of_all_sizes() -> None:
    """Of one sample there is no variance, of none there is nothing; later steps are not affected."""
    model, optimizer = problem()
    monitor = watch(model, optimizer, quantities=[*NAMES, "alpha", "grad_hist"], every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in (5, 1, 7, 0, 64):
            X, y = batch(n)
            optimizer.zero_grad()
            F.cross_entropy(model(X), y, reduction="sum").backward()
            optimizer.step()
    monitor.close()
    has = ["norm_test" in record for record in monitor.history()]
    assert has == [True, False, True, False, True] and monitor.history().steps == [0, 1, 2, 3, 4]


def test_errors_inside_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the monitor computes while the user's gradients are computed does not disturb these."""
    model, optimizer = problem()
    monitor = watch(model, optimizer, quantities=[*NAMES, "hess_trace"], every=1)

    def fails(*_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr("backpack.cockpit.collect.is_small", fails)
    monkeypatch.setattr("backpack.cockpit.curvature.Curvature._reduce", fails)
    X, y = batch()
    wanted = torch.autograd.grad(F.cross_entropy(model(X), y), list(model.parameters()))
    with pytest.warns(UserWarning, match="is left out at step 0: no room"):
        F.cross_entropy(model(X), y).backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    torch.testing.assert_close(found, list(wanted))
    monkeypatch.undo()
    train(model, optimizer)
    monitor.close()
    assert set(monitor.left_out) == {"grad_noise", "norm_test", "hess_trace"}
    assert {"grad_noise", "norm_test", "hess_trace"} <= set(monitor.history().at(1))
    assert {"loss", "grad_norm"} <= set(monitor.history().at(0))


def test_a_schedule_that_fails() -> None:
    model, optimizer = problem()
    monitor = watch(model, optimizer, quantities=["loss"], every=lambda step: step < 2 or 1 / 0)
    train(model, optimizer)
    with pytest.warns(UserWarning, match="the monitor is closed, as it raised ZeroDivisionError"):
        train(model, optimizer, 3)
    assert monitor.history().steps == [0, 1]


def test_largest_eigenvalue_of_what_is_not_finite() -> None:
    with pytest.raises(MissingError, match="not finite"):
        lanczos(lambda v: [v[0] * torch.nan], [torch.ones(3) / 3**0.5])


def test_numbers_of_two_bytes() -> None:
    """Losses of few digits are read all the same."""
    model, optimizer = problem()
    model.bfloat16()
    monitor = watch(model, optimizer, quantities=["alpha", "hard_samples", "norm_test"], every=1)
    for _ in range(6):
        X, y = batch(20)
        optimizer.zero_grad()
        F.cross_entropy(model(X.bfloat16()), y).backward()
        optimizer.step()
    monitor.close()
    assert "hard_samples" not in monitor.left_out and "norm_test" not in monitor.left_out


# --------------------------------------------------------------------------------------
# Models that others look at too


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("part", [False, True])
def test_monitors_of_common_modules(first: int, part: bool) -> None:
    """Closing one leaves the other what it needs; nothing of either stays."""
    model, optimizer = problem()
    plain = state_of(model)
    both = [
        watch(model, optimizer, quantities=[*NAMES, "hess_trace"], every=1),
        watch(model[0] if part else model, optimizer, quantities=NAMES, every=2),
    ]
    train(model, optimizer, 2)
    both.pop(first).close()
    (other,) = both
    for step in (2, 3, 4):
        before, (X, y) = copy.deepcopy(model), batch()
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
        if first == 1 or (step % 2 == 0 and not part):
            check(other, step, expected(before, X, y))
    other.close()
    assert other.left_out == {} and other.history().steps[-1] == 4
    assert state_of(model) == plain


def test_what_the_user_extends_meanwhile_stays_so() -> None:
    model, optimizer = problem()
    lossfunc = extend(nn.CrossEntropyLoss())
    monitor = watch(model, optimizer, quantities=NAMES, every=2)
    extend(model)
    for _ in range(4):
        X, y = batch()
        optimizer.zero_grad()
        loss = lossfunc(model(X), y)
        with backpack(BatchGrad()):
            loss.backward()
        assert all(p.grad_batch.shape == (5, *p.shape) for p in model.parameters())
        optimizer.step()
    monitor.close()
    loss = lossfunc(model(X), y)
    with backpack(BatchGrad()):
        loss.backward()
    assert monitor.left_out == {} and monitor.history().steps == [0, 2]


def test_what_was_said_of_a_part_stays() -> None:
    model, optimizer = problem()
    extend(model[2], batch_dim=1, samples=0)
    before = [dict(each.__dict__) for each in model.modules()]
    with watch(model, optimizer, quantities=["loss"], every=2):
        train(model, optimizer, 4)
    after = [dict(each.__dict__) for each in model.modules()]
    names = ("_backpack_extend", "_backpack_root", "_backpack_batch_dim", "_backpack_samples")
    for then, now in zip(before, after, strict=True):
        assert {n: then.get(n) for n in names} == {n: now.get(n) for n in names}


def test_fields_stay_on_no_parameter() -> None:
    """Also where the user's block looks at parameters that the monitor does not."""
    model, optimizer = problem()
    monitor = watch(model, optimizer, quantities="business", include="^0", every=1)
    for _ in range(2):
        X, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), y)
        with backpack(BatchGrad()):
            loss.backward()
        assert all(
            {k for k in p.__dict__ if not k.startswith("_back")} == {"grad_batch"}
            for p in model.parameters()
        )
        optimizer.step()
    monitor.close()


def test_compiled_models_are_seen() -> None:
    """They run uncompiled in tracked steps, and compiled in others."""
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(monitor.step_count)
            return graph(*args)

        return run

    model, optimizer = problem()
    compiled = torch.compile(model, backend=backend)
    monitor = watch(compiled, optimizer, quantities=NAMES, every=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a compiled Sequential runs uncompiled")
        for step in range(7):
            before, (X, y) = copy.deepcopy(model), batch()
            optimizer.zero_grad()
            F.cross_entropy(compiled(X), y).backward()
            optimizer.step()
            if step % 3 == 0:
                check(monitor, step, expected(before, X, y))
    monitor.close()
    assert monitor.left_out == {} and set(calls) == {1, 2, 4, 5}
    compiled(batch()[0])
    assert calls[-1] == 7


def test_a_monitor_that_is_not_closed() -> None:
    """Neither does it hold the model, nor is compiled code left uncompiled."""
    torch.compile(lambda x: x, backend="eager")(torch.ones(1))
    model, optimizer = problem()
    gone = weakref.ref(model)
    watch(model, optimizer, quantities=["loss"], every=1)
    del model, optimizer
    gc.collect()
    assert gone() is None and not _torch._wanted


# --------------------------------------------------------------------------------------
# Files


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on; nothing is lost or written twice once there is room again."""
    model, optimizer = problem()
    path = tmp_path / "run.jsonl"
    monitor = watch(model, optimizer, quantities=["loss"], every=1, path=path)
    train(model, optimizer)
    write, room = os.write, [17]

    def full(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(file, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(UserWarning, match="run.jsonl cannot be written .* kept in memory"):
        train(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)
    assert History.read(path).steps == [0]
    monkeypatch.undo()
    train(model, optimizer)
    monitor.close()
    assert list(History.read(path)) == list(monitor.history()) and len(monitor.history()) == 5


def test_a_folder_that_goes() -> None:
    folder = tempfile.mkdtemp()
    path = Path(folder) / "runs" / "run.jsonl"
    model, optimizer = problem()
    monitor = watch(model, optimizer, quantities=["loss"], every=1, path=path)
    train(model, optimizer)
    shutil.rmtree(path.parent)
    with pytest.warns(UserWarning, match="cannot be written"):
        train(model, optimizer, 2)
    path.parent.mkdir()
    monitor.close()
    assert History.read(path).steps == [1, 2]
    shutil.rmtree(folder)


def test_a_state_of_another_model() -> None:
    model, optimizer = problem()
    with watch(model, optimizer, quantities=NAMES, every=1) as monitor:
        train(model, optimizer, 2)
        state = monitor.state_dict()
    other = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3))
    for model in (other, nn.Linear(4, 3)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(model, optimizer, quantities=NAMES, every=1) as monitor:
            with pytest.raises(ValueError, match="a monitor of other parameters: 4 tensors, .*6, 4"):
                monitor.load_state_dict(state)
            train(model, optimizer, 2)
        assert monitor.history().steps == [0, 1]


# --------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every is a positive whole number"),
        ({"every": -1}, ValueError, "every is a positive whole number"),
        ({"every": 2.5}, ValueError, "every is a positive whole number"),
        ({"every": True}, ValueError, "every is a positive whole number"),
        ({"hold": -1}, ValueError, "hold is a number of bytes"),
        ({"log": 3}, TypeError, "a sink is a function"),
        ({"log": [print, 3]}, TypeError, "a sink is a function"),
        ({"optimizer": "sgd"}, TypeError, "optimizer is a torch.optim.Optimizer"),
        ({"model": "model"}, TypeError, "model is a torch.nn.Module"),
        ({"every": lambda step: 1 / 0}, ZeroDivisionError, "zero"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """At once, and nothing stays."""
    model, optimizer = problem()
    plain = state_of(model)
    given: dict[str, Any] = {"model": model, "optimizer": optimizer, **options}
    with pytest.raises(error, match=message):
        watch(**given)
    hooks: Callable[[str], Any] = lambda name: getattr(optimizer, f"_optimizer_step_{name}_hooks")  # noqa: E731
    assert state_of(model) == plain and not hooks("pre") and not hooks("post")
