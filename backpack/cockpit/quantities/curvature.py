"""The original's quantities of curvature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backpack.cockpit.curvature import Curvature
from backpack.cockpit.eigenvalue import lanczos, starting, vector_products
from backpack.cockpit.quantities import forms
from backpack.cockpit.quantities.first import _OfSamples
from backpack.cockpit.quantities.forms import EIGENVALUE, KeptForm, Peek
from backpack.cockpit.quantities.quantity import Schedule, SingleStepQuantity
from backpack.own import BackpropExtension, Pass

MATRICES = {"diag_h": "hessian", "diag_ggn_exact": "ggn", "diag_ggn_mc": "ggn_mc"}


def _extension(curvature: str, diagonal: bool) -> Curvature:
    return Curvature(f"cockpit_{curvature}", _raise, MATRICES[curvature], diagonal)


def _raise(part: str, error: Exception) -> None:
    raise error


class _WithCurvature(SingleStepQuantity):
    def _choose(self, curvature: str) -> None:
        if curvature not in MATRICES:
            raise KeyError(f"no curvature {curvature!r}; there are {list(MATRICES)}")
        self._curvature = curvature

    def _traces(self, params: Sequence[Tensor]) -> list[float]:
        return [getattr(p, f"cockpit_{self._curvature}")[0].item() for p in params]


class HessTrace(_WithCurvature):
    """Trace of each parameter's block of a curvature matrix.

    Args:
        track_schedule: says of a step whether it is tracked.
        verbose: print what is stored.
        curvature: ``"diag_h"``, ``"diag_ggn_exact"`` or ``"diag_ggn_mc"``.
    """

    def __init__(
        self, track_schedule: Schedule, verbose: bool = False, curvature: str = "diag_h"
    ) -> None:
        super().__init__(track_schedule, verbose)
        self._choose(curvature)

    def extensions(self, global_step: int) -> Sequence[BackpropExtension]:
        return [_extension(self._curvature, False)] if self.should_compute(global_step) else []

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        return self._traces(params)


class TICTrace(_WithCurvature, _OfSamples):
    """``(1/B sum ||g_n||^2) / (tr C + eps)`` (Thomas et al., 2020).

    Args:
        track_schedule: says of a step whether it is tracked.
        verbose: print what is stored.
        curvature: see :class:`HessTrace`.
        epsilon: added to the trace.
    """

    _diagonal = False

    def __init__(
        self,
        track_schedule: Schedule,
        verbose: bool = False,
        curvature: str = "diag_h",
        epsilon: float = 1e-7,
    ) -> None:
        super().__init__(track_schedule, verbose)
        self._choose(curvature)
        self._epsilon = epsilon

    def extensions(self, global_step: int) -> Sequence[BackpropExtension]:
        if not self.should_compute(global_step):
            return []
        return [KeptForm(), _extension(self._curvature, self._diagonal)]

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        B = forms.samples(global_step, params)
        second = B * forms.squared_norms(params).sum().item()
        return second / (sum(self._traces(params)) + self._epsilon)


class TICDiag(TICTrace):
    """``sum_d (1/B sum g_nd^2) / (C_dd + eps)``; arguments as :class:`TICTrace`."""

    _diagonal = True

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        B, total = forms.samples(global_step, params), 0.0
        for p, (second, _) in zip(params, forms.entries(params, B), strict=True):
            diagonal = getattr(p, f"cockpit_{self._curvature}")[1]
            total += (second.double() / (diagonal.double() + self._epsilon)).sum().item()
        return total


class HessMaxEV(SingleStepQuantity):
    """The Hessian's largest eigenvalue; of the graph that is there, ``create_graph`` is not needed.

    Args:
        track_schedule: says of a step whether it is tracked.
        verbose: print what is stored.
        use_power: the eigenvalue of largest magnitude, as the power method finds it; otherwise the
            largest.
    """

    def __init__(self, track_schedule: Schedule, verbose: bool = False, use_power: bool = True) -> None:
        super().__init__(track_schedule, verbose)
        self._use_power = use_power

    def extensions(self, global_step: int) -> Sequence[BackpropExtension]:
        return [Peek(EIGENVALUE, self._value)] if self.should_compute(global_step) else []

    def _value(self, given: Pass) -> float:
        parameters = [leaf.parameter for leaf in given.leaves]
        with torch.enable_grad():
            edges, weights = [edge for edge, _ in given.roots], [weight for _, weight in given.roots]
            product = vector_products(edges, weights, parameters)
        return lanczos(product, starting(parameters), self._use_power)[0]

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        return next((getattr(p, EIGENVALUE) for p in params if hasattr(p, EIGENVALUE)), None)
