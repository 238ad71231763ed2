"""Which input carries the batch, where several may: masks, positions and steps do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import BatchGrad
from tests.cases import Apply, P
from tests.rows import compare

SIZES = [(2, 4), (4, 4), (3, 5), (1, 4)]
D = 5


def _attend(m: Any, mask: Tensor, h: Tensor) -> Tensor:
    scores = (h @ h.mT).masked_fill(~mask, -1e9) if mask.dtype == torch.bool else h @ h.mT + mask
    return m.o((scores.softmax(-1) @ h).mean(1))


def _tokens(f: Callable[..., Tensor], **parts: nn.Module) -> nn.Module:
    return Apply(f, e=nn.Embedding(9, D), w=nn.Embedding(9, D), o=nn.Linear(D, 3), **parts)


def _features(f: Callable[..., Tensor], **parts: Any) -> nn.Module:
    return Apply(f, l=nn.Linear(D, D), o=nn.Linear(D, 3), **parts)


def _ids(*shape: int) -> Tensor:
    return torch.randint(9, shape)


def _sum(m: Any, p: Tensor, x: Tensor) -> Tensor:
    return m.o((m.e(p) + m.w(x)).tanh().mean(1))


# A model of some input and the batch, and these for N samples of T positions.
Case = tuple[Callable[[int], nn.Module], Callable[[int, int], list[Tensor]]]
CASES: dict[str, Case] = {
    "mask": (
        lambda T: _features(lambda m, k, x: _attend(m, k, m.l(x))),
        lambda N, T: [torch.randn(T, T), torch.randn(N, T, D)],
    ),
    "mask of heads": (
        lambda T: _features(lambda m, k, x: _attend(m, k[0, 0], m.l(x))),
        lambda N, T: [torch.randn(1, 1, T, T), torch.randn(N, T, D)],
    ),
    "bool": (
        lambda T: _features(lambda m, k, x: _attend(m, k, m.l(x))),
        lambda N, T: [torch.ones(T, T).bool().tril(), torch.randn(N, T, D)],
    ),
    "learned mask": (
        lambda T: _features(lambda m, k, x: m.o(((m.a * k) @ m.l(x)).mean(1)), a=P(T, T)),
        lambda N, T: [torch.randn(T, T), torch.randn(N, T, D)],
    ),
    "mask of ids": (
        lambda T: _tokens(lambda m, k, x: _attend(m, k, m.w(x))),
        lambda N, T: [torch.randn(T, T), _ids(N, T)],
    ),
    "positions": (lambda T: _tokens(_sum), lambda N, T: [torch.arange(T), _ids(N, T)]),
    "positions of one": (lambda T: _tokens(_sum), lambda N, T: [torch.arange(T)[None], _ids(N, T)]),
    "positions of all": (
        lambda T: _tokens(_sum),
        lambda N, T: [torch.arange(T).repeat(N, 1), _ids(N, T)],
    ),
    "step": (
        lambda T: _features(lambda m, t, x: m.o((m.a(t) + m.l(x)).tanh()), a=nn.Linear(1, D)),
        lambda N, T: [torch.randn(1), torch.randn(N, D)],
    ),
    "time": (
        lambda T: _features(lambda m, t, x: m.o((t + m.l(x)).tanh())),
        lambda N, T: [torch.tensor(0.5), torch.randn(N, D)],
    ),
    "times": (
        lambda T: _features(lambda m, t, x: m.o((t[:, None] + m.l(x)).tanh())),
        lambda N, T: [torch.randn(N), torch.randn(N, D)],
    ),
    "padding": (
        lambda T: _features(lambda m, k, x: m.o((m.l(x).tanh() * k[..., None]).mean(1))),
        lambda N, T: [torch.rand(N, T) > 0.5, torch.randn(N, T, D)],
    ),
    "states": (
        lambda T: _tokens(lambda m, x, h: m.o((m.e(x) + h.sum(0)).tanh())),
        lambda N, T: [_ids(N), torch.randn(2, N, D)],
    ),
    "state": (
        lambda T: _tokens(lambda m, x, h: m.o((m.e(x) + h[0]).tanh())),
        lambda N, T: [_ids(N), torch.randn(1, N, D)],
    ),
    "table": (
        lambda T: _features(lambda m, x, t: m.o((m.l(x) @ t.T @ t).tanh())),
        lambda N, T: [torch.randn(N, D), torch.randn(7, D)],
    ),
    "edges": (
        lambda T: _features(lambda m, x, e: m.o(m.l(x).tanh().index_add(0, e[0], x[e[1]]))),
        lambda N, T: [torch.randn(N, D), torch.randint(N, (2, 6))],
    ),
}


@pytest.mark.parametrize("N, T", SIZES)
@pytest.mark.parametrize("name", [name for name in CASES if name != "edges"])
def test_the_batch_is_found(name: str, N: int, T: int) -> None:
    make, data = CASES[name]
    torch.manual_seed(0)
    compare(make(T), data(N, T))


@pytest.mark.parametrize("N, T", SIZES)
def test_by_name(N: int, T: int) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.o = nn.Embedding(9, D), nn.Linear(D, 3)

        def forward(self, attention_mask: Tensor, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            h = self.e(input_ids) + self.e(position_ids)
            return self.o((h * attention_mask[..., None]).mean(1))

    ids, positions = _ids(N, T), torch.arange(T)[None]
    model = extend(Network().double())
    output = model(position_ids=positions, attention_mask=torch.ones(N, T), input_ids=ids)
    with backpack(BatchGrad()):
        F.cross_entropy(output, torch.zeros(N, dtype=torch.long)).backward()
    for p in model.parameters():
        assert p.grad_batch.shape == (N, *p.shape)
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)


@pytest.mark.parametrize("N, T", SIZES)
def test_what_shapes_do_not_tell_is_asked_for(N: int, T: int) -> None:
    """Whole numbers beside features: ids of samples as well as positions."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.l = nn.Embedding(9, D), nn.Linear(D, 3)

        def forward(self, where: Tensor, what: Tensor) -> Tensor:
            return self.l((self.e(where) + what).tanh().mean(1))

    model = extend(Network())
    loss = model(torch.arange(T), torch.randn(N, T, D)).sum()
    message = rf"which input carries the batch: of 'where' \({T},\), 'what' \({N}, {T}, {D}\)"
    with pytest.raises(RuntimeError, match=message), backpack(BatchGrad()):
        loss.backward()


