"""Newton steps by conjugate gradients, on products with curvature blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from backpack import extensions
from backpack.optim.base import Params, State
from backpack.optim.curvature import CurvatureOptimizer, Use

Curvature = Literal["ggn", "hessian", "pch"]
_QUANTITIES = {"ggn": extensions.GGNMP, "hessian": extensions.HMP, "pch": extensions.PCHMP}


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, max_iter: int, tol: float, atol: float
) -> Tensor:
    """Solve ``M x = b`` for a symmetric ``M``, as far as ``M`` is positive on the way.

    Conjugate gradients from zero (Hestenes, Stiefel, 1952), truncated as in Newton's method with
    negative curvature (Nocedal, Wright, Numerical Optimization, 2006, algorithm 7.1): a direction ``p``
    with ``p^T M p <= 0`` ends the iteration, and the result is the last ``x``, or ``b`` if that is the
    first direction. So ``b^T x > 0`` in any case, unless ``b`` is zero.

    Args:
        product: ``M``'s product with a tensor of ``b``'s shape.
        b: the right-hand side.
        max_iter: number of products at most.
        tol: stop at ``|b - M x| <= max(tol |b|, atol)``.
        atol: see ``tol``.

    Returns:
        ``x``, a new tensor of ``b``'s shape.
    """
    x, residual, direction = b.new_zeros(b.shape), b, b
    square = (residual * residual).sum()
    stop = max(tol * float(square.sqrt()), atol)
    for iteration in range(max_iter):
        if float(square.sqrt()) <= stop:
            break
        along = product(direction)
        curvature = (direction * along).sum()
        if not bool(curvature > 0):
            return b.clone() if iteration == 0 else x
        length = square / curvature
        x = x + length * direction
        residual = residual - length * along
        square, last = (residual * residual).sum(), square
        direction = residual + square / last * direction
    return x


class CGNewton(CurvatureOptimizer):
    """Newton steps by conjugate gradients, block by block.

    ``theta <- theta - lr d``, ``(C + (damping + l2) I) d = grad + l2 theta``, one system for each
    parameter, whose block ``C`` is known by its products only. The graph of the backward pass is kept
    until :meth:`step` or :meth:`zero_grad`.

    Directions of negative curvature end the iteration, see :func:`conjugate_gradients`: the step is the
    one before, or the gradient if there is none, and descends in any case. The GGN and the
    positive-curvature Hessian have none for convex losses.

    Args:
        params: a model (extended in place unless it is already), or parameters of extended models as
            any ``torch.optim.Optimizer`` takes them, groups included.
        lr: learning rate.
        damping: added to the curvature, at least 0.
        l2: weight of ``l2 / 2 |theta|^2``, which is added to the loss; its gradient and its curvature.
        curvature: ``"ggn"`` for the generalized Gauss-Newton matrix, ``"hessian"``, or ``"pch"`` for
            the positive-curvature Hessian (Chen et al., 2018, arXiv:1802.06502).
        max_iter: products for each parameter, at most.
        tol: residual at which a system counts as solved, relative to its right-hand side.
        atol: the same, absolute.
        momentum: factor of the last step's direction, ``m <- momentum m + d``.
        kl_clip: bound on the size of a step, see :class:`backpack.optim.CurvatureOptimizer`.
        process_local: say that each process trains a model of its own, see
            :class:`backpack.optim.BackpackOptimizer`.
        process_group: processes that train one model, see there.

    Raises:
        ValueError: if an argument is out of its range.
    """

    _RANGES = {
        **CurvatureOptimizer._RANGES,
        **{"max_iter": (1, False), "tol": (0.0, False), "atol": (0.0, False)},
    }

    def __init__(
        self,
        params: Params,
        lr: float,
        damping: float,
        l2: float = 0.0,
        *,
        curvature: Curvature = "ggn",
        max_iter: int = 100,
        tol: float = 1e-5,
        atol: float = 1e-8,
        momentum: float = 0.0,
        kl_clip: float | None = None,
        process_local: bool = False,
        process_group: Any = None,
    ) -> None:
        if curvature not in _QUANTITIES:
            raise ValueError(f"curvature must be one of {', '.join(_QUANTITIES)}, got {curvature!r}")
        super().__init__(
            params,
            _QUANTITIES[curvature](),
            kl_clip,
            process_local,
            process_group,
            lr=lr,
            damping=damping,
            l2=l2,
            max_iter=max_iter,
            tol=tol,
            atol=atol,
            momentum=momentum,
            update_every=1,
            ema_decay=0.0,
        )

    def _update(self, use: Use, decay: float) -> State:
        return {}

    def _solve(self, use: Use, state: State) -> Tensor:
        def product(vector: Tensor) -> Tensor:
            found: Tensor = use.quantity(vector) / use.scale + use.gamma * vector
            return found

        options = (use.group[name] for name in ("max_iter", "tol", "atol"))
        return conjugate_gradients(product, use.gradient, *options)
