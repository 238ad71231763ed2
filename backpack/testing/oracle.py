"""The oracle: every quantity by brute force, with plain autograd and in float64.

:class:`Oracle` uses torch alone, and nothing of this library: the model runs unextended, samples are
told apart by holding all rows but one of the model output constant, Jacobians and Hessians are computed
row by row. Complex numbers are pairs of real ones. Slow, and the judge of everything else.
:func:`check` runs both and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from backpack.capture.extend import extend, unextend
from backpack.capture.said import Samples, said_axes
from backpack.engine.block import backpack
from backpack.quantities.base import BackpropExtension, listed
from backpack.quantities.diagonal import BatchDiagGGNExact, BatchDiagHessian, DiagGGNExact, DiagHessian
from backpack.quantities.first_order import BatchGrad, BatchL2Grad, SumGradSquared, Variance
from backpack.quantities.square_root import SqrtGGNExact
from backpack.testing.copies import cast, copied, exactly
from backpack.testing.report import Report, error_of
from backpack.testing.rows import Rows


class Oracle(Rows):
    """Quantities of a model and a loss by brute force; see :class:`Rows` for its arguments."""

    def _share(self, n: int) -> Tensor:
        """The loss as a function of the n-th sample's output only."""
        output = self.output()
        return self.loss(torch.where(self._mask(output, n), output, output.detach()))

    def _gradients(self, value: Tensor, create_graph: bool = False) -> list[Tensor]:
        parameters = list(self.parameters.values())
        if not value.requires_grad:
            return [_pairs(torch.zeros_like(p)) for p in parameters]
        grads = torch.autograd.grad(
            value, parameters, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
        found = (
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)
        )
        return [_pairs(g) for g in found]

    def _named(self, rows: Iterable[Sequence[Tensor]]) -> dict[str, Tensor]:
        rows = list(rows)
        if not rows:  # of a sample without any
            zeros = {name: _pairs(p.detach()) for name, p in self.parameters.items()}
            return {name: p.new_zeros(0, *p.shape) for name, p in zeros.items()}
        columns = zip(*rows, strict=True)
        return {name: torch.stack(c) for name, c in zip(self.parameters, columns, strict=True)}

    @cached_property
    def grad_batch(self) -> dict[str, Tensor]:
        """Individual gradients, ``[N, *p]``."""
        return self._named(self._gradients(self._share(n)) for n in range(self.samples))

    @cached_property
    def loss_hessians(self) -> list[Tensor]:
        """Loss Hessian in each sample's output, ``[C, C]``."""
        found = []
        for n in range(self.samples):
            f = self.output().detach().requires_grad_()
            mask = _pairs_alike(self._mask(f, n).expand_as(f), f)
            (gradient,) = torch.autograd.grad(self.loss(f), f, create_graph=True)
            rows = []
            for entry in _pairs(gradient)[mask]:
                row = torch.zeros_like(f)
                if entry.requires_grad:
                    grad = torch.autograd.grad(entry, f, retain_graph=True, allow_unused=True)[0]
                    row = row if grad is None else grad
                rows.append(_pairs(row)[mask])
            found.append(torch.stack(rows) if rows else f.real.new_zeros(0, 0))
        return found

    @cached_property
    def jacobians(self) -> list[dict[str, Tensor]]:
        """Jacobian of each sample's output in each parameter, ``[C, *p]``."""
        found = []
        output = self.output()
        for n in range(self.samples):
            mask = _pairs_alike(self._mask(output, n).expand_as(output), output)
            entries = _pairs(output)[mask]
            found.append(self._named(self._gradients(entry) for entry in entries))
        return found

    @cached_property
    def diag_ggn_batch(self) -> dict[str, Tensor]:
        """Diagonal of each sample's generalized Gauss-Newton, ``[N, *p]``."""
        return self._named(
            [torch.einsum("c...,cd,d...->...", j, h, j) for j in jacobian.values()]
            for jacobian, h in zip(self.jacobians, self.loss_hessians, strict=True)
        )

    @cached_property
    def ggn(self) -> dict[str, Tensor]:
        """Generalized Gauss-Newton block of each parameter, ``[P, P]``."""
        blocks = {}
        for name in self.parameters:
            block = torch.zeros(())
            for jacobian, h in zip(self.jacobians, self.loss_hessians, strict=True):
                j = jacobian[name].reshape(len(h), -1)
                block = block + j.T @ h @ j
            blocks[name] = block
        return blocks

    @cached_property
    def diag_h_batch(self) -> dict[str, Tensor]:
        """Diagonal of the Hessian of each sample's share of the loss, ``[N, *p]``."""
        rows = []
        for n in range(self.samples):
            gradients = self._gradients(self._share(n), create_graph=True)
            row = []
            for p, gradient in zip(self.parameters.values(), gradients, strict=True):
                diagonal = torch.zeros_like(gradient).flatten()
                for j, entry in enumerate(gradient.flatten()):
                    if entry.requires_grad:
                        second = torch.autograd.grad(entry, p, retain_graph=True, allow_unused=True)[0]
                        diagonal[j] = 0 if second is None else _pairs(second).flatten()[j]
                row.append(diagonal.reshape(gradient.shape).detach())
            rows.append(row)
        return self._named(rows)

    def value(self, savefield: str) -> dict[str, Tensor]:
        """The quantity saved to ``savefield``, for each parameter.

        Raises:
            KeyError: if there is no brute-force twin of that quantity.
        """
        return {
            name: _of_complex(value, savefield) if self.parameters[name].is_complex() else value
            for name, value in self.in_pairs(savefield).items()
        }

    def in_pairs(self, savefield: str) -> dict[str, Tensor]:
        """The same for real and imaginary parts of complex parameters, as two real ones."""
        return {name: g.detach() for name, g in _TWINS[savefield](self).items()}