def test_edges_first() -> None:
    f = lambda m, e, x: m.o(m.l(x).tanh().index_add(0, e[0], x[e[1]]))  # noqa: E731
    model = extend(_features(f))
    loss = model(torch.randint(4, (2, 6)), torch.randn(4, D)).sum()
    with pytest.raises(RuntimeError, match="cannot tell which input"), backpack(BatchGrad()):
        loss.backward()


def test_an_input_that_is_known_decides() -> None:
    """The output of another extended model."""
    first = extend(nn.Linear(4, D))
    second = extend(_features(lambda m, k, h: _attend(m, k, m.l(h[:, None]))))
    X = torch.randn(3, 4)
    with backpack(BatchGrad()):
        second(torch.randn(1, 1), first(X)).sum().backward()
    for p in (*first.parameters(), *second.parameters()):
        assert p.grad_batch.shape == (3, *p.shape)
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_an_input_that_leads_nowhere_is_asked_about(rows: int, joined: bool) -> None:
    """The output is made from the second input alone, whose rows are not as many as the first's."""

    def forward(m: Any, a: Tensor, b: Tensor) -> Tensor:
        m.l(a).tanh()  # of no consequence
        parts = b.split(3, 1)
        return m.o(torch.cat(parts, 1) if joined else b)

    model = extend(_features(forward))
    loss = F.mse_loss(model(torch.randn(3, D), torch.randn(rows, D)), torch.zeros(rows, 3))
    with pytest.raises(RuntimeError, match="cannot tell which input"), backpack(BatchGrad()):
        loss.backward()
    model = extend(_features(forward), samples=1)
    loss = F.mse_loss(model(torch.randn(3, D), torch.randn(rows, D)), torch.zeros(rows, 3))
    with backpack(BatchGrad()):
        loss.backward()
    for p in model.o.parameters():
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)


