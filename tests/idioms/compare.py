"""The quantities of one pass against brute force."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backpack import backpack
from backpack import extensions as E
from backpack.quantities.base import BackpropExtension
from backpack.testing.copies import exactly
from tests.idioms.reference import Truth

TOLERANCE = 1e-8
# Quantities that are refused together.
GROUPS: dict[str, tuple[BackpropExtension, ...]] = {
    "first": (E.BatchGrad(), E.BatchL2Grad(), E.SumGradSquared(), E.Variance()),
    "ggn": (
        *(E.DiagGGNExact(), E.BatchDiagGGNExact(), E.SqrtGGNExact(), E.KFLR()),
        *(exactly(E.DiagGGNMC()), exactly(E.BatchDiagGGNMC())),
    ),
    "ekflr": (E.EKFLR(),),
    "kfra": (E.KFRA(),),
    "hessian": (E.DiagHessian(), E.BatchDiagHessian()),
    "ggnmp": (E.GGNMP(),),
    "hmp": (E.HMP(),),
}
# Totals and what is per sample apart, for losses that mix samples.
SPLIT: dict[str, tuple[BackpropExtension, ...]] = {
    **{type(ext).__name__: (ext,) for name in ("ggn", "hessian") for ext in GROUPS[name]},
    **{name: group for name, group in GROUPS.items() if name not in ("ggn", "hessian")},
}
# What a group's outcome is: "" for agreement, "refused: ...", "refused by torch: ..." or "wrong: ...".
Outcome = dict[str, str]


class Comparison:
    """Compares quantities of passes with what they should be.

    Args:
        truth: what they should be.
        model: the extended model.
        backward: makes one backward pass, loss and all.
        ends_linear: whether the model's last operation is its last layer.
        tolerance: largest error that counts as agreement, relative to a parameter's largest entry.
        floor: errors that are rounding, in absolute terms.
        columns: how many columns a square root has at most; ``None``: any number.
        options: of ``backpack(...)``.
    """

    def __init__(
        self,
        truth: Truth,
        model: nn.Module,
        backward: Callable[[], None],
        ends_linear: bool = True,
        tolerance: float = TOLERANCE,
        floor: float = 0.0,
        columns: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.truth, self.model, self.backward = truth, model, backward
        self.ends_linear, self.columns = ends_linear, columns
        self.tolerance, self.floor = tolerance, floor
        self.options = options or {}

    def outcome(
        self, groups: dict[str, tuple[BackpropExtension, ...]] = GROUPS, gradient: bool = True
    ) -> Outcome:
        """One pass with all groups; group by group if that raises."""
        try:
            return self._tried(groups, gradient)
        except (RuntimeError, ValueError, NotImplementedError):
            found: Outcome = {}
            for name, group in groups.items():
                try:
                    found |= self._tried({name: group}, gradient)
                except (RuntimeError, ValueError, NotImplementedError) as error:
                    found[name] = f"refused{'' if ours(error) else ' by torch'}: {error}"
            return found

    def _tried(self, groups: dict[str, tuple[BackpropExtension, ...]], gradient: bool) -> Outcome:
        extensions = [ext for group in groups.values() for ext in group]
        for p in self.model.parameters():
            p.grad = None
            for ext in extensions:
                p.__dict__.pop(ext.savefield, None)
        with backpack(*extensions, gradient=gradient, **self.options):
            self.backward()
        return {
            name: "; ".join(filter(None, map(self._wrong, group))) for name, group in groups.items()
        }

    def _wrong(self, ext: BackpropExtension) -> str:
        """What is wrong with a quantity, if anything is."""
        field, parameters = ext.savefield, self.truth.at.parameters
        found = {
            n: getattr(p, field, None) for n, p in self.model.named_parameters() if n in parameters
        }
        errors = {}
        try:
            if field in ("kflr", "kfra", "ekflr"):
                errors = {n: self._kronecker(field, n, value) for n, value in found.items()}
            else:
                expected = self.truth.value(field)
                largest = max(float(e.abs().max()) for e in expected.values())
                for name, value in found.items():
                    if value is None and not bool(expected[name].abs().max() > self.floor):
                        continue  # the parameter takes no part
                    errors[name] = self._error(field, name, value, expected[name], largest)
        except WrongError as error:
            return f"wrong: {field}: {error}"
        worst = max(errors.values(), default=0.0)
        return "" if worst <= self.tolerance else f"wrong: {field} {worst:.1e}"

    def _error(self, field: str, name: str, value: Any, expected: Tensor, largest: float) -> float:
        if value is None:
            raise WrongError(f"{name} has none")
        if field in ("ggnmp", "hmp"):
            return _product(value, expected, self.truth.at.parameters[name], largest, self.floor)
        value = self._gram(value, name) if field.startswith("sqrt") else value
        return relative(value, expected, largest, self.floor)

    def _gram(self, root: Tensor, name: str) -> Tensor:
        at = self.truth.at
        shape = at.parameters[name].shape
        # A loss that takes a part of the outputs, or their means, has as many columns as it has inputs.
        most = len(root) if self.columns is None else self.columns
        fits = (0 if self.truth.flat else 1) <= len(root) <= most
        if root.shape[1:] != (at.samples, *shape) or not fits:
            raise WrongError(
                f"shape {list(root.shape)} for {self.columns} outputs of {at.samples} samples"
            )
        flat = root.reshape(-1, shape.numel())
        return flat.T @ flat

    def _kronecker(self, field: str, name: str, value: Any) -> float:
        """Of KFRA the last layer's factors, which are those of KFLR; without curvature only ``B``."""
        expected = self.truth.kronecker(name)
        if field == "ekflr":
            return self._eigen(name, value, expected)
        if field == "kfra" and (not name.startswith("o.") or not self.ends_linear):
            return 0.0
        pairs = list(zip(value, expected, strict=True))[: 1 if self.truth.flat else 2]
        return max(relative(a, b, float(b.abs().max())) for a, b in pairs)

    def _eigen(self, name: str, value: Any, factors: list[Tensor]) -> float:
        """The bases diagonalise the factors, the eigenvalues are the block's in that basis."""
        errors = []
        for Q, factor in zip(value.eigenvectors, factors, strict=True):
            turned = Q.T @ factor @ Q
            if not self.truth.flat:
                errors.append(
                    relative(torch.diag(turned.diagonal()), turned, float(factor.abs().max()))
                )
            errors.append(relative(Q.T @ Q, torch.eye(len(Q)).to(Q), 1.0))
        Q = value.eigenvectors[0]
        Q = torch.kron(*value.eigenvectors) if len(value.eigenvectors) == 2 else Q
        diagonal = (Q.T @ self.truth.ggn[name] @ Q).diagonal()
        errors.append(relative(value.eigenvalues.flatten(), diagonal, float(diagonal.abs().max())))
        return max(errors)


def ours(error: BaseException) -> bool:
    """Whether an error is one of the library's own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "backpack" in Path(trace.tb_frame.f_code.co_filename).parts


class WrongError(Exception):
    """A value of the wrong shape."""


def relative(found: Tensor, expected: Tensor, largest: float, floor: float = 0.0) -> float:
    """The largest error, relative to the largest entry or a thousandth of ``largest``."""
    if found.shape != expected.shape:
        raise WrongError(f"shape {list(found.shape)} instead of {list(expected.shape)}")
    scale = max(float(expected.abs().max()), 1e-3 * largest) or 1.0
    error = float((found - expected).abs().max())
    if error != error:
        return float("inf")
    return error / scale if error > floor else 0.0


def _product(function: Any, block: Tensor, p: Tensor, largest: float, floor: float) -> float:
    vectors = torch.randn(2, len(block), generator=torch.Generator().manual_seed(1), dtype=block.dtype)
    found = function(vectors.reshape(2, *p.shape)).reshape(2, -1)
    return relative(found, vectors @ block, largest, floor)
