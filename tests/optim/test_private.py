"""Clipped and noisy gradients against a loop over samples."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, disable, extend, optim
from backpack.extensions import Variance
from backpack.optim.accounting import BatchSizes

N = 6
OPTIONS: dict[str, Any] = {"noise_multiplier": 0.0, "max_grad_norm": 0.8, "expected_batch_size": 5.0}


class Token(nn.Module):
    """A table and a recurrent layer: positions share weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn, self.out = (
            nn.Embedding(5, 4),
            nn.GRU(4, 3, batch_first=True),
            nn.Linear(3, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(self.table(x))[0][:, -1])


class Tied(nn.Module):
    """A table that is also the matrix of the last layer, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.middle(torch.tanh(self.middle(self.table(x)))).mean(1) + self.table(x[:, 0])
        return hidden @ self.table.weight.T


MODELS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        lambda n: torch.randn(n, 4, dtype=torch.float64),
    ),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)
        ),
        lambda n: torch.randn(n, 1, 5, 5, dtype=torch.float64),
    ),
    "tokens": (Token, lambda n: torch.randint(5, (n, 4))),
    "sparse": (
        lambda: nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 3)),
        lambda n: torch.randint(5, (n, 2)),
    ),
    "tied": (Tied, lambda n: torch.randint(5, (n, 4))),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def problem(name: str = "mlp", n: int = N) -> tuple[nn.Module, Tensor, Tensor]:
    make, data = MODELS[name]
    return make().double(), data(n), torch.arange(n) % 3


def losses(model: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(X), y, reduction="none")


def individual(model: nn.Module, X: Tensor, y: Tensor) -> list[list[Tensor]]:
    """Gradients of all samples, one after the other."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with disable():
        found = [
            torch.autograd.grad(losses(model, X[n : n + 1], y[n : n + 1]).sum(), parameters)
            for n in range(len(X))
        ]
    return [[g.to_dense() if g.is_sparse else g for g in each] for each in found]


def norm(gradient: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradient]).norm()


