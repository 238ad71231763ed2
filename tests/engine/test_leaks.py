"""Nothing outlives its graph: no tensor, no cycle, no byte, whatever becomes of the backward pass."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend, memory_cleanup
from backpack import extensions as E

STEPS, WARM = 200, 20
GROWTH = 6 * 2**20  # bytes; a step's activations take 80 kB, its quantities more
N = 4


class Net(nn.Module):
    """A bit of everything: reuse, in-place, parameters added and multiplied, a derived weight."""

    def __init__(self, watch: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.mix = nn.Linear(4 * 256, 16)
        self.same = nn.Linear(16, 16)
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(16, 3))
        self.watch = watch
        self.seen: list[weakref.ref[Tensor]] = []

    def see(self, x: Tensor) -> Tensor:
        if self.watch:
            self.seen.append(weakref.ref(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        see = self.see
        x = see(see(self.norm(see(self.conv(x)))) * self.scale)
        x = see(see(x + 1).relu_().flatten(1))
        x = see(see(self.mix(x)).tanh())
        for _ in range(2):
            x = see(see(self.same(x)).sigmoid() + x)
        return see(self.last(x))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Reference counts alone must free everything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def problem(watch: bool = False) -> tuple[Net, nn.Module, Tensor, Tensor]:
    return Net(watch), nn.CrossEntropyLoss(), torch.randn(N, 1, 16, 16), torch.randint(3, (N,))


def live() -> int:
    """Number of tensors alive."""
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def memory() -> int:
    """Resident bytes, 0 where they cannot be read."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.exists() else 0


# --------------------------------------------------------------------------------------
# Many steps

FIRST = (E.BatchGrad(), E.BatchL2Grad(), E.SumGradSquared(), E.Variance())
SECOND = (E.DiagGGNExact(), E.BatchDiagGGNMC(), E.SqrtGGNMC(), E.KFAC())
Step = Callable[[Callable[[], Tensor], Net, dict[str, Any]], None]


def first_order(loss: Callable[[], Tensor], net: Net, kept: dict[str, Any]) -> None:
    with backpack(*FIRST):
        loss().backward()


def second_order(loss: Callable[[], Tensor], net: Net, kept: dict[str, Any]) -> None:
    with backpack(*SECOND):
        loss().backward()


def never_backward(loss: Callable[[], Tensor], net: Net, kept: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="no backward pass ran"), backpack(*FIRST):
        loss()


def no_block(loss: Callable[[], Tensor], net: Net, kept: dict[str, Any]) -> None:
    loss().backward()


def hidden_raises(loss: Callable[[], Tensor], net: Net, kept: dict[str, Any]) -> None:
    def stop(grad: Tensor) -> None:
        raise KeyError("stop")

    handle = net.same.register_forward_hook(lambda m, a, out: out.register_hook(stop) and None)
    with pytest.raises(KeyError), backpack(*FIRST, E.DiagGGNExact()):
        loss().backward()
    handle.remove()


def forward_raises(loss: Callable[[], Tensor], net: Net, kept: dict[str, Any]) -> None:
    def stop(module: nn.Module, args: tuple) -> None:
        raise KeyError("stop")

    handle = net.last.register_forward_pre_hook(stop)
    with pytest.raises(KeyError), backpack(*FIRST):
        loss()
    handle.remove()


def retain_graph(loss: Callable[[], Tensor], net: Net, kept: dict[str, Any]) -> None:
    value = loss()
    with backpack(E.BatchGrad(), E.DiagGGNMC()):
        value.backward(retain_graph=True)
        value.backward(retain_graph=True)


def create_graph(loss: Callable[[], Tensor], net: Net, kept: dict[str, Any]) -> None:
    with backpack(E.BatchGrad(), E.DiagGGNMC()):
        loss().backward(create_graph=True)
    for p in net.parameters():  # they hold the graph that holds them, as .grad does in torch
        del p.grad_batch, p.diag_ggn_mc
        p.grad = None


def holds_the_loss(loss: Callable[[], Tensor], net: Net, kept: dict[str, Any]) -> None:
    kept["loss"] = loss()
    with backpack(E.Variance(), E.DiagGGNMC()):
        kept["loss"].backward()


