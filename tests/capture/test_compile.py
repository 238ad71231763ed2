"""Compiled models, in every spelling: inside of a block they run uncompiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, disable, extend, unextend
from backpack import extensions as E

X, Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])


class Backend:
    """Counts graphs that are compiled, and calls of what came out."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.calls += 1
            return graph(*args)

        return run


@pytest.fixture
def backend() -> Iterator[Backend]:
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Calls(nn.Module):
    """A model that calls another through a compiled function."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model
        self.call = torch.compile(lambda x: model(x), **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def in_place(model: nn.Module, **options: Any) -> nn.Module:
    model.compile(**options)
    return model


WHOLE: dict[str, Callable[..., nn.Module]] = {
    "extend(compile(m))": lambda **o: extend(torch.compile(net(), **o)),
    "compile(extend(m))": lambda **o: torch.compile(extend(net()), **o),
    "extend(m).compile()": lambda **o: in_place(extend(net()), **o),
    "m.compile(); extend(m)": lambda **o: extend(in_place(net(), **o)),
    "a compiled function calls it": lambda **o: Calls(extend(net()), **o),
}


def check(model: nn.Module, whole: bool) -> None:
    """Fields are those of the model uncompiled."""
    plain, exts = extend(net()), [E.BatchGrad(), E.DiagGGNExact(), E.KFLR()]
    with backpack(*exts):
        F.cross_entropy(plain(X), Y).backward()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            with backpack(*exts):
                F.cross_entropy(model(X), Y).backward()
    assert [str(w.message).startswith("a compiled Sequential runs uncompiled") for w in said] == [
        True
    ] * whole
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad_batch, q.grad_batch)
        assert torch.allclose(p.diag_ggn_exact, q.diag_ggn_exact)
        assert all(torch.allclose(a, b) for a, b in zip(p.kflr, q.kflr, strict=True))


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models(name: str, backend: Backend) -> None:
    """Compiled outside of blocks, in one graph and once; uncompiled inside."""
    model = WHOLE[name](backend=backend, fullgraph=True)
    for rounds in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss = F.cross_entropy(model(X), Y)
            loss.backward()
        assert backend.graphs == 1 and backend.calls == rounds
        assert torch.allclose(loss, F.cross_entropy(net()(X), Y))
        check(model, whole=rounds == 1)
        assert backend.calls == rounds
    with torch.no_grad(), disable():
        assert torch.allclose(model(X), net()(X))


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_forward_outside_of_the_block(backend: str) -> None:
    torch._dynamo.reset()
    model = torch.compile(extend(net()), backend=backend)
    loss = F.cross_entropy(model(X), Y)
    outside = pytest.raises(RuntimeError, match="forward pass ran compiled.*inside of the")
    with outside, backpack(E.BatchGrad()):
        loss.backward()
    assert not hasattr(next(model.parameters()), "grad_batch")
    check(model, whole=True)


def parts(kind: str, **options: Any) -> nn.Module:
    model = net()
    if kind == "submodule":
        model[0] = torch.compile(model[0], **options)
    elif kind == "submodule in place":
        model[0].compile(**options)
    else:
        region = torch.compile(torch.tanh if kind == "region" else model[0].forward, **options)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = model

            def forward(self, x: Tensor) -> Tensor:
                x = region(x) if kind != "region" else self.inner[0](x)
                return self.inner[2](region(x) if kind == "region" else x.tanh())

        return extend(Model())
    return extend(model)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("kind", ["submodule", "submodule in place", "region", "region with weights"])
def test_parts_of_a_model(kind: str, outside: bool, backend: Backend) -> None:
    """Compiled parts of an extended model work, wherever its forward pass is."""
    model = parts(kind, backend=backend)
    if not outside:
        check(model, whole=False)
        return
    loss = F.cross_entropy(model(X), Y)
    with backpack(E.BatchGrad()):
        loss.backward()
    for p in model.parameters():
        assert torch.allclose(p.grad_batch.sum(0), p.grad)


def test_a_compiled_loss(backend: Backend) -> None:
    model, plain = extend(net()), extend(net())
    loss = torch.compile(F.cross_entropy, backend=backend)
    with backpack(E.DiagGGNExact(), E.KFLR()):
        loss(model(X), Y).backward()
        F.cross_entropy(plain(X), Y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.diag_ggn_exact, q.diag_ggn_exact)


def test_unextend_and_nested_blocks(backend: Backend) -> None:
    model = extend(torch.compile(net(), backend=backend))
    with backpack(E.BatchGrad()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with backpack(E.BatchL2Grad()):
            F.cross_entropy(model(X), Y).backward()
        F.cross_entropy(model(X), Y).backward()
    assert backend.calls == 0
    p = next(model.parameters())
    assert p.grad_batch.shape[0] == p.batch_l2.shape[0] == 5
    unextend(model)
    model(X)
    assert backend.calls == 1
    with pytest.raises(ZeroDivisionError), backpack(E.BatchGrad()):
        1 / 0  # noqa: B018
    model(X)
    assert backend.calls == 2


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("forward", ["inside", "outside"])
def test_a_block_in_a_compiled_function(forward: str, compiler: str, backend: Backend) -> None:
    """Nothing inside can be seen; the error says what to compile instead."""
    model, lossfunc = extend(net()), extend(nn.CrossEntropyLoss())

    def step() -> None:
        loss = lossfunc(model(X), Y) if forward == "outside" else None
        with backpack(E.BatchGrad()):
            (lossfunc(model(X), Y) if loss is None else loss).backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Dynamo's, about threads
        with pytest.raises(RuntimeError, match="must not be compiled itself"):
            torch.compile(step, backend=compiler)()
    assert not hasattr(model[0].weight, "grad_batch") and disable.store_io
    step()
    assert model[0].weight.grad_batch.shape == (5, 6, 4)
