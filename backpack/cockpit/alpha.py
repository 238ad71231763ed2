"""Where a step has landed, in the parabola that is fitted to both ends of it.

``alpha = 0``: in the minimum along the step's direction; ``-1``: it has not moved; ``1``: as far on the
other side. (Schneider, Dangel, Hennig, 2021, arXiv:2102.06604.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

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
    rows = torch.tensor(
        [[1.0, 0.0, 0.0], [1.0, t, t * t], [0.0, 1.0, 0.0], [0.0, 1.0, 2 * t]], dtype=torch.float64
    )
    values = [start.loss, end.loss, start.slope, end.slope]
    variances = [start.loss_variance, end.loss_variance, start.slope_variance, end.slope_variance]
    weights = torch.tensor([1 / (v or SMALLEST) for v in variances], dtype=torch.float64)
    normal = rows.mT @ (weights.unsqueeze(1) * rows)
    try:
        found = torch.linalg.solve(normal, rows.mT @ (weights * torch.tensor(values).double()))
    except RuntimeError:
        return None
    w0, w1, w2 = found.tolist()
    return (w0, w1, w2) if all(map(_finite, (w0, w1, w2))) else None


def _finite(x: float) -> bool:
    return x == x and abs(x) != float("inf")


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