def _of_complex(value: Tensor, savefield: str) -> Tensor:
    """Gradients are complex, their squares and curvature are summed over both parts."""
    if savefield in ("batch_l2", *_ROOTS):
        return value
    return torch.view_as_complex(value) if savefield == "grad_batch" else value.sum(-1)


def _pairs(x: Tensor) -> Tensor:
    """Real and imaginary parts of complex numbers, ``[..., 2]``."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _pairs_alike(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of complex numbers as one of their two parts."""
    return mask.unsqueeze(-1).expand(*mask.shape, 2) if like.is_complex() else mask


def _each(values: dict[str, Tensor], function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: function(value) for name, value in values.items()}


def _sqrt_gram(sqrt: Tensor) -> Tensor:
    sqrt = _pairs(sqrt)
    flat = sqrt.reshape(sqrt.shape[0] * sqrt.shape[1], sqrt.shape[2:].numel())
    return flat.T @ flat


_TWINS: dict[str, Callable[[Oracle], dict[str, Tensor]]] = {
    "grad_batch": lambda o: o.grad_batch,
    "batch_l2": lambda o: _each(o.grad_batch, lambda g: (g**2).reshape(len(g), -1).sum(1)),
    "sum_grad_squared": lambda o: _each(o.grad_batch, lambda g: (g**2).sum(0)),
    "variance": lambda o: _each(o.grad_batch, lambda g: g.var(0, unbiased=False)),
    "diag_ggn_exact": lambda o: _each(o.diag_ggn_batch, lambda g: g.sum(0)),
    "diag_ggn_exact_batch": lambda o: o.diag_ggn_batch,
    "diag_ggn_mc": lambda o: _each(o.diag_ggn_batch, lambda g: g.sum(0)),
    "diag_ggn_mc_batch": lambda o: o.diag_ggn_batch,
    "sqrt_ggn_exact": lambda o: o.ggn,
    "sqrt_ggn_mc": lambda o: o.ggn,
    "diag_h": lambda o: _each(o.diag_h_batch, lambda g: g.sum(0)),
    "diag_h_batch": lambda o: o.diag_h_batch,
}
# Compared by the matrix that they are a root of.
_ROOTS = frozenset({"sqrt_ggn_exact", "sqrt_ggn_mc"})


DEFAULT = (
    BatchGrad(),
    BatchL2Grad(),
    SumGradSquared(),
    Variance(),
    DiagGGNExact(),
    BatchDiagGGNExact(),
    SqrtGGNExact(),
    DiagHessian(),
    BatchDiagHessian(),
)


