"""The tangent kernel against explicit Jacobians."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from backpack import extend
from backpack.vivit import ntk
from tests.cases import CASES, Case
from tests.vivit.dense import Brute, near

# Inputs on the first axis, outputs too; enough samples to be cut in pieces.
PLAIN = [case for case in CASES if case.batch_dim == 0 == case.output_dim]


@pytest.mark.parametrize("case", PLAIN[::3], ids=lambda c: c.name)
def test_case(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = case.model().double(), case.inputs()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    inputs = tuple(i.double() if i.is_floating_point() else i for i in inputs)
    model.eval()
    with torch.no_grad():
        y = torch.rand_like(model(*inputs))
    J = Brute(model, nn.MSELoss(), inputs, y).jacobian
    expected = torch.einsum("ncp,mdp->ncmd", J, J)
    near(ntk(model, inputs), expected)
    near(ntk(model, inputs, trace=True), torch.einsum("ncmc->nm", expected))


def small() -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten()
    return nn.Sequential(*convolution, nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def jacobian(model: nn.Module, X: Tensor, names: Any = None) -> Tensor:
    """By ``torch.func``."""
    parameters = {n: p.detach() for n, p in model.named_parameters() if names is None or n in names}

    def single(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, p, (x.unsqueeze(0),))[0]

    found = vmap(jacrev(single), (None, 0))(parameters, X)
    return torch.cat([j.flatten(2) for j in found.values()], 2).detach()


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("trace", [True, False])
def test_tiles(batch_size: int | None, trace: bool) -> None:
    model, X, Z = small(), torch.rand(5, 2, 4).double(), torch.rand(3, 2, 4).double()
    for other in (None, Z):
        J, K = jacobian(model, X), jacobian(model, X if other is None else other)
        expected = torch.einsum("ncp,mdp->ncmd", J, K)
        expected = torch.einsum("ncmc->nm", expected) if trace else expected
        near(ntk(model, X, other, trace=trace, batch_size=batch_size), expected)


def test_some_parameters() -> None:
    model, X = small(), torch.rand(4, 2, 4).double()
    model[0].bias.requires_grad_(False)
    J = jacobian(model, X, ["0.weight", "3.bias"])
    found = ntk(model, X, parameters=[model[0].weight, model[3].bias, model[0].bias])
    near(found, torch.einsum("ncp,mdp->ncmd", J, J))


def test_model_is_as_it_was() -> None:
    """No gradients, no hooks; a model that is extended stays so."""
    model, X = small(), torch.rand(4, 2, 4).double()
    with torch.no_grad():
        ntk(model, X)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    ntk(extend(model), X)
    assert model._backpack_extend


def test_output_must_be_a_tensor() -> None:
    with pytest.raises(ValueError, match="must be a tensor"):
        ntk(nn.LSTM(2, 3, batch_first=True), torch.rand(2, 3, 2))
