"""When to track: functions of the step."""

from __future__ import annotations

from collections.abc import Callable

import torch

Schedule = Callable[[int], bool]


def linear(interval: int, offset: int = 0) -> Schedule:
    """Every ``interval`` steps, from ``offset`` on.

    Example:
        >>> every_third = linear(3, offset=1)
        >>> [step for step in range(8) if every_third(step)]
        [1, 4, 7]
    """

    def schedule(global_step: int) -> bool:
        return global_step >= offset and (global_step - offset) % interval == 0

    return schedule


def logarithmic(
    start: float, end: float, steps: int = 300, base: float = 10, init: bool = True
) -> Schedule:
    """Steps that are spaced evenly on a logarithmic scale.

    Args:
        start: ``base ** start`` is the first step.
        end: ``base ** end`` is the last.
        steps: how many; those that are equal after truncation count once.
        base: the logarithm's.
        init: track step 0 too.

    Example:
        >>> schedule = logarithmic(0, 2, steps=5)
        >>> [step for step in range(101) if schedule(step)]
        [0, 1, 3, 10, 31, 100]
    """
    chosen = set(torch.logspace(start, end, steps, base=base).int().tolist())
    if init:
        chosen.add(0)
    return lambda global_step: global_step in chosen
