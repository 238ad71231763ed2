"""Programs as the paper, the poster and the tutorials write them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import CrossEntropyLoss, Flatten, Linear, Sequential

from backpack import backpack, disable, extend
from backpack.extensions import BatchGrad, BatchL2Grad, DiagGGNExact, DiagHessian, Variance
from backpack.testing.oracle import Oracle
from tests.resnet import ResNet18


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def digits(samples: int = 16) -> tuple[Tensor, Tensor]:
    """A batch shaped like MNIST."""
    return torch.rand(samples, 1, 28, 28), torch.randint(10, (samples,))


def individual(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Individual gradients by a loop over samples, scaled by 1/N."""
    rows = []
    parameters = dict(model.named_parameters())
    with disable():
        for n in range(len(X)):
            loss = F.cross_entropy(model(X[n : n + 1]), y[n : n + 1]) / len(X)
            rows.append(torch.autograd.grad(loss, list(parameters.values())))
    return {name: torch.stack(g) for name, g in zip(parameters, zip(*rows, strict=True), strict=True)}


def test_paper() -> None:
    """Figure 1 of Dangel, Kunstner, Hennig (2020)."""
    X, y = digits()

    model = Linear(784, 10)
    lossfunc = CrossEntropyLoss()

    model = extend(model)
    lossfunc = extend(lossfunc)

    loss = lossfunc(model(X.flatten(1)), y)

    with backpack(Variance()):
        loss.backward()

    gradients = individual(model, X.flatten(1), y)
    for name, param in model.named_parameters():
        assert param.grad.shape == param.variance.shape == param.shape
        torch.testing.assert_close(param.variance, gradients[name].var(0, unbiased=False))


def test_poster() -> None:
    X, y = digits()
    model = extend(Sequential(Flatten(), Linear(784, 10)))
    lossfunc = extend(CrossEntropyLoss())

    loss = lossfunc(model(X), y)
    with backpack(DiagHessian()):
        loss.backward()

    p = model(X).softmax(1).detach()
    second = (p * (1 - p) / len(X)).T
    torch.testing.assert_close(model[1].weight.diag_h, second @ X.flatten(1).square())
    torch.testing.assert_close(model[1].bias.diag_h, second.sum(1))


def test_resnet() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        net = ResNet18(num_classes=10, width=4)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.normal_(module.running_mean, 0.1)
        X, y = torch.rand(3, 3, 32, 32), torch.randint(10, (3,))

        model = extend(net.eval(), use_converter=True)
        lossfunc = extend(CrossEntropyLoss())
        loss = lossfunc(model(X), y)
        with backpack(Variance(), DiagGGNExact()):
            loss.backward()

        gradients = individual(model, X, y)
        for name, param in model.named_parameters():
            assert param.grad.shape == param.variance.shape == param.diag_ggn_exact.shape
            torch.testing.assert_close(param.variance, gradients[name].var(0, unbiased=False))
        last = [*model.layer4[1].parameters(), *model.fc.parameters()]
        values = [param.diag_ggn_exact for param in last]
        for param in model.parameters():
            param.requires_grad_(any(param is each for each in last))
        with disable():
            ggn = Oracle(model, F.cross_entropy, X, y).value("diag_ggn_exact")
        assert len(ggn) == len(values)
        for value, reference in zip(values, ggn.values(), strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-8, atol=1e-16)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        lambda f, y: F.nll_loss(f.log_softmax(1), y),
        lambda f, y: -f.log_softmax(1)[torch.arange(len(y)), y].mean(),
        lambda f, y: (f.logsumexp(1) - f.gather(1, y[:, None]).squeeze(1)).mean(),
    ],
)
def test_first_order_with_any_loss(loss) -> None:
    """The loss need not be extended, nor be a module."""
    X, y = digits()
    model = extend(Sequential(Flatten(), Linear(784, 20), nn.ReLU(), Linear(20, 10)))
    with backpack(BatchGrad(), BatchL2Grad(), Variance()):
        loss(model(X), y).backward()
    for name, reference in individual(model, X, y).items():
        param = model.get_parameter(name)
        torch.testing.assert_close(param.grad_batch, reference)
        torch.testing.assert_close(param.batch_l2, reference.flatten(1).square().sum(1))
        torch.testing.assert_close(param.variance, reference.var(0, unbiased=False))