def check(
    model: nn.Module,
    lossfunc: Callable[[Any, Any], Tensor],
    X: Any,
    y: Any,
    extensions: BackpropExtension | Sequence[BackpropExtension] = DEFAULT,
    *,
    batch_dim: int = 0,
    output_dim: int | None = None,
    tolerance: float = 1e-8,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    seed: int = 0,
    sample_of_row: Tensor | Sequence[int] | None = None,
    samples: Samples | None = None,
) -> Report:
    """Compare quantities with brute-force autograd on a model of your own.

    Works on copies; use a small model and a small batch, for the oracle is slow. Square roots are
    compared by the matrix they are a root of; Monte-Carlo quantities with exact columns in place of
    the draws, which checks all but the draws.

    Args:
        model: any module.
        lossfunc: a loss module or function of output and targets.
        X: the input, or a tuple of inputs. The output may be a tensor, or hold several in containers or
            attributes; those without rows (a penalty) are constants.
        y: the targets.
        extensions: the quantities to check, or one; by default all that are exact.
        batch_dim: sample axis of input and output.
        output_dim: sample axis of the output, if it is another.
        tolerance: largest relative error that counts as agreement.
        dtype: precision in which backpack computes; the oracle computes in float64.
        device: where backpack computes; by default, and the oracle always, where the model is.
        seed: random seed of every forward pass (dropout).
        sample_of_row: the sample of each row of the output, where replacing one sample by another does
            not tell (a mask that depends on the data picks rows).
        samples: the input that carries the batch, or which row belongs to which sample, as for
            :func:`backpack.extend`.

    Returns:
        A report; ``print(report)`` shows a table, ``report.ok`` the verdict.

    Raises:
        KeyError: for a quantity that has no brute-force twin (Kronecker factors approximate).
        ValueError: for a quantity of some samples only, or if rows of the output cannot be told apart.

    Example:
        >>> model, X, y = nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 1, 0])
        >>> report = check(model, nn.CrossEntropyLoss(), X, y)
        >>> report.ok, report.worst < 1e-8
        (True, True)
    """
    extensions = listed(extensions)
    for ext in extensions:
        if ext.savefield not in _TWINS:
            raise KeyError(f"{ext!r} has no brute-force twin; leave it out of check(...)")
        if ext.subsampling is not None:
            raise ValueError(
                f"check compares all samples, but {ext!r} has subsampling={ext.subsampling}"
            )
    judge, wide, count = unextend(copied(model, torch.float64)), cast(X, torch.float64), None
    if samples is not None:
        given = wide if isinstance(wide, tuple) else (wide,)
        count = said_axes(samples, judge, given, {}, batch_dim)[0][1].size
    oracle = Oracle(
        judge,
        unextend(copied(lossfunc, torch.float64)) if isinstance(lossfunc, nn.Module) else lossfunc,
        wide,
        cast(y, torch.float64),
        batch_dim,
        seed,
        output_dim,
        sample_of_row,
        count,
    )
    ours = extend(copied(model, dtype, device), batch_dim=batch_dim, samples=samples)
    our_loss = extend(copied(lossfunc, dtype, device)) if isinstance(lossfunc, nn.Module) else lossfunc
    inputs = cast(X, dtype, device)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        output = ours(*inputs) if isinstance(inputs, tuple) else ours(inputs)
        loss = our_loss(output, cast(y, dtype, device))
    with backpack(*map(exactly, extensions)):
        loss.backward(torch.ones_like(loss))

    report = Report(tolerance)
    parameters = dict(ours.named_parameters())
    for ext in extensions:
        expected = oracle.value(ext.savefield)
        # Parts of complex numbers may cancel.
        pairs = {
            name: float(e.abs().max())
            for name, e in oracle.in_pairs(ext.savefield).items()
            if e.numel()
        }
        largest = max(pairs.values(), default=0.0)
        for name, reference in expected.items():
            p = parameters[name]
            value = getattr(p, ext.savefield, None)
            if value is not None and ext.savefield in _ROOTS:
                fits = value.shape[1:] == (oracle.samples, *p.shape)
                value = _sqrt_gram(value) if fits else value
            found = (value is not None) == (p.grad is not None)
            least = max(1e-3 * largest, pairs.get(name, 0.0))
            error = error_of(value, reference, least) if found else float("inf")
            report.errors[name, ext.savefield] = error
    return report