def clipped_sum(gradients: list[list[Tensor]], bound: float) -> list[Tensor]:
    factors = [min(1.0, bound / float(norm(g))) for g in gradients]
    return [
        sum((f * g for f, g in zip(factors, column, strict=True)), torch.zeros_like(column[0]))
        for column in zip(*gradients, strict=True)
    ]


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def close(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_step(name: str) -> None:
    """The loop's clipped mean; some samples are clipped and some are not."""
    model, X, y = problem(name)
    gradients, before = individual(model, X, y), values(model)
    norms = torch.stack([norm(g) for g in gradients])
    bound = float(norms.median())
    optimizer = optim.DPSGD(model, 0.5, **{**OPTIONS, "max_grad_norm": bound})
    found = optimizer.backward(losses(model, X, y))
    torch.testing.assert_close(found, norms, rtol=1e-9, atol=1e-12)
    optimizer.backward(losses(model, X, y))
    optimizer.step()
    expected = clipped_sum(2 * gradients, bound)
    close(values(model), [p - 0.5 * g / 5 for p, g in zip(before, expected, strict=True)])
    assert all(p.grad is None and not hasattr(p, "batch_l2") for p in model.parameters())


def test_groups_share_one_norm() -> None:
    """Options of groups, frozen parameters, momentum and l2."""
    model, X, y = problem()
    extend(model)
    first, frozen, *second = model.parameters()
    frozen.requires_grad_(False)
    groups = [{"params": [first, frozen], "lr": 0.2, "l2": 0.1}, {"params": second}]
    optimizer = optim.DPSGD(groups, 0.5, momentum=0.9, **OPTIONS)
    moved = [torch.zeros_like(p) for p in [first, *second]]
    for _ in range(3):
        before, fixed = [p.detach().clone() for p in [first, *second]], frozen.clone()
        gradients = [g / 5 for g in clipped_sum(individual(model, X, y), 0.8)]
        gradients[0] = gradients[0] + 0.1 * before[0]
        moved = [0.9 * m + g for m, g in zip(moved, gradients, strict=True)]
        optimizer.zero_grad()
        optimizer.backward(losses(model, X, y))
        optimizer.step()
        expected = [p - r * m for p, r, m in zip(before, (0.2, 0.5, 0.5), moved, strict=True)]
        close([p.detach() for p in [first, *second]], expected)
        assert torch.equal(frozen, fixed)


def test_parts_of_a_batch() -> None:
    """Sums of several passes are those of one."""
    model, X, y = problem()
    other = copy.deepcopy(model)
    optimizer = optim.DPSGD(model, 0.5, **OPTIONS)
    optimizer.backward(losses(model, X, y))
    optimizer.step()
    optimizer = optim.DPSGD(other, 0.5, **OPTIONS)
    for part in (slice(0, 2), slice(2, 2), slice(2, N)):
        optimizer.backward(losses(other, X[part], y[part]))
    optimizer.step()
    close(values(model), values(other))


def test_noise() -> None:
    """Drawn once for each step, whatever the batch holds, with std sigma C / B."""
    model, X, y = problem()
    noisy, lr, sigma = copy.deepcopy(model), 0.5, 3.0
    optimizer = optim.DPSGD(model, lr, **OPTIONS)
    optimizer.backward(losses(model, X, y))
    optimizer.step()
    generator = torch.Generator().manual_seed(7)
    options = {**OPTIONS, "noise_multiplier": sigma, "generator": generator}
    optimizer = optim.DPSGD(noisy, lr, **options)
    for part in (slice(0, 2), slice(2, N)):
        optimizer.backward(losses(noisy, X[part], y[part]))
    optimizer.step()
    generator = torch.Generator().manual_seed(7)
    for a, b in zip(values(noisy), values(model), strict=True):
        z = torch.empty_like(a).normal_(generator=generator)
        torch.testing.assert_close(a - b, -lr * sigma * 0.8 / 5 * z, rtol=1e-9, atol=1e-12)


def test_noise_has_the_right_size() -> None:
    """An empty batch (Poisson sampling) is a step of noise alone, in every parameter."""
    model = nn.Linear(300, 100)
    before = values(model)
    options = {"noise_multiplier": 1.5, "max_grad_norm": 2.0, "expected_batch_size": 10.0}
    optimizer = optim.DPSGD(model, 1.0, generator=torch.Generator().manual_seed(0), **options)
    optimizer.backward(losses(model, torch.randn(0, 300), torch.zeros(0, dtype=torch.long)))
    optimizer.step()
    weight, bias = (a - b for a, b in zip(values(model), before, strict=True))
    assert float(weight.std()) == pytest.approx(0.3, rel=0.02)
    assert float(weight.mean()) == pytest.approx(0.0, abs=0.01)
    assert bias.all()


def test_parameters_out_of_reach_get_noise() -> None:
    """Whether a batch reaches a parameter is not told."""
    model, X, y = problem()
    unused = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    extend(model)
    options = {**OPTIONS, "noise_multiplier": 1.0}
    optimizer = optim.DPSGD([*model.parameters(), unused], 0.5, **options)
    optimizer.backward(losses(model, X, y))
    optimizer.step()
    assert unused.all()


def test_plain_gradients_do_not_enter() -> None:
    model, X, y = problem()
    other = copy.deepcopy(model)
    optimizer = optim.DPSGD(model, 0.5, **OPTIONS)
    optimizer.backward(losses(model, X, y))
    optimizer.step()
    optimizer = optim.DPSGD(other, 0.5, **OPTIONS)
    losses(other, X, y).sum().backward()
    kept = other[0].weight.grad.clone()
    optimizer.backward(losses(other, X, y))
    optimizer.step()
    close(values(model), values(other))
    assert torch.equal(other[0].weight.grad, kept)


def test_other_quantities_in_the_same_pass() -> None:
    model, X, y = problem()
    optimizer = optim.DPSGD(model, 0.5, **OPTIONS)
    loss = losses(model, X, y)
    with backpack(Variance()):
        optimizer.backward(loss)
    optimizer.step()
    assert not hasattr(model[0].weight, "batch_l2")


def test_resumes_bit_for_bit() -> None:
    model, X, y = problem()
    options = {**OPTIONS, "noise_multiplier": 1.0}
    optimizer = optim.DPSGD(
        model, 0.5, momentum=0.9, generator=torch.Generator().manual_seed(0), **options
    )

    def train(model: nn.Module, optimizer: optim.DPSGD) -> None:
        for _ in range(3):
            optimizer.backward(losses(model, X, y))
            optimizer.step()

    train(model, optimizer)
    other = copy.deepcopy(model)
    resumed = optim.DPSGD(other, 9.0, generator=torch.Generator(), **options)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.generator.set_state(optimizer.generator.get_state())
    train(model, optimizer)
    train(other, resumed)
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(other), strict=True))


