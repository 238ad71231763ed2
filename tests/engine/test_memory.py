"""Fresh memory, and how much of it is held."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import nn

from backpack import backpack, extend
from backpack.extensions import BatchDiagGGNExact, BatchGrad, SqrtGGNExact
from backpack.forms import memory


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "_advise", lambda: lambda start, length: calls.append((start, length)))
    return calls


def test_advice_is_for_the_pages_of_the_tensor(advised) -> None:
    x = memory.fresh(torch.ones(1), (memory.LARGE // 4, 2))
    [(start, length)] = advised
    assert start % mmap.PAGESIZE == 0
    assert 0 <= start - x.data_ptr() < mmap.PAGESIZE
    assert start + length == x.data_ptr() + x.nbytes
    assert x.shape == (memory.LARGE // 4, 2)


def test_small_memory_is_not_advised(advised) -> None:
    assert memory.fresh(torch.ones(1), (3, 4)).shape == (3, 4)
    assert not advised


def test_advice_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    memory._advise.cache_clear()
    monkeypatch.setenv("BACKPACK_HUGE_PAGES", "0")
    assert memory._advise() is None
    memory._advise.cache_clear()
    monkeypatch.delenv("BACKPACK_HUGE_PAGES")
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert memory._advise() is None
    memory._advise.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_memory_holds_what_is_written(dtype: torch.dtype) -> None:
    count = memory.LARGE // dtype.itemsize + 5
    x = memory.fresh(torch.ones(1, dtype=dtype), (count,))
    assert x.fill_(3).sum(dtype=torch.float64).item() == 3 * count
    assert not memory.fresh_zeros(x, (count,)).any()


@pytest.mark.parametrize("ext", [BatchGrad(), BatchDiagGGNExact(), SqrtGGNExact()], ids=repr)
def test_values_of_an_earlier_pass_make_room(ext) -> None:
    """When gradients reach the first layer's tap, its former value is gone; another holder keeps it."""
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    lossfunc = extend(nn.CrossEntropyLoss())
    x, y = torch.rand(5, 4), torch.tensor([0, 1, 1, 0, 1])
    held, seen = [], []
    for step in range(2):
        loss = lossfunc(model(x), y)
        if step:
            loss.register_hook(lambda g: None)
            model[2].bias.register_hook(
                lambda g: seen.append([ext.savefield in p.__dict__ for p in model[0].parameters()])
            )
        with backpack(ext):
            loss.backward()
        held.append([getattr(p, ext.savefield) for p in model.parameters()])
    assert seen == [[False, False]]
    for first, second in zip(*held, strict=True):
        assert first is not second
        torch.testing.assert_close(first, second)


def test_no_value_is_left_of_a_pass_that_failed() -> None:
    model = extend(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    x = torch.rand(5, 4)

    def fails(grad: torch.Tensor) -> None:
        raise ValueError("on purpose")

    with backpack(BatchGrad()):
        model(x).square().sum().backward()
        handle = model[0].bias.register_hook(fails)
        with pytest.raises(ValueError, match="on purpose"):
            model(x).square().sum().backward()
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())
    handle.remove()
