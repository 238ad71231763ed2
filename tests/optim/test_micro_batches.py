"""Steps of micro-batches against those of one batch."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend, optim
from backpack import extensions as E
from backpack.optim.curvature import CurvatureOptimizer
from backpack.quantities.combining import Never
from backpack.quantities.parts import rule_of
from backpack.testing.copies import exactly
from tests.cases import Apply, P
from tests.optim.problems import STEPS, Problem
from tests.optim.test_kronecker import head

N = 6


def make(name: str, model: nn.Module, **options: Any) -> Any:
    """An optimizer that takes micro-batches, with exact columns in place of draws."""
    if name.startswith("EK"):
        options["micro_batches"] = True
    optimizer = STEPS[name][0](model, 0.3, 3.0 if name == "CGNewton hessian" else 0.5, **options)
    optimizer._extension = exactly(optimizer._extension)
    return optimizer


NAMES = [name for name in STEPS if name != "KFRA"]


def problem(build: Callable[[], nn.Module] | None = None, X: Tensor | None = None) -> Problem:
    """The same parameters and data each time."""
    torch.manual_seed(0)
    X = torch.randn(N, 1, 4, 4, dtype=torch.float64) if X is None else X
    return Problem(None if build is None else build(), X)


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def steps(
    each: Problem,
    optimizer: Any,
    sizes: tuple[int, ...],
    weight: Callable[[int], float],
    blocks: bool = True,
    reduction: str = "mean",
    count: int = 2,
) -> list[Tensor]:
    """Parameters after some steps on micro-batches of these sizes."""
    lossfunc = extend(nn.CrossEntropyLoss(reduction=reduction))
    for _ in range(count):
        optimizer.zero_grad()
        losses = [
            (lambda X=X, y=y: lossfunc(each.model(X), y) * weight(len(X)))
            for X, y in zip(each.X.split(sizes), each.y.split(sizes), strict=True)
        ]
        if blocks:
            for loss in losses:
                value = loss()
                with optimizer.backpack():
                    value.backward()
        else:
            with optimizer.backpack():
                for loss in losses:
                    loss().backward()
        optimizer.step()
    return each.values()


WAYS: dict[str, tuple[tuple[int, ...], Callable[[int], float], str]] = {
    "equal": ((2, 2, 2), lambda n: 1 / 3, "mean"),
    "unequal": ((3, 2, 1), lambda n: n / N, "mean"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_one_step(name: str, way: str) -> None:
    """Of as many blocks, and of as many passes in one block."""
    sizes, weight, reduction = WAYS[way]
    one = problem()
    expected = steps(one, make(name, one.model), (N,), lambda n: 1.0)
    for blocks in (True, False):
        many = problem()
        close(steps(many, make(name, many.model), sizes, weight, blocks, reduction), expected)
        assert not any("_" not in field and vars(p) for p in many.parameters for field in vars(p))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "SumGradSquared"])
def test_losses_that_are_sums(name: str) -> None:
    one, many = problem(), problem()
    expected = steps(one, make(name, one.model), (N,), lambda n: 1.0, reduction="sum")
    found = steps(many, make(name, many.model), (3, 2, 1), lambda n: 1.0, reduction="sum")
    close(found, expected)


def test_sums_of_squares_that_are_sums() -> None:
    one, many = problem(), problem()
    found = []
    for each, sizes in ((one, (N,)), (many, (3, 2, 1))):
        optimizer = optim.SumGradSquared(each.model, 0.3, 0.5, reduction="sum")
        found.append(steps(each, optimizer, sizes, lambda n: 1.0, reduction="sum"))
    close(*found)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "table": (
        lambda: head(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Tanh(), width=6),
        lambda: torch.randint(5, (N, 2)),
    ),
    "padded table": (
        lambda: head(nn.Embedding(5, 3, padding_idx=1), nn.Tanh(), width=6),
        lambda: torch.randint(3, (N, 2)),
    ),
    "one by one": (
        lambda: Apply(
            lambda m, a: torch.stack([m.o(m.i(x).tanh().mean(0)) for x in a]),
            i=nn.Linear(2, 3),
            o=nn.Linear(3, 3),
        ),
        lambda: torch.randn(N, 4, 2).double(),
    ),
    "transposed": (
        lambda: head(nn.ConvTranspose2d(2, 2, 2, groups=2), nn.Tanh(), width=18),
        lambda: torch.randn(N, 2, 2, 2).double(),
    ),
    "right": (
        lambda: Apply(lambda m, a: torch.tanh(a @ m.w) @ m.v, w=P(4, 4), v=P(4, 3)),
        lambda: torch.randn(N, 4).double(),
    ),
    "derived": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        lambda: torch.randn(N, 4).double(),
    ),
    "table and matrix": (
        lambda: Apply(lambda m, a: F.linear(F.embedding(a, m.w).mean(1), m.w), w=P(3, 4)),
        lambda: torch.randint(3, (N, 2)),
    ),
}


@pytest.mark.parametrize("name", ["KFLR", "KFLR expand", "EKFLR", "DiagHessian"])
@pytest.mark.parametrize("model", MODELS)
def test_layouts(model: str, name: str) -> None:
    build, data = MODELS[model]
    torch.manual_seed(0)
    X, found = data(), []
    for sizes, weight in (((N,), lambda n: 1.0), ((3, 2, 1), lambda n: n / N)):
        each = problem(build, X)
        found.append(steps(each, make(name, each.model), sizes, weight))
    close(*found)


@pytest.mark.parametrize("name", ["KFLR", "EKFLR", "DiagGGNExact"])
def test_averages_and_updates_now_and_then(name: str) -> None:
    """Steps are counted by steps, not by blocks."""
    # Averages of EKFAC depend on the choice of eigenvectors without curvature, which rounding decides.
    decay, found = 0.0 if name == "EKFLR" else 0.9, []
    for sizes, weight in (((N,), lambda n: 1.0), ((2, 2, 2), lambda n: 1 / 3)):
        each = problem()
        optimizer = make(name, each.model, ema_decay=decay, update_every=2, momentum=0.5)
        found.append(steps(each, optimizer, sizes, weight, count=5))
    close(*found)


def test_gradient_scaling() -> None:
    found = []
    for sizes in ((N,), (2, 2, 2)):
        each = problem()
        optimizer = make("KFLR", each.model)
        for X, y in zip(each.X.split(sizes), each.y.split(sizes), strict=True):
            loss = F.cross_entropy(each.model(X), y) * len(X) / N
            with optimizer.backpack(scale=64.0):
                (64.0 * loss).backward()
        for p in each.parameters:
            p.grad /= 64.0
        optimizer.step()
        found.append(each.values())
    close(*found)
    with optimizer.backpack(scale=64.0):
        each.loss().backward()
    message = "one scale, but it is 32.0 now and was 64.0"
    with pytest.raises(ValueError, match=message), optimizer.backpack(scale=32.0):
        pass


def test_functions_of_autograd() -> None:
    """A pass that begins otherwise than with loss.backward() counts too."""
    one, many = problem(), problem()
    expected = steps(one, make("SumGradSquared", one.model), (N,), lambda n: 1.0, count=1)
    optimizer = make("SumGradSquared", many.model)
    with optimizer.backpack():
        for X, y in zip(many.X.split(2), many.y.split(2), strict=True):
            torch.autograd.backward(F.cross_entropy(many.model(X), y) / 3)
    optimizer.step()
    close(many.values(), expected)


class Head(nn.Module):
    """A second head that some batches leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        index, result = (x[:, 0] > 0).nonzero()[:, 0], self.first(x)
        return result.index_add(0, index, self.second(x[index])) if len(index) else result


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("name", ["KFLR", "EKFLR", "DiagGGNExact", "SumGradSquared"])
def test_parameters_that_a_micro_batch_does_not_reach(name: str, order: tuple[int, int]) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 4).double().abs(), -torch.randn(4, 4).double().abs()]
    X, found = torch.cat([parts[i] for i in order]), []
    sizes = tuple(len(parts[i]) for i in order)
    for each_sizes, weight in (((N,), lambda n: 1.0), (sizes, lambda n: n / N)):
        each = problem(Head, X)
        found.append(steps(each, make(name, each.model), each_sizes, weight, count=1))
    close(*found)


