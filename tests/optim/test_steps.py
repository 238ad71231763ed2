"""Every optimizer's step against dense linear algebra, and what all of them have in common."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from backpack import backpack, extend, optim
from backpack import extensions as E
from backpack.optim.base import _finite
from tests.cases import Apply
from tests.optim.problems import STEPS, Problem, dense, kron

# Those whose curvature is an average over steps and may be computed now and then.
AVERAGED = [name for name in STEPS if not name.startswith("CG")]


def fields(problem: Problem) -> set[str]:
    """Attributes that quantities have left on parameters."""
    return {name for p in problem.parameters for name in vars(p)}


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def same(a: Any, b: Any) -> bool:
    """Bit for bit, for nested states."""
    (found, shape), (expected, other) = tree_flatten(a), tree_flatten(b)
    pairs = zip(found, expected, strict=True)
    return shape == other and all(x.equal(y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def solved(blocks: list[Tensor], rhs: list[Tensor]) -> list[Tensor]:
    return [
        torch.linalg.solve(m, r.flatten()).reshape(r.shape) for m, r in zip(blocks, rhs, strict=True)
    ]


def damping_of(name: str) -> float:
    """Enough for the Hessian's block to be positive definite, as conjugate gradients need."""
    return 3.0 if name == "CGNewton hessian" else 0.5


@pytest.mark.parametrize("l2", [0.0, 0.2])
@pytest.mark.parametrize("name", STEPS)
def test_step(name: str, l2: float) -> None:
    """The update theta - lr (G + (damping + l2) I)^-1 (grad + l2 theta), by dense matrices."""
    make, blocks = STEPS[name]
    problem, damping = Problem(), damping_of(name)
    before = problem.values()
    rhs = [g + l2 * p for g, p in zip(problem.gradients(), before, strict=True)]
    matrices = blocks(problem, damping + l2)
    assert all(bool((torch.linalg.eigvalsh(m) > 0).all()) for m in matrices)
    problem.step(make(problem.model, 0.3, damping, l2))
    directions = solved(matrices, rhs)
    close(problem.values(), [p - 0.3 * d for p, d in zip(before, directions, strict=True)])
    assert not fields(problem)


def _scaled() -> nn.Module:
    return Apply(
        lambda m, x: m.o(x.flatten(1)) * m.t, o=nn.Linear(16, 3), t=nn.Parameter(torch.tensor(0.7))
    )


@pytest.mark.parametrize("name", [name for name in STEPS if "hessian" not in name])
def test_a_parameter_that_is_a_number(name: str) -> None:
    """Its block of the GGN is a number too, for all that approximate no more than the draws."""
    problem = Problem(_scaled())
    (t,) = [p for p in problem.parameters if not p.dim()]
    before = t.detach().clone()
    (block,) = problem.oracle().value("diag_ggn_exact")["t"].reshape(1)
    (g,) = torch.autograd.grad(problem.loss(), [t])
    problem.step(STEPS[name][0](problem.model, 0.3, 0.5, 0.0))
    assert t.shape == () and bool(t.isfinite()) and not t.equal(before)
    if name in ("DiagGGNExact", "KFLR", "EKFLR"):
        close([t.detach()], [before - 0.3 * g / (block + 0.5)])


@pytest.mark.parametrize("name", ["DiagGGNExact", "KFLR", "EKFLR", "CGNewton"])
def test_momentum(name: str) -> None:
    make, blocks = STEPS[name]
    problem = Problem()
    optimizer = make(problem.model, 0.1, 0.5, momentum=0.9)
    moved = [torch.zeros_like(p) for p in problem.parameters]
    for _ in range(3):
        before = problem.values()
        directions = solved(blocks(problem, 0.5), problem.gradients())
        moved = [0.9 * m + d for m, d in zip(moved, directions, strict=True)]
        problem.step(optimizer)
        close(problem.values(), [p - 0.1 * m for p, m in zip(before, moved, strict=True)])


# --------------------------------------------------------------------------------------
# Averages, updates now and then, bounded steps

EMA = 0.6


def averaged(values: list[Tensor]) -> Tensor:
    """With the documented weights: 1/2, 2/5, and the given one from then on."""
    mean = values[0]
    for k, value in enumerate(values[1:], 2):
        r = min(1 - 1 / k, EMA)
        mean = r * mean + (1 - r) * value
    return mean


def _diagonals(name: str, values: list[Any], gamma: float) -> Tensor:
    return torch.diag(averaged(values).abs().flatten() + gamma)


def _factors(name: str, values: list[Any], gamma: float) -> Tensor:
    return dense([averaged(list(each)) for each in zip(*values, strict=True)], gamma)