# --------------------------------------------------------------------------------------
# Errors


def _normalised(model: nn.Module) -> nn.Module:
    return nn.Sequential(model[0], nn.BatchNorm1d(5), *model[1:]).double()


ERRORS = {
    "reduced": (
        lambda m, X, y: F.cross_entropy(m(X), y),
        ValueError,
        r"one loss for each sample, \[N\]",
    ),
    "positions": (lambda m, X, y: m(X), ValueError, r"\[N\], but got \[6, 3\]"),
    "half": (lambda m, X, y: losses(m, X, y).bfloat16(), ValueError, "compute them in float32"),
    "constant": (lambda m, X, y: torch.ones(N), ValueError, "do not depend on any parameter"),
    "of another model": (
        lambda m, X, y: losses(extend(copy.deepcopy(m)), X, y),
        ValueError,
        "do not depend on any parameter",
    ),
    "infinite": (lambda m, X, y: losses(m, X, y) / 0, ValueError, "not finite"),
    "pairs": (
        lambda m, X, y: losses(m, X, y).reshape(2, 3).sum(0),
        ValueError,
        "there are 3 losses, but the model saw 6 samples",
    ),
    "weight decay": (
        lambda m, X, y: losses(m, X, y) + 0.1 * m[0].weight.square().sum(),
        RuntimeError,
        "parameter '0.weight' enters the losses outside of an extended model",
    ),
    "hook": (
        lambda m, X, y: losses(_hooked(m), X, y),
        RuntimeError,
        "parameter '0.weight' has a gradient hook",
    ),
    "disabled": (lambda m, X, y: _disabled(m, X, y), RuntimeError, "parameter '0.weight' enters"),
}


def _hooked(model: nn.Module) -> nn.Module:
    model[0].weight.register_hook(lambda g: 10 * g)
    return model


def _disabled(model: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    with disable():
        return losses(model, X, y)


@pytest.mark.parametrize("error", ERRORS)
def test_errors_add_nothing(error: str) -> None:
    function, kind, message = ERRORS[error]
    model, X, y = problem()
    optimizer = optim.DPSGD(model, 0.5, **OPTIONS)
    before = values(model)
    with pytest.raises(kind, match=message):
        optimizer.backward(function(model, X, y))
    assert all(not vars(p) for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"call optimizer.backward\(losses\) before"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))
    assert not optimizer.state


def test_batch_normalization() -> None:
    model, X, y = problem()
    model = _normalised(model)
    optimizer = optim.DPSGD(model, 0.5, **OPTIONS)
    with pytest.raises(NotImplementedError, match="mixes the samples of a batch"):
        optimizer.backward(losses(model, X, y))
    with pytest.raises(RuntimeError, match="before"):
        optimizer.step()
    model.eval()
    optimizer.backward(losses(model, X, y))
    optimizer.step()


