"""What else sees the calls of a forward pass (torch-function modes, subclasses) sees all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from backpack import backpack, extend
from backpack.extensions import BatchGrad


class Seeing(TorchFunctionMode):
    """Notes the names of all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Doubling(TorchFunctionMode):
    """Doubles what ``relu`` gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 2 * out if getattr(func, "__name__", "") == "relu" else out


class Model(nn.Module):
    """Built-in functions and some written in Python, shapes, slices, and a mode of its own."""

    def __init__(self, own: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(3, 2)
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        with self.own():
            h = torch.relu(self.first(x))
            h = self.norm(h).view(x.shape[0], 2, 3)[:, 0]
            h = F.dropout(h + 1, 0.0)
        return self.last(h.reshape(-1, 3))


def _model(own: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Model:
    torch.manual_seed(0)
    return Model(own).double()


X = torch.rand(5, 4, dtype=torch.float64)


def _compare(model: Model, outside: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Compare the gradients of samples that a block left with a loop over samples."""
    for p in model.parameters():
        rows = []
        for n in range(len(X)):
            with outside():
                loss = model(X[n : n + 1]).square().sum()
            rows.append(torch.autograd.grad(loss, p)[0])
        torch.testing.assert_close(BatchGrad.of(p), torch.stack(rows))


PLACES = ("around the block", "within the block", "within forward")


@pytest.mark.parametrize("place", PLACES)
def test_a_mode_sees_the_calls_of_forward(place: str) -> None:
    plain, seeing = Seeing(), Seeing()
    model = _model((lambda: plain) if place == PLACES[2] else nullcontext)
    with plain if place != PLACES[2] else nullcontext():
        model(X)
    extended = extend(_model((lambda: seeing) if place == PLACES[2] else nullcontext))
    with seeing if place == PLACES[0] else nullcontext(), backpack(BatchGrad()):
        with seeing if place == PLACES[1] else nullcontext():
            out = extended(X)
        out.square().sum().backward()
    expected = [name for name in plain.calls if name != "__get__"]
    rest = iter(seeing.calls)
    assert expected
    assert all(name in rest for name in expected)  # in this order


@pytest.mark.parametrize("place", PLACES)
def test_a_mode_may_change_what_comes_out(place: str) -> None:
    model = extend(_model(Doubling if place == PLACES[2] else nullcontext))
    with Doubling() if place == PLACES[0] else nullcontext(), backpack(BatchGrad()):
        with Doubling() if place == PLACES[1] else nullcontext():
            out = model(X)
        out.square().sum().backward()
    twin = _model(Doubling if place == PLACES[2] else nullcontext)
    with nullcontext() if place == PLACES[2] else Doubling():
        torch.testing.assert_close(out, twin(X))
    _compare(model, nullcontext if place == PLACES[2] else Doubling)


class Tagged(Tensor):
    """A subclass whose results are counted."""

    count = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.count += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_sees_its_calls() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3).double()
            self.shift = torch.ones(3, dtype=torch.float64).as_subclass(Tagged)

        def forward(self, x: Tensor) -> Tensor:
            return torch.add(self.layer(x), self.shift).relu()

    torch.manual_seed(0)
    plain = Adds()
    Tagged.count = 0
    assert isinstance(plain(X), Tagged)
    expected, Tagged.count = Tagged.count, 0
    model = extend(plain)
    with backpack(BatchGrad()):
        out = model(X)
        assert Tagged.count >= expected > 0
        assert isinstance(out, Tagged)
        out.square().sum().backward()
    h = model.layer(X).detach() + 1
    torch.testing.assert_close(BatchGrad.of(model.layer.bias), 2 * h * (h > 0))


def test_derivatives_inside_of_forward_are_seen() -> None:
    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            energy = self.last(self.first(x).tanh())
            return torch.autograd.grad(energy.sum(), x, create_graph=True)[0]

    torch.manual_seed(0)
    model = extend(Force().double())
    with backpack(BatchGrad()):
        model(X).square().sum().backward()
    for p in [model.first.weight, model.first.bias, model.last.weight]:
        rows = [torch.autograd.grad(model(X[n : n + 1]).square().sum(), p)[0] for n in range(len(X))]
        torch.testing.assert_close(BatchGrad.of(p), torch.stack(rows))
