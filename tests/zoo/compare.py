"""What ``backpack`` gives for a model of the zoo, against brute force in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backpack import backpack, extend
from backpack import extensions as E
from backpack.quantities.base import BackpropExtension
from backpack.testing.oracle import Oracle
from backpack.testing.report import Report
from tests.zoo.setting import N, Setting

FIRST = E.BatchGrad(), E.BatchL2Grad(), E.SumGradSquared(), E.Variance()
SECOND = E.DiagGGNExact(), E.BatchDiagGGNExact(), E.SqrtGGNExact(), E.KFLR()
BLOCK = 200  # entries of parameters whose GGN block is written out


class View(nn.Module):
    """A model as a function from its inputs to one tensor."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.model, self.setting = setting.model, setting

    def forward(self, *inputs: Any) -> Tensor:
        return self.setting.outputs(self.setting.call(self.model, *inputs))


class Trial:
    """A model of the zoo, made in float64, and its oracle."""

    def __init__(self, make: Callable[[], Setting], tolerance: float = 1e-8) -> None:
        with _double():
            setting, plain = _made(make), _made(make)
        self.setting = setting
        self.oracle = Oracle(
            *(View(plain), lambda f, _: plain.criterion(f), plain.inputs, None, plain.batch_dim)
        )
        extend(setting.model, batch_dim=setting.batch_dim)
        self.parameters = {f"model.{name}": p for name, p in setting.model.named_parameters()}
        self.tolerance = tolerance

    def loss(self) -> Tensor:
        """The loss as a user computes it."""
        setting = self.setting
        output = setting.call(setting.model, *setting.inputs)
        return setting.loss(output) if setting.loss else setting.criterion(setting.outputs(output))

    def first(self) -> Report:
        """Quantities of the first order."""
        with _double():
            loss = self.loss()
            with backpack(*FIRST):
                loss.backward()
            report = Report(self.tolerance)
            for ext in FIRST:
                self._add(report, ext, self.oracle.value(ext.savefield))
            plain = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
            gradients = {n: g.sum(0) for n, g in self.oracle.grad_batch.items() if n in plain}
            _compare(report, "sum", gradients, plain)
            if self.setting.alone:
                _compare(report, "alone", self._single_samples(), self._saved("grad_batch"))
        return report

    def second(self) -> Report:
        """The GGN: its diagonal, with and without samples kept apart; square roots and factors."""
        with _double():
            with backpack(*SECOND):
                self.loss().backward()
            report = Report(self.tolerance)
            for ext in SECOND[:2]:
                self._add(report, ext, self.oracle.value(ext.savefield))
            diagonal = self.oracle.value("diag_ggn_exact")
            roots, factors = self._saved("sqrt_ggn_exact"), self._saved("kflr")
            _compare(
                report, "diagonal of sqrt", diagonal, {n: (v**2).sum((0, 1)) for n, v in roots.items()}
            )
            small = {n: self._block(n) for n, d in diagonal.items() if d.numel() <= BLOCK}
            _compare(report, "sqrt_ggn_exact", small, {n: _gram(roots[n]) for n in small if n in roots})
            for name, p in self.parameters.items():
                if name in factors:
                    rows = [len(factor) for factor in factors[name]]
                    sizes = [p.numel()] if len(rows) == 1 else [max(rows), p.numel() // max(rows)]
                    fine = sorted(rows) == sorted(sizes)
                    report.errors[name, "rows of kflr"] = 0.0 if fine else float("inf")
        return report

    def hessian(self, per_sample: bool = False, entries: int = 2) -> Report:
        """The Hessian's diagonal, some entries of every parameter."""
        ext = E.BatchDiagHessian() if per_sample else E.DiagHessian()
        # other kernels cannot be differentiated twice
        with _double(), sdpa_kernel(SDPBackend.MATH):
            with backpack(ext):
                self.loss().backward()
            places = {n: torch.randperm(p.numel())[:entries] for n, p in self.oracle.parameters.items()}
            rows = [self._hessian_entries(n, places) for n in range(N)]
        expected = {name: torch.stack([row[name] for row in rows]) for name in places}
        if not per_sample:
            expected = {name: e.sum(0, keepdim=True) for name, e in expected.items()}
        found = self._saved(ext.savefield)
        found = {n: v.reshape(N if per_sample else 1, -1)[:, places[n]] for n, v in found.items()}
        report = Report(self.tolerance)
        _compare(report, ext.savefield, expected, found)
        return report

    def hessian_by_sample(self) -> Report:
        """The same, with samples kept apart."""
        return self.hessian(per_sample=True)

    def lively(self) -> bool:
        """Whether samples and parameters make a difference, so that errors can be seen."""
        with _double():
            output = self.oracle.output().detach().movedim(self.setting.batch_dim, 0)
            gradients = self.oracle.grad_batch.values()
            curvature = max(float(h.abs().max()) for h in self.oracle.loss_hessians)
        spread = float((output - output.mean(0)).abs().max() / output.abs().max())
        used = sum(bool(g.abs().max() > 1e-12) for g in gradients)
        return spread > 1e-3 and curvature > 1e-6 and used > 0.6 * len(gradients)

    def _hessian_entries(self, n: int, places: dict[str, Tensor]) -> dict[str, Tensor]:
        gradients = self.oracle._gradients(self.oracle._share(n), create_graph=True)
        found = {}
        for (name, p), gradient in zip(self.oracle.parameters.items(), gradients, strict=True):
            values = torch.zeros(len(places[name]))
            for k, j in enumerate(places[name]):
                entry = gradient.flatten()[j]
                if entry.requires_grad:
                    (second,) = torch.autograd.grad(entry, p, retain_graph=True, allow_unused=True)
                    values[k] = 0.0 if second is None else second.flatten()[j]
            found[name] = values
        return found

    def _block(self, name: str) -> Tensor:
        block = torch.zeros(())
        for jacobian, h in zip(self.oracle.jacobians, self.oracle.loss_hessians, strict=True):
            j = jacobian[name].flatten(1)
            block = block + j.T @ h @ j
        return block

    def _single_samples(self) -> dict[str, Tensor]:
        """Gradients of the losses of batches of one sample."""
        setting, rows = self.setting, []
        parameters = self.oracle.parameters
        for n in range(N):
            inputs = [v[n : n + 1] for v in setting.inputs]
            loss = setting.loss(setting.call(self.oracle.model.model, *inputs)) / N
            rows.append(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))
        columns = zip(*rows, strict=True)
        return {
            name: torch.stack([torch.zeros_like(p) if g is None else g for g in column])
            for (name, p), column in zip(parameters.items(), columns, strict=True)
        }

    def _saved(self, field: str) -> dict[str, Any]:
        return {n: getattr(p, field) for n, p in self.parameters.items() if hasattr(p, field)}

    def _add(self, report: Report, ext: BackpropExtension, expected: dict[str, Tensor]) -> None:
        _compare(report, ext.savefield, expected, self._saved(ext.savefield))


@contextmanager
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _made(make: Callable[[], Setting]) -> Setting:
    torch.manual_seed(0)
    setting = make()
    setting.model.double()  # some packages make parameters and buffers of single precision
    return setting


def _gram(sqrt: Tensor) -> Tensor:
    flat = sqrt.flatten(0, 1).flatten(1)
    return flat.T @ flat


def _compare(report: Report, what: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Errors as in :class:`Report`; a missing value stands for zeros."""
    largest = max((float(e.abs().max()) for e in expected.values()), default=0.0)
    for name, reference in expected.items():
        value = found.get(name)
        if value is None:
            error = float("inf") if bool(reference.any()) else 0.0
        else:
            scale = max(float(reference.abs().max()), 1e-3 * largest) or 1.0
            error = float((value - reference).abs().max()) / scale
        report.errors[name, what] = float("inf") if error != error else error
