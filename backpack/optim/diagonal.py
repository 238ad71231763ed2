"""Optimizers that divide by a diagonal of the curvature."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from backpack import extensions
from backpack.optim.base import Params, State
from backpack.optim.curvature import CurvatureOptimizer, Use, made
from backpack.quantities.base import BackpropExtension, Context
from backpack.quantities.combining import Counted


class _Diagonal(CurvatureOptimizer):
    """Division by a diagonal: ``d = (grad + l2 theta) / (|c| + damping + l2)``, entry by entry.

    Where the denominator is zero, the step is zero (the pseudo-inverse).
    """

    quantity: type[BackpropExtension]
    # The quantity's power of the loss's scale.
    degree = 1

    def __init__(
        self,
        params: Params,
        lr: float,
        damping: float,
        l2: float = 0.0,
        *,
        momentum: float = 0.0,
        ema_decay: float = 0.0,
        update_every: int = 1,
        kl_clip: float | None = None,
        process_local: bool = False,
        process_group: Any = None,
        **arguments: Any,
    ) -> None:
        super().__init__(
            params,
            made(type(self), self.quantity, arguments),
            kl_clip,
            process_local,
            process_group,
            lr=lr,
            damping=damping,
            l2=l2,
            momentum=momentum,
            ema_decay=ema_decay,
            update_every=update_every,
        )

    def _update(self, use: Use, decay: float) -> State:
        curvature = use.quantity / use.scale**self.degree
        if decay:
            curvature = use.state["curvature"].lerp(curvature, 1 - decay)
        return {"curvature": curvature}

    def _solve(self, use: Use, state: State) -> Tensor:
        denominator = state["curvature"].abs() + use.gamma
        direction = use.gradient / denominator
        return direction if use.gamma else direction.masked_fill(denominator == 0, 0.0)


class DiagGGNExact(_Diagonal):
    """Division by the diagonal of the generalized Gauss-Newton matrix (GGN).

    ``theta <- theta - lr (grad + l2 theta) / (diag(G) + damping + l2)``, where ``G`` is the GGN of the
    loss as it is reduced: with a mean loss ``G`` is a mean too, and ``damping`` does not depend on the
    batch size. Dangel, Kunstner, Hennig, ICLR 2020, arXiv:1912.10985, section 4 and appendix C.3.

    Args:
        params: a model (extended in place unless it is already), or parameters of extended models as
            any ``torch.optim.Optimizer`` takes them, groups included.
        lr: learning rate.
        damping: added to the curvature, at least 0; with 0, entries without curvature stay.
        l2: weight of ``l2 / 2 |theta|^2``, which is added to the loss; its gradient and its curvature.
        momentum: factor of the last step's direction, ``m <- momentum m + d``.
        ema_decay: curvature is averaged over steps, ``c <- r c + (1 - r) c_new`` with
            ``r = min(1 - 1/k, ema_decay)`` at the k-th update.
        update_every: curvature is computed in every so many steps only, and used in all.
        kl_clip: bound on the size of a step, see :class:`backpack.optim.CurvatureOptimizer`.
        process_local: say that each process trains a model of its own, see
            :class:`backpack.optim.BackpackOptimizer`.
        process_group: processes that train one model, see there.
    """

    quantity = extensions.DiagGGNExact


class DiagGGNMC(_Diagonal):
    """:class:`DiagGGNExact` with the diagonal estimated from sampled targets.

    Args:
        params: see :class:`DiagGGNExact`, as ``lr``, ``damping``, ``l2``, ``momentum``, ``ema_decay``,
            ``update_every``, ``kl_clip``, ``process_local`` and
            ``process_group``.
        mc_samples: draws per data point, default 1.
        generator: source of randomness; its state is not in the ``state_dict``.
    """

    quantity = extensions.DiagGGNMC


class DiagHessian(_Diagonal):
    """Division by the absolute diagonal of the Hessian.

    ``theta <- theta - lr (grad + l2 theta) / (|diag(H)| + damping + l2)``. Entries of negative
    curvature descend as far as those of positive curvature, and saddles repel (Dauphin et al.,
    2014, arXiv:1406.2572, who take absolute eigenvalues). Averages over steps are those of ``diag(H)``,
    before the absolute value.

    Args:
        params: see :class:`DiagGGNExact`, as ``lr``, ``damping``, ``l2``, ``momentum``, ``ema_decay``,
            ``update_every``, ``kl_clip``, ``process_local`` and
            ``process_group``.
    """

    quantity = extensions.DiagHessian


class _MeanGradSquared(extensions.SumGradSquared):
    """``mean_grad_squared = N sum_n g_n^2 = 1/N sum_n (N g_n)^2``, shape ``p``."""

    savefield = "mean_grad_squared"
    combine = Counted(2)

    def finish(self, state: Tensor, context: Context) -> Tensor:
        return state * context.samples


class SumGradSquared(_Diagonal):
    """Division by the diagonal of the empirical Fisher matrix, the second moment of the gradients.

    ``theta <- theta - lr (grad + l2 theta) / (f + damping + l2)``. With ``g_n`` the gradient of the
    n-th sample's share of the loss, ``p.sum_grad_squared = sum_n g_n^2``. For a loss that is a mean,
    ``g_n`` carries ``1/N`` and the sum ``1/N^2``, where the other curvatures carry ``1/N``; hence
    ``f = N sum_n g_n^2``, the mean of the squared gradients of the samples' own losses, which has their
    scale and does not fall with the batch size. For a loss that is a sum, ``f = sum_n g_n^2``.

    No square root is taken: the step is a natural gradient, not Adam's.

    Args:
        params: see :class:`DiagGGNExact`, as ``lr``, ``damping``, ``l2``, ``momentum``, ``ema_decay``,
            ``update_every``, ``kl_clip``, ``process_local`` and
            ``process_group``.
        reduction: how the loss sums up samples, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: for another ``reduction``.
    """

    degree = 2

    @staticmethod
    def quantity(reduction: Literal["mean", "sum"] = "mean") -> BackpropExtension:  # type: ignore[override]
        """The quantity for a loss that is reduced so."""
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        return _MeanGradSquared() if reduction == "mean" else extensions.SumGradSquared()
