"""The demo runs, draws its figure, and is reproducible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from backpack import backpack, extend
from backpack.extensions import BatchL2Grad, Variance
from demo import digits

QUIET = Console(quiet=True)


def test_run_writes_a_figure(tmp_path: Path) -> None:
    output = tmp_path / "new" / "digits.png"
    digits.main(["--epochs", "1", "--samples", "150", "--batch-size", "40", "--output", str(output)])
    assert output.read_bytes().startswith(b"\x89PNG")


def test_runs_with_the_same_seed_agree() -> None:
    settings = digits.Settings(epochs=1, batch_size=32, samples=120)
    data = digits.load(settings.samples)
    first, again = (digits.train(settings, data, QUIET)[1] for _ in range(2))
    assert len(first.loss) == 3
    assert len(first.accuracy) == 1
    assert first.loss == again.loss
    assert first.curvature == again.curvature


def test_signal_and_norms_are_those_of_individual_gradients() -> None:
    torch.manual_seed(0)
    layer, loss_function = extend(torch.nn.Linear(3, 2)), extend(torch.nn.CrossEntropyLoss())
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])

    def gradient(n: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(layer(x[n : n + 1]), y[n : n + 1])
        parts = torch.autograd.grad(loss, tuple(layer.parameters()))
        return torch.cat([part.flatten() for part in parts])

    gradients = torch.stack([gradient(n) for n in range(6)])
    with backpack(Variance(), BatchL2Grad()):
        loss_function(layer(x), y).backward()
    noise = gradients.var(0).sum() / 6
    assert digits.signal_to_noise(layer) == pytest.approx(
        float(gradients.mean(0).square().sum() / noise), rel=1e-4
    )
    torch.testing.assert_close(digits.gradient_norms(layer), gradients.norm(dim=1))
