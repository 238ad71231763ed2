"""Brute force for any loss of a model's outputs, samples mixed or not, by plain autograd in float64.

The model is taken apart at its outputs once: values, first and second derivatives of every entry. For
each loss only its gradient and Hessian in these entries are needed then: many losses cost little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

Values = dict[str, Tensor]


class Expanded:
    """Outputs of a model with their derivatives in the parameters.

    Args:
        parameters: the parameters by their names.
        outputs: outputs of one or several forward passes, with their graphs.
        owner: the sample that every entry belongs to, ``[O]`` for all outputs one after the other.
        samples: how many samples there are.
    """

    def __init__(
        self, parameters: Values, outputs: Sequence[Tensor], owner: Tensor, samples: int
    ) -> None:
        self.parameters, self.owner, self.samples = parameters, owner, samples
        self.outputs = [o.detach() for o in outputs]
        self._entries = torch.cat([o.flatten() for o in outputs])

    @cached_property
    def jacobian(self) -> Values:
        """``[O, P]``."""
        return self._stacked([self._slopes(e) for e in self._entries])

    def bends(self, weights: Tensor) -> Values:
        """Blocks ``[K, P, P]`` of the Hessians of weighted sums of the entries, ``weights [K, O]``."""
        return self._stacked([self._blocks((w * self._entries).sum()) for w in weights])

    def _slopes(self, value: Tensor, create_graph: bool = False) -> list[Tensor]:
        parameters = list(self.parameters.values())
        found: Sequence[Tensor | None] = [None] * len(parameters)
        if value.requires_grad:
            found = torch.autograd.grad(
                value, parameters, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
        return [_or_zeros(g, p).flatten() for g, p in zip(found, parameters, strict=True)]

    def _blocks(self, value: Tensor) -> list[Tensor]:
        blocks = []
        slopes = self._slopes(value, create_graph=True)
        for slope, p in zip(slopes, self.parameters.values(), strict=True):
            rows = [
                torch.autograd.grad(s, p, retain_graph=True, allow_unused=True)[0]
                if s.requires_grad
                else None
                for s in slope
            ]
            blocks.append(torch.stack([_or_zeros(row, p).flatten() for row in rows]).detach())
        return blocks

    def _stacked(self, rows: list[list[Tensor]]) -> Values:
        columns = zip(*rows, strict=True)
        return {name: torch.stack(c) for name, c in zip(self.parameters, columns, strict=True)}


class Tabulated(Expanded):
    """A model at some inputs, with the second derivatives of every entry, for many losses.

    Args:
        model: the model, not extended.
        inputs: one input for each forward pass.
        batch_dim: sample axis of inputs and outputs.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], batch_dim: int = 0) -> None:
        samples = inputs[0].shape[batch_dim]
        # Second moments of the inputs of linear layers over all samples and uses.
        self.moments: Values = {}
        handles = [
            module.register_forward_pre_hook(self._moment(name, samples))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        outputs = [model(each) for each in inputs]
        for handle in handles:
            handle.remove()
        owner = torch.cat([rows_of(o, batch_dim).flatten() for o in outputs])
        super().__init__(dict(model.named_parameters()), outputs, owner, samples)
        self.table = super().bends(torch.eye(len(owner)).to(outputs[0]))

    def _moment(self, name: str, samples: int) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            rows = args[0].detach().flatten(0, -2)
            self.moments[name] = self.moments.get(name, 0) + rows.T @ rows / samples

        return hook

    def bends(self, weights: Tensor) -> Values:
        return {n: torch.einsum("ko,opq->kpq", weights, T) for n, T in self.table.items()}


def rows_of(output: Tensor, dim: int) -> Tensor:
    """The number of its row for every entry."""
    shape = [-1 if d == dim else 1 for d in range(output.dim())]
    return torch.arange(output.shape[dim]).reshape(shape).expand(output.shape)


def _or_zeros(g: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if g is None else g


class Truth:
    """Every quantity of a loss of an expanded model's outputs.

    Args:
        at: the model's outputs.
        loss: the loss as a function of the list of outputs.
    """

    def __init__(self, at: Expanded, loss: Callable[[list[Tensor]], Tensor]) -> None:
        self.at = at
        leaves = [o.clone().requires_grad_() for o in at.outputs]
        value = loss(leaves)
        self.loss = value.detach()
        slope = self._gradient(value, leaves, create_graph=True)
        rows = [
            self._gradient(s, leaves) if s.requires_grad else torch.zeros_like(slope) for s in slope
        ]
        self.slope, self.hessian = slope.detach(), torch.stack(rows)
        self.own = torch.nn.functional.one_hot(at.owner, at.samples).T.to(slope)  # [N, O]

    @staticmethod
    def _gradient(value: Tensor, leaves: list[Tensor], create_graph: bool = False) -> Tensor:
        found = torch.autograd.grad(
            value, leaves, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        return torch.cat([_or_zeros(g, o).flatten() for g, o in zip(found, leaves, strict=True)])

    @cached_property
    def mixes(self) -> bool:
        """Whether the loss's Hessian couples samples."""
        apart = self.own.T @ self.own
        return bool((self.hessian * (1 - apart)).abs().max() > 1e-12)

    @cached_property
    def flat(self) -> bool:
        """Whether the loss has no curvature."""
        return not bool(self.hessian.any())

    @cached_property
    def convex(self) -> bool:
        """Whether the loss's Hessian has a square root."""
        values = torch.linalg.eigvalsh((self.hessian + self.hessian.T) / 2)
        lowest = float(values[0] / values.abs().amax().clamp(min=1e-9))
        assert not -1e-5 < lowest < -1e-12, "a Hessian on the edge"
        return lowest > -1e-5

    def _shaped(self, name: str, value: Tensor) -> Tensor:
        return value.reshape(value.shape[:-1] + self.at.parameters[name].shape)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Values:
        return {n: self._shaped(n, function(J)) for n, J in self.at.jacobian.items()}

    @cached_property
    def grad_batch(self) -> Values:
        """``J_n^T dL/do_n``."""
        return self._each(lambda J: (self.own * self.slope) @ J)

    @cached_property
    def ggn(self) -> Values:
        """Blocks ``[P, P]`` of ``J^T H J`` with the Hessian in all outputs."""
        return {n: J.T @ self.hessian @ J for n, J in self.at.jacobian.items()}

    @cached_property
    def bends(self) -> Values:
        """What the model's own curvature adds to the Hessian, for each sample, ``[N, P, P]``."""
        return self.at.bends(self.own * self.slope)

    @cached_property
    def hessian_blocks(self) -> Values:
        """Blocks ``[P, P]`` of the Hessian."""
        return {n: block + self.bends[n].sum(0) for n, block in self.ggn.items()}

    @cached_property
    def diag_ggn_batch(self) -> Values:
        """Diagonals of ``J_n^T H_nn J_n``."""
        return self._each(
            lambda J: torch.einsum("no,op,ol,nl,lp->np", self.own, J, self.hessian, self.own, J)
        )

    @cached_property
    def diag_h_batch(self) -> Values:
        """Diagonals of the Hessian of the loss as a function of one sample's outputs."""
        bends = {n: self._shaped(n, b.diagonal(dim1=1, dim2=2)) for n, b in self.bends.items()}
        return {n: d + bends[n] for n, d in self.diag_ggn_batch.items()}

    def diagonal(self, blocks: Values) -> Values:
        return {n: self._shaped(n, block.diagonal()) for n, block in blocks.items()}

    def value(self, field: str) -> Values:
        """The quantity saved to ``field``; of a square root, the matrix it is a root of."""
        found: dict[str, Callable[[], Values]] = {
            "grad_batch": lambda: self.grad_batch,
            "batch_l2": lambda: {
                n: g.square().reshape(len(g), -1).sum(1) for n, g in self.grad_batch.items()
            },
            "sum_grad_squared": lambda: {n: g.square().sum(0) for n, g in self.grad_batch.items()},
            "variance": lambda: {n: g.var(0, unbiased=False) for n, g in self.grad_batch.items()},
            "diag_ggn_exact": lambda: self.diagonal(self.ggn),
            "diag_ggn_exact_batch": lambda: self.diag_ggn_batch,
            "diag_ggn_mc": lambda: self.diagonal(self.ggn),
            "diag_ggn_mc_batch": lambda: self.diag_ggn_batch,
            "sqrt_ggn_exact": lambda: self.ggn,
            "diag_h": lambda: self.diagonal(self.hessian_blocks),
            "diag_h_batch": lambda: self.diag_h_batch,
            "ggnmp": lambda: self.ggn,
            "hmp": lambda: self.hessian_blocks,
        }
        return found[field]()

    def kronecker(self, name: str) -> list[Tensor]:
        """``[B, A]`` of a linear layer's weight, ``[B]`` of its bias: ``B`` is the bias's block."""
        assert isinstance(self.at, Tabulated)
        layer, _, kind = name.rpartition(".")
        B = self.ggn[f"{layer}.bias"]
        return [B, self.at.moments[layer]] if kind == "weight" else [B]
