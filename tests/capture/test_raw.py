"""Inputs that are permuted, picked or mixed before any parameter; batches of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import (
    KFLR,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    EmpiricalKFAC,
    SqrtGGNExact,
    Variance,
)
from backpack.testing.oracle import check
from tests.cases import Apply, P
from tests.rows import compare

N = 3
PERM = torch.tensor([2, 0, 1])
SAME = [0, 1, 2]


def _assigned(x: Tensor, index: Any, rows: Tensor) -> Tensor:
    x = x.clone()
    x[index] = rows
    return x


# Inputs that are moved: the samples that rows belong to.
MOVED: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    "flip": (lambda x: x.flip(0), [2, 1, 0]),
    "roll": (lambda x: x.roll(1, 0), [2, 0, 1]),
    "unbind": (lambda x: torch.stack(x.unbind(0)[::-1]), [2, 1, 0]),
    "rows": (lambda x: torch.stack([x[i] for i in (2, 0, 1)]), [2, 0, 1]),
    "cat": (lambda x: torch.cat([x[1:], x[:1]]), [1, 2, 0]),
    "picked": (lambda x: x[PERM], [2, 0, 1]),
    "repeated": (lambda x: x[[1, 1, 0]], [1, 1, 0]),
    "gather": (lambda x: x.gather(0, PERM[:, None].expand(N, 4)), [2, 0, 1]),
    "there and back": (lambda x: x[PERM][PERM.argsort()], SAME),
    "sorted": (lambda x: x[(i := x[:, 0].argsort())][i.argsort()], SAME),
    "copied": (lambda x: torch.zeros_like(x).copy_(x.flip(0)), [2, 1, 0]),
    "overwritten": (lambda x: x.clone().copy_(x.flip(0)), [2, 1, 0]),
    "assigned": (lambda x: _assigned(x, slice(None), x.flip(0)), [2, 1, 0]),
    "shifted": (lambda x: _assigned(x, slice(1, None), x[:-1]), [0, 0, 1]),
    "row assigned": (lambda x: _assigned(x, 2, x[0]), [0, 1, 0]),
    "row copied": (lambda x: x.index_copy(0, torch.tensor([2]), x[:1]), [0, 1, 0]),
    "row scattered": (lambda x: x.select_scatter(x[0], 0, 2), [0, 1, 0]),
    "rows scattered": (lambda x: x.slice_scatter(x[1:2], 0, 0, 1), [1, 1, 2]),
}
# Inputs that are mixed, but have a row for each sample.
MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "mixup": lambda x: 0.3 * x + 0.7 * x[PERM],
    "difference": lambda x: x - x[PERM],
    "centred": lambda x: x - x.mean(0),
    "standardised": lambda x: (x - x.mean(0)) / x.std(0),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "normalize": lambda x: F.normalize(x, dim=0),
    "softmax": lambda x: x.softmax(0),
    "cumsum": lambda x: x.cumsum(0),
    "sort": lambda x: x.sort(0)[0],
    "graph": lambda x: (x @ x.t()).softmax(1) @ x,
    "statistics": lambda x: x.mean(0, keepdim=True).expand(N, 4),
    "in place": lambda x: x.clone().sub_(x.flip(0)),
    "fft": lambda x: torch.fft.fft(x, dim=0).real,
}


def _first(f: Callable[[Tensor], Tensor]) -> nn.Module:
    return Apply(lambda m, x: m.o(m.l(f(x)).tanh()), l=nn.Linear(4, 4), o=nn.Linear(4, 3))


@pytest.mark.parametrize("name", MOVED)
def test_inputs_that_moved(name: str) -> None:
    f, owners = MOVED[name]
    compare(_first(f), [torch.randn(N, 4)], owners)


@pytest.mark.parametrize("name", MOVED)
def test_second_inputs_that_moved(name: str) -> None:
    """Of an input that is a guess because another comes first."""
    f, owners = MOVED[name]
    layers = {"l": nn.Linear(4, 4), "o": nn.Linear(4, 3)}
    model = Apply(lambda m, _, x: m.o(m.l(f(x)).tanh()), **layers)
    compare(model, [torch.randn(N, 2, 2), torch.randn(N, 4)], owners)


@pytest.mark.parametrize("name", MIXED)
def test_inputs_that_were_mixed(name: str) -> None:
    compare(_first(MIXED[name]), [torch.randn(N, 4)])


class Turned(nn.Module):
    """A second input goes through a cell in another order, and back; the cell makes its own state."""

    def __init__(self, cell: nn.Module, pick: int) -> None:
        super().__init__()
        self.o, self.pick = nn.Linear(4, 3), pick
        self.__dict__["cell"] = cell.double().requires_grad_(False)  # no part of the model

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h = self.cell(z.flip(0))
        h = (h[0] if isinstance(h, tuple) else h).flip(0)
        return self.o(h[[self.pick, 0, 2]])


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_a_second_input_through_frozen_cells(cell: Any) -> None:
    compare(Turned(cell(4, 4), 1), [torch.randn(N, 4), torch.randn(N, 4)], [1, 0, 2])


@pytest.mark.parametrize("name", [*MOVED, *MIXED])
def test_added_to_hidden_features(name: str) -> None:
    """What needs no gradient is a constant there, whosesoever it is."""
    f = MOVED[name][0] if name in MOVED else MIXED[name]
    model = Apply(lambda m, x: m.o((m.l(x) * f(x) + f(x)).tanh()), l=nn.Linear(4, 4), o=nn.Linear(4, 3))
    compare(model, [torch.randn(N, 4)])


class Cell(nn.Module):
    """The state is made by a factory, which must not say where samples are."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.cell, self.o = nn.Linear(4, 4), nn.GRUCell(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.cell(self.l(x.flip(0)))[[2, 1, 0]])


