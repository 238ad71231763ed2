"""SciPy's linear operators of curvature over data, by the names of vivit-for-pytorch 1.0.0.

:class:`backpack.vivit.GGN` and :class:`~backpack.vivit.Hessian` are the same for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from backpack.vivit.operators import GGN, Hessian

__all__ = ["GGNLinearOperator", "HessianLinearOperator"]


class _Moved:
    """Data on a device."""

    def __init__(self, data: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> None:
        self.data, self.device = data, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for X, y in self.data:
            yield X.to(self.device), y.to(self.device)


def GGNLinearOperator(
    model: nn.Module,
    loss_function: Callable[[Any, Any], Tensor],
    data: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    progressbar: bool = False,
    check_deterministic: bool = True,
) -> Any:
    """The generalized Gauss-Newton matrix as a ``scipy.sparse.linalg.LinearOperator``.

    Args:
        model: any module.
        loss_function: ``loss_function(output, y)``.
        data: batches ``(X, y)``, gone through for each product.
        device: where batches are moved.
        progressbar: whether to print how far a product is.
        check_deterministic: whether to compare gradients of two passes over the data.
    """
    moved = _Moved(data, torch.device(device))
    options: dict[str, Any] = {"check": check_deterministic, "progress": progressbar}
    return GGN(model, loss_function, moved, **options).scipy()


def HessianLinearOperator(
    model: nn.Module,
    loss_function: Callable[[Any, Any], Tensor],
    data: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    progressbar: bool = False,
    check_deterministic: bool = True,
) -> Any:
    """The Hessian as a ``scipy.sparse.linalg.LinearOperator``.

    Args:
        model: any module.
        loss_function: ``loss_function(output, y)``.
        data: batches ``(X, y)``, gone through for each product.
        device: where batches are moved.
        progressbar: whether to print how far a product is.
        check_deterministic: whether to compare gradients of two passes over the data.
    """
    moved = _Moved(data, torch.device(device))
    options: dict[str, Any] = {"check": check_deterministic, "progress": progressbar}
    return Hessian(model, loss_function, moved, **options).scipy()
