"""Blocks of several threads on one model: values are right, or the pass is refused."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.testing.oracle import Oracle


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return extend(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return X, torch.randint(3, (6,), generator=generator)


def norms(model: nn.Module, seed: int) -> list[Tensor]:
    found = Oracle(copy.deepcopy(model), nn.CrossEntropyLoss(), *batch(seed)).grad_batch
    return [g.flatten(1).square().sum(1) for g in found.values()]


def backward(model: nn.Module, seed: int) -> None:
    X, y = batch(seed)
    F.cross_entropy(model(X), y).backward()


def elsewhere(work: Callable[[], None]) -> BaseException | None:
    """Run in a thread; what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


@pytest.mark.parametrize("limited", [False, True])
def test_one_model_and_field_in_two_threads_is_refused(limited: bool) -> None:
    """While the first block is open; its values stay, and the second leaves nothing."""
    model, expected = network(), norms(network(), 1)
    options = {"parameters": [model[0].weight]} if limited else {}

    def second() -> None:
        with backpack(E.BatchL2Grad(), **options):
            backward(model, 2)

    with backpack(E.BatchL2Grad()):
        backward(model, 1)
        error = elsewhere(second)
        assert isinstance(error, RuntimeError)
        assert "'0.weight' takes part in a backward pass of another thread" in str(error)
        for p, each in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.batch_l2, each)
    for p, each in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.batch_l2, each)
    assert elsewhere(second) is None
    torch.testing.assert_close(model[0].weight.batch_l2, norms(model, 2)[0])


def test_other_fields_parameters_and_models_are_right() -> None:
    model = network()
    other = copy.deepcopy(model)
    ranges = [list(model[0].parameters()), list(model[2].parameters())]

    def fields() -> None:
        with backpack(E.SumGradSquared(), parameters=ranges[0]):
            backward(model, 2)

    def parameters() -> None:
        with backpack(E.BatchL2Grad(), parameters=ranges[1]):
            backward(model, 2)

    def models() -> None:
        with backpack(E.BatchL2Grad()):
            backward(other, 2)

    with backpack(E.BatchL2Grad(), parameters=ranges[0]):
        backward(model, 1)
        assert [elsewhere(work) for work in (fields, parameters, models)] == [None] * 3
    first, second = norms(model, 1), norms(model, 2)
    found = [p.batch_l2 for p in model.parameters()]
    for one, two in zip(found, [*first[:2], *second[2:]], strict=True):
        torch.testing.assert_close(one, two)
    for p, each in zip(other.parameters(), second, strict=True):
        torch.testing.assert_close(p.batch_l2, each)


@pytest.fixture
def _often() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_often")
def test_threads_at_once() -> None:
    """Every value that is read inside of a block is that of its own batch."""
    model = network()
    expected = {seed: norms(model, seed) for seed in (1, 2)}
    right, refused, wrong = list[int](), list[str](), list[int]()

    def work(seed: int) -> None:
        for _ in range(100):
            try:
                with backpack(E.BatchL2Grad()):
                    backward(model, seed)
                    found = [p.batch_l2 for p in model.parameters()]
            except RuntimeError as error:
                refused.append(str(error))
                continue
            same = all(map(torch.allclose, found, expected[seed]))
            (right if same else wrong).append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(right) + len(refused) == 200 and right
    assert all("another thread" in text for text in refused)


@pytest.mark.usefixtures("_often")
def test_threads_that_take_turns() -> None:
    """A lock around the block and what reads the fields."""
    model, lock = network(), threading.Lock()
    expected = {seed: norms(model, seed) for seed in (1, 2)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(50):
            with lock:
                with backpack(E.BatchL2Grad()):
                    backward(model, seed)
                found = [p.batch_l2 for p in model.parameters()]
            if not all(map(torch.allclose, found, expected[seed])):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
