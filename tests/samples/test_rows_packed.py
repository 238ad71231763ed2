"""Packed sequences in the ways in which they are made; ``test_rows.py`` compares all quantities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_sequence

from backpack import backpack, extend, mark
from backpack.extensions import KFAC, BatchGrad
from tests.cases import Apply
from tests.row_cases import LENGTHS, TOKENS

SEQUENCES = list(TOKENS.split(LENGTHS))
PACKED = pack_sequence(SEQUENCES, enforce_sorted=False)
PADDED = pad_sequence(SEQUENCES, batch_first=True)
# Two sequences are one user's.
USERS = torch.tensor([1, 0, 1])


def _last(m: Any, packed: Any, *states: Any) -> Tensor:
    return m.o(m.r(packed, *states)[1][-1])


def _gru(f: Callable[..., Tensor], **parts: Any) -> nn.Module:
    return Apply(f, r=nn.GRU(3, 2), o=nn.Linear(2, 2), **parts)


# A model, its inputs, and options of ``extend``.
Case = tuple[Callable[[], nn.Module], list[Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "packed inside": (
        lambda: _gru(lambda m, xs: _last(m, pack_sequence(xs, enforce_sorted=False))),
        *([SEQUENCES], {"samples": 0}),
    ),
    "embedded, then packed": (
        lambda: _gru(
            lambda m, xs: _last(m, pack_sequence([m.e(x).tanh() for x in xs], enforce_sorted=False)),
            e=nn.Linear(3, 3),
        ),
        *([SEQUENCES], {"samples": 0}),
    ),
    "padded inside": (
        lambda: _gru(lambda m, xs: m.o(m.r(pad_sequence(xs))[0].sum(0))),
        *([SEQUENCES], {"samples": 0}),
    ),
    "steps first": (
        lambda: _gru(
            lambda m, x, n: _last(m, pack_padded_sequence(m.e(x), n, enforce_sorted=False)),
            e=nn.Linear(3, 3),
        ),
        *([PADDED.transpose(0, 1), torch.tensor(LENGTHS)], {"batch_dim": 1}),
    ),
    "sorted": (lambda: _gru(_last), [pack_sequence([SEQUENCES[n] for n in (2, 0, 1)])], {}),
    "first states": (
        lambda: _gru(lambda m, p, h: _last(m, p, m.i(h)[None]), i=nn.Linear(3, 2)),
        *([PACKED, TOKENS[:3]], {}),
    ),
    "learned first state": (
        lambda: _gru(
            lambda m, p: _last(m, p, m.h.expand(1, 3, 2).contiguous()),
            h=nn.Parameter(torch.randn(1, 1, 2)),
        ),
        *([PACKED], {}),
    ),
    "of one step": (
        lambda: _gru(_last),
        *([pack_sequence([x[:1] for x in SEQUENCES], enforce_sorted=False)], {}),
    ),
    "alone": (lambda: _gru(_last), [pack_sequence(SEQUENCES[2:])], {}),
    "users": (lambda: _gru(_last), [PACKED], {"samples": lambda p: (p.data, _users(p))}),
}


def _users(packed: PackedSequence) -> Tensor:
    """The user of each row of the data."""
    order = USERS[packed.sorted_indices]
    return torch.cat([order[:count] for count in packed.batch_sizes])


def truth(model: nn.Module, output: Tensor, y: Tensor) -> dict[str, Tensor]:
    losses = F.cross_entropy(output, y, reduction="none") / len(y)
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [torch.autograd.grad(each, parameters, retain_graph=True) for each in losses]
    return {name: torch.stack(each) for name, each in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_individual_gradients(name: str) -> None:
    make, inputs, options = CASES[name]
    torch.manual_seed(0)
    model = make().double()
    output = model(*inputs)
    y = torch.tensor([0, 1, 0])[: len(output)]
    expected = truth(model, output, y)
    extend(model, **options)
    with backpack(BatchGrad()):
        F.cross_entropy(model(*inputs), y).backward()
    for key, p in model.named_parameters():
        value = expected[key]
        if name == "users":
            value = value.new_zeros(2, *p.shape).index_add(0, USERS, value)
        torch.testing.assert_close(p.grad_batch, value)


def test_padding_counts_for_nothing() -> None:
    """Factors are those of sequences of their own lengths, however long the longest one is."""
    model = extend(_gru(_last).double())
    factors = []
    for xs in (SEQUENCES[:1], [SEQUENCES[0], torch.zeros(50, 3).double()]):
        with backpack(KFAC()):
            _last(model, pack_sequence(xs, enforce_sorted=False))[0].square().sum().backward()
        factors.append(len(xs) * model.r.weight_ih_l0.kfac[1])
    torch.testing.assert_close(*factors)


def test_what_is_computed_is_the_same() -> None:
    torch.manual_seed(0)
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        layer = kind(3, 2, num_layers=2, bidirectional=True).double()
        before = layer(PACKED)
        extend(layer)
        torch.testing.assert_close(layer(PACKED)[0].data, before[0].data)
        torch.testing.assert_close(layer(PACKED)[1], before[1])


def test_samples_on_the_wrong_axis() -> None:
    f = lambda m, x, n: _last(m, pack_padded_sequence(m.e(x), n, enforce_sorted=False))  # noqa: E731
    model = extend(_gru(f, e=nn.Linear(3, 3)).double())
    loss = model(PADDED, torch.tensor([3, 2, 1])).sum()
    with pytest.raises(RuntimeError, match="batch_first"), backpack(BatchGrad()):
        loss.backward()


def test_steps_of_one_sequence_are_one_samples() -> None:
    rows = mark(PACKED.data.clone(), torch.arange(6) % 2)
    model = extend(_gru(_last).double())
    loss = model(PackedSequence(rows, *PACKED[1:])).sum()
    with pytest.raises(RuntimeError, match="one sequence"), backpack(BatchGrad()):
        loss.backward()