def holds_an_unused_loss(loss: Callable[[], Tensor], net: Net, kept: dict[str, Any]) -> None:
    kept["before"], kept["loss"] = kept.get("loss"), loss()


def autograd_grad(loss: Callable[[], Tensor], net: Net, kept: dict[str, Any]) -> None:
    with backpack(E.BatchL2Grad()):
        torch.autograd.grad(loss(), list(net.parameters()))


def accumulates(loss: Callable[[], Tensor], net: Net, kept: dict[str, Any]) -> None:
    kept["sum"] = kept.get("sum", 0) + loss().item()
    total = loss() + loss()
    with backpack(E.Variance()):
        (total / 2).backward()


MANY: tuple[Step, ...] = (
    *(first_order, second_order, never_backward, no_block, hidden_raises, forward_raises),
    *(retain_graph, create_graph, holds_the_loss, holds_an_unused_loss, autograd_grad, accumulates),
)
SLOW = (second_order, retain_graph, create_graph, holds_the_loss, accumulates)


@pytest.mark.parametrize("step", MANY, ids=lambda f: f.__name__)
def test_many_steps(step: Step) -> None:
    net, lossfunc, X, y = problem()
    extend(net), extend(lossfunc)
    kept: dict[str, Any] = {}

    def loss() -> Tensor:
        return lossfunc(net(X), y)

    def run(steps: int) -> tuple[int, int]:
        for _ in range(steps):
            net.zero_grad()
            step(loss, net, kept)
        return live(), memory()

    # A leak grows all the time; the allocator's own pools grow now and then.
    blocks = [run(WARM)]
    for _ in range(4):
        blocks.append(run((STEPS // 2 if step in SLOW else STEPS) // 4))
    tensors, sizes = zip(*blocks, strict=True)
    assert tensors[-1] <= tensors[0], f"live tensors after each block of steps: {tensors}"
    growth = min(after - before for before, after in pairwise(sizes))
    assert growth < GROWTH / 4, f"memory after each block of steps: {sizes}"


def test_hessian_steps() -> None:
    model, lossfunc = extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), nn.MSELoss()
    X, y = torch.randn(N, 3), torch.randn(N, 2)
    counts = []
    for _ in range(20):
        model.zero_grad()
        with backpack(E.DiagHessian(), E.BatchDiagHessian()):
            lossfunc(model(X), y).backward()
        counts.append(live())
    assert counts[-1] <= counts[5]


# --------------------------------------------------------------------------------------
# One step


class Mark:
    """Lives as long as the autograd node it is put on, which itself takes no weak references."""


def alive(net: Net) -> list[bool]:
    return [ref() is not None for ref in net.seen]


def test_capture_keeps_what_autograd_keeps() -> None:
    """After a forward pass, the same activations are alive with and without ``extend``."""
    found = []
    for extended in (False, True):
        torch.manual_seed(0)
        net, lossfunc, X, y = problem(watch=True)
        if extended:
            extend(net), extend(lossfunc)
        lossfunc(net(X), y)  # torch's own caches
        net.seen.clear()
        loss = lossfunc(net(X), y)
        found.append(alive(net))
        assert loss.requires_grad
    assert found[0] == found[1]
    assert not all(found[0]) and any(found[0])


def test_freed_after_backward_outside_a_block(no_collection) -> None:
    net, lossfunc, X, y = problem(watch=True)
    extend(net), extend(lossfunc)
    loss = lossfunc(net(X), y)
    assert any(alive(net))
    loss.backward()
    assert not any(alive(net))


@pytest.mark.parametrize("quantities", [(), FIRST, SECOND], ids=["none", "first", "second"])
def test_freed_after_backward_in_a_block(no_collection, quantities) -> None:
    net, lossfunc, X, y = problem(watch=True)
    extend(net), extend(lossfunc)
    loss = lossfunc(net(X), y)
    with backpack(*quantities):
        loss.backward()
        assert not any(alive(net)[:-1])


@pytest.mark.parametrize("quantities", [(), *((q,) for q in (*FIRST, *SECOND))], ids=repr)
def test_freed_on_the_way(no_collection, quantities) -> None:
    """Layers let go of their inputs as backward passes, and not when it is over."""
    model = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(5, 5), nn.Tanh())))
    outputs: list[Tensor] = []
    for module in model[1::2]:
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    extend(model)
    loss = model(torch.rand(N, 5)).square().sum()
    later, seen = [weakref.ref(x) for x in outputs[1:]], []
    # The last call counts: columns of second order and the certificate come by earlier.
    outputs[0].register_hook(lambda g: seen.append([ref() is not None for ref in later]))
    outputs.clear()
    with backpack(*quantities):
        loss.backward()
    assert not any(seen[-1])