# --------------------------------------------------------------------------------------
# What is refused, and what begins anew


@pytest.mark.parametrize(
    "optimizer, message",
    [
        (lambda m: optim.KFRA(m, 0.1, 0.5), "kfra of an earlier .*averages a matrix over the batch"),
        (lambda m: optim.EKFLR(m, 0.1, 0.5), "ekflr of an earlier .*pass micro_batches=True"),
        (lambda m: optim.EKFAC(m, 0.1, 0.5), "ekfac of an earlier .*pass micro_batches=True"),
    ],
)
def test_curvature_that_does_not_combine(optimizer: Callable[..., Any], message: str) -> None:
    each = Problem(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    its = optimizer(each.model)
    each.step(its)
    for _ in range(2):
        its.zero_grad()
        with its.backpack():
            each.loss().backward()
        full = f"parameter '1.weight' has a gradient and {message}"
        with pytest.raises(RuntimeError, match=full), its.backpack():
            each.loss().backward()
    its.zero_grad()
    with pytest.raises(NotImplementedError), its.backpack():
        each.loss().backward()
        each.loss().backward()
    with pytest.raises(RuntimeError, match="has a gradient, but no"):
        its.step()
    each.step(its)


class Other(E.DiagGGNExact):
    def finish(self, state: Tensor, context: Any) -> Tensor:
        return state + 1


class Ours(CurvatureOptimizer):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(
            model,
            Other(),
            None,
            lr=0.1,
            damping=0.1,
            l2=0.0,
            momentum=0.0,
            ema_decay=0.0,
            update_every=1,
        )

    def _update(self, use: Any, decay: float) -> dict[str, Any]:
        return {"c": use.quantity}

    def _solve(self, use: Any, state: dict[str, Any]) -> Tensor:
        return use.gradient / state["c"]


def test_curvature_of_ones_own() -> None:
    each = Problem()
    optimizer = Ours(each.model)
    each.step(optimizer)
    optimizer.zero_grad()
    with optimizer.backpack():
        each.loss().backward()
    message = "does not say how values of several backward passes combine"
    with pytest.raises(RuntimeError, match=message), optimizer.backpack():
        pass


def test_a_pass_that_raises() -> None:
    """The micro-batches before it are lost too: their gradients may have parts of its own added."""
    each = Problem()
    optimizer = optim.KFLR(each.model, 0.1, 0.5)
    with optimizer.backpack():
        each.loss().backward()
    handle = each.parameters[0].register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError), optimizer.backpack():
        each.loss().backward()
    handle.remove()
    with pytest.raises(RuntimeError, match="has a gradient, but no kflr"):
        optimizer.step()
    each.step(optimizer)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_were_reset_elsewhere(to_none: bool) -> None:
    """``model.zero_grad()`` in place of the optimizer's: what was computed for them does not count."""
    one, many = Problem(), Problem()
    for each in (one, many):
        optimizer = optim.KFLR(each.model, 0.1, 0.5)
        if each is many:
            X, each.X = each.X, 2 * each.X
            with optimizer.backpack():
                each.loss().backward()
            each.X = X
            each.model.zero_grad(set_to_none=to_none)
        with optimizer.backpack():
            each.loss().backward()
        optimizer.step()
    close(many.values(), one.values())


