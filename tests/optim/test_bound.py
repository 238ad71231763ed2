"""DPSGD's bound by finite change of one sample: it holds, or the step is refused.

Replacing one sample by any other moves the sum of clipped gradients by at most ``2 C``, leaving one out
by at most ``C``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import extend, optim
from backpack.optim import bounds

N, C = 6, 0.05
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Lambda(nn.Module):
    """A model from a function of itself and its input."""

    def __init__(self, run: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def on_words(table: nn.Module, **more: nn.Module) -> nn.Module:
    def run(m: Lambda, x: Tensor) -> Tensor:
        words = m.table((x.abs() * 7).long() % 5)
        return m.out(words.flatten(1) if words.dim() == 3 else words)

    bag = isinstance(table, nn.EmbeddingBag)
    return Lambda(run, table=table, out=nn.Linear(3 if bag else 12, 3), **more)


class Average(nn.Module):
    """A layer that keeps a statistic of the data and divides by it, as custom layers do."""

    def __init__(self, assigns: bool) -> None:
        super().__init__()
        self.assigns = assigns
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            new = 0.9 * self.scale + 0.1 * x.abs().mean(0)
            if self.assigns:
                self.scale = new
            else:
                self.scale.copy_(new)
        return x / self.scale


def normalized_gradient(model: nn.Module, X: Tensor) -> Tensor:
    out = model(X)
    out.register_hook(lambda g: g / (g.norm() + 1e-30))
    return out


def cross_entropy(f: Tensor, y: Tensor, **options: object) -> Tensor:
    return F.cross_entropy(f, y, reduction="none", **options)


def rank(f: Tensor) -> Tensor:
    """A hinge over pairs of samples: piecewise linear, without any second derivative."""
    return (1 - f[:, None, 0] + f[None, :, 0]).relu().mean(1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "embedding": lambda: on_words(nn.Embedding(5, 3)),
    "sparse": lambda: on_words(nn.Embedding(5, 3, sparse=True)),
    "bag": lambda: on_words(nn.EmbeddingBag(5, 3)),
    "norms": lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.ReLU(), nn.Linear(6, 3)),
    "frozen statistics": lambda: nn.Sequential(nn.BatchNorm1d(4).eval(), nn.Linear(4, 3)),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Linear(5, 3)
    ),
}
REFUSED_MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "max_norm": (
        lambda: on_words(nn.Embedding(5, 3, max_norm=0.5)),
        "'table' .Embedding. has max_norm",
    ),
    "max_norm, frozen": (
        lambda: on_words(nn.Embedding(5, 3, max_norm=0.5).requires_grad_(False)),
        "'table' .Embedding. has max_norm",
    ),
    "max_norm of a bag": (
        lambda: on_words(nn.EmbeddingBag(5, 3, max_norm=0.5)),
        "'table' .EmbeddingBag. has max_norm",
    ),
    "max_norm of a function": (
        lambda: Lambda(
            lambda m, x: m.out(F.embedding((x.abs() * 7).long() % 5, m.l.weight, max_norm=0.1).sum(1)),
            l=nn.Linear(3, 5),
            out=nn.Linear(3, 3),
        ),
        "'l.weight' of Lambda was changed by its forward pass",
    ),
    "scale_grad_by_freq": (
        lambda: on_words(nn.Embedding(5, 3, scale_grad_by_freq=True)),
        "scale_grad_by_freq",
    ),
    "scale_grad_by_freq of a bag": (
        lambda: on_words(nn.EmbeddingBag(5, 3, mode="sum", scale_grad_by_freq=True)),
        "scale_grad_by_freq",
    ),
    "a statistic in place": (
        lambda: nn.Sequential(Average(False), nn.Linear(4, 3)),
        "'0.scale' of Sequential was changed",
    ),
    "a statistic assigned": (
        lambda: nn.Sequential(nn.Linear(4, 4), Average(True), nn.Linear(4, 3)),
        "'1.scale' of Sequential was changed",
    ),
}
LOSSES: dict[str, Loss] = {
    "cross entropy": lambda m, X, y: cross_entropy(m(X), y),
    "weighted": lambda m, X, y: cross_entropy(m(X), y, weight=torch.tensor([1.0, 2, 5])),
    "smoothed": lambda m, X, y: cross_entropy(m(X), y, label_smoothing=0.2),
    "mean squares": lambda m, X, y: F.mse_loss(m(X), F.one_hot(y, 3).double(), reduction="none").sum(1),
    "absolute": lambda m, X, y: F.l1_loss(m(X), F.one_hot(y, 3).double(), reduction="none").mean(1),
    "hinge": lambda m, X, y: F.multi_margin_loss(m(X), y, reduction="none"),
    "within a sample": lambda m, X, y: m(X).sort(1)[0].diff(dim=1).square().sum(1),
    "two forwards": lambda m, X, y: (m(X) - m(X.flip(1))).square().sum(1),
    "transposed": lambda m, X, y: m(X).t().square().sum(0),
    "positions": lambda m, X, y: cross_entropy(m(X).view(-1, 3), y).view(len(X), -1).sum(1),
    "one by one": lambda m, X, y: torch.stack([f.exp().sum() for f in m(X)]),
    "scaled": lambda m, X, y: cross_entropy(100 * m(X), y),
    "the output": lambda m, X, y: m(X)[:, 0],
}
REFUSED: dict[str, Loss] = {
    "similarities": lambda m, X, y: cross_entropy((f := m(X)) @ f.t(), torch.arange(len(X))),
    "two towers": lambda m, X, y: cross_entropy(m(X) @ m(X.flip(1)).t(), torch.arange(len(X))),
    "centred": lambda m, X, y: ((f := m(X)) - f.mean(0)).square().sum(1),
    "standardized": lambda m, X, y: cross_entropy(F.batch_norm(m(X), None, None, training=True), y),
    "contrastive": lambda m, X, y: -torch.log_softmax(torch.cdist(f := m(X), f) + f.sum(), 1)[:, 0],
    "ranked": lambda m, X, y: rank(m(X)),
    "ranked by neighbours": lambda m, X, y: (1 - (f := m(X))[:, 0] + f.roll(1, 0)[:, 0]).relu(),
    "absolute difference": lambda m, X, y: ((f := m(X)) - f[:1]).abs().sum(1),
    "the largest": lambda m, X, y: cross_entropy(m(X), y) + m(X).amax(),
    "softmax over samples": lambda m, X, y: m(X).softmax(0)[:, 0],
    "sorted": lambda m, X, y: cross_entropy(m(X), y).sort()[0],
    "permuted": lambda m, X, y: cross_entropy(m(X), y).roll(1),
    "a running sum": lambda m, X, y: cross_entropy(m(X), y).cumsum(0),
    "the mean on top": lambda m, X, y: (own := cross_entropy(m(X), y)) + own.mean(),
    "a small coupling": lambda m, X, y: (own := cross_entropy(m(X), y)) + 1e-14 * own.mean(),
    "the last one only": lambda m, X, y: (
        (own := cross_entropy(m(X), y)) + own[-1] * (torch.arange(len(own)) == 0)
    ),
    "a gradient that is normalized": lambda m, X, y: cross_entropy(normalized_gradient(m, X), y),
}


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def clipped_sum(model: nn.Module, loss: Loss, X: Tensor, y: Tensor) -> Tensor:
    """What one step moves the parameters along, without noise."""
    model = copy.deepcopy(model)
    optimizer = optim.DPSGD(model, 1.0, noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.backward(loss(model, X, y))
    optimizer.step()
    moved = [(old - p).flatten() for p, old in zip(model.parameters(), before, strict=True)]
    return torch.cat(moved).detach()


def check_bound(model: nn.Module, loss: Loss) -> None:
    X, y = torch.randn(N, 4), torch.randint(3, (N,))
    whole = clipped_sum(model, loss, X, y)
    for n in range(N):
        rest = [m for m in range(N) if m != n]
        left_out = clipped_sum(model, loss, X[rest], y[rest])
        assert float((whole - left_out).norm()) <= C * (1 + 1e-9)
        for size in (1.0, 30.0):
            X_new, y_new = X.clone(), y.clone()
            X_new[n], y_new[n] = size * torch.randn(4), (y[n] + 1) % 3
            replaced = clipped_sum(model, loss, X_new, y_new)
            assert float((whole - replaced).norm()) <= 2 * C * (1 + 1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_models(model: str) -> None:
    check_bound(MODELS[model](), LOSSES["cross entropy"])


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: str) -> None:
    check_bound(mlp(), LOSSES[loss])


@pytest.mark.parametrize("model", REFUSED_MODELS)
def test_models_that_break_it(model: str) -> None:
    make, message = REFUSED_MODELS[model]
    with pytest.raises(NotImplementedError, match=message):
        check_bound(make(), LOSSES["cross entropy"])


@pytest.mark.parametrize("loss", REFUSED)
@pytest.mark.parametrize("model", ["mlp", "embedding"])
def test_losses_that_break_it(loss: str, model: str) -> None:
    with pytest.raises(NotImplementedError, match="sample"):
        check_bound(MODELS[model](), REFUSED[loss])


@pytest.mark.parametrize("count", [*range(1, 40), 100, 128, 1000])
def test_sets_tell_all_pairs_apart(count: int) -> None:
    inside = bounds._sets(count).bool()
    apart = (inside[:, :, None] & ~inside[:, None, :]).any(0)
    assert bool((apart | torch.eye(count).bool()).all())


def test_refusals_change_nothing() -> None:
    """Neither the model nor the optimizer, which go on with a loss that is private."""
    model = mlp()
    X, y = torch.randn(N, 4), torch.randint(3, (N,))
    optimizer = optim.DPSGD(model, 1.0, noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=1.0)
    with pytest.raises(NotImplementedError, match=r"sample \d of the batch"):
        optimizer.backward(REFUSED["centred"](model, X, y))
    with pytest.raises(RuntimeError, match="before"):
        optimizer.step()
    optimizer.backward(LOSSES["cross entropy"](model, X, y))
    optimizer.step()


def test_layers_that_change_in_training_only() -> None:
    """What is refused in training mode is accepted in evaluation mode, or outside of the model."""

    class Trained(Average):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else x / self.scale

    model = nn.Sequential(Trained(False), nn.Linear(4, 3))
    X, y = torch.randn(N, 4), torch.randint(3, (N,))
    optimizer = optim.DPSGD(
        extend(model).parameters(), 1.0, noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=1.0
    )
    model.eval()
    for _ in range(2):  # the first pass tells the optimizer of the model
        optimizer.backward(LOSSES["cross entropy"](model, X, y))
        optimizer.step()
        with torch.no_grad():
            model[0].scale.mul_(2)
    model.train()
    with pytest.raises(NotImplementedError, match="'0.scale' of Sequential was changed"):
        optimizer.backward(LOSSES["cross entropy"](model, X, y))
    model.eval()
    optimizer.backward(LOSSES["cross entropy"](model, X, y))
    optimizer.step()
    other = copy.deepcopy(model)
    assert len(other._forward_pre_hooks) == len(model._forward_pre_hooks)


def test_mixed_precision() -> None:
    """Outputs in another precision than the losses."""
    model = mlp().float()
    X, y = torch.randn(N, 4).float(), torch.randint(3, (N,))
    optimizer = optim.DPSGD(model, 1.0, noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        f = model(X)
    optimizer.backward(cross_entropy(f.float(), y))
    with torch.autocast("cpu", torch.bfloat16):
        f = model(X)
    with pytest.raises(NotImplementedError, match="sample"):
        optimizer.backward(cross_entropy((f - f.mean(0)).float(), y))
