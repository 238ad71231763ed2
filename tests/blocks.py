"""Products with curvature blocks and Kronecker factors, against plain autograd in float64.

Of Kronecker factors, sizes and symmetry are compared; of exact ones, and of the empirical Fisher's,
also the factor of a bias with the bias's block, and ``B`` of a weight's ``[B, A]`` with the block
of the bias beside it; of :class:`KFRA` the same with the blocks of its recursion, and ``A``. Of
corrected eigenvalues all: they are the diagonal of the block in a basis that is orthonormal and
diagonalizes the factors of :class:`KFLR`. Quantities with draws have exact columns in their place.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.kronecker import KroneckerEigen
from backpack.sources.table import AveragedRoot, ExactRoot, LossGradient, SampledRoot
from backpack.testing.copies import exactly
from backpack.testing.oracle import Oracle
from backpack.testing.report import Report
from tests.averaged import averaged_blocks
from tests.positive import positive_block


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

    FIELDS = ("ggnmp", "hmp", "pchmp", "kflr", "kfra", "kfac", "kfac_empirical", "ekflr", "ekfac")

    def __init__(self, model: nn.Module, lossfunc: nn.Module, X: Any, y: Any, **axes: int) -> None:
        self.model, self.lossfunc = copy.deepcopy(model).double(), copy.deepcopy(lossfunc).double()
        self.X, self.y = _double(X), _double(y)
        self.batch_dim = axes.get("batch_dim", 0)
        self.oracle = Oracle(copy.deepcopy(self.model), self.lossfunc, self.X, self.y, **axes)
        self._blocks: dict[str, dict[str, Tensor]] = {}

    def blocks(self, field: str) -> dict[str, Tensor]:
        """The matrix that a quantity stands for."""
        kinds = {"hmp": "hessian", "kfac_empirical": "fisher", "pchmp": "positive", "kfra": "averaged"}
        kind = kinds.get(field, "ggn")
        if kind not in self._blocks:
            if kind == "ggn":
                found = self.oracle.ggn
            elif kind == "fisher":
                rows = {name: g.reshape(len(g), -1) for name, g in self.oracle.grad_batch.items()}
                found = {name: each.T @ each for name, each in rows.items()}
            elif kind == "positive":
                ggn, hessian = self.blocks("ggnmp"), self.blocks("hmp")
                found = {
                    n: positive_block(self.oracle, p, ggn[n], hessian[n], lambda c: c.clamp(min=0))
                    for n, p in self.oracle.parameters.items()
                }
            elif kind == "averaged":
                model, oracle = extend(copy.deepcopy(self.model), batch_dim=self.batch_dim), self.oracle
                inputs = self.X if isinstance(self.X, tuple) else (self.X,)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(oracle.seed)
                    output = model(*inputs)
                loss = lambda f: self.lossfunc(f, self.y).sum()  # noqa: E731
                found = averaged_blocks(model, loss, output, oracle.samples)
            else:
                loss = self.oracle.loss(self.oracle.output())
                found = {n: hessian_block(loss, p) for n, p in self.oracle.parameters.items()}
            self._blocks[kind] = {name: block.detach() for name, block in found.items()}
        return self._blocks[kind]

    @cached_property
    def factors(self) -> dict[str, Any]:
        """Factors of :class:`KFLR`."""
        parameters = self.run(E.KFLR()).named_parameters()
        return {name: p.kflr for name, p in parameters if hasattr(p, "kflr")}

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
        model, field = self.run(exactly(ext)), ext.savefield
        values = {n: getattr(p, field) for n, p in model.named_parameters() if hasattr(p, field)}
        report = Report(tolerance)
        for name, p in self.oracle.parameters.items():
            if name in values and callable(values[name]):
                pairs = self._product(name, values[name], field)
            elif name in values and isinstance(values[name], KroneckerEigen):
                pairs = self._eigen(name, p, values[name])
            elif name in values:
                exact = isinstance(ext.source, (ExactRoot, SampledRoot, LossGradient, AveragedRoot))
                pairs = self._factors(name, p, values, field, exact)
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
        self, name: str, p: Tensor, values: dict[str, Any], field: str, exact: bool
    ) -> list[tuple[Tensor, Tensor]]:
        factors = values[name]
        pairs = [(factor, factor.T) for factor in factors]
        sizes = torch.tensor([float(len(factor)) for factor in factors])
        pairs.append((sizes.prod(), torch.tensor(float(p.numel()))))
        above = name.replace("weight", "bias") if len(factors) == 2 else name
        if exact and above in values and ("bias" in above or len(factors) == 1):
            pairs.append((factors[0], self.blocks(field)[above]))
        if field == "kfra" and len(factors) == 2:
            both = zip(factors, self.factors[name], strict=True)  # A is that of KFLR, first or second
            pairs.append(min(both, key=lambda pair: float((pair[0] - pair[1]).abs().max())))
        return pairs

    def _eigen(self, name: str, p: Tensor, value: KroneckerEigen) -> list[tuple[Tensor, Tensor]]:
        block, count = self.blocks("ggn")[name], p.numel()
        units = torch.eye(count, dtype=torch.float64).reshape(count, *p.shape)
        # Eigenvectors as columns, [P, P], and what the block makes of them.
        basis = value.rotate(units).reshape(count, count)
        turned = value.rotate(block.reshape(count, *p.shape)).reshape(count, count)
        pairs = [(value.eigenvalues.flatten(), (basis * turned).sum(0))]
        pairs.append((basis.T @ basis, torch.eye(count, dtype=torch.float64)))
        for vectors, factor in zip(value.eigenvectors, self.factors[name], strict=True):
            if vectors.dim() > 1:
                diagonal = vectors.T @ factor @ vectors
                pairs.append((diagonal, torch.diag(diagonal.diagonal())))
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