ONE_OR_TWO: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "rows": lambda m, a, b: m.o((b / a).expand(2, D)).tanh(),
    "turned": lambda m, a, b: m.o((b / a).expand(2, D)).tanh().t(),
    "first of no use": lambda m, a, b: m.o(b.expand(2, D).repeat_interleave(2, 0))[[1]],
}


@pytest.mark.parametrize("name", ONE_OR_TWO)
def test_one_sample_or_as_many_as_the_second_input_has(name: str) -> None:
    """A first input of one row may be all of a batch of one, or what a batch of two shares."""
    data = torch.randn(1, 1), torch.randn(2, 1)
    model = extend(_features(ONE_OR_TWO[name]))
    with pytest.raises(RuntimeError, match="cannot tell which input"), backpack(BatchGrad()):
        model(*data).sum().backward()
    model = extend(_features(ONE_OR_TWO[name]), samples=1)
    with backpack(BatchGrad()):
        model(*data).square().sum().backward()
    for p in model.o.parameters():
        assert len(p.grad_batch) == 2
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_layers_as_many_as_samples(kind: Any) -> None:
    """States of zeros, whose first axis is that of layers, beside inputs of which one is of no use."""
    forward = lambda m, a, x: m.l(x.reshape(2, 2, 1))[0]  # noqa: E731
    model = extend(Apply(forward, l=kind(1, 4, num_layers=2, batch_first=True)))
    a, x = torch.randn(2, 2, 2, 2), torch.randn(2, 2)
    with backpack(BatchGrad()):
        model(a, x).square().sum().backward()
    found = {n: p.grad_batch.clone() for n, p in model.named_parameters()}
    for n in range(2):
        model.zero_grad()
        model(a, x)[n].square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name][n], p.grad)


@pytest.mark.parametrize("length", [2, 3])
def test_an_input_that_is_not_used(length: int) -> None:
    """As many rows as it has are picked from the other by an index that looks like its samples."""
    picks = torch.tensor([1, 0, 0])
    model = extend(_features(lambda m, a, x: m.o(m.l(x[torch.tensor(picks.tolist())]).tanh())))
    with pytest.raises(RuntimeError, match="which input carries the batch"), backpack(BatchGrad()):
        model(torch.randn(3, length), torch.randn(2, D)).square().sum().backward()


FEATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda x, i: x[:, i],
    "ellipsis": lambda x, i: x[..., i],
    "new axis": lambda x, i: x[:, None, i].squeeze(1),
    "index_select": lambda x, i: x.index_select(1, i),
    "by name": lambda x, i: torch.index_select(x, dim=-1, index=i),
    "gather": lambda x, i: x.gather(1, i.expand(len(x), -1)),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_that_another_input_picks(name: str) -> None:
    """No rows: samples stay where they are."""
    pick = FEATURES[name]
    model = _features(lambda m, x, i: m.o(m.l(pick(x, i)).tanh()))
    model.l = nn.Linear(3, D)
    compare(model, [torch.randn(4, 6), torch.tensor([0, 2, 5])])


PICKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_select": lambda a, i: a.index_select(0, i),
    "index": lambda a, i: a[i],
    "gather": lambda a, i: a.gather(0, i.unsqueeze(1).expand(-1, a.shape[1])),
    "embedding": lambda a, i: F.embedding(i, a),
}


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("name", PICKS)
def test_rows_that_another_input_picks(name: str, square: bool) -> None:
    """A table whose rows are picked by data: either could hold the samples."""
    pick = PICKS[name]
    model = _features(lambda m, a, x: m.o(m.l(pick(a, x[:3].argmax(1) % 3)).tanh()))
    a = torch.randn(3, 3) if square else torch.randn(3, D)
    model.l = nn.Linear(a.shape[1], D)
    extend(model)
    with (
        pytest.raises(RuntimeError, match="rows of one are picked by the other"),
        backpack(BatchGrad()),
    ):
        model(a, torch.randn(4, D)).square().sum().backward()