def test_a_state_made_by_a_factory() -> None:
    compare(Cell(), [torch.randn(N, 4)])


ROWS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "layers": lambda m, x: torch.stack([m.o(m.l(row).tanh()) for row in x]),
    "unbind": lambda m, x: m.o(torch.stack([m.l(row).tanh() for row in x.unbind(0)])),
    "hidden": lambda m, x: torch.stack([m.o(row.tanh()) for row in m.l(x)]),
    "parts": lambda m, x: torch.cat([m.o(m.l(part).tanh()) for part in x.split(1)]),
    "numbers": lambda m, x: torch.stack(
        [torch.stack([(m.l(r) * m.w[j]).sum() for j in SAME]) for r in x]
    ),
    "images": lambda m, x: torch.stack([m.o(m.c(r.view(1, 2, 2)).tanh().flatten()) for r in x]),
    "convolution": lambda m, x: m.o(torch.cat([m.c(r.view(1, 2, 2))[None] for r in x]).flatten(1)),
}


@pytest.mark.parametrize("n", [3, 1])
@pytest.mark.parametrize("name", ROWS)
def test_loops_over_samples(name: str, n: int) -> None:
    parts = {"l": nn.Linear(4, 4), "c": nn.Conv2d(1, 4, 2), "o": nn.Linear(4, 3), "w": P(3)}
    compare(Apply(ROWS[name], **parts), [torch.randn(n, 4)])


CONSTANTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "row": lambda m, x: m.l(x) + m.k(x[0]),
    "mean": lambda m, x: m.l(x) + m.k(x.mean(0)),
    "gate": lambda m, x: m.l(x) * (m.w * x.mean(0)),
    "covariance": lambda m, x: m.l(x) @ (x.t() @ x),
    "learned covariance": lambda m, x: m.l(x) @ (m.w * (x.t() @ x)),
    "detached": lambda m, x: m.l(x) - m.l(x).detach().mean(0),
    "number": lambda m, x: m.l(x) * (m.w * x.sum()),
}


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("name", CONSTANTS)
def test_what_all_samples_look_at(name: str, size: int) -> None:
    """Also where there are as many features as samples."""
    if name == "learned covariance" and size == N:
        size = 5
    layers = {"l": nn.Linear(size, size), "k": nn.Linear(size, size), "o": nn.Linear(size, 3)}
    model = Apply(lambda m, x: m.o(CONSTANTS[name](m, x).tanh()), w=P(size), **layers)
    compare(model, [torch.randn(N, size)])


