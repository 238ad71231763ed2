"""Every quantity of the monitor against brute force: one sample at a time, by plain autograd."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.cockpit import (
    Measure,
    MissingError,
    Monitor,
    Step,
    hess_trace,
    small,
    tic_diag,
    tic_trace,
    watch,
)
from backpack.cockpit.collect import Probe
from backpack.cockpit.concluding import CONCLUSIONS
from backpack.cockpit.configurations import SPECIAL
from backpack.cockpit.grouping import layer_of
from backpack.cockpit.histograms import Entries, counted, symlog_edges
from backpack.cockpit.measures import MEASURES

pytestmark = pytest.mark.usefixtures("each_way")

STEPS = 3
FIRST = """loss learning_rate grad_norm param_norm update_size update_ratio distance norm_test
inner_test ortho_test grad_noise grad_signal noise_scale alpha mean_gsnr early_stopping""".split()


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Length(nn.Module):
    """A parametrization; the second derivative of torch's own weight norm is wrong."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.square().sum(1, keepdim=True).sqrt()


class Reused(nn.Module):
    """A layer that is used twice, a parameter of its own, a table of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(7, 5)
        self.same = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.rand(5))
        self.last = nn.Linear(5, 3)
        nn.utils.parametrize.register_parametrization(self.last, "weight", Length())

    def forward(self, x: Tensor) -> Tensor:
        x = self.rows(x)
        for _ in range(2):
            x = self.same(x).tanh() * self.scale
        return self.last(x.mean(1))


class Tokens(nn.Module):
    """A class for each token, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.rows(x)).relu().cumsum(1))


class ReturnsLoss(nn.Module):
    """As the models of some libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.body(x), y)


class Problem(NamedTuple):
    """A model, its data, and its loss.

    Attributes:
        model: makes it.
        inputs: makes inputs for so many samples.
        targets: makes targets.
        loss: of output and targets.
        each: each sample's loss, of output and targets.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    targets: Callable[[int], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    each: Callable[[Tensor, Tensor], Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def classes(n: int) -> Tensor:
    return torch.randint(3, (n,))


def vectors(n: int) -> Tensor:
    return torch.randn(n, 4)


def by_tokens(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f[:, :-1].reshape(-1, 6), y[:, 1:].reshape(-1))