STATISTICS = {
    "batch": lambda: nn.BatchNorm1d(5),
    "batch, without statistics": lambda: nn.BatchNorm1d(5, track_running_stats=False).eval(),
    "instance": lambda: nn.InstanceNorm1d(5, track_running_stats=True),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_below_frozen_layers(name: str) -> None:
    """They leave no trace on the graph of what is trained."""
    _, X, y = problem()
    norm = STATISTICS[name]().requires_grad_(False)
    frozen = nn.Linear(4, 10).requires_grad_(False), nn.Unflatten(1, (5, 2)), norm
    model = nn.Sequential(*frozen, nn.Flatten(), nn.Linear(10, 3)).double()
    optimizer = optim.DPSGD(model, 0.5, **OPTIONS)
    with pytest.raises(NotImplementedError, match=rf"'2' \({type(norm).__name__}\)"):
        optimizer.backward(losses(model, X, y))
    if norm.track_running_stats:
        norm.eval()
        optimizer.backward(losses(model, X, y))


def test_terms_that_cancel() -> None:
    """Norms of a sum whose terms are far larger than it."""
    model = nn.Linear(50, 50)
    optimizer = optim.DPSGD(model, 1.0, **OPTIONS)
    for ratio in (1e2, 1e3, 1e4):
        torch.manual_seed(0)
        X, direction = ratio * torch.randn(8, 1, 50), torch.randn(50)
        X = torch.cat([X, X + torch.randn(8, 1, 50)], 1)
        f = model(X)
        norms = optimizer.backward((f[:, 0] - f[:, 1]) @ direction)
        torch.testing.assert_close(
            norms, (X[:, 0] - X[:, 1]).norm(dim=1) * direction.norm(), rtol=1e-4, atol=0
        )


def test_steps_need_their_own_gradients() -> None:
    model, X, y = problem()
    optimizer = optim.DPSGD(model, 0.5, **OPTIONS)
    for clear in (optimizer.step, optimizer.zero_grad):
        optimizer.backward(losses(model, X, y))
        clear()
        with pytest.raises(RuntimeError, match="before"):
            optimizer.step()


def test_gradient_scaling_is_refused() -> None:
    model, X, y = problem()
    optimizer = optim.DPSGD(model, 0.5, **OPTIONS)
    scaler, before = torch.amp.GradScaler("cpu"), values(model)
    optimizer.backward(scaler.scale(losses(model, X, y)))
    with pytest.raises(RuntimeError, match="without a scaler"):
        scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


@pytest.mark.parametrize(
    "option, value",
    [
        ("lr", -1.0),
        ("l2", float("nan")),
        ("momentum", 1.0),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", float("nan")),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", float("inf")),
        ("expected_batch_size", 0),
    ],
)
def test_bad_options(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"DPSGD: {option}"):
        optim.DPSGD(nn.Linear(2, 2), **{"lr": 0.1, **OPTIONS, option: value})


# --------------------------------------------------------------------------------------
# Accounting


def _train(loader: Any, expected: float) -> None:
    model = nn.Linear(4, 3).double()
    optimizer = optim.DPSGD(model, lr=0.1, **{**OPTIONS, "expected_batch_size": expected})
    for X, y in loader:
        half = len(X) // 2
        optimizer.backward(losses(model, X[:half], y[:half]))
        optimizer.zero_grad()  # does not count
        for part in (slice(half), slice(half, None)):
            optimizer.backward(losses(model, X[part], y[part]))
        optimizer.step()


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("last", [0, 5])
def test_a_shuffled_loader(size: int, last: int) -> None:
    """Batches of one size are no Poisson samples: one warning, within an epoch, with the remedy."""
    data = torch.utils.data.TensorDataset(
        torch.randn(20 * size + last, 4, dtype=torch.float64), torch.randint(3, (20 * size + last,))
    )
    loader = torch.utils.data.DataLoader(data, batch_size=size, shuffle=True)
    with pytest.warns(UserWarning, match=f"had {size} samples.*batch_sampler") as found:
        _train([*loader, *loader], size)
    assert len(found) == 1


@pytest.mark.parametrize("size", [2, 8, 32, 128])
def test_poisson_batches(size: int) -> None:
    """Sizes that are drawn as they should be are never strange, nor are they all different."""
    sizes = torch.poisson(torch.full((3000,), float(size), dtype=torch.float64))
    seen = BatchSizes(size)
    assert all(seen.note(int(each)) is None for each in sizes)
    alike = float((sizes[1:] == sizes[:-1]).double().mean())
    assert alike == pytest.approx(seen.chance, abs=4 * (seen.chance / 3000) ** 0.5)


