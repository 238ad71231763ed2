"""Canonical forms by themselves, against what they stand for, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from backpack import backpack, extend, factors
from backpack import extensions as E
from backpack.factors import Layout, Outer, Patches, merge
from backpack.rules import unfold
from tests.cases import Apply


class Written(TorchDispatchMode):
    """Adds up the numbers of entries that operations write to fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in held:
                self.entries += each.numel()
        return out


def convolutions(count: int, keep: bool = False) -> list[Outer]:
    """A convolution used several times: forms of inputs of several sizes."""
    torch.manual_seed(0)
    forms = []
    for length in range(6, 6 + count):
        x = torch.rand(3, 2, length, 7).double()
        windows = unfold(x, (2, 3), (1, 2), ((1, 0), (1, 1)), (1, 1)).unflatten(1, (1, -1))
        a = Patches(windows, 2, keep)
        g = torch.rand(2, 3, 1, a.shape[2], 5).double()
        forms.append(Outer(a, g, Layout(torch.Size((5, 2, 2, 3)))))
    return forms


def test_patches_of_several_uses_are_written_once() -> None:
    for keep in (False, True):
        forms = convolutions(2, keep)
        if keep:
            for form in forms:
                form.inputs.written()
        size = sum(form.inputs.shape.numel() + form.g.numel() for form in forms)
        with torch.no_grad(), Written() as written:
            merged = merge(forms)
        assert written.entries <= size
        torch.testing.assert_close(merged.dense(), sum(form.dense() for form in forms))
    differentiable = merge(forms)  # in grad mode
    torch.testing.assert_close(differentiable.dense(), merged.dense())


def test_convolution_used_twice_in_half_precision_inputs() -> None:
    """Autocast leaves inputs in another precision than gradients."""
    torch.manual_seed(0)
    model = extend(
        Apply(lambda m, x: m.l(m.l(x).tanh()).flatten(1), l=nn.Conv1d(2, 2, 3, padding=1, bias=False))
    )
    X, y = torch.rand(4, 2, 5), torch.zeros(4, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(X)
    with backpack(E.BatchGrad(), E.BatchL2Grad()):
        nn.functional.mse_loss(output.float(), y).backward()
    weight = model.l.weight
    torch.testing.assert_close(weight.grad_batch.sum(0), weight.grad, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(
        weight.batch_l2, weight.grad_batch.flatten(1).square().sum(1), rtol=1e-2, atol=1e-4
    )


class Held:
    """Bytes of what a graph saves, each storage once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []  # alive, so that no two have one address

    def __call__(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor.detach())
        return tensor

    @property
    def bytes(self) -> int:
        storages = (tensor.untyped_storage() for tensor in self.tensors)
        return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


@pytest.mark.parametrize("block", [2**12, 2**26], ids=["single columns", "all together"])
def test_a_graph_holds_patches_once(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not once for each block of columns, with `create_graph`."""
    monkeypatch.setitem(factors.BLOCK_BYTES, "cpu", block)
    torch.manual_seed(0)
    x = torch.rand(2, 3, 200).double().requires_grad_()
    windows = unfold(x, (10,), (1,), ((0, 0),), (1,)).unflatten(1, (1, -1))
    inputs = Patches(windows, 1)
    g = torch.rand(40, 2, 1, inputs.shape[2], 1).double().requires_grad_()
    held = Held()
    with torch.autograd.graph.saved_tensors_hooks(held, lambda tensor: tensor):
        form = Outer(inputs, g, Layout(torch.Size((1, 3, 10))))
        form.square_sum().sum().backward(create_graph=True)
    products = g.shape[0] * g.shape[1] * 30
    assert held.bytes < 8 * (4 * inputs.shape.numel() + 4 * g.numel() + 12 * products)