def test_retained_until_the_graph_goes(no_collection) -> None:
    net, lossfunc, X, y = problem(watch=True)
    extend(net), extend(lossfunc)
    loss = lossfunc(net(X), y)
    with backpack(*FIRST):
        loss.backward(retain_graph=True)
    assert any(alive(net)[:-1])
    del loss
    assert not any(alive(net))


@pytest.mark.parametrize("loss_too", [True, False])
def test_no_cycles_without_backward(no_collection, loss_too: bool) -> None:
    net, lossfunc, X, y = problem(watch=True)
    extend(net)
    if loss_too:
        extend(lossfunc)
    loss = lossfunc(net(X), y)
    assert any(alive(net))
    del loss
    assert not any(alive(net))


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda f, y: f.square().mean()])
@pytest.mark.parametrize("quantities", [(), FIRST, SECOND], ids=["none", "first", "second"])
def test_no_cycles_after_backward(no_collection, quantities, loss) -> None:
    net, _, X, y = problem(watch=True)
    extend(net)
    value = loss(net(X), y)
    mark = Mark()
    value.grad_fn.metadata["mark"], node = mark, weakref.ref(mark)
    del mark
    with backpack(*quantities):
        value.backward()
    del value
    assert node() is None and not any(alive(net))


def test_no_cycles_after_an_exception(no_collection) -> None:
    net, lossfunc, X, y = problem(watch=True)
    extend(net), extend(lossfunc)
    for _ in range(3):
        hidden_raises(lambda: lossfunc(net(X), y), net, {})
        forward_raises(lambda: lossfunc(net(X), y), net, {})
    assert not any(alive(net))


def test_models_are_freed(no_collection) -> None:
    net, lossfunc, X, y = problem()
    extend(net), extend(lossfunc)
    with backpack(*FIRST, *SECOND):
        lossfunc(net(X), y).backward()
    parameter = weakref.ref(net.conv.weight)
    del net
    gc.collect()  # torch's modules hold themselves
    assert parameter() is None


@pytest.mark.parametrize(
    "exts",
    [(*FIRST, *SECOND), (E.KFLR(), E.EKFLR(), E.SqrtGGNExact()), (E.GGNMP(), E.HMP())],
    ids=["both", "lists", "products"],
)
def test_models_with_differentiable_quantities_are_freed(no_collection, exts) -> None:
    """By one line: quantities keep their values, and let go of the graph that holds the parameters."""
    net, lossfunc, X, y = problem()
    extend(net), extend(lossfunc)
    with backpack(*exts):
        loss = lossfunc(net(X), y)
        loss.backward(create_graph=True)
    weight = net.conv.weight
    fields = [ext.savefield for ext in exts if not callable(getattr(weight, ext.savefield))]
    before = {field: getattr(weight, field) for field in fields}
    memory_cleanup(net)
    assert not weight.grad.requires_grad
    for field, value in before.items():
        found = getattr(weight, field)
        assert type(found) is type(value)
        torch.testing.assert_close(list(_tensors(found)), [t.detach() for t in _tensors(value)])
        assert not any(t.requires_grad for t in _tensors(found))
        assert any(t.requires_grad for t in _tensors(value))  # who holds it may still differentiate it
    assert not any(hasattr(weight, ext.savefield) for ext in exts if ext.savefield not in fields)
    parameter, value, found = weakref.ref(weight), None, None
    del net, lossfunc, loss, weight, before, value, found
    gc.collect()  # torch's modules hold themselves
    assert parameter() is None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for each in value:
            yield from _tensors(each)