def test_epsilon() -> None:
    """The value of the paper on subsampled moments, and what must hold of any accountant."""
    spent = {"steps": 10000, "sample_rate": 0.01, "noise_multiplier": 4.0, "delta": 1e-5}
    # Abadi et al. (2016) name 1.26, by their moments accountant.
    assert 0.9 < optim.epsilon(**spent) < 1.27
    for name, more in (
        ("steps", 20000),
        ("sample_rate", 0.02),
        ("noise_multiplier", 2.0),
        ("delta", 1e-7),
    ):
        assert optim.epsilon(**{**spent, name: more}) > optim.epsilon(**spent)
    # Without sampling, by hand: the Renyi divergence of order a is a / (2 sigma^2), converted with the
    # best a, epsilon <= 1 / (2 sigma^2) + sqrt(2 log(1 / delta)) / sigma.
    alone = optim.epsilon(steps=1, sample_rate=1.0, noise_multiplier=5.0, delta=1e-5)
    assert 0.5 < alone < 1 / 50 + (2 * 11.512925 / 25) ** 0.5
    assert optim.epsilon(**{**spent, "steps": 0}) == 0
    assert optim.epsilon(**{**spent, "noise_multiplier": 0.0}) == float("inf")


@pytest.mark.parametrize(
    "name, value",
    [("steps", -1), ("steps", 1.5), ("sample_rate", 0.0), ("noise_multiplier", -1.0), ("delta", 1.0)]
    + [("noise_multiplier", float("inf"))],
)
def test_epsilon_of_nonsense(name: str, value: float) -> None:
    spent = {"steps": 10, "sample_rate": 0.01, "noise_multiplier": 1.0, "delta": 1e-5}
    with pytest.raises(ValueError, match=f"epsilon: {name} is out of range"):
        optim.epsilon(**{**spent, name: value})


def test_epsilon_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"backpack-anew\[privacy\]"):
        optim.epsilon(steps=1, sample_rate=0.1, noise_multiplier=1.0, delta=1e-5)


@pytest.mark.parametrize("layer", [0, 2])
def test_hooks_of_tensors_are_clipped(layer: int) -> None:
    """Hooks that scale the gradient on its way: what is clipped is what arrives."""
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())
    model[layer].register_forward_hook(lambda m, i, out: out.register_hook(lambda g: 100 * g) and None)
    optimizer = optim.DPSGD(
        model, lr=1.0, noise_multiplier=0.0, max_grad_norm=0.1, expected_batch_size=1.0
    )
    before = [p.detach().clone() for p in model.parameters()]
    X, y = torch.randn(1, 4).double(), torch.tensor([1])
    norm = optimizer.backward(F.cross_entropy(model(X), y, reduction="none"))
    with disable():
        grads = torch.autograd.grad(F.cross_entropy(model(X), y), list(model.parameters()))
    expected = torch.cat([g.flatten() for g in grads]).norm()
    torch.testing.assert_close(norm[0], expected)
    optimizer.step()
    moved = [(p - old).flatten() for p, old in zip(model.parameters(), before, strict=True)]
    torch.testing.assert_close(torch.cat(moved).norm(), torch.tensor(0.1).double())


def test_two_views_of_each_sample() -> None:
    """Forward passes that are joined are about the same samples: there is one loss for each."""
    model = nn.Linear(3, 2).double()
    optimizer = optim.DPSGD(model, 0.1, noise_multiplier=0, max_grad_norm=1e9, expected_batch_size=4)
    X, y = torch.randn(4, 3).double(), torch.tensor([0, 1, 0, 1])
    f = torch.cat([model(X), model(-X)])
    losses = F.cross_entropy(f, y.repeat(2), reduction="none").reshape(2, 4).sum(0)
    wanted = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    norms = torch.stack([sum(g.square().sum() for g in grads).sqrt() for grads in wanted])
    torch.testing.assert_close(optimizer.backward(losses), norms)
    parts = torch.cat([model(X[:2]), model(X[2:])])
    with pytest.raises(ValueError, match="all samples to one forward pass"):
        optimizer.backward(F.cross_entropy(parts, y, reduction="none"))