def _eigenvalues(name: str, values: list[Any], gamma: float) -> Tensor:
    """The old average's diagonal in the new basis, by dense matrices."""
    mean = torch.zeros_like(dense(values[0], 0.0))
    for k, value in enumerate(values, 1):
        Q, r = kron(value.eigenvectors), min(1 - 1 / k, EMA)
        mean = r * mean + (1 - r) * dense(value, 0.0)
        mean = Q @ torch.diag((Q.T @ mean @ Q).diagonal()) @ Q.T
    return mean + gamma * torch.eye(len(mean), dtype=mean.dtype)


def _mean_grad_squared(problem: Problem) -> list[Tensor]:
    return [len(problem.X) * c for c in problem.quantity(E.SumGradSquared())]


AVERAGES = {
    "DiagGGNExact": (lambda p: p.quantity(E.DiagGGNExact()), _diagonals),
    "DiagHessian": (lambda p: p.quantity(E.DiagHessian()), _diagonals),
    "SumGradSquared": (_mean_grad_squared, _diagonals),
    "KFLR": (lambda p: p.quantity(E.KFLR()), _factors),
    "KFRA": (lambda p: p.quantity(E.KFRA()), _factors),
    "EKFLR": (lambda p: p.quantity(E.EKFLR()), _eigenvalues),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_average_over_steps(name: str) -> None:
    values_of, block = AVERAGES[name]
    problem = Problem()
    optimizer = STEPS[name][0](problem.model, 0.0, 0.5, ema_decay=EMA)
    inputs, seen = torch.randn(4, *problem.X.shape, dtype=torch.float64), []
    for step, X in enumerate(inputs):
        problem.X = X
        seen.append(values_of(problem))
        optimizer.param_groups[0]["lr"] = 0.3 if step == 3 else 0.0
        before, gradients = problem.values(), problem.gradients()
        problem.step(optimizer)
    blocks = [block(name, list(values), 0.5) for values in zip(*seen, strict=True)]
    directions = solved(blocks, gradients)
    close(problem.values(), [p - 0.3 * d for p, d in zip(before, directions, strict=True)])


@pytest.mark.parametrize("name", AVERAGED)
def test_averages_may_begin_later(name: str) -> None:
    problem = Problem()
    optimizer = STEPS[name][0](problem.model, 0.1, 0.5)
    problem.step(optimizer)
    optimizer.param_groups[0]["ema_decay"] = 0.9
    train(problem, optimizer, 2)


@pytest.mark.parametrize("name", AVERAGED)
def test_update_every(name: str) -> None:
    """Steps in between use the old curvature, and need no block."""
    make, blocks = STEPS[name]
    problem = Problem()
    optimizer = make(problem.model, 0.1, 0.5, update_every=3)
    matrices = blocks(problem, 0.5)
    for step in range(3):
        assert bool(optimizer.extensions) is (step == 0)
        before = problem.values()
        directions = solved(matrices, problem.gradients())
        if step < 2:
            problem.step(optimizer)
        else:
            optimizer.zero_grad()
            problem.loss().backward()
            optimizer.step()
        close(problem.values(), [p - 0.1 * d for p, d in zip(before, directions, strict=True)])
    assert optimizer.extensions


@pytest.mark.parametrize("name", STEPS)
def test_kl_clip(name: str) -> None:
    """lr^2 d^T (C + gamma I) d, of all groups, stays at the bound; below it nothing changes."""
    make, blocks = STEPS[name]
    problem, damping = Problem(), damping_of(name)
    matrices, gradients = blocks(problem, damping), problem.gradients()
    rates = [0.3] * 2 + [0.2] * 2
    moves = [r * d for r, d in zip(rates, solved(matrices, gradients), strict=True)]
    size = sum(d.flatten() @ m @ d.flatten() for d, m in zip(moves, matrices, strict=True))
    for bound, factor in ((size / 4, 0.5), (size * 4, 1.0)):
        problem = Problem()
        first, second = problem.parameters[:2], problem.parameters[2:]
        groups = [{"params": first}, {"params": second, "lr": 0.2}]
        extend(problem.model)
        before = problem.values()
        problem.step(make(groups, 0.3, damping, kl_clip=float(bound)))
        close(problem.values(), [p - factor * d for p, d in zip(before, moves, strict=True)])


# --------------------------------------------------------------------------------------
# What users of torch.optim expect


@pytest.mark.parametrize("name", STEPS)
def test_groups(name: str) -> None:
    """Options of their own, a group added later, and a frozen parameter that is not touched."""
    make, blocks = STEPS[name]
    problem = Problem()
    extend(problem.model)
    conv, bias, weight, frozen = problem.parameters
    optimizer = make([{"params": [conv, frozen]}, {"params": [bias], "lr": 0.2}], 0.3, damping_of(name))
    optimizer.add_param_group({"params": [weight], "damping": 4.0, "l2": 0.1})
    low, high = blocks(problem, damping_of(name)), blocks(problem, 4.1)
    matrices = [low[0], low[1], high[2]]
    frozen.requires_grad_(False)
    before, gradients = problem.values(), problem.gradients()
    gradients[2] = gradients[2] + 0.1 * weight.detach()
    directions = solved(matrices, gradients)
    problem.step(optimizer)
    rates = (0.3, 0.2, 0.3)
    expected = [p - r * d for p, r, d in zip(before, rates, directions, strict=False)]
    close(problem.values(), [*expected, before[3]])
    assert torch.equal(frozen, before[3]) and frozen not in optimizer.state
    frozen.requires_grad_(True)
    problem.step(optimizer)
    assert not torch.equal(frozen, before[3])


def train(problem: Problem, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        problem.step(optimizer)


def options_of(name: str) -> dict[str, Any]:
    averages = {"ema_decay": 0.9, "update_every": 2} if name in AVERAGED else {}
    return {"momentum": 0.9, "l2": 1e-3, **averages}


def generator_of(optimizer: Any) -> torch.Generator | None:
    return getattr(optimizer._extension.source, "generator", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", STEPS)
def test_resumes_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    make, _ = STEPS[name]
    problem = Problem()
    problem.model.to(dtype)
    problem.X = problem.X.to(dtype)
    optimizer = make(problem.model, 0.1, 0.5, **options_of(name))
    train(problem, optimizer, 3)

    file = io.BytesIO()
    torch.save({"model": problem.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Problem(seed=1)
    other.model.to(dtype).load_state_dict(saved["model"])
    other.X = problem.X
    resumed = make(other.model, 9.0, 9.0)
    resumed.load_state_dict(saved["optimizer"])
    if generator_of(optimizer) is not None:
        generator_of(resumed).set_state(generator_of(optimizer).get_state())
    for each in (problem, other):
        train(each, optimizer if each is problem else resumed, 4)
    assert all(torch.equal(a, b) for a, b in zip(problem.values(), other.values(), strict=True))


@pytest.mark.parametrize("how", ["copy", "pickle"])
@pytest.mark.parametrize("name", ["DiagGGNExact", "KFLR", "EKFLR", "CGNewton"])
def test_copies(name: str, how: str) -> None:
    problem = Problem()
    optimizer = STEPS[name][0](problem.model, 0.1, 0.5, momentum=0.9, kl_clip=0.1)
    train(problem, optimizer, 2)
    pair = (problem.model, optimizer)
    model, twin = copy.deepcopy(pair) if how == "copy" else pickle.loads(pickle.dumps(pair))
    other = Problem()
    other.model = model
    train(problem, optimizer, 2)
    train(other, twin, 2)
    assert all(torch.equal(a, b) for a, b in zip(problem.values(), other.values(), strict=True))


@pytest.mark.parametrize("name", STEPS)
def test_schedulers_and_closures(name: str) -> None:
    make, _ = STEPS[name]
    plain, scheduled = Problem(), Problem()
    optimizer = make(plain.model, 0.1, 0.5)
    for rate in (0.1, 0.05, 0.025):
        optimizer.param_groups[0]["lr"] = rate
        plain.step(optimizer)

    optimizer = make(scheduled.model, 0.1, 0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = scheduled.loss()
        with optimizer.backpack():
            loss.backward()
        return loss

    for _ in range(3):
        loss = scheduled.loss()
        assert torch.equal(optimizer.step(closure), loss)
        scheduler.step()
    assert all(torch.equal(a, b) for a, b in zip(plain.values(), scheduled.values(), strict=True))


def test_cyclic_schedule() -> None:
    """A scheduler that changes the momentum."""
    problem = Problem()
    optimizer = optim.KFLR(problem.model, 0.1, 0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4)
    for _ in range(3):
        problem.step(optimizer)
        scheduler.step()
    assert optimizer.param_groups[0]["momentum"] != 0.9


def test_unused_and_sparse() -> None:
    """A parameter without gradient stays; sparse gradients count as the dense ones they are."""
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(6, 4, sparse=sparse)
        model = nn.Sequential(table, nn.Flatten(), nn.Linear(12, 3))
        problem = Problem(model, torch.randint(6, (5, 3)))
        unused = nn.Parameter(torch.ones(2))
        extend(model)
        optimizer = optim.KFLR([*model.parameters(), unused], 0.1, 0.5)
        problem.step(optimizer)
        assert torch.equal(unused, torch.ones(2)) and unused not in optimizer.state
        found.append(problem.values())
    close(*found)


# --------------------------------------------------------------------------------------
# Gradient scaling


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_scaler(name: str, unscale: bool) -> None:
    """Quantities carry the scaler's factor, or its square; the step does not."""
    make, _ = STEPS[name]
    plain, scaled = Problem(), Problem()
    train(plain, make(plain.model, 0.1, 0.5, **options_of(name)), 3)

    optimizer = make(scaled.model, 0.1, 0.5, **options_of(name))
    # The factor changes while averages are kept.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = scaled.loss()
        with optimizer.backpack(scale=scaler.get_scale() if unscale else None):
            scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    for a, b in zip(plain.values(), scaled.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_scaler_skips_what_overflowed() -> None:
    problem = Problem()
    optimizer = optim.KFLR(problem.model, 0.1, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = problem.values()
    loss = problem.loss()
    with optimizer.backpack():
        scaler.scale(loss).backward()
    problem.parameters[0].grad[0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(problem.values(), before, strict=True))
    assert scaler.get_scale() == 4.0 and not fields(problem) and not optimizer.state


def test_scaler_must_tell_its_factor() -> None:
    problem = Problem()
    optimizer = optim.KFLR(problem.model, 0.1, 0.5)
    scaler = torch.amp.GradScaler("cpu")
    before, loss = problem.values(), problem.loss()
    with optimizer.backpack():
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="scale=scaler.get_scale"):
        scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(problem.values(), before, strict=True))
    problem.step(optimizer)  # the scaler has left nothing behind


# --------------------------------------------------------------------------------------
# Errors


def _plain_backward(problem: Problem, optimizer: Any) -> None:
    problem.loss().backward()


def _no_backward(problem: Problem, optimizer: Any) -> None:
    pass


def _step_twice(problem: Problem, optimizer: Any) -> None:
    """The second step has a gradient, but no quantities of its own."""
    problem.step(optimizer)


def _quantities_of_another_gradient(problem: Problem, optimizer: Any) -> None:
    with optimizer.backpack():
        problem.loss().backward()
    optimizer.zero_grad()
    problem.loss().backward()


def _nan_gradient(problem: Problem, optimizer: Any) -> None:
    with optimizer.backpack():
        problem.loss().backward()
    problem.parameters[2].grad[0] = torch.nan


ERRORS = {
    "no backward": (_no_backward, RuntimeError, "no parameter has a gradient"),
    "no block": (_plain_backward, RuntimeError, "parameter '0.weight' has a gradient, but no"),
    "two steps": (_step_twice, RuntimeError, "parameter '0.weight' has a gradient, but no"),
    "stale": (_quantities_of_another_gradient, RuntimeError, "parameter '0.weight' has a gradient"),
    "nan": (_nan_gradient, ValueError, "gradient of parameter '3.weight' is not finite"),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", STEPS)
def test_errors_change_nothing(name: str, error: str) -> None:
    before, kind, message = ERRORS[error]
    problem = Problem()
    optimizer = STEPS[name][0](problem.model, 0.1, 0.5, momentum=0.9)
    if error != "no backward":
        problem.step(optimizer)
        optimizer.zero_grad()
    before(problem, optimizer)
    values, state = problem.values(), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(kind, match=message):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(problem.values(), values, strict=True))
    assert same(optimizer.state_dict(), state)
    problem.step(optimizer)


@pytest.mark.filterwarnings("ignore:no extended model")
@pytest.mark.parametrize("name", STEPS)
def test_a_model_that_is_not_extended(name: str) -> None:
    """The block was there, and is not what is missing."""
    problem = Problem()
    model = problem.model
    optimizer = STEPS[name][0](model.named_parameters(), 0.1, 0.5)
    with optimizer.backpack():
        problem.lossfunc(model(problem.X), problem.y).backward()
    with pytest.raises(RuntimeError, match=r"'0.weight' has a gradient.*call extend\(model\) before"):
        optimizer.step()
    optimizer.zero_grad()
    problem.lossfunc(model(problem.X), problem.y).backward()
    with pytest.raises(RuntimeError, match=r"call loss.backward\(\) within"):
        optimizer.step()


@pytest.mark.parametrize("name", AVERAGED)
def test_infinite_curvature(name: str) -> None:
    problem = Problem()
    optimizer = STEPS[name][0](problem.model, 0.1, 0.5)
    with optimizer.backpack():
        problem.loss().backward()
    (extension,) = optimizer.extensions
    bias, values = problem.parameters[3], problem.values()
    value = getattr(bias, extension.savefield)
    value = value[-1] if isinstance(value, (list, tuple)) else value
    value[0] = torch.inf
    with pytest.raises(ValueError, match=f"{extension.savefield} of parameter '3.bias' is not finite"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(problem.values(), values, strict=True))
    problem.step(optimizer)


def test_large_numbers_are_finite() -> None:
    """Though their sum is not; infinite ones of opposite sign are not, whatever their sum is."""
    for entries, finite in (([3e38, 3e38], True), ([torch.inf, -torch.inf], False), ([], True)):
        assert _finite(torch.tensor(entries)) is finite


def test_infinite_step() -> None:
    problem = Problem()
    optimizer = optim.DiagGGNExact(problem.model, 0.1, 0.0)
    with optimizer.backpack():
        problem.loss().backward()
    values = problem.values()
    problem.parameters[1].diag_ggn_exact.fill_(1e-320)
    with pytest.raises(ValueError, match="step of parameter '0.bias' is not finite; use more damping"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(problem.values(), values, strict=True))


def test_names_in_messages() -> None:
    problem = Problem()
    extend(problem.model)
    named = optim.KFLR(problem.model.named_parameters(), 0.1, 0.5)
    unnamed = optim.KFLR(problem.model.parameters(), 0.1, 0.5)
    problem.loss().backward()
    with pytest.raises(RuntimeError, match="parameter '0.weight'"):
        named.step()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0, of shape \(2, 1, 3, 3\),"):
        unnamed.step()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"lr": -1.0}, ValueError, "lr must be at least 0 and finite, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"damping": -1e-3}, ValueError, "damping"),
        ({"damping": float("inf")}, ValueError, "damping"),
        ({"l2": -1.0}, ValueError, "l2"),
        ({"momentum": 1.0}, ValueError, "momentum must be at least 0 and less than 1"),
        ({"ema_decay": 1.0}, ValueError, "ema_decay"),
        ({"update_every": 0}, ValueError, "update_every"),
        ({"update_every": 1.5}, ValueError, "update_every must be an integer"),
        ({"kl_clip": 0.0}, ValueError, "kl_clip"),
        ({"momentun": 0.5}, TypeError, "momentun"),
    ],
)
@pytest.mark.parametrize("name", ["DiagGGNExact", "SumGradSquared", "KFLR", "KFRA", "EKFAC"])
def test_bad_options(name: str, options: dict[str, Any], error: type, message: str) -> None:
    problem = Problem()
    make = getattr(optim, name)
    with pytest.raises(error, match=message):
        make(problem.model, **{"lr": 0.1, "damping": 0.5, **options})
    assert not hasattr(problem.model, "_backpack_extend")
    if set(options) <= {"lr", "damping", "l2", "momentum", "ema_decay", "update_every"}:
        optimizer = make(problem.model[0], 0.1, 0.5)
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": problem.model[3].parameters(), **options})
        assert len(optimizer.param_groups) == 1


def test_bad_arguments_of_one() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="mc_samples"):
        optim.KFAC(model, 0.1, 0.5, mc_samples=0)
    with pytest.raises(ValueError, match="reduction must be"):
        optim.SumGradSquared(model, 0.1, 0.5, reduction="none")
    with pytest.raises(ValueError, match="curvature must be one of ggn, hessian, pch"):
        optim.CGNewton(model, 0.1, 0.5, curvature="fisher")
    with pytest.raises(ValueError, match="max_iter"):
        optim.CGNewton(model, 0.1, 0.5, max_iter=0)
    with pytest.raises(ValueError, match="scale must be positive"):
        optim.KFAC(model, 0.1, 0.5).backpack(scale=0.0).__enter__()


def test_a_plain_block_with_the_optimizers_quantities() -> None:
    found = []
    for plain in (False, True):
        problem = Problem()
        optimizer = optim.EKFLR(problem.model, 0.1, 0.5)
        if plain:
            with backpack(*optimizer.extensions):
                problem.loss().backward()
            optimizer.step()
        else:
            problem.step(optimizer)
        found.append(problem.values())
    close(*found)


def test_other_quantities_of_the_block() -> None:
    problem = Problem()
    optimizer = optim.KFLR(problem.model, 0.1, 0.5)
    with optimizer.backpack(E.BatchL2Grad()):
        problem.loss().backward()
    optimizer.step()
    assert fields(problem) == {"batch_l2"}