def by_tokens_each(f: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(f[:, :-1].reshape(-1, 6), y[:, 1:].reshape(-1), reduction="none")
    return losses.reshape(len(y), -1).mean(1)


def entropies(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="none")


PROBLEMS = {
    "mlp": Problem(mlp, vectors, classes, nn.CrossEntropyLoss(), entropies),
    "mlp-sum": Problem(
        mlp,
        vectors,
        classes,
        nn.CrossEntropyLoss(reduction="sum"),
        lambda f, y: len(y) * entropies(f, y),
    ),
    "cnn": Problem(cnn, lambda n: torch.randn(n, 1, 8, 8), classes, F.cross_entropy, entropies),
    "regression": Problem(
        mlp,
        vectors,
        lambda n: torch.randn(n, 3),
        F.mse_loss,
        lambda f, y: (f - y).square().mean(1),
    ),
    "own-loss": Problem(
        mlp,
        vectors,
        lambda n: torch.randn(n, 3),
        lambda f, y: 2 * ((f - y) ** 2).sum(1).mean() + 1,
        lambda f, y: 2 * (f - y).square().sum(1),
    ),
    "reused": Problem(Reused, lambda n: torch.randint(7, (n, 4)), classes, F.cross_entropy, entropies),
    "tokens": Problem(
        Tokens,
        lambda n: torch.randint(6, (n, 5)),
        lambda n: torch.randint(6, (n, 5)),
        by_tokens,
        by_tokens_each,
    ),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
Batches = list[tuple[Tensor, Tensor, float]]


# --------------------------------------------------------------------------------------
# Brute force


class Truth:
    """Individual gradients of a step ``[B, p]``, of all batches together, and each sample's loss."""

    def __init__(self, problem: Problem, model: nn.Module, batches: Batches) -> None:
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        parameters = [p for p in model.parameters() if p.requires_grad]
        rows: list[list[Tensor]] = []
        losses = []
        self.loss = 0.0
        for X, y, factor in batches:
            output = model(X)
            self.loss += factor * float(problem.loss(output, y).detach())
            losses.append(factor * problem.each(output, y).detach() / len(y))
            for n in range(len(X)):
                mask = (torch.arange(len(X)) == n).reshape(-1, *[1] * (output.dim() - 1))
                alone = torch.where(mask, output, output.detach())
                share = factor * problem.loss(alone, y)
                grads = torch.autograd.grad(share, parameters, retain_graph=True, allow_unused=True)
                pairs = zip(grads, parameters, strict=True)
                rows.append([torch.zeros_like(p) if g is None else g for g, p in pairs])
        self.B = len(rows)
        self.losses = self.B * torch.cat(losses)
        self.g_n = {
            name: self.B * torch.stack([row[j] for row in rows]).flatten(1)
            for j, name in enumerate(self.names)
        }

    def of(self, names: list[str]) -> Tensor:
        return torch.cat([self.g_n[name] for name in names], 1)


def first_order(truth: Truth, names: list[str]) -> dict[str, float]:
    """The formulas, written down."""
    g_n, B = truth.of(names), truth.B
    g = g_n.mean(0)
    norms, dots, total = (g_n**2).sum(1), g_n @ g, float(g @ g)
    noise = float(g_n.var(0).sum())
    second = (g_n**2).mean(0)
    return {
        "norm_test": (((norms.sum() / total) - B) / (B * (B - 1))).sqrt(),
        "inner_test": ((((dots**2).sum() / total**2) - B) / (B * (B - 1))).sqrt(),
        "ortho_test": ((norms / total - dots**2 / total**2).sum() / (B * (B - 1))).sqrt(),
        "grad_noise": noise,
        "grad_signal": total - noise / B,
        "mean_gsnr": (g**2 / (second - g**2 + 1e-5)).mean(),
        "early_stopping": 1 - B * (g**2 / (g_n.var(0) + 1e-5)).mean(),
    }


def parabola(start: Truth, end: Truth, d: Tensor, names: list[str]) -> float:
    """Alpha by the normal equations."""
    t = d.norm()
    slopes = [truth.of(names) @ d / t for truth in (start, end)]
    losses = [torch.tensor(start.loss), torch.tensor(end.loss)]
    y = torch.stack([*losses, *(s.mean() for s in slopes)])
    variances = [*(truth.losses.var() for truth in (start, end)), *(s.var() for s in slopes)]
    Phi = torch.tensor([[1, 1, 0, 0], [0, t, 1, 1], [0, t**2, 0, 2 * t]])
    inverse = torch.diag(1 / torch.stack(variances))
    _, w1, w2 = torch.linalg.solve(Phi @ inverse @ Phi.T, Phi @ inverse @ y)
    return -1.0 if w2 < 0 else float(2 * t / (-w1 / w2) - 1)


# --------------------------------------------------------------------------------------
# Runs


class Seen(NamedTuple):
    """A step of a run: its batches, and copies of the model before and after."""

    batches: Batches
    before: nn.Module
    after: nn.Module


def run(
    problem: Problem, optimizer: str = "sgd", factors: tuple[float, ...] = (1.0,), **options: Any
) -> tuple[Monitor, list[Seen]]:
    """A short run with so many backward passes in each step, each loss with a factor."""
    model = problem.model()
    opt = OPTIMIZERS[optimizer](model.parameters())
    monitor = watch(model, opt, every=1, **options)
    seen = []
    for _ in range(STEPS):
        batches = [
            (problem.inputs(n), problem.targets(n), f) for n, f in zip((5, 4, 3), factors, strict=False)
        ]
        before = copied(model)
        opt.zero_grad()
        for X, y, factor in batches:
            (problem.loss(model(X), y) * factor).backward()
        opt.step()
        seen.append(Seen(batches, before, copied(model)))
    monitor.close()
    return monitor, seen


def copied(model: nn.Module) -> nn.Module:
    from backpack import unextend

    return unextend(copy.deepcopy(model))


def groups_of(model: nn.Module) -> dict[str, list[str]]:
    """Names of parameters for each key's ending."""
    names = [name for name, _ in model.named_parameters()]
    found = {"": names}
    for name in names:
        found.setdefault(f"/{layer_of(name)}", []).append(name)
    return found


def flat(model: nn.Module, names: list[str]) -> Tensor:
    return torch.cat([model.get_parameter(name).detach().flatten() for name in names])


def close(found: float, expected: Any, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(expected).detach(), rtol=tolerance, atol=1e-12
    )


FACTORS = {"one pass": (1.0,), "mean of three": (1 / 3, 1 / 3, 1 / 3), "sum of two": (1.0, 2.0)}


# Every optimizer with one pass in a step, one of them with several.
RUNS = [(name, "one pass") for name in OPTIMIZERS]
RUNS += [("adam", "mean of three"), ("momentum", "sum of two"), ("sgd", "sum of two")]


@pytest.mark.parametrize(("optimizer", "factors"), RUNS)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_first_order(problem: Problem, optimizer: str, factors: str) -> None:
    check(problem, *run(problem, optimizer, FACTORS[factors], quantities=FIRST))


# What needs no more of a gradient than its norm.
BY_NORMS = [name for name in FIRST if name not in ("mean_gsnr", "early_stopping")]


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_large_gradients_are_let_go(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backpack.cockpit.collect.HELD", 0)
    monkeypatch.setattr(small, "SMALL", 0)
    check(problem, *run(problem, "sgd", quantities=BY_NORMS))


def check(problem: Problem, monitor: Monitor, seen: list[Seen]) -> None:
    """Compare all that was tracked with brute force."""
    assert monitor.left_out == {} and monitor.optimizer is not None
    (rate,) = {group["lr"] for group in monitor.optimizer.param_groups}
    truths = [Truth(problem, each.before, each.batches) for each in seen]
    for step, (truth, (_, before, after)) in enumerate(zip(truths, seen, strict=True)):
        values = monitor.history().at(step)
        close(values["loss"], truth.loss)
        close(values["learning_rate"], rate)
        for ending, names in groups_of(before).items():
            g, d = truth.of(names).mean(0), flat(after, names) - flat(before, names)
            expected = first_order(truth, names) | {
                "grad_norm": g.norm(),
                "param_norm": flat(before, names).norm(),
                "update_size": d.norm(),
                "update_ratio": d.norm() / flat(before, names).norm(),
                "distance": (flat(before, names) - flat(seen[0].before, names)).norm(),
            }
            for name, value in expected.items():
                if name not in monitor.history().header["quantities"]:
                    continue
                if float(g.norm()) > 1e-12 or name in ("grad_norm", "param_norm"):
                    close(values[name + ending], value)
        if step + 1 < STEPS:
            names = truth.names
            d = flat(after, names) - flat(before, names)
            close(values["alpha"], parabola(truth, truths[step + 1], d, names), 1e-6)
        else:
            assert "alpha" not in values


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("changed", [False, True])
def test_a_further_pass(to_none: bool, changed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step has more passes than those before it had: gradients that were let go are needed."""
    monkeypatch.setattr("backpack.cockpit.collect.HELD", 0)
    monkeypatch.setattr(small, "SMALL", 0)
    problem = PROBLEMS["mlp"]
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = ["norm_test", "grad_noise", "grad_signal"]
    monitor = watch(model, optimizer, quantities=[*names, "inner_test"], every=1)
    for passes in (1, 1, 2):
        optimizer.zero_grad(set_to_none=to_none)
        batches = [(problem.inputs(5), problem.targets(5), 1.0) for _ in range(passes)]
        before = copied(model)
        for n, (X, y, _) in enumerate(batches):
            if n and changed:
                model[0].weight.grad.mul_(2)
            problem.loss(model(X), y).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    truth, values = Truth(problem, before, batches), monitor.history().at(2)
    monitor.close()
    expected = first_order(truth, truth.names)
    if changed and to_none:  # what the gradient was is not known any more: nothing is better than wrong
        assert not values.keys() & set(names)
        assert "the gradient was not kept" in monitor.left_out["norm_test"]
    else:
        for name in names:
            close(values[name], expected[name])
        assert "more backward passes than the last" in monitor.left_out["inner_test"]


def test_measures_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may ask a step for gradients, and for the update before."""
    monkeypatch.setattr("backpack.cockpit.collect.HELD", 0)
    monkeypatch.setattr(small, "SMALL", 0)

    def turned(step: Step) -> Tensor:
        if step.update is None or step.last is None:
            raise MissingError("there is no step before")
        along = sum((step.update[p] * step.last[p]).sum() for p in step.parameters)
        against = sum((step.update[p] * g).sum() for p, g in step.gradients.items())
        return torch.stack([torch.as_tensor(along), torch.as_tensor(against)])[:1] / against

    own = Measure("turned", frozenset({"norms", "update"}), turned, layered=False)
    problem = PROBLEMS["mlp"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at the first step
        monitor, seen = run(problem, "sgd", quantities=["alpha", own])
    assert list(monitor.left_out) == ["turned"]
    names = [name for name, _ in seen[0].before.named_parameters()]
    moves = [flat(each.after, names) - flat(each.before, names) for each in seen]
    for step in (1, 2):
        g = Truth(problem, seen[step].before, seen[step].batches).of(names).mean(0)
        close(monitor.history().at(step)["turned"], (moves[step] @ moves[step - 1]) / (moves[step] @ g))


def test_noise_scale() -> None:
    """Numerator and denominator are averaged over steps, each by itself."""
    monitor, _ = run(PROBLEMS["mlp"], quantities=["grad_noise", "grad_signal", "noise_scale"])
    noise = signal = None
    for record in monitor.history():
        new = record["grad_noise"], record["grad_signal"]
        noise = new[0] if noise is None else 0.9 * noise + 0.1 * new[0]
        signal = new[1] if signal is None else 0.9 * signal + 0.1 * new[1]
        if signal > 0:
            close(record["noise_scale"], noise / signal)
        else:
            assert "noise_scale" not in record


# --------------------------------------------------------------------------------------
# Curvature


def hessian(problem: Problem, model: nn.Module, batches: Batches) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = sum(factor * problem.loss(model(X), y) for X, y, factor in batches)
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    rows = []
    for entry in torch.cat([g.flatten() for g in grads]):
        second = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([s.flatten() for s in second]))
    return torch.stack(rows).detach()


def places(model: nn.Module, names: list[str]) -> Tensor:
    """Rows and columns of the Hessian that belong to these parameters."""
    found, at = [], 0
    for name, p in model.named_parameters():
        if name in names:
            found.append(torch.arange(at, at + p.numel()))
        at += p.numel()
    return torch.cat(found)


@pytest.mark.parametrize("factors", [(1.0,), (1.0, 2.0)], ids=["one pass", "sum of two"])
@pytest.mark.parametrize("problem", ["mlp", "mlp-sum", "cnn", "regression", "own-loss"])
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_curvature(problem: str, matrix: str, factors: tuple[float, ...]) -> None:
    """In networks of piecewise linear operations both matrices are the same on the diagonal."""
    given = PROBLEMS[problem]
    measures = [hess_trace(matrix), tic_trace(matrix), tic_diag(matrix)]
    monitor, seen = run(given, factors=factors, quantities=measures)
    assert monitor.left_out == {}
    for step, (batches, before, _) in enumerate(seen):
        truth, diagonal = Truth(given, before, batches), hessian(given, before, batches).diagonal()
        values = monitor.history().at(step)
        for ending, names in groups_of(before).items():
            H = diagonal[places(before, names)]
            second = (truth.of(names) ** 2).mean(0)
            close(values["hess_trace" + ending], H.sum(), 1e-7)
            close(values["tic_trace" + ending], second.sum() / (H.sum() + 1e-7), 1e-6)
            close(values["tic_diag" + ending], (second / (H + 1e-7)).sum(), 1e-6)


@pytest.mark.parametrize("problem", ["reused", "tokens"])
def test_curved(problem: str) -> None:
    given = PROBLEMS[problem]
    monitor, seen = run(given, quantities=[hess_trace("hessian")])
    for step, (batches, before, _) in enumerate(seen):
        close(
            monitor.history().at(step)["hess_trace"],
            hessian(given, before, batches).trace(),
            1e-7,
        )


def test_sampled_curvature() -> None:
    """Without bias, and from randomness of the monitor's own."""
    given = PROBLEMS["mlp"]
    model, X, y = given.model(), given.inputs(6), given.targets(6)
    monitor = watch(model, quantities=["hess_trace"], every=1)
    torch.manual_seed(3)
    for _ in range(300):
        with monitor.step():
            F.cross_entropy(model(X), y).backward()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)
    monitor.close()
    _, values = monitor.history().column("hess_trace")
    expected = float(hessian(given, model, [(X, y, 1.0)]).trace())
    found = torch.tensor(values)
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / len(found) ** 0.5
    assert float(found.std()) > 0


def test_alpha_by_the_ggn() -> None:
    """Of a linear model, whose GGN is its Hessian; without bias."""
    model = nn.Linear(4, 3)
    X, y = vectors(8), classes(8)
    monitor = watch(model, quantities=["alpha_ggn"], every=1)
    d = [torch.randn_like(p) for p in model.parameters()]
    for _ in range(300):
        with monitor.step():
            F.cross_entropy(model(X), y).backward()
            with torch.no_grad():
                for p, change in zip(model.parameters(), d, strict=True):
                    p += change
        with torch.no_grad():
            for p, change in zip(model.parameters(), d, strict=True):
                p -= change
        gradients = [p.grad for p in model.parameters()]
        model.zero_grad()
    monitor.close()
    problem = Problem(mlp, vectors, classes, F.cross_entropy, entropies)
    H, step = hessian(problem, model, [(X, y, 1.0)]), torch.cat([x.flatten() for x in d])
    slope = torch.cat([g.flatten() for g in gradients]) @ step
    found = torch.tensor(monitor.history().column("alpha_ggn")[1])
    expected = float(-(step @ H @ step) / slope - 1)
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / len(found) ** 0.5


@pytest.mark.parametrize("known", [True, False])
def test_loss_modules_are_known_for_a_while(known: bool) -> None:
    """A module's Hessian is found by its rule; it is left as it was."""
    lossfunc: Any = nn.CrossEntropyLoss() if known else lambda f, y: F.cross_entropy(f.sin(), y)
    model = nn.Linear(4, 5000)  # too many outputs for a loss to be differentiated twice
    monitor = watch(model, quantities=["hess_trace"], every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if known else "ignore")
        with monitor.step():
            lossfunc(model(vectors(3)), classes(3)).backward()
    monitor.close()
    assert ("hess_trace" in monitor.history().at(0)) == known
    assert not known or not (lossfunc._forward_hooks or lossfunc._forward_pre_hooks)


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv, self.options = nn.Linear(4, 12), options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (2, 6)).transpose(1, 2).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, **self.options).mean((1, 2, 3))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_logits(causal: bool) -> None:
    model, x = Attention(is_causal=causal), torch.randn(3, 5, 4)
    original = F.scaled_dot_product_attention
    monitor = watch(model, quantities=["attention_logit", "norm_test"], every=1)
    with monitor.step():
        model(x).square().mean().backward()
    monitor.close()
    assert F.scaled_dot_product_attention is original
    q, k, _ = model.qkv(x).unflatten(-1, (2, 6)).transpose(1, 2).chunk(3, -1)
    logits = q @ k.mT / 2**0.5
    if causal:
        logits = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    close(monitor.history().at(0)["attention_logit"], logits.max(), 1e-5)
    assert "norm_test" in monitor.history().at(0)


def test_critical_sharpness() -> None:
    """Of a parabola it is known: the loss is what it was at twice the way to the minimum."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.ones(3, 1), torch.zeros(3, 1)
    count = []

    def loss() -> Tensor:
        count.append(1)
        return 1.5 * F.mse_loss(model(x), y)  # second derivative: 3

    names = ["critical_sharpness", "update_size"]
    monitor = watch(model, optimizer, quantities=names, every=1, closure=loss)
    before = float(model.weight.detach())
    loss().backward()
    optimizer.step()
    monitor.close()
    assert float(model.weight.detach()) == before * (1 - 0.1 * 3)
    assert len(count) <= 10
    close(monitor.history().at(0)["critical_sharpness"], 3.0, 0.05)


@pytest.mark.parametrize("problem", ["mlp", "cnn", "regression", "reused"])
def test_largest_eigenvalue(problem: str) -> None:
    given = PROBLEMS[problem]
    monitor, seen = run(given, quantities=["hess_max_ev"])
    assert monitor.left_out == {}
    for step, (batches, before, _) in enumerate(seen):
        largest = torch.linalg.eigvalsh(hessian(given, before, batches))[-1]
        close(monitor.history().at(step)["hess_max_ev"], largest, 2e-3)


def test_largest_eigenvalue_of_several_passes() -> None:
    """Follows that of the sum, by one step of the power method for each of the optimizer."""
    given = PROBLEMS["mlp"]
    model = given.model()
    batches = [(given.inputs(5), given.targets(5), 0.5) for _ in range(2)]
    monitor = watch(model, quantities=["hess_max_ev"], every=1)
    for _ in range(60):
        with monitor.step():
            for X, y, factor in batches:
                (factor * given.loss(model(X), y)).backward()
    monitor.close()
    largest = torch.linalg.eigvalsh(hessian(given, model, batches))[-1]
    close(monitor.history().at(59)["hess_max_ev"], largest, 2e-3)


# --------------------------------------------------------------------------------------
# Activations, histograms


@pytest.mark.parametrize("factors", FACTORS.values(), ids=list(FACTORS))
@pytest.mark.parametrize("problem", ["mlp", "cnn"])
def test_activity(problem: str, factors: tuple[float, ...]) -> None:
    given = PROBLEMS[problem]
    names = ["activation_rms", "dead_units", "output_grad_rms"]
    monitor, seen = run(given, factors=factors, quantities=names)
    for step, (batches, before, _) in enumerate(seen):
        inputs: dict[str, list[Tensor]] = {}
        grads: dict[str, list[Tensor]] = {}

        def note(module: nn.Module, args: Any, output: Tensor, name: str) -> None:
            inputs.setdefault(name, []).append(args[0].detach())  # noqa: B023
            output.register_hook(lambda g: grads.setdefault(name, []).append(g))  # noqa: B023

        for name, module in before.named_children():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_hook(lambda m, a, o, name=name: note(m, a, o, name))
        for X, y, factor in batches:
            (given.loss(before(X), y) * factor).backward()
        values = monitor.history().at(step)
        for name in inputs:
            g = torch.cat([each.flatten() for each in grads[name]])
            close(values[f"output_grad_rms/{name}"], g.square().mean().sqrt())
            a = [_seen_in_the_middle(before.get_submodule(name), each) for each in inputs[name]]
            squares = torch.cat([each.flatten() for each in a]).square()
            close(values[f"activation_rms/{name}"], squares.mean().sqrt())
            silent = [(each == 0).all(2).all(0).double().mean() for each in a]
            if name != "0":
                close(values[f"dead_units/{name}"], torch.stack(silent).mean())
        # What the model is given is no activation.
        assert "dead_units/0" not in values


def _seen_in_the_middle(module: nn.Module, a: Tensor) -> Tensor:
    """Samples, features, places."""
    if isinstance(module, nn.Linear):
        return a.unsqueeze(2)
    k = module.kernel_size[0]
    first, last = k // 2, k - 1 - k // 2
    return a[:, :, first : a.shape[2] - last, first : a.shape[3] - last].flatten(2)


@pytest.mark.parametrize("factors", FACTORS.values(), ids=list(FACTORS))
def test_histograms(factors: tuple[float, ...]) -> None:
    given = PROBLEMS["cnn"]
    monitor, seen = run(given, factors=factors, quantities=["grad_hist", "grad_hist_2d"])
    for step, (batches, before, _) in enumerate(seen):
        values = monitor.history().at(step)
        found = values["grad_hist"]
        edges = torch.tensor(found["edges"])
        truth = Truth(given, before, batches)
        g_n = truth.of(truth.names)
        at = torch.bucketize(g_n, edges, right=True) - 1
        assert found["counts"] == torch.bincount(at.flatten(), minlength=len(edges) - 1).tolist()
        rows = torch.bucketize(flat(before, truth.names), edges, right=True) - 1
        joint = torch.zeros(len(edges) - 1, len(edges) - 1, dtype=torch.long)
        joint.index_put_((at, rows.expand_as(at)), torch.ones_like(at), accumulate=True)
        assert values["grad_hist_2d"]["counts"] == joint.tolist()


def test_a_model_that_returns_its_loss() -> None:
    torch.manual_seed(0)
    model = ReturnsLoss()
    monitor = watch(model, quantities=FIRST[2:], every=1)
    X, y = torch.randn(6, 4), torch.randint(3, (6,))
    with monitor.step():
        model(X, y).backward()
    monitor.close()
    values = monitor.history().at(0)
    problem = Problem(mlp, vectors, classes, F.cross_entropy, entropies)
    truth = Truth(problem, copied(model).body, [(X, y, 1.0)])
    for name, value in first_order(truth, truth.names).items():
        close(values[name], value)


def test_many_entries() -> None:
    """Of large layers some are looked at, and stand for all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 300), nn.Tanh(), nn.Linear(300, 10))
    X, y = torch.randn(50, 100), torch.randint(10, (50,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, quantities=["grad_hist", "grad_hist_2d"], every=1) as monitor:
        F.cross_entropy(model(X), y).backward()
        before = copied(model)
        optimizer.step()
    found = monitor.history().at(0)["grad_hist"]
    truth = Truth(Problem(mlp, vectors, classes, F.cross_entropy, entropies), before, [(X, y, 1.0)])
    edges = torch.tensor(found["edges"])
    counts = torch.histogram(truth.of(truth.names), edges[1:-1])[0]
    assert sum(found["counts"]) == pytest.approx(
        50 * sum(p.numel() for p in model.parameters()), rel=1e-3
    )
    estimated = torch.tensor(found["counts"][1:-1]).double()
    # Each entry that is looked at in the largest layer stands for so many.
    weight = 50 * 30000 / 4096
    assert ((estimated - counts).abs() <= 3 * (weight * counts).sqrt() + 3 * weight).all()
    assert (counts > 10 * weight).sum() >= 6
    joint = torch.tensor(monitor.history().at(0)["grad_hist_2d"]["counts"])
    assert (joint.sum(1) - torch.tensor(found["counts"])).abs().max() <= len(edges)


@pytest.mark.parametrize(
    "first, hard",
    [
        ([1.0] * 8, 2),
        # Of mean and standard deviation 1: above 4 a loss is large.
        ([0.0] * 4 + [2.0] * 4, 1),
    ],
)
def test_hard_samples(first: list[float], hard: int) -> None:
    """Those with a loss that is large beside the first step's, once most have a small one."""
    scale = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([scale], lr=0.0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    model = Model()
    losses = [first, [0.2] * 4 + [3.0] * 4, [0.2] * 5 + [1.4, 1.6, 5.0]]
    with watch(model, optimizer, quantities=["hard_samples"], every=1) as monitor:
        for each in losses:
            optimizer.zero_grad()
            x = torch.tensor(each).sqrt().unsqueeze(1)
            F.mse_loss(model(x), torch.zeros_like(x)).backward()
            optimizer.step()
    steps, found = monitor.history().column("hard_samples")
    assert steps == [2] and found == [pytest.approx(hard / 8)]


@pytest.mark.filterwarnings("ignore:cockpit")
def test_probabilities_of_samples() -> None:
    """Where probabilities add up over samples, no loss is a sample's."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, quantities=["loss", "hard_samples"], every=1) as monitor:
        F.nll_loss(F.log_softmax(model(torch.randn(3, 4)), 0), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    assert "which rows of the loss" in monitor.left_out["hard_samples"]
    assert monitor.history().at(0).keys() >= {"loss"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bins(dtype: torch.dtype) -> None:
    """Numbers are found in the bins that a search among edges says, edges and their neighbours too."""
    edges = torch.tensor(symlog_edges(), dtype=torch.float64).to(dtype)
    info, inf = torch.finfo(dtype), torch.tensor(math.inf, dtype=dtype)
    odd = torch.tensor([0.0, -0.0, info.tiny / 8, -info.tiny / 8, info.max, info.min], dtype=dtype)
    values = torch.randn(20_000, dtype=dtype) * torch.randn(20_000, dtype=dtype).mul(12).exp()
    values = torch.cat([values, odd, edges, edges.nextafter(inf), edges.nextafter(-inf)])
    entries = [Entries(values[:100], None, 2.0), Entries(values[100:], None, 3.0)]
    places = (torch.bucketize(values, edges, right=True) - 1).clamp(max=len(edges) - 2)
    expected = torch.bincount(places, torch.full((len(values),), 3.0).double())
    expected -= torch.bincount(places[:100], minlength=len(edges) - 1)
    assert torch.equal(counted(entries, [1.0, 1.0], False), expected)
    # Another factor for each pass; what is not a number is not counted.
    entries[1].values[:50] = math.nan
    found = counted(entries, [1e-3, 10.0], False)
    scaled = torch.cat([values[:100] * 1e-3, values[150:] * 10.0])
    places = (torch.bucketize(scaled, edges, right=True) - 1).clamp(max=len(edges) - 2)
    weights = torch.full((len(scaled),), 3.0).double()
    weights[:100] = 2.0
    assert torch.equal(found, torch.bincount(places, weights))


@pytest.mark.parametrize("last", [False, True], ids=["classes last", "positions last"])
def test_losses_of_positions(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model's losses are read from its graph; where samples are is not tried out."""

    def tried(*_: Any) -> None:
        raise AssertionError("tried out")

    monkeypatch.setattr("backpack.graph.tracing._owners", tried)
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)))
    X, y = torch.randint(5, (6, 7)), torch.randint(3, (6, 7))
    probe = Probe("probe", lambda part, error: None)
    with backpack(probe):
        logits = model(X)
        if last:
            F.cross_entropy(logits.permute(0, 2, 1), y).backward()
        else:
            F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    assert probe.losses is not None
    expected = F.cross_entropy(model(X).permute(0, 2, 1), y, reduction="none").sum(1) / y.numel()
    torch.testing.assert_close(probe.losses, expected, check_dtype=False)


def test_every_quantity_has_a_row() -> None:
    """In the table that says what it means; and each that is no function of a step, a function."""
    page = (Path(__file__).parents[2] / "docs" / "cockpit.md").read_text().split("## What it costs")[0]
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert told == {*MEASURES, *SPECIAL}
    assert CONCLUSIONS.keys() == SPECIAL.keys()
