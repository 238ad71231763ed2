"""What training loops do around a backward pass: checkpoints, scalers, fused optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from backpack import backpack, check, extend, optim
from backpack import extensions as E
from backpack.testing.oracle import Oracle
from tests.cases import Apply

N = 6


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=generator), torch.arange(N) % 3


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 3))


CHECKPOINTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "part": lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)),
    "all": lambda m, x: checkpoint(lambda x: m.head(m.body(x)), x, use_reentrant=False),
    "sequential": lambda m, x: m.head(checkpoint_sequential(m.body, 2, x, use_reentrant=False)),
    "twice": lambda m, x: m.head(
        checkpoint(lambda x: checkpoint(m.body, x, use_reentrant=False), x, use_reentrant=False)
    ),
    "frozen below": lambda m, x: m.head(
        checkpoint(m.body, m.frozen(x).requires_grad_(), use_reentrant=False)
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str) -> None:
    torch.manual_seed(0)
    frozen = nn.Linear(4, 4).requires_grad_(False)
    model = Apply(CHECKPOINTS[name], body=layers(), head=nn.Linear(3, 3), frozen=frozen)
    X, y = data()
    report = check(model, nn.CrossEntropyLoss(), X, y)
    assert report.ok and len({parameter for parameter, _ in report.errors}) == 8, report


@pytest.mark.parametrize("quantity", [E.BatchGrad(), E.KFLR()], ids=repr)
def test_reentrant_checkpoints_are_refused(quantity: E.BackpropExtension) -> None:
    model = Apply(
        lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=True)),
        body=layers(),
        head=nn.Linear(3, 3),
    )
    extend(model)
    X, y = data()
    with backpack(quantity), pytest.raises(RuntimeError, match="use_reentrant=False"):
        nn.functional.cross_entropy(model(X.requires_grad_()), y).backward()
    assert not any(hasattr(p, quantity.savefield) for p in model.parameters())


def test_fields_have_the_scaler_s_factor() -> None:
    """They are those of the loss whose gradient is taken; a step that is skipped changes nothing."""
    model, (X, y) = extend(layers().double()), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    oracle = Oracle(model, nn.CrossEntropyLoss(), X.double(), y)
    expected = [g.flatten(1).square().sum(1) for g in oracle.grad_batch.values()]
    with backpack(E.BatchL2Grad(), E.DiagGGNExact()):
        scaler.scale(nn.functional.cross_entropy(model(X.double()), y)).backward()
    scale = scaler.get_scale()
    for p, norms in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.batch_l2 / scale**2, norms, rtol=1e-10, atol=0)
    exact = [g.sum(0) for g in oracle.diag_ggn_batch.values()]
    for p, diagonal in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(p.diag_ggn_exact / scale, diagonal, rtol=1e-10, atol=1e-15)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


Make = Callable[[nn.Module], torch.optim.Optimizer]
FUSED: dict[str, Make] = {
    "adam": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True),
    "many": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=True),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_optimizers(name: str) -> None:
    """They step on what backward leaves, with and without a block; fields are of the old parameters."""
    X, y = data()
    models = [layers(), extend(layers())]
    for model in models:
        optimizer = FUSED[name](model)
        for _ in range(3):
            optimizer.zero_grad()
            with backpack(*([E.Variance()] if model is models[1] else [])):
                nn.functional.cross_entropy(model(X), y).backward()
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, two)
    reference = layers().double()
    for p, old in zip(reference.parameters(), before, strict=True):
        p.data.copy_(old)
    oracle = Oracle(reference, nn.CrossEntropyLoss(), X.double(), y)
    for p, g in zip(models[1].parameters(), oracle.grad_batch.values(), strict=True):
        torch.testing.assert_close(p.variance.double(), g.var(0, unbiased=False), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("quantities", [(E.BatchGrad(),), (E.Variance(), E.KFLR()), (E.DiagHessian(),)])
def test_optimizers_that_step_within_backward(quantities: tuple[E.BackpropExtension, ...]) -> None:
    """One optimizer for each parameter, which steps as soon as its gradient is there, and frees it."""
    X, y = data()
    expected, model = extend(layers()), extend(layers())
    with backpack(*quantities):
        nn.functional.cross_entropy(expected(X), y).backward()
    for p in model.parameters():
        optimizer = torch.optim.SGD([p], lr=0.1, fused=True)

        def step(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    with backpack(*quantities):
        nn.functional.cross_entropy(model(X), y).backward()
    for p, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert p.grad is None
        torch.testing.assert_close(p, other - 0.1 * other.grad)
        for ext in quantities:
            one, two = getattr(p, ext.savefield), getattr(other, ext.savefield)
            for a, b in zip(*(x if isinstance(x, list) else [x] for x in (one, two)), strict=True):
                torch.testing.assert_close(a, b)


def test_the_library_s_optimizers_have_no_fused_variant() -> None:
    with pytest.raises(TypeError, match="takes no such arguments: fused"):
        optim.KFAC(layers(), lr=0.1, damping=0.1, fused=True)