def test_lost_rows_that_meet_a_parameter() -> None:
    model = extend(Apply(lambda m, x: m.l(x.t() @ x), l=nn.Linear(4, 4)))
    loss = model(torch.randn(N, 4)).sum()
    message = "'l.weight'.*lost first at matmul: a product over the sample axis"
    with pytest.raises(RuntimeError, match=message), backpack(BatchGrad()):
        loss.backward()


# --------------------------------------------------------------------------------------
# One sample: nothing can be mixed

QUANTITIES = (BatchGrad(), BatchL2Grad(), Variance(), DiagGGNExact(), SqrtGGNExact(), DiagHessian())
ONE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "squeeze": lambda m, x: m.o(m.l(x.squeeze(0)).tanh())[None],
    "mean": lambda m, x: m.o(m.l(x).tanh().mean(0, True)),
    "row": lambda m, x: m.o(m.l(x)[0][None].tanh()),
    "unbatched": lambda m, x: m.o(m.l(x[0]).tanh())[None],
    "flatten": lambda m, x: m.o(m.l(x.flatten()).tanh())[None],
    "sum": lambda m, x: (m.l(x).square().sum() * m.w).reshape(1, 3),
    "softmax": lambda m, x: m.o(m.l(x).softmax(0) * m.l(x).tanh()),
    "cumsum": lambda m, x: m.o(m.l(x).tanh().cumsum(0)),
    "product": lambda m, x: (m.o.weight @ m.l(x).tanh().t()).t(),
    "einsum": lambda m, x: torch.einsum("na,ba->b", m.l(x).tanh(), m.o.weight)[None],
    "gram": lambda m, x: m.o((m.l(x).t() @ m.l(x)).tanh().mean(0, True)),
    "flip": lambda m, x: m.o(m.l(x).tanh().flip(0)),
    "attention": lambda m, x: m.o(F.scaled_dot_product_attention(*[m.l(x).tanh()] * 3)),
    "norm": lambda m, x: m.o(F.layer_norm(m.l(x), (1, 4), m.b).tanh()),
    "convolution": lambda m, x: m.o(m.c(x.view(1, 2, 2)).tanh().flatten())[None],
    "states": lambda m, x: m.o(m.r(m.l(x).tanh())[0].tanh())[:1],
    "in place": lambda m, x: m.o(m.l(x).tanh().clone().sub_(m.l(x).mean(0))),
}


@pytest.mark.parametrize("name", ONE)
def test_one_sample(name: str) -> None:
    torch.manual_seed(0)
    layers = {"l": nn.Linear(4, 4), "o": nn.Linear(4, 3), "c": nn.Conv2d(1, 4, 2), "r": nn.RNN(4, 4)}
    model = Apply(ONE[name], w=P(3), b=P(1, 4), **layers)
    X = torch.randn(1, 4)
    used = torch.autograd.grad(model(X).sum(), list(model.parameters()), allow_unused=True)
    for p, g in zip(model.parameters(), used, strict=True):
        p.requires_grad_(g is not None)
    quantities = [ext for ext in QUANTITIES if name != "attention" or not isinstance(ext, DiagHessian)]
    report = check(model, nn.MSELoss(), X, torch.zeros(1, 3).double(), quantities)
    assert report.ok, f"\n{report}"


