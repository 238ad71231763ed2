"""The original's histograms of individual gradients, in one and two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backpack.cockpit.quantities import forms
from backpack.cockpit.quantities.bin_adaptation import NoAdaptation, Range
from backpack.cockpit.quantities.first import _OfSamples
from backpack.cockpit.quantities.quantity import Schedule


class GradHist1d(_OfSamples):
    """Counts of all entries of individual gradients; those outside count in the outer bins.

    Args:
        track_schedule: says of a step whether it is tracked.
        verbose: print what is stored.
        bins: their number.
        range: from where to where.
        adapt: how the range changes (:mod:`backpack.cockpit.quantities.bin_adaptation`).
    """

    def __init__(
        self,
        track_schedule: Schedule,
        verbose: bool = False,
        bins: int = 100,
        range: Range = (-2.0, 2.0),  # noqa: A002
        adapt: Any = None,
    ) -> None:
        super().__init__(track_schedule, verbose)
        self._bins, self._range = bins, range
        self._adapt = NoAdaptation() if adapt is None else adapt

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        B, (low, high) = forms.samples(global_step, params), self._range
        counts = torch.zeros(self._bins, dtype=torch.float64)
        for each in forms.found(params):
            for _, _, g in each.form.blocks():
                entries = (g * B).clamp(low, high)
                counts += torch.histc(entries, self._bins, low, high).double().cpu()
        edges = torch.linspace(low, high, self._bins + 1)
        self._range = self._adapt.adapt(global_step, params, self._range)
        return {"hist": counts.float(), "edges": edges}


class GradHist2d(_OfSamples):
    """Counts of entries of individual gradients against the parameters' values.

    Args:
        track_schedule: says of a step whether it is tracked.
        verbose: print what is stored.
        bins: their numbers.
        range: from where to where, of gradients and of parameters.
        adapt: how the ranges change.
        keep_individual: count for each parameter too.
    """

    def __init__(
        self,
        track_schedule: Schedule,
        verbose: bool = False,
        bins: tuple[int, int] = (40, 50),
        range: tuple[Range, Range] = ((-1.0, 1.0), (-2.0, 2.0)),  # noqa: A002
        adapt: tuple[Any, Any] = (None, None),
        keep_individual: bool = False,
    ) -> None:
        super().__init__(track_schedule, verbose)
        self._bins, self._range, self._keep = bins, list(range), keep_individual
        self._adapt = [NoAdaptation() if each is None else each for each in adapt]

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        edges = tuple(
            torch.linspace(low, high, bins + 1)
            for (low, high), bins in zip(self._range, self._bins, strict=True)
        )
        counts = [self._counts(global_step, params, p) for p in params]
        value: dict[str, Any] = {"hist": sum(counts), "edges": edges}
        if self._keep:
            value["param_groups"] = len(counts)
            for j, each in enumerate(counts):
                value[f"param_{j}"] = {"hist": each, "edges": edges}
        self._range = [
            policy.adapt(global_step, params, old)
            for policy, old in zip(self._adapt, self._range, strict=True)
        ]
        return value

    def _counts(self, global_step: int, params: Sequence[Tensor], p: Tensor) -> Tensor:
        B, (bins_x, bins_y) = forms.samples(global_step, params), self._bins
        counts = torch.zeros(bins_x * bins_y, dtype=torch.long, device=p.device)
        rows = self._places(p.detach().flatten(), 1)
        for _, _, g in getattr(p, forms.FORM).form.blocks():
            columns = self._places((g * B).reshape(-1, p.numel()), 0)
            at = (columns * bins_y + rows).flatten()
            counts += torch.bincount(at, minlength=len(counts))
        return counts.reshape(bins_x, bins_y).cpu()

    def _places(self, x: Tensor, axis: int) -> Tensor:
        """The bin of each entry; the outer ones for those outside."""
        (low, high), bins = self._range[axis], self._bins[axis]
        width = (high - low) / bins
        inside = x.clamp(low + width / 2, high - width / 2)
        return ((inside - low) / width).floor().long().clamp(0, bins - 1)
