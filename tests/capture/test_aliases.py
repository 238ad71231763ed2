"""Writes in place through views and other aliases: all tensors of the same memory learn of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack._ambient import ambient
from backpack.extensions import BatchGrad
from backpack.samples.axis import MARK
from tests.cases import Apply
from tests.rows import compare


def _written(f: Callable[[Tensor], Any]) -> nn.Module:
    """``f`` writes to hidden features; its result is not used."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.l(x).clone()
        f(h)
        return m.o(h.tanh())

    return Apply(forward, l=nn.Linear(4, 4), o=nn.Linear(4, 3))


def _made(f: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    return Apply(lambda m, x: m.o(f(m.l(x), x).tanh()), l=nn.Linear(4, 4), o=nn.Linear(4, 3))


# Rows of other samples are added: no row belongs to one sample.
MIXING: dict[str, Callable[[Tensor], Any]] = {
    "slice": lambda h: h[1:].add_(h[:-1].clone()),
    "flat": lambda h: h.view(-1)[:4].add_(h.view(-1)[-4:].clone()),
    "row": lambda h: h[0].add_(h[1].clone()),
    "select": lambda h: h.select(0, 0).mul_(h.select(0, 1).clone()),
    "transposed": lambda h: h.t().cumsum_(1),
    "whole": lambda h: (h[1:], h.sub_(h.mean(0))),
    "view_as": lambda h: h.view_as(h).add_(h.flip(0).clone()),
    "unsqueezed": lambda h: h.unsqueeze(0).lerp_(h.flip(0).clone(), 0.5),
    "diagonal": lambda h: h.diagonal().add_(h.diagonal().flip(0).clone()),
    "assigned": lambda h: h.t().__setitem__((slice(None), 0), h.mean(0)),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_base_is_not_what_it_was(name: str) -> None:
    model = extend(_written(MIXING[name]))
    loss = F.mse_loss(model(torch.randn(4, 4)), torch.zeros(4, 3))
    message = "cannot tell which axis .*'o.weight'"
    with pytest.raises(RuntimeError, match=message), backpack(BatchGrad()):
        loss.backward()


def test_siblings_are_not_what_they_were() -> None:
    def f(m: Any, x: Tensor) -> Tensor:
        h = m.l(x).clone()
        before, other = h[:], h.view(4, 2, 2)
        other[1:].add_(other[:-1].clone())
        return m.o(before.tanh())

    model = extend(Apply(f, l=nn.Linear(4, 4), o=nn.Linear(4, 3)))
    loss = model(torch.randn(4, 4)).sum()
    with pytest.raises(RuntimeError, match="cannot tell which axis"), backpack(BatchGrad()):
        loss.backward()


# Rows are overwritten by rows: the samples that rows of the result belong to.
MOVING: dict[str, tuple[Callable[[Tensor], Any], list[int]]] = {
    "narrow": (lambda h: h.narrow(0, 1, 3).copy_(h.narrow(0, 0, 3).clone()), [0, 0, 1, 2]),
    "flipped": (lambda h: h.view_as(h).copy_(h.flip(0).clone()), [3, 2, 1, 0]),
    "row": (lambda h: h[0].copy_(h[1].clone()), [1, 1, 2, 3]),
    "flat": (lambda h: h.view(-1)[:4].copy_(h.view(-1)[-4:].clone()), [3, 1, 2, 3]),
    "assigned": (lambda h: h[:2].__setitem__(0, h[2].clone()), [2, 1, 2, 3]),
}


@pytest.mark.parametrize("name", MOVING)
def test_rows_that_moved(name: str) -> None:
    f, owners = MOVING[name]
    compare(_written(f), [torch.randn(4, 4)], owners)


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("sibling", [False, True])
def test_rows_of_a_second_input_that_moved(name: str, sibling: bool) -> None:
    """Whose samples are a guess: rows to which nothing was written keep their own."""
    write, owners = MOVING[name]

    def forward(m: Any, a: Tensor, x: Tensor) -> Tensor:
        h = m.l(x).clone()
        other = h.view(h.shape)
        write(h)
        return m.o((other if sibling else h).unsqueeze(1).tanh()).squeeze(1)

    model = Apply(forward, l=nn.Linear(4, 4), o=nn.Linear(4, 3))
    compare(model, [torch.randn(4, 2, 2, 2), torch.randn(4, 4)], owners)


def _no_grad(f: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return torch.no_grad()(f)


# Every entry stays with its sample.
KEEPING: dict[str, Callable[[Tensor], Any]] = {
    "column": lambda h: h[:, 0].add_(h[:, 1]),
    "own": lambda h: h[1:].mul_(h[1:].clone()),
    "relu_": lambda h: torch.relu_(h[1:]),
    "relu": lambda h: F.relu(h[1:], inplace=True),
    "dropout": lambda h: F.dropout(h, 0.0, True, inplace=True),
    "constant": lambda h: h[0].mul_(2),
    "diagonal": lambda h: h.diagonal().copy_(h.clone()[:, 0]),
    # What autograd does not see leaves every row its gradient.
    "detach": lambda h: h.detach()[1:].copy_(h.detach()[:-1].clone()),
    "data": lambda h: h.data.copy_(h.data.flip(0)),
    "no_grad": _no_grad(lambda h: h[1:].copy_(h[:-1].clone())),
    "data-column": lambda h: h.t().detach()[0].add_(1),
}


@pytest.mark.parametrize("name", KEEPING)
def test_rows_that_stayed(name: str) -> None:
    compare(_written(KEEPING[name]), [torch.randn(4, 4)])


def test_writes_that_keep_rows_are_cheap() -> None:
    def f(h: Tensor) -> None:
        view = h[1:]
        h.mul_(2)
        h[:, 0] += h[:, 1]
        view.mul_(2).add_(view)
        assert not ambient.written

    compare(_written(f), [torch.randn(4, 4)])


def _through_views(h: Tensor, x: Tensor) -> Tensor:
    b = x.new_zeros(2, len(h), 4)
    b[0].copy_(h)
    b[1].copy_(h.sin())
    return b.sum(0)


def _interleaved(h: Tensor, x: Tensor) -> Tensor:
    b = torch.zeros(2 * len(h), 4).to(h)
    b[::2].copy_(h)
    b[1::2].copy_(h.sin())
    return b.view(len(h), 2, 4).sum(1)


def _by_parts(h: Tensor, x: Tensor) -> Tensor:
    b = torch.zeros(len(h), 4).to(h)
    b[:2].copy_(h[:2])
    b[2:].copy_(h[2:])
    return b


def _out(h: Tensor, x: Tensor) -> Tensor:
    b = torch.zeros(len(h), 4).to(h)
    torch.mul(x, 2, out=b)
    return b * h


def _set(h: Tensor, x: Tensor) -> Tensor:
    b = torch.zeros(1).to(h)
    b.set_(x)
    return b * h


def _data(h: Tensor, x: Tensor) -> Tensor:
    b = torch.zeros(1).to(h)
    b.data = x * 2
    return b * h


BUFFERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "transposed": lambda h, x: (b := x.new_zeros(4, len(h)), b.t().copy_(h))[0].t(),
    "flat": lambda h, x: (b := x.new_zeros(len(h), 4), b.view(-1).copy_(h.flatten()))[0],
    "unbound": _through_views,
    "interleaved": _interleaved,
    "by parts": _by_parts,
    "out": _out,
    "set_": _set,
    "data": _data,
}


@pytest.mark.parametrize("n", [4, 3, 1])
@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_that_are_filled(name: str, n: int) -> None:
    compare(_made(BUFFERS[name]), [torch.randn(n, 4)])


def test_a_buffer_with_as_many_rows_as_columns() -> None:
    """Its rows are features, whatever their number."""
    model = extend(_made(lambda h, x: (b := x.new_zeros(4, 4), b.t().copy_(h))[0]))
    loss = model(torch.randn(4, 4)).sum()
    with pytest.raises(RuntimeError, match="cannot tell which axis"), backpack(BatchGrad()):
        loss.backward()


def test_rows_of_inputs_written_to_others() -> None:
    def f(h: Tensor, x: Tensor) -> Tensor:
        b = torch.zeros(4, 4).to(h)
        torch.flip(x, (0,)).t_()
        b.t().copy_(x.flip(0).t())
        return b

    model = Apply(lambda m, x: m.o(f(x, x).tanh()), o=nn.Linear(4, 3))
    compare(model, [torch.randn(4, 4)], [3, 2, 1, 0])


@pytest.mark.parametrize("write", [torch.relu_, lambda x: F.relu(x, inplace=True), Tensor.contiguous])
def test_nothing_is_left_on_inputs(write: Callable[[Tensor], Any]) -> None:
    """The next model may have its samples on another axis."""

    def f(m: Any, x: Tensor, bias: Tensor) -> Tensor:
        write(x)
        bias.add_(x.mean(0))
        return m.l(x + bias)

    X, bias = torch.randn(3, 3), torch.zeros(3)
    model = extend(Apply(f, l=nn.Linear(3, 3)))
    with backpack(BatchGrad()):
        model(X, bias).sum().backward()
    assert not hasattr(X, MARK) and not hasattr(bias, MARK)
    other = extend(Apply(lambda m, x: m.l(x.t()), l=nn.Linear(3, 3)), batch_dim=1)
    with backpack(BatchGrad()):
        other(X).sum().backward()
    torch.testing.assert_close(other.l.weight.grad_batch[1], X[:, 1].expand(3, 3))


def test_nothing_is_left_on_buffers() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(3, 3)
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("bank", torch.zeros(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.mul_(0.9).add_(x.mean(0))
            self.bank.t().copy_(x.t())
            return self.l(x - self.mean) + self.bank

    model = extend(Memory())
    with backpack(BatchGrad()):
        model(torch.randn(3, 3)).sum().backward()
    assert not hasattr(model.mean, MARK) and not hasattr(model.bank, MARK)
    assert not ambient.written and not ambient.axes


def test_values_of_parameters_are_no_data() -> None:
    """Initialised by the first batch."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.shift, self.scale = nn.Linear(4, 4), nn.Parameter(P), nn.Parameter(P + 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.shift.copy_(x.mean(0))
                self.scale.data.copy_(x.std(0))
            return self.l((x - self.shift) * self.scale)[:, :3]

    P = torch.zeros(4)
    compare(Norm(), [torch.randn(3, 4)])
