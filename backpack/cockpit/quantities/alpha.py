"""The original's alpha: where a step has landed in a parabola fitted to both ends."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backpack.cockpit import alpha as parabola
from backpack.cockpit.context import get_individual_losses
from backpack.cockpit.losses import UnreadableError, individual_losses
from backpack.cockpit.quantities import forms
from backpack.cockpit.quantities.forms import LOSSES, Found, KeptForm, Peek
from backpack.cockpit.quantities.quantity import TwoStepQuantity
from backpack.own import BackpropExtension, Pass


def _read(given: Pass) -> Tensor | None:
    leaves: Any = given.leaves
    try:
        return individual_losses(given, leaves[0].samples)[0]
    except UnreadableError:
        return None


class Alpha(TwoStepQuantity):
    """0: the step has landed in the minimum along it; 1: on the other side; -1: it has not moved.

    Each sample's loss is read from the graph where ``info`` has no ``"individual_losses"``.
    """

    SAVE_SHIFT = 1

    def extensions(self, global_step: int) -> Sequence[BackpropExtension]:
        if self.is_start(global_step) or self.is_end(global_step):
            return [KeptForm(), Peek(LOSSES, _read)]
        return []

    def _losses(self, global_step: int, params: Sequence[Tensor]) -> Tensor | None:
        given = get_individual_losses(global_step)
        if given is not None:
            return given.detach().double()
        shares = getattr(params[0], LOSSES, None)
        return None if shares is None else shares * forms.samples(global_step, params)

    def _compute_start(
        self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None
    ) -> Any:
        return {
            "at": [p.detach().clone() for p in params],
            "found": forms.found(params),
            "loss": batch_loss,
            "losses": self._losses(global_step, params),
            "samples": forms.samples(global_step, params),
        }

    def _compute_end(
        self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None
    ) -> Any:
        start, losses = self._cache[global_step - 1], self._losses(global_step, params)
        if start["losses"] is None or losses is None or start["loss"] is None or batch_loss is None:
            warnings.warn("Alpha: each sample's loss is not known; give it in info", stacklevel=2)
            return None
        step = [p.detach() - q for p, q in zip(params, start["at"], strict=True)]
        length = float(sum(d.double().square().sum() for d in step)) ** 0.5
        if length == 0:
            warnings.warn("Alpha: the parameters have not moved", stacklevel=2)
        ends = [
            _end(start["found"], step, start["samples"], length, start["loss"], start["losses"]),
            _end(
                forms.found(params),
                step,
                forms.samples(global_step, params),
                length,
                batch_loss,
                losses,
            ),
        ]
        return parabola.alpha(ends[0], ends[1], length)


def _end(
    found: Sequence[Found],
    step: Sequence[Tensor],
    samples: int,
    length: float,
    loss: Tensor,
    losses: Tensor,
) -> parabola.End:
    slopes: Any = sum(each.project(d).double() for each, d in zip(found, step, strict=True))
    slopes = slopes * samples / (length or 1.0)
    numbers = (losses.var(), slopes.mean(), slopes.var())
    spread, slope, variance = (float(torch.as_tensor(x)) for x in numbers)
    return parabola.End(loss.item(), spread, slope, variance)