def test_one_sample_without_an_axis() -> None:
    """All rows of the output are those of the sample."""
    model = Apply(lambda m, x: m.o(m.l(x.view(5, 4)).tanh()), l=nn.Linear(4, 4), o=nn.Linear(4, 3))
    compare(model, [torch.randn(1, 5, 4)], [0] * 5, samples=1)


@pytest.mark.parametrize("ext", [KFLR, EmpiricalKFAC])
def test_factors_of_an_unbatched_layer(ext: type) -> None:
    torch.manual_seed(0)
    layers = {"c": nn.Conv2d(1, 4, 2), "l": nn.Linear(4, 4), "o": nn.Linear(4, 3)}

    def alone(m: Any, x: Tensor) -> Tensor:
        return m.o(m.l(m.c(x[0]).tanh().flatten()).tanh())[None]

    def batched(m: Any, x: Tensor) -> Tensor:
        return m.o(m.l(m.c(x).tanh().flatten(1)).tanh())

    X, y, found = torch.randn(1, 1, 2, 2), torch.tensor([1]), []
    for f in (alone, batched):
        model, lossfunc = extend(Apply(f, **layers)), extend(nn.CrossEntropyLoss())
        with backpack(ext()):
            lossfunc(model(X), y).backward()
        found.append([factor for p in model.parameters() for factor in getattr(p, ext.savefield)])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there)


ROWS_OF_ITSELF: dict[str, Callable[[Tensor], Tensor]] = {
    "diagonal_scatter": lambda c: c.diagonal_scatter(2 * c.diagonal()),
    "cat": lambda c: torch.cat([2 * c[:, :1], c[:, 1:]], 1),
    "cat of picked": lambda c: torch.cat([c[:, 1:], c[:, :1]], 1).roll(1, 1),
    "stack": lambda c: torch.stack([2 * each for each in c.unbind(1)], 1),
    "select_scatter": lambda c: c.select_scatter(2 * c.select(1, 0), 1, 0),
}


@pytest.mark.parametrize("name", ROWS_OF_ITSELF)
@pytest.mark.parametrize("rows", [1, 2])
def test_rows_of_a_second_input_beside_the_others(rows: int, name: str) -> None:
    """What is picked from a guess is no less of a guess."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(rows, 2)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return self.l(ROWS_OF_ITSELF[name](c).T)

    model, lossfunc = extend(Model(), batch_dim=1), nn.MSELoss(reduction="sum")
    X, C, y = torch.randn(N, N, 2), torch.randn(rows, N), torch.randn(N, 2)
    with backpack(BatchGrad()):
        lossfunc(model(X.transpose(0, 1), C), y).backward()
    f = model(X.transpose(0, 1), C).detach()
    torch.testing.assert_close(model.l.bias.grad_batch, 2 * (f - y))


class Codes(nn.Module):
    """Features of all samples together choose the words of each."""

    def __init__(self, mixes: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mixes = mixes
        self.features, self.table = nn.Linear(2, 3), nn.Embedding(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(self.mixes(self.features(x)).argmax(1)))


@pytest.mark.parametrize(
    "mixes",
    [lambda h: h.softmax(0), lambda h: h.T @ h, lambda h: h.flatten().roll(1).reshape(3, 3)],
    ids=["softmax", "gram", "roll"],
)
def test_whole_numbers_of_features_that_were_mixed(mixes: Callable[[Tensor], Tensor]) -> None:
    """As many rows as there are samples do not make them theirs."""
    model, X, y = extend(Codes(mixes).double()), torch.randn(N, 2).double(), torch.arange(N)
    with pytest.raises(RuntimeError, match="mixes samples|holds the samples"), backpack(BatchGrad()):
        F.cross_entropy(model(X), y).backward()
    model.mixes = lambda h: h.softmax(1)
    with backpack(BatchGrad()):
        F.cross_entropy(model(X), y).backward()
    torch.testing.assert_close(model.table.weight.grad_batch.sum(0), model.table.weight.grad)