def test_some_gradients_that_were_reset_elsewhere() -> None:
    each = Problem()
    optimizer = optim.KFLR(each.model, 0.1, 0.5)
    with optimizer.backpack():
        each.loss().backward()
    each.parameters[1].grad = None
    message = "gradient of parameter '0.bias' was reset, but not those"
    with pytest.raises(RuntimeError, match=message), optimizer.backpack():
        pass


def test_curvature_of_other_blocks() -> None:
    each = Problem()
    optimizer = optim.KFLR(each.model, 0.1, 0.5)
    with backpack(E.KFLR()):
        each.loss().backward()
    message = "parameter '0.weight' .*outside of this optimizer's blocks"
    with pytest.raises(RuntimeError, match=message), optimizer.backpack():
        each.loss().backward()


def test_further_quantities_are_those_of_the_last_pass() -> None:
    each = Problem()
    optimizer = optim.KFLR(each.model, 0.1, 0.5)
    for part in (slice(0, 3), slice(3, 5)):
        with optimizer.backpack(E.BatchL2Grad()):
            F.cross_entropy(each.model(each.X[part]), each.y[part]).backward()
    assert len(each.parameters[0].batch_l2) == 2


@pytest.mark.parametrize("name", NAMES)
def test_copies(name: str) -> None:
    """Between two micro-batches, too; the copy begins anew."""
    each = Problem()
    optimizer = make(name, each.model)
    with optimizer.backpack():
        each.loss().backward()
    again = copy.deepcopy(optimizer)
    assert again._passes is None and type(again._extension) is type(optimizer._extension)
    if not name.startswith("CG"):
        assert pickle.loads(pickle.dumps(optimizer))._passes is None
    optimizer.step()


def test_inputs_that_are_written_over() -> None:
    """One buffer for all micro-batches: what is held is not the buffer."""
    found = []
    for sizes in ((N,), (2, 2, 2)):
        each = problem(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
        optimizer, buffer = make("EKFLR", each.model), torch.empty(sizes[0], 1, 4, 4).double()
        for X, y in zip(each.X.split(sizes), each.y.split(sizes), strict=True):
            buffer.copy_(X)
            with optimizer.backpack():
                (F.cross_entropy(each.model(buffer), y) * len(X) / N).backward()
        buffer.zero_()
        optimizer.step()
        found.append(each.values())
    close(*found)


def test_every_optimizer_says_how() -> None:
    """No quantity of an optimizer has a rule by accident."""
    model = extend(nn.Linear(2, 2))
    for name, (build, _) in STEPS.items():
        rule = rule_of(build(model, 0.1, 0.5)._extension)
        assert rule is not None
        assert isinstance(rule, Never) == (name in ("KFRA", "EKFAC", "EKFLR")), name


@pytest.mark.parametrize("name", ["CGNewton", "KFLR", "EKFLR"])
def test_nothing_waits_for_the_garbage_collector(name: str) -> None:
    """A step lets go of graphs, factors and what was held."""
    each = problem()
    optimizer, kept = make(name, each.model), []
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            with optimizer.backpack():
                (each.loss() / 2).backward()
        value = getattr(each.parameters[0], optimizer._extension.savefield)
        kept += [weakref.ref(optimizer._passes), *map(weakref.ref, optimizer._passes.extensions)]
        kept += [weakref.ref(value if name == "CGNewton" else value[0])]
        del value
        optimizer.step()
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()
