"""Tensors that keep their gradients keep the loss's, and nothing of the library's own passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backpack import backpack, extend
from backpack import extensions as E

QUANTITIES = [
    E.BatchGrad,
    E.DiagGGNExact,
    E.DiagGGNMC,
    E.DiagHessian,
    E.SqrtGGNExact,
    E.KFAC,
    E.KFLR,
    E.GGNMP,
    E.HMP,
]


class Net(nn.Module):
    """Keeps what it makes; ``retains``: the names of what retains its gradient, in forward."""

    def __init__(self, retains: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.retains = retains
        self.made: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        self.made = {"hidden": hidden, "halves": hidden.tanh()}
        left, right = self.made["halves"].split([2, 3], 1)
        self.made |= {"left": left, "output": self.last(torch.cat([left, right], 1))}
        for name in self.retains:
            self.made[name].retain_grad()
        return self.made["output"]


NAMES = ("hidden", "halves", "left", "output")


def run(
    backward: Callable[[Net, Tensor], None], retains: tuple[str, ...], *exts: Any, **options: Any
) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    net = Net(retains)
    model, lossfunc = extend(net), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    model.double()
    if not exts:
        backward(net, lossfunc(model(x), y))
    else:
        loss = lossfunc(model(x), y)
        with backpack(*exts, certify="always", **options):
            backward(net, loss)
    return {name: net.made[name].grad if net.made[name].retains_grad else None for name in NAMES}


def plainly(net: Net, loss: Tensor) -> None:
    loss.backward()


def after_forward(net: Net, loss: Tensor) -> None:
    net.made["hidden"].retain_grad()
    loss.backward()


def at_inputs(net: Net, loss: Tensor) -> None:
    loss.backward(inputs=[net.made["left"], net.first.weight])


def twice(net: Net, loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


def differentiable(net: Net, loss: Tensor) -> None:
    loss.backward(create_graph=True)
    grad = net.made["hidden"].grad
    assert grad is not None
    grad.square().sum().backward()


@pytest.mark.parametrize("ext", QUANTITIES, ids=lambda ext: ext.__name__)
@pytest.mark.parametrize(
    ("backward", "retains"),
    [(plainly, NAMES), (after_forward, ()), (at_inputs, ()), (twice, ("left", "output"))],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_gradients_kept(ext: Any, backward: Any, retains: tuple[str, ...]) -> None:
    expected, found = run(backward, retains), run(backward, retains, ext())
    assert any(g is not None for g in expected.values())
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("ext", [E.BatchGrad, E.DiagGGNExact], ids=lambda ext: ext.__name__)
def test_in_differentiable_passes(ext: Any) -> None:
    expected, found = run(differentiable, NAMES), run(differentiable, NAMES, ext())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backward", [plainly, at_inputs], ids=lambda x: x.__name__)
def test_gradient_from_forms(backward: Any) -> None:
    expected = run(backward, ("hidden",))
    torch.testing.assert_close(run(backward, ("hidden",), E.BatchGrad(), gradient="forms"), expected)


def test_no_gradient_wanted() -> None:
    found = run(plainly, NAMES, E.BatchGrad(), E.DiagGGNExact(), gradient=False)
    assert all(g is None for g in found.values())


@pytest.mark.parametrize("ext", [E.BatchGrad, E.DiagGGNExact, E.KFAC], ids=lambda ext: ext.__name__)
def test_between_output_and_loss(ext: Any) -> None:
    """What the loss takes, and the loss itself, made outside of the block or in it."""

    def kept(inside: bool, *exts: Any) -> list[Tensor | None]:
        torch.manual_seed(0)
        model, lossfunc = extend(nn.Linear(4, 3).double()), extend(nn.CrossEntropyLoss())
        x, y = torch.randn(6, 2, 4, dtype=torch.float64), torch.randint(3, (12,))

        def forward() -> tuple[Tensor, Tensor, Tensor]:
            output = model(x)
            logits = output.view(-1, 3)
            return output, logits, lossfunc(logits, y)

        made = () if inside else forward()
        with backpack(*exts):
            made = made or forward()
            for tensor in made:
                tensor.retain_grad()
            made[-1].backward()
        return [tensor.grad for tensor in made]

    for inside in (False, True):
        torch.testing.assert_close(kept(inside, ext()), kept(inside))


def _assigned(z: Tensor, h: Tensor) -> None:
    z[:] = h


def _columns(z: Tensor, h: Tensor) -> None:
    z[:, 0].copy_(h[:, 0])
    z[:, 1:3] = h[:, 1:3]


def _view(z: Tensor, h: Tensor) -> None:
    view = z[:, :3]
    view.copy_(h[:, :3])


@pytest.mark.parametrize("write", [_assigned, _columns, _view, Tensor.copy_, Tensor.add_])
@pytest.mark.parametrize("inside", [True, False], ids=["in the model", "after it"])
def test_memory_that_was_written_to(write: Callable[[Tensor, Tensor], Any], inside: bool) -> None:
    """What was made without a gradient has one from then on."""

    class Buffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if not inside:
                return h
            self.buffer = torch.zeros(len(x), 5)
            write(self.buffer, h)
            self.buffer.retain_grad()
            return self.last(self.buffer.tanh())

    def kept(model: Any, x: Tensor) -> Tensor | None:
        out = model(x)
        if inside:
            out.square().sum().backward()
            return model.buffer.grad
        buffer = torch.zeros_like(out)
        write(buffer, out)
        buffer.retain_grad()
        F.mse_loss(buffer.view(-1), torch.ones(buffer.numel())).backward()
        return buffer.grad

    torch.manual_seed(0)
    model, x = Buffer(), torch.randn(3, 4)
    expected = kept(model, x)
    extend(model)
    for ext in (E.BatchGrad(), E.DiagGGNExact(), E.DiagHessian()):
        with backpack(ext):
            torch.testing.assert_close(kept(model, x), expected)


def test_models_in_blocks_around_training() -> None:
    """What is noted of a block's operations does not grow with it."""
    model = extend(nn.Linear(4, 3))
    with backpack(E.BatchL2Grad()) as block:
        for _ in range(2000):
            F.cross_entropy(model(torch.randn(2, 4)), torch.tensor([0, 1])).backward()
        (here,) = block._blocks
        assert len(here.made) <= 2048
