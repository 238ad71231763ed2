"""Critical sharpness: how sharp the loss is along the update, by how far one could have gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EVALUATIONS = 9


def critical_sharpness(
    closure: Callable[[], Any], update: dict[Tensor, Tensor], rates: list[float] | None
) -> float | None:
    """``2 / eta_c``, with ``eta_c`` the learning rate at which the update leaves the loss as it was.

    (arXiv:2601.16979.) A few forward passes without gradients along the update, which is taken back
    afterwards; random numbers are those of the run.

    Args:
        closure: gives the loss of one and the same batch.
        update: what was added to the parameters.
        rates: learning rates of the optimizer's groups; the first counts.

    Returns:
        ``None`` if no such rate is found.
    """
    after = [p.detach().clone() for p in update]
    changes = list(update.values())
    rate = rates[0] if rates else 1.0

    def loss(times: float) -> float:
        with torch.no_grad():
            for p, end, change in zip(update, after, changes, strict=True):
                p.copy_(end + (times - 1) * change)
            value = closure()
            return float(value.detach() if isinstance(value, Tensor) else value)

    devices = sorted({p.device.index for p in update if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            times = _crossing(lambda t: _same_randomness(loss, t))
    finally:
        with torch.no_grad():
            for p, end in zip(update, after, strict=True):
                p.copy_(end)
    return None if times is None else 2 / (times * rate)


def _same_randomness(loss: Callable[[float], float], times: float) -> float:
    torch.manual_seed(0)
    return loss(times)


def _crossing(loss: Callable[[float], float]) -> float | None:
    """The multiple of the update at which the loss is what it was without: doubled, then halved."""
    start, left = loss(0.0), EVALUATIONS - 1
    low, high = 0.0, None
    times = 1.0
    while left:
        left -= 1
        above = not loss(times) <= start
        if above:
            high = times
        else:
            low = times
        if high is None:
            times = 2 * times
        elif low == 0.0:
            times = high / 2
        else:
            times = (low + high) / 2
    if high is None or low == 0.0:
        return None
    return (low + high) / 2
