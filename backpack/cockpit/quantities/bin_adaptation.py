"""How the range of a histogram follows what it counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backpack.cockpit.quantities import forms
from backpack.cockpit.quantities.quantity import Schedule

Range = tuple[float, float]


class NoAdaptation:
    """The range stays."""

    def adapt(self, global_step: int, params: Sequence[Tensor], range: Range) -> Range:  # noqa: A002
        """The range from the next step on."""
        return range


class _AbsMax:
    """As wide as the largest entry, at the steps of a schedule.

    Args:
        schedule: says of a step whether the range is adapted then.
        verbose: print new ranges.
        padding: how much wider.
        min_size: the least width.
    """

    def __init__(
        self,
        schedule: Schedule,
        verbose: bool = False,
        padding: float = 0.0,
        min_size: float = 1e-6,
    ) -> None:
        self._schedule, self._verbose = schedule, verbose
        self._padding, self._min_size = padding, min_size

    def adapt(self, global_step: int, params: Sequence[Tensor], range: Range) -> Range:  # noqa: A002
        """The range from the next step on."""
        if not self._schedule(global_step):
            return range
        with torch.no_grad():
            largest = max(self._largest(global_step, params), self._min_size / 2)
        found = (1 + self._padding) * largest
        if self._verbose:
            print(f"[Step {global_step} | {type(self).__name__}]: range is now +-{found}")
        return -found, found

    def _largest(self, global_step: int, params: Sequence[Tensor]) -> float:
        raise NotImplementedError


class GradAbsMax(_AbsMax):
    """Of individual gradients."""

    def _largest(self, global_step: int, params: Sequence[Tensor]) -> float:
        B = forms.samples(global_step, params)
        blocks = (g for each in forms.found(params) for _, _, g in each.form.blocks())
        return B * max((float(g.abs().max()) for g in blocks if g.numel()), default=0.0)


class ParamAbsMax(_AbsMax):
    """Of parameters."""

    def _largest(self, global_step: int, params: Sequence[Tensor]) -> float:
        return max((float(p.detach().abs().max()) for p in params if p.numel()), default=0.0)
