"""State that is not passed along: whose it is, and that it is put back whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, disable, extend
from backpack._ambient import ambient, within
from backpack.engine.state import current_block
from backpack.extensions import KFLR, BatchGrad, DiagGGNExact, DiagHessian
from backpack.losses.base import LOSSES
from backpack.rules.base import RULES
from backpack.samples import axis as batch
from backpack.samples import separability as probe


def network() -> nn.Module:
    torch.manual_seed(0)
    return extend(nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)))


def loss_of(model: nn.Module) -> Tensor:
    return extend(nn.MSELoss())(model(torch.rand(4, 1, 3)), torch.zeros(4, 3))


@pytest.fixture
def untouched() -> Iterator[Callable[[], None]]:
    """A check that nothing is left of a pass."""

    def check() -> None:
        assert ambient.axes == {} and ambient.recorder is None
        assert ambient.patches is None
        assert ambient.grams is None
        assert ambient.blocks == []
        assert disable.store_io

    check()
    yield check
    check()


def _raises(*args: object, **kwargs: object) -> None:
    raise ZeroDivisionError("a rule that fails")


@pytest.mark.parametrize("ext", [BatchGrad, DiagGGNExact, DiagHessian, KFLR])
@pytest.mark.parametrize("when", ["rule", "form", "quantity"])
def test_after_an_exception_in_backward(ext, when, untouched, monkeypatch) -> None:
    model = network()
    own = ext()
    if when == "rule":
        monkeypatch.setitem(RULES, F.linear, _raises)
    elif when == "form":
        monkeypatch.setitem(RULES, F.linear, lambda batch, x, w, b=None: [(w, _raises), (b, _raises)])
    else:
        own.reduce = _raises
    with pytest.raises(ZeroDivisionError), backpack(own):
        loss_of(model).backward()
    untouched()


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "alone"])
@pytest.mark.parametrize("ext", [DiagGGNExact, DiagHessian, KFLR])
def test_after_an_exception_in_a_loss(ext, gradient: bool, untouched, monkeypatch) -> None:
    model = network()
    loss = loss_of(model)
    monkeypatch.setitem(LOSSES, F.mse_loss, _raises)
    with pytest.raises(ZeroDivisionError), backpack(ext(), gradient=gradient):
        loss.backward()
    untouched()
    assert not any(hasattr(p, ext().savefield) for p in model.parameters())


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "alone"])
@pytest.mark.parametrize("module", [nn.MSELoss, nn.Linear, nn.Conv1d])
@pytest.mark.parametrize("ext", [BatchGrad, DiagGGNExact])
def test_after_an_exception_in_a_hook(ext, module: type[nn.Module], gradient: bool, untouched) -> None:
    def hook(each: nn.Module) -> None:
        if isinstance(each, module):
            seen.append(each)
            _raises()

    model, seen = network(), list[nn.Module]()
    loss = loss_of(model)
    with pytest.raises(ZeroDivisionError), backpack(ext(), extension_hook=hook, gradient=gradient):
        loss.backward()
    untouched()
    left = ("input0", "input1", "output")
    assert seen and not any(hasattr(each, name) for each in seen for name in left)
    assert not any(hasattr(p, ext().savefield) for p in model.parameters())


def test_a_scope_puts_back_what_was_there() -> None:
    seen: list[object] = []
    with within(grams=[], patch_bytes=3):
        outer = ambient.grams
        with pytest.raises(ZeroDivisionError), within(grams=None, axes={1: None}):
            assert ambient.grams is None and ambient.axes == {1: None} and ambient.patch_bytes == 3
            in_thread(lambda: seen.extend((ambient.axes, ambient.patch_bytes)))
            _raises()
        assert ambient.grams is outer and not ambient.axes
    assert ambient.grams is None and ambient.patch_bytes == 0
    assert seen == [{}, 0], "threads have their own"


def test_after_an_exception_in_forward(untouched) -> None:
    model = extend(nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2)))
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.rand(4, 3))
    untouched()


def test_a_call_that_fails_leaves_the_block_as_it_was() -> None:
    model = network()
    with backpack(BatchGrad()):
        loss = loss_of(model)
        with pytest.raises((ValueError, RuntimeError)):
            torch.autograd.grad([loss, loss], [model[0].weight], [torch.ones(())])
        torch.autograd.backward(loss)
    assert all(hasattr(p, "grad_batch") for p in model.parameters())


def in_thread(work: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_disable_is_of_one_thread() -> None:
    def elsewhere() -> None:
        assert disable.store_io and disable().store_io and disable.should_store_io()
        model = network()
        with backpack(BatchGrad()):
            loss_of(model).backward()
        assert all(hasattr(p, "grad_batch") for p in model.parameters())

    with disable():
        assert not disable.store_io and not disable().store_io and not disable.should_store_io()
        in_thread(elsewhere)
        assert not disable.store_io
    assert disable.store_io


def test_one_disable_object_nested_and_in_two_threads() -> None:
    quiet = disable()
    with quiet:
        with quiet:
            pass
        assert not disable.store_io
        in_thread(lambda: quiet.__enter__() or quiet.__exit__(None, None, None))
        assert not disable.store_io
    assert disable.store_io


def test_disable_holds_in_autograds_own_threads(untouched) -> None:
    """Backward on a device runs in these: the block's thread says whether it is switched off."""
    block = backpack(BatchGrad())
    found = []
    with pytest.warns(UserWarning, match="no backward pass ran"), block:
        (entry,) = ambient.blocks
        in_thread(lambda: found.append(entry.listens))
        with disable():
            in_thread(lambda: found.append(entry.listens))
    assert found == [True, False]


def test_one_block_object_in_two_threads(untouched) -> None:
    """Each thread leaves the block that it entered itself."""
    shared, left = backpack(BatchGrad()), threading.Event()
    current_inputs, models = threading.Event(), [network(), network()]

    def other() -> None:
        with shared:
            current_inputs.set()
            assert left.wait(60)
            loss_of(models[1]).backward()

    with shared:
        thread = threading.Thread(target=other)
        thread.start()
        assert current_inputs.wait(60)
        loss_of(models[0]).backward()
    assert current_block() is None
    left.set()
    thread.join()
    for model in models:
        assert all(hasattr(p, "grad_batch") for p in model.parameters())


def test_verdicts_may_vanish_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may empty them between two looks."""

    class Vanishing(dict):
        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            self.clear()
            return found

    monkeypatch.setattr(probe, "_verdicts", Vanishing())
    x = torch.rand(4, 3)
    for _ in range(2):
        axis = batch.regular_axis(4)
        assert probe.is_sample_separable(torch.cumsum, (x, 1), {}, 0, [(x, axis)], axis)
