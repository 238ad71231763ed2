"""Curvature and individual gradients as dense matrices, by brute force in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backpack import extend, unextend
from backpack.testing.oracle import Oracle
from tests.cases import Case, LossCase


class Brute:
    """A case and a loss: an extended model with its loss, and what brute force says of it.

    Attributes:
        loss: calls the extended model, and gives its loss.
        ggns: each sample's share of the GGN, ``[N, D, D]``.
        gradients: each sample's share of the gradient, ``[N, D]``.
        jacobian: ``[N, C, D]``.
    """

    def __init__(
        self,
        model: nn.Module,
        lossfunc: Callable[..., Tensor],
        X: Any,
        y: Any,
        batch_dim: int = 0,
        output_dim: int | None = None,
        seed: int = 0,
    ) -> None:
        oracle = Oracle(unextend(copy.deepcopy(model)), lossfunc, X, y, batch_dim, seed, output_dim)
        self.model = extend(model, batch_dim=batch_dim)
        self.lossfunc = extend(lossfunc) if isinstance(lossfunc, nn.Module) else lossfunc
        self.inputs, self.y, self.seed = oracle.inputs, y, seed
        self.names = list(oracle.parameters)
        self.parameters = dict(self.model.named_parameters())
        jacobians = oracle.jacobians
        self.jacobian = torch.stack(
            [
                torch.cat([j[name].reshape(len(j[name]), -1) for name in self.names], 1)
                for j in jacobians
            ]
        )
        hessians = torch.stack(oracle.loss_hessians)
        self.ggns = torch.einsum("ncp,ncd,ndq->npq", self.jacobian, hessians, self.jacobian)
        batch = oracle.grad_batch
        self.gradients = torch.cat(
            [batch[name].reshape(len(batch[name]), -1) for name in self.names], 1
        )

    @classmethod
    def of(cls, case: Case, loss: LossCase) -> Brute:
        """The case with the loss, on random numbers."""
        torch.manual_seed(0)
        model, inputs = case.model().double(), case.inputs()
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        inputs = tuple(i.double() if i.is_floating_point() else i for i in inputs)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            output = model(*inputs)
        y = loss.target(output)
        return cls(model, loss.loss(), inputs, y, case.batch_dim, case.output_dim)

    def loss(self) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.lossfunc(self.model(*self.inputs), self.y)

    @property
    def samples(self) -> int:
        return len(self.gradients)

    def entries(self, group: Sequence[Tensor]) -> Tensor:
        """Places of a group's numbers among those of all parameters."""
        places, first = {}, 0
        for name in self.names:
            p = self.parameters[name]
            places[p] = torch.arange(first, first + p.numel())
            first += p.numel()
        return torch.cat([places[p] for p in group])


def flat(tensors: Sequence[Tensor], lead: int = 0) -> Tensor:
    """Tensors of a group's shapes as vectors."""
    return torch.cat([t.reshape(*t.shape[:lead], -1) for t in tensors], lead)


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    """Equal up to a part of the largest entry."""
    assert found.shape == expected.shape
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((found.double() - expected).abs().max()) if expected.numel() else 0.0
    assert error <= tolerance * max(scale, 1e-12), (error, scale)
