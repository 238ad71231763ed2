"""Products with curvature blocks and Kronecker factors, against plain autograd in float64.

Of Kronecker factors, sizes and symmetry are compared; of exact ones also the factor of a bias with the
bias's block, and ``B`` of a weight's ``[B, A]`` with the block of the bias beside it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.sources.table import ExactRoot
from backpack.testing.oracle import Oracle
from backpack.testing.report import Report


def hessian_block(loss: Tensor, p: Tensor) -> Tensor:
    """The Hessian of a loss in one parameter, row by row."""
    (gradient,) = torch.autograd.grad(loss, p, create_graph=True, allow_unused=True)
    block = torch.zeros(p.numel(), p.numel(), dtype=p.dtype)
    if gradient is None:
        return block
    for row, entry in zip(block, gradient.flatten(), strict=True):
        if entry.requires_grad:
            (second,) = torch.autograd.grad(entry, p, retain_graph=True, allow_unused=True)
            if second is not None:
                row += second.flatten()
    return block


class Blocks:
    """A model, a loss, and the curvature blocks of all parameters by brute force."""

    def __init__(self, model: nn.Module, lossfunc: nn.Module, X: Any, y: Any, **axes: int) -> None:
        self.model, self.lossfunc = copy.deepcopy(model).double(), copy.deepcopy(lossfunc).double()
        self.X, self.y = _double(X), _double(y)
        self.batch_dim = axes.get("batch_dim", 0)
        self.oracle = Oracle(copy.deepcopy(self.model), self.lossfunc, self.X, self.y, **axes)
        self._blocks: dict[str, dict[str, Tensor]] = {}

    def blocks(self, field: str) -> dict[str, Tensor]:
        """The matrix that a quantity stands for."""
        kind = "hessian" if field == "hmp" else "ggn"
        if kind not in self._blocks:
            if kind == "ggn":
                found = self.oracle.ggn
            else:
                loss = self.oracle.loss(self.oracle.output())
                found = {n: hessian_block(loss, p) for n, p in self.oracle.parameters.items()}
            self._blocks[kind] = {name: block.detach() for name, block in found.items()}
        return self._blocks[kind]

    def run(self, ext: E.BackpropExtension) -> nn.Module:
        """A copy of the model, with the quantity saved to its parameters."""
        model = extend(copy.deepcopy(self.model), batch_dim=self.batch_dim)
        lossfunc = extend(copy.deepcopy(self.lossfunc))
        inputs = self.X if isinstance(self.X, tuple) else (self.X,)
        with backpack(ext):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.oracle.seed)  # dropout
                loss = lossfunc(model(*inputs), self.y)
            loss.backward(torch.ones_like(loss))
        return model

    def compare(self, ext: E.BackpropExtension, tolerance: float = 1e-8) -> Report:
        """Compare one quantity."""
        model, field = self.run(ext), ext.savefield
        values = {n: getattr(p, field) for n, p in model.named_parameters() if hasattr(p, field)}
        report = Report(tolerance)
        for name, p in self.oracle.parameters.items():
            if name in values and callable(values[name]):
                pairs = self._product(name, values[name], field)
            elif name in values:
                pairs = self._factors(name, p, values, exact=isinstance(ext.source, ExactRoot))
            else:
                pairs = [(torch.zeros(()), self.blocks(field)[name].abs().max())]
            scale = max(float(block.abs().max()) for block in self.blocks(field).values()) or 1.0
            errors = [_difference(a, b, 1e-3 * scale) for a, b in pairs]
            report.errors[name, field] = max(errors, default=0.0)
        return report

    def _product(self, name: str, product: Any, field: str) -> list[tuple[Tensor, Tensor]]:
        p = self.oracle.parameters[name]
        mat = torch.randn(3, *p.shape, dtype=torch.float64)
        expected = (mat.reshape(3, -1) @ self.blocks(field)[name]).reshape(mat.shape)
        return [(product(mat), expected), (product(mat[0]), expected[0])]

    def _factors(
        self, name: str, p: Tensor, values: dict[str, Any], exact: bool
    ) -> list[tuple[Tensor, Tensor]]:
        factors = values[name]
        pairs = [(factor, factor.T) for factor in factors]
        sizes = torch.tensor([float(len(factor)) for factor in factors])
        pairs.append((sizes.prod(), torch.tensor(float(p.numel()))))
        above = name.replace("weight", "bias") if len(factors) == 2 else name
        if exact and above in values and "bias" in above:
            pairs.append((factors[0], self.blocks("ggn")[above]))
        return pairs


def _double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _difference(found: Tensor, expected: Tensor, least: float) -> float:
    if found.shape != expected.shape:
        return float("inf")
    scale = max(float(expected.abs().max()), least)
    error = float((found - expected).abs().max()) / scale
    return float("inf") if error != error else error
