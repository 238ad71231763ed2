"""Newton steps with the whole generalized Gauss-Newton matrix, exactly, from a Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from backpack.optim.base import BackpackOptimizer, Params, State, _finite
from backpack.quantities.base import BackpropExtension
from backpack.vivit import LowRank


class GramNewton(BackpackOptimizer):
    """``theta <- theta - lr d`` with ``(G + (damping + l2) I) d = grad + l2 theta``, solved exactly.

    ``G`` is the generalized Gauss-Newton matrix of all parameters of a group, blocks between them
    included. It has the rank of a small matrix, columns times samples, by which the system is solved:
    ``G = V V^T``, and ``d = [g - V (gamma I + V^T V)^-1 V^T g] / gamma``. Memory is that of activations
    and these times the number of columns; time goes with the square of columns times samples, and its
    cube.

        >>> from backpack import extend
        >>> model, lossfunc = torch.nn.Linear(4, 3), extend(torch.nn.CrossEntropyLoss())
        >>> X, y = torch.rand(5, 4), torch.tensor([0, 1, 2, 1, 0])
        >>> optimizer = GramNewton(model, lr=1.0, damping=1e-2)
        >>> optimizer.zero_grad()
        >>> loss = lossfunc(model(X), y)
        >>> with optimizer.backpack():
        ...     loss.backward()
        >>> optimizer.step()

    The block may be entered once for each part of a batch: gradients and curvature add up.

    Args:
        params: a model (extended in place unless it is already), or parameters of extended models as
            any ``torch.optim.Optimizer`` takes them, groups included.
        lr: learning rate.
        damping: added to the curvature; ``damping + l2`` is positive.
        l2: weight of ``l2 / 2 |theta|^2``, which is added to the loss; its gradient and its curvature.
        columns: of the square root ``V``, as :class:`backpack.vivit.LowRank` takes them.
        mc_samples: number of random columns, for ``"mc"``.
        top: number of leading columns of each sample, for ``"top"``.
        generator: source of randomness.
        subsampling: samples whose curvature is taken.
        momentum: factor of the last step's direction, ``m <- momentum m + d``.
        process_local: say that each process trains a model of its own, see
            :class:`backpack.optim.BackpackOptimizer`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    _step_supports_amp_scaling = True  # torch: `step` itself undoes the scaler's factor
    _curvature: LowRank | None = None
    _scale: float | None = None
    _exchanges = False

    def __init__(
        self,
        params: Params,
        lr: float,
        damping: float,
        l2: float = 0.0,
        *,
        columns: Literal["exact", "mc", "top"] = "exact",
        mc_samples: int = 1,
        top: int = 1,
        generator: torch.Generator | None = None,
        subsampling: Sequence[int] | None = None,
        momentum: float = 0.0,
        process_local: bool = False,
    ) -> None:
        self._options: dict[str, Any] = {
            "columns": columns,
            "mc_samples": mc_samples,
            "top": top,
            "generator": generator,
            "subsampling": subsampling,
            "gradients": False,
        }
        LowRank(**self._options)  # whose checks come before a model is extended
        defaults = {"lr": lr, "damping": damping, "l2": l2, "momentum": momentum}
        super().__init__(params, defaults, process_local=process_local)

    def _own(self) -> tuple[str, ...]:
        return (*super()._own(), "_options")

    def _check(self, group: Any) -> None:
        super()._check(group)
        if not group.get("damping", 0.0) + group.get("l2", 0.0) > 0:
            raise ValueError(f"{type(self).__name__}: damping + l2 must be positive")

    @contextmanager
    def backpack(
        self, *more: BackpropExtension, scale: float | None = None, **options: Any
    ) -> Iterator[LowRank]:
        """The block for the step's backward pass.

        Args:
            *more: further quantities, for other purposes.
            scale: the factor that the loss was multiplied with and the gradients are not to keep, such
                as ``scaler.get_scale()``. Needed only where ``scaler.unscale_(optimizer)`` comes before
                ``scaler.step(optimizer)``; without it, ``scaler.step`` tells the factor.
            **options: further arguments of :class:`backpack.backpack`.

        Raises:
            ValueError: if ``scale`` is not positive, or differs from that of a pass before.
        """
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be positive and finite, got {scale!r}")
        if self._curvature is None:
            self._curvature = LowRank(**self._options)
        elif scale != self._scale:
            raise ValueError(f"the pass before had scale={self._scale!r}, this one has {scale!r}")
        curvature, self._scale = self._curvature, scale
        curvature.extensions, curvature.options = more, options
        with curvature:
            yield curvature

    def _discard(self) -> None:
        self._curvature, self._scale = None, None

    def _directions(self) -> list[tuple[Tensor, Tensor, dict[str, Any], State]]:
        in_gradient = getattr(self, "grad_scale", None)
        if in_gradient is None and hasattr(self, "found_inf") and self._scale is None:
            raise RuntimeError(
                "scaler.unscale_(optimizer) has divided the gradients by the scaler's factor, which "
                "the curvature still has; write `with optimizer.backpack(scale=scaler.get_scale()):`"
            )
        in_gradient = 1.0 if in_gradient is None else float(in_gradient)
        scale = in_gradient if self._scale is None else self._scale
        moves: list[tuple[Tensor, Tensor, dict[str, Any], State]] = []
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.requires_grad and p.grad is not None]
            right = [self._right(p, group, in_gradient) for p in parameters]
            if not parameters:
                continue
            curvature, gamma = self._curvature_of(parameters), group["damping"] + group["l2"]
            # Curvature has the scaler's factor: (G / s + gamma I)^-1 = s (G + s gamma I)^-1.
            found = curvature.solve(gamma * scale, right, parameters)
            moves += [(p, d.mul_(scale), group, {}) for p, d in zip(parameters, found, strict=True)]
        if not moves:
            raise RuntimeError(
                "no parameter has a gradient; call loss.backward() within `with optimizer.backpack():` "
                "before every step"
            )
        return moves

    def _right(self, p: Tensor, group: dict[str, Any], scale: float) -> Tensor:
        """``grad + l2 theta``, checked."""
        assert p.grad is not None
        gradient = p.grad.to_dense() if p.grad.is_sparse else p.grad
        if not _finite(gradient):
            raise ValueError(f"the gradient of parameter {self._name(p)} is not finite")
        gradient = gradient / scale if scale != 1 else gradient
        return gradient.add(p, alpha=group["l2"]) if group["l2"] else gradient

    def _curvature_of(self, parameters: Sequence[Tensor]) -> LowRank:
        known = set() if self._curvature is None else set(self._curvature.parameters)
        for p in parameters:
            if p not in known:
                remedy = (
                    "in the block no extended model was seen that has it; call extend(model) before "
                    "the forward pass, or give the model to the optimizer instead of its parameters"
                    if known
                    else "call loss.backward() within `with optimizer.backpack():` before every step"
                )
                raise RuntimeError(
                    f"parameter {self._name(p)} has a gradient, but no curvature that belongs to it; "
                    + remedy
                )
        assert self._curvature is not None
        return self._curvature
