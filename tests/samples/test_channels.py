"""Samples among the channels: filters of each sample's own in one grouped convolution, and norms."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import KFLR, BatchGrad, DiagGGNExact
from backpack.testing.oracle import check
from tests.cases import Apply, P

Model = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


def modulated(transposed: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Filters scaled by a style, and normalised."""

    def forward(m: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        n, channels, *size = x.shape
        weight = m.w * (m.style(z)[:, None, :, None, None] + 1)
        weight = weight * torch.rsqrt(weight.pow(2).sum((2, 3, 4), keepdim=True) + 1e-8)
        x = x.reshape(1, n * channels, *size)
        if transposed:
            filters = weight.transpose(1, 2).reshape(n * channels, 3, 2, 2)
            out = F.conv_transpose2d(x, filters, stride=2, groups=n)
        else:
            out = F.conv2d(x, weight.reshape(n * 3, channels, 2, 2), groups=n)
        return m.out(out.view(n, 3, -1).mean(2))

    model = Apply(forward, w=P(1, 3, 2, 2, 2), style=nn.Linear(2, 2), out=nn.Linear(3, 3))
    return model, (torch.randn(4, 2, 3, 3), torch.randn(4, 2))


def mixture() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Each sample's own mixture of filters, with biases."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.first(x)
        share = m.route(x.mean(2)).sigmoid()
        filters, bias = (share @ m.filters.flatten(1)).view(-1, 2, 2), (share @ m.bias).flatten()
        return (
            F.conv1d(x.reshape(1, -1, x.shape[2]), filters, bias, groups=len(x))
            .view(len(x), 3, -1)
            .amax(2)
        )

    parts = {
        "first": nn.Conv1d(1, 2, 1),
        "route": nn.Linear(2, 2),
        "filters": P(2, 3, 2, 2),
        "bias": P(2, 3),
    }
    return Apply(forward, **parts), (torch.randn(4, 1, 4),)


def correlation() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A template is looked for in the features of an image, channel by channel."""

    def forward(m: nn.Module, template: Tensor, x: Tensor) -> Tensor:
        template, x = m.first(template), m.first(x)
        n, channels = x.shape[:2]
        x, template = (
            x.view(1, -1, *x.shape[2:]),
            template.reshape(n * channels, 1, *template.shape[2:]),
        )
        return F.conv2d(x, template, groups=n * channels).view(n, channels, -1).mean(2)

    return Apply(forward, first=nn.Conv2d(1, 3, 2)), (torch.randn(4, 1, 3, 3), torch.randn(4, 1, 4, 4))


def styled() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Instance norm with scale and shift from a style, by batch norm of channels of all samples."""

    def forward(m: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        x = m.first(x)
        n, channels = x.shape[:2]
        scale, shift = (each.reshape(-1) for each in m.style(z).chunk(2, 1))
        mean, variance = torch.zeros(n * channels).to(x), torch.ones(n * channels).to(x)
        flat = x.reshape(1, n * channels, -1)
        return F.batch_norm(flat, mean, variance, scale, shift, True).view_as(x).relu().mean((2, 3))

    model = Apply(forward, first=nn.Conv2d(1, 3, 2), style=nn.Linear(2, 6))
    return model, (torch.randn(4, 1, 3, 4), torch.randn(4, 2))


MODELS: dict[str, Model] = {
    "modulated": lambda: modulated(False),
    "modulated, transposed": lambda: modulated(True),
    "mixture": mixture,
    "correlation": correlation,
    "styled": styled,
}


@pytest.mark.parametrize("name", MODELS)
def test_quantities(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    report = check(model, nn.CrossEntropyLoss(), inputs, torch.arange(4) % 3)
    assert report.ok, f"\n{report}"


def test_channels_that_are_shared() -> None:
    """Two groups for four samples: each filter sees two of them."""
    model = extend(
        Apply(
            lambda m, x: F.conv1d(m.first(x).view(1, 4, 4), m.w, groups=2).view(4, 2),
            **{"first": nn.Conv1d(1, 1, 1), "w": P(4, 2, 3)},
        )
    )
    loss = model(torch.randn(4, 1, 4)).square().sum()
    with pytest.raises(RuntimeError, match="axis"), backpack(BatchGrad()):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("affine", [False, True])
def test_running_statistics_are_the_users(affine: bool, dtype: torch.dtype) -> None:
    """An operation that is tried out, or called again for derivatives, may write to its arguments."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        own = (m.scale, m.shift) if affine else (None, None)
        h = F.batch_norm(m.first(x).view(1, 8, -1), m.mean, m.variance, *own, True)  # type: ignore[call-arg]
        return m.out(h.view(4, 2, -1).relu().mean(2))

    parts = {"first": nn.Conv1d(1, 2, 2), "scale": P(8), "shift": P(8), "out": nn.Linear(2, 3)}
    model = Apply(forward, **parts)
    model.register_buffer("mean", torch.zeros(8))
    model.register_buffer("variance", torch.ones(8))
    model, X, y = model.to(dtype), torch.randn(4, 1, 5, dtype=dtype), torch.arange(4) % 3
    ours = extend(copy.deepcopy(model))
    plain = F.cross_entropy(model(X), y)
    with backpack(BatchGrad(), DiagGGNExact(), KFLR()):
        loss = F.cross_entropy(ours(X), y)
        loss.backward()
    assert torch.equal(plain, loss)
    assert torch.equal(model.mean, ours.mean) and torch.equal(model.variance, ours.variance)
