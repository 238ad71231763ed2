"""Curvature of a data set, batch after batch, is that of one batch with all samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backpack import extend
from backpack.vivit import LowRank, derivatives_over, over
from tests.vivit.dense import flat, near

torch.manual_seed(0)
X, Y = torch.rand(12, 1, 6, 6).double(), torch.randint(3, (12,))
BATCHES = [(X[:4], Y[:4]), (X[4:5], Y[4:5]), (X[5:9], Y[5:9]), (X[9:], Y[9:])]


def network() -> nn.Module:
    torch.manual_seed(1)
    convolution = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    return extend(nn.Sequential(*convolution, nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)).double())


def whole(model: nn.Module, lossfunc: nn.Module, **options: Any) -> LowRank:
    with LowRank(**options) as curvature:
        lossfunc(model(X), Y).backward()
    return curvature


def size(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("vectors", [None, 24])
def test_same_as_one_batch(reduction: str, vectors: int | None) -> None:
    """Without limit, and with room for as many eigenvectors as there are."""
    model, lossfunc = network(), extend(nn.CrossEntropyLoss(reduction=reduction))
    memory = None if vectors is None else 2 * vectors * size(model)
    expected = whole(model, lossfunc)
    found = over(model, lossfunc, BATCHES if vectors else iter(BATCHES), memory=memory)
    if vectors:
        found.merge()
    assert found.samples == 12 and found.lost < 1e-12 * float(expected.trace())
    near(found.trace(), expected.trace())
    near(found.eigvalsh()[:20], expected.eigvalsh()[:20])
    group = found.parameters[2:5]
    near(found.eigvalsh(group)[:10], expected.eigvalsh(group)[:10])
    a, b = found.eigh(6), expected.eigh(6)
    for u, v in zip(a.vectors, b.vectors, strict=True):
        near(u.abs(), v.abs(), 1e-5)
    near(flat(found.solve(1e-2)), flat(expected.solve(1e-2)))
    near(flat(found.newton(a, 0.1, bulk=0.2)), flat(expected.newton(b, 0.1, bulk=0.2)), 1e-6)
    near(found.share(a), expected.share(b), 1e-6)
    near(found.logdet(0.1), expected.logdet(0.1))
    near(found.effective_dimension(0.1), expected.effective_dimension(0.1))
    if vectors is None:
        near(found.influence(damping=0.1), expected.influence(damping=0.1))
    slopes = derivatives_over(model, lossfunc, BATCHES, a)
    near(slopes.gammas.abs(), expected.derivatives(b).gammas.abs(), 1e-5)
    near(slopes.lambdas, expected.derivatives(b).lambdas, 1e-5)
    some = derivatives_over(model, lossfunc, BATCHES, [v[:2] for v in a.vectors[2:5]], parameters=group)
    near(some.gammas, expected.derivatives([v[:2] for v in a.vectors[2:5]], group).gammas)
    assert all(p.grad is not None for p in model.parameters())


def test_too_little_room() -> None:
    """What is left out is told; leading eigenvalues lose no more than that."""
    model, lossfunc = network(), extend(nn.CrossEntropyLoss())
    expected = whole(model, lossfunc)
    found = over(model, lossfunc, BATCHES, memory=2 * 8 * size(model))
    assert found.memory <= 2 * 8 * size(model)
    assert found.lost > 0
    total = float(expected.trace())
    assert abs(float(found.trace()) + found.lost - total) < 1e-8 * total
    missing = expected.eigvalsh()[:5] - found.eigvalsh()[:5]
    assert bool((missing >= -1e-12).all()) and float(missing.max()) <= found.lost
    assert float(missing[0]) < 0.02 * float(expected.eigvalsh()[0])
    narrow = over(model, lossfunc, BATCHES, memory=2 * 8 * size(model), rank=3)
    assert narrow.lost > found.lost


def test_single_samples_are_refused() -> None:
    model, lossfunc = network(), extend(nn.CrossEntropyLoss())
    curvature = whole(model, lossfunc)
    pairs, seen = curvature.eigh(2), curvature.eigh(3)
    seen.vectors
    curvature.merge()
    for ask in (
        lambda: curvature.derivatives(curvature.eigh(2)),
        lambda: curvature.influence(damping=1.0),
        lambda: curvature.gradient_gram(),
        lambda: curvature.newton(curvature.eigh(2), lambda pairs, found: found.lambdas.mean(0)),
    ):
        with pytest.raises(RuntimeError, match="single samples"):
            ask()
    with pytest.raises(RuntimeError, match="has changed"):
        pairs.vectors
    with pytest.raises(ValueError, match="as it is now"):
        curvature.newton(seen, 1.0)
    assert len(seen.vectors[0]) == 3


def test_scale() -> None:
    model, lossfunc = network(), extend(nn.CrossEntropyLoss())
    curvature = whole(model, lossfunc)
    values, steps = curvature.eigvalsh(), flat(curvature.solve(0.1))
    curvature.scale(3.0)
    near(curvature.eigvalsh()[:8], 3 * values[:8])
    near(flat(curvature.solve(0.3)), steps)
    with pytest.raises(ValueError, match="positive"):
        curvature.scale(0.0)


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    model, lossfunc = network(), extend(nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="no data"):
        over(model, lossfunc, [])
    with pytest.raises(ValueError, match="no room"):
        over(model, lossfunc, BATCHES, memory=10)
    over(model, lossfunc, BATCHES, progress=True, columns="mc")
    assert "batch 4 of 4" in capsys.readouterr().out


def test_several_inputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Bilinear(3, 2, 2)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.a(x, z)

    model, lossfunc = extend(Pair().double()), extend(nn.MSELoss())
    x, z, y = (torch.rand(6, d).double() for d in (3, 2, 2))
    with LowRank() as expected:
        lossfunc(model(x, z), y).backward()
    found = over(model, lossfunc, [((x[:2], z[:2]), y[:2]), ((x[2:], z[2:]), y[2:])])
    near(found.eigvalsh(), expected.eigvalsh())
