"""Where a step has landed, in the parabola that is fitted to both ends of it.

``alpha = 0``: in the minimum along the step's direction; ``-1``: it has not moved; ``1``: as far on the
other side. (Schneider, Dangel, Hennig, 2021, arXiv:2102.06604.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

SMALLEST = 1e-10


class End(NamedTuple):
    """One end of a step: the loss and its slope along the step, each with its variance over samples."""

    loss: float
    loss_variance: float
    slope: float
    slope_variance: float


def fit(start: End, end: End, length: float) -> tuple[float, float, float] | None:
    """Coefficients of ``w0 + w1 t + w2 t^2``, by least squares weighted with the inverse variances.

    ``None`` where the fit is singular.
    """
    t = length
    rows = (1.0, 0.0, 0.0), (1.0, t, t * t), (0.0, 1.0, 0.0), (0.0, 1.0, 2 * t)
    values = start.loss, end.loss, start.slope, end.slope
    variances = start.loss_variance, end.loss_variance, start.slope_variance, end.slope_variance
    system = [[0.0] * 4 for _ in range(3)]
    for row, value, variance in zip(rows, values, variances, strict=True):
        for i, left in enumerate(row):
            for j, right in enumerate((*row, value)):
                system[i][j] += left * right / (variance or SMALLEST)
    found = _solve(system)
    return (
        None if found is None or not all(map(math.isfinite, found)) else (found[0], found[1], found[2])
    )


def _solve(system: list[list[float]]) -> list[float] | None:
    """The solution of linear equations, whose last column is the right side; ``None`` if singular.

    A call of torch takes longer than these three equations.
    """
    size = len(system)
    for k in range(size):
        pivot = max(range(k, size), key=lambda i: abs(system[i][k]))
        system[k], system[pivot] = system[pivot], system[k]
        if not system[k][k]:
            return None
        for i in range(k + 1, size):
            factor = system[i][k] / system[k][k]
            for j in range(k, size + 1):
                system[i][j] -= factor * system[k][j]
    found = [0.0] * size
    for k in reversed(range(size)):
        known = sum(system[k][j] * found[j] for j in range(k + 1, size))
        found[k] = (system[k][size] - known) / system[k][k]
    return found


def alpha(start: End, end: End, length: float) -> float | None:
    """Where the step has landed; ``None`` where it cannot be told.

    Example:
        >>> flat = End(1.0, 1.0, -2.0, 1.0), End(0.0, 1.0, 0.0, 1.0)  # (1 - t)^2, a step of length 1
        >>> round(alpha(*flat, 1.0), 6)
        0.0
    """
    if length == 0:
        return -1.0
    w = fit(start, end, length)
    if w is None:
        return None
    _, w1, w2 = w
    if w2 < 0:
        return -1.0
    return 2 * length / (-w1 / w2) - 1 if w1 and w2 else None
