"""Optimizers that divide by Kronecker-factored curvature.

Letters: ``B``, ``A`` the factors of a weight, ``[o, o]`` and ``[i, i]``; ``gamma = damping + l2``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from backpack import extensions
from backpack.factors import Form, Lookup, Outer, Single, spectrum
from backpack.optim.base import CurvatureOptimizer, Params, State, Use, made
from backpack.quantities import BackpropExtension, Context, Eigen

# A factor that is not positive definite after this many doublings of its damping is an error.
DOUBLINGS = 10


class Placed(BackpropExtension):
    """Kronecker factors, and where in the parameter the matrix is that they belong to.

    The factors alone do not tell: those of a transposed convolution belong to
    ``weight.transpose(0, 1)``, and a weight that multiplies from the right, or is looked up, has its
    inputs first.

    Args:
        factors: the quantity, which is saved as it is.
    """

    written_out = False

    def __init__(self, factors: BackpropExtension) -> None:
        self.factors = factors
        self.savefield, self.kind, self.refines = factors.savefield, factors.kind, factors.refines
        self.places: dict[Tensor, str] = {}

    def reduce(self, form: Form, sign: Tensor | None = None) -> Any:
        return self.factors.reduce(form, sign), _place(form)

    def update(self, state: Any, form: Form, sign: Tensor | None = None) -> Any:
        return self.factors.update(state[0], form, sign), state[1]

    def refine(self, state: Any, form: Form) -> Any:
        return self.factors.refine(state[0], form), state[1]

    def finish(self, state: Any, context: Context) -> Any:
        self.places[context.parameter] = state[1]
        return self.factors.finish(state[0], context)

    def zero(self, context: Context) -> Any:
        self.places[context.parameter] = "rows"
        return self.factors.zero(context)

    def __repr__(self) -> str:
        return repr(self.factors)


def _place(form: Form) -> str:
    form = form.form if isinstance(form, Single) else form
    if isinstance(form, Lookup):
        return "columns"
    return form.layout.kind if isinstance(form, Outer) else "rows"


class _Kronecker(CurvatureOptimizer):
    """The options that all share, and where matrices are in their parameters."""

    quantity: type[BackpropExtension]
    _extension: Placed

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
        **arguments: Any,
    ) -> None:
        super().__init__(
            params,
            Placed(made(type(self), self.quantity, arguments)),
            kl_clip,
            lr=lr,
            damping=damping,
            l2=l2,
            momentum=momentum,
            ema_decay=ema_decay,
            update_every=update_every,
        )

    def _place(self, use: Use) -> str:
        """Where the matrix is; states keep no string, which ``load_state_dict`` does not restore."""
        places = self._extension.places
        if use.parameter not in places:
            raise RuntimeError(
                f"{self._extension.savefield} of parameter {use.name} does not come from this "
                "optimizer's quantity; call loss.backward() within `with optimizer.backpack():`"
            )
        return places[use.parameter]

    def _discard(self) -> None:
        super()._discard()
        self._extension.places.clear()

    def _update(self, use: Use, decay: float) -> State:
        """Damped inverses of the averaged factors."""
        factors, place = [_working(factor) for factor in use.quantity], self._place(use)
        # The factor that is a sum over samples has the scale of the loss, the other has none.
        scaled = 1 if place == "columns" else 0
        factors[scaled] = factors[scaled] / use.scale
        factors = [_thin(factor) for factor in factors]
        # Without averages factors are not kept, and an average that begins later begins here.
        if decay and "factors" in use.state:
            old = map(_working, use.state["factors"])
            factors = [_mix(o, new, decay) for o, new in zip(old, factors, strict=True)]
        shifts = pi_damping(factors, use.gamma)
        inverses = [_inverse(f, s, use.name) for f, s in zip(factors, shifts, strict=True)]
        dtype = use.parameter.dtype
        new: State = {"transposed": place == "convt", "inverses": [f.to(dtype) for f in inverses]}
        if use.group["ema_decay"]:
            new["factors"] = [factor.to(dtype) for factor in factors]
        return new

    def _solve(self, use: Use, state: State) -> Tensor:
        inverses = state["inverses"]
        matrix = _as_matrix(use.gradient, state["transposed"], [len(each) for each in inverses])
        return _as_parameter(_multiply(inverses, matrix), state["transposed"], use.parameter)


class _EigenvalueCorrected(_Kronecker):
    """Division in the eigenbasis of the factors."""

    def _update(self, use: Use, decay: float) -> State:
        eigen: Eigen = use.quantity
        bases, eigenvalues = [_working(each) for each in eigen.eigenvectors], eigen.eigenvalues
        eigenvalues = _working(eigenvalues) / use.scale
        if decay:
            old = zip(use.state["bases"], bases, strict=True)
            overlaps = [(new.mT @ _working(each)).square() for each, new in old]
            carried = _multiply(overlaps, _working(use.state["eigenvalues"]))
            eigenvalues = carried.lerp(eigenvalues, 1 - decay)
        dtype = use.parameter.dtype
        return {
            "transposed": self._place(use) == "convt",
            "bases": [each.to(dtype) for each in bases],
            "eigenvalues": eigenvalues.to(dtype),
        }

    def _solve(self, use: Use, state: State) -> Tensor:
        bases, eigenvalues = state["bases"], state["eigenvalues"]
        matrix = _as_matrix(use.gradient, state["transposed"], list(eigenvalues.shape))
        rotated = _multiply([each.mT for each in bases], matrix)
        if use.gamma:
            rotated = rotated / (eigenvalues + use.gamma)
        else:
            small = eigenvalues <= _tolerance(eigenvalues)
            rotated = (rotated / eigenvalues).masked_fill(small, 0.0)
        return _as_parameter(_multiply(bases, rotated), state["transposed"], use.parameter)


# --------------------------------------------------------------------------------------
# Matrices


def pi_damping(factors: list[Tensor], gamma: float) -> list[float]:
    """What is added to the diagonals of the factors in place of ``gamma`` to that of the matrix.

    ``sqrt(gamma) / pi`` to ``B`` and ``pi sqrt(gamma)`` to ``A``, with
    ``pi^2 = (trace(A) / i) / (trace(B) / o)`` (Martens, Grosse, 2015, arXiv:1503.05671, section 6.3),
    which makes the two additions equally large in proportion to their factors; ``pi = 1`` where a trace
    is not positive. For one factor ``gamma`` itself.

    Args:
        factors: one or two; a vector stands for a diagonal matrix.
        gamma: ``damping + l2``.
    """
    if len(factors) == 1:
        return [gamma]
    b, a = (float(f.sum() if f.dim() == 1 else f.trace()) / max(len(f), 1) for f in factors)
    pi = math.sqrt(a / b) if a > 0 and b > 0 else 1.0
    return [math.sqrt(gamma) / pi, math.sqrt(gamma) * pi]


def _working(factor: Tensor) -> Tensor:
    """In a precision in which matrices can be factorized."""
    return factor.to(torch.float64 if factor.dtype == torch.float64 else torch.float32)


def _thin(factor: Tensor) -> Tensor:
    """The diagonal, if there is nothing else: row frequencies of an embedding, above all."""
    diagonal = factor.diagonal()
    alone = len(factor) > 1 and int(factor.count_nonzero()) == int(diagonal.count_nonzero())
    return diagonal.clone() if alone else factor


def _mix(old: Tensor, new: Tensor, decay: float) -> Tensor:
    if old.dim() != new.dim():
        old, new = (torch.diag(each) if each.dim() == 1 else each for each in (old, new))
    return old.lerp(new, 1 - decay)


def _tolerance(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues up to this are rounding errors of the largest."""
    return eigenvalues.abs().max() * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps


def _inverse(factor: Tensor, shift: float, name: str) -> Tensor:
    """``(F + shift I)^{-1}``; the pseudo-inverse if ``shift`` is zero."""
    if not shift:
        return _pseudo_inverse(factor, name)
    for _ in range(DOUBLINGS + 1):
        if factor.dim() == 1:
            if bool((factor + shift > 0).all()):
                return 1 / (factor + shift)
        else:
            shifted = factor.clone()
            shifted.diagonal().add_(shift)
            root, failed = torch.linalg.cholesky_ex(shifted)
            if not bool(failed):
                return torch.cholesky_inverse(root)
        shift *= 2
    raise ValueError(
        f"a Kronecker factor of parameter {name} is not positive definite, even with {shift / 2:.1e} "
        "on its diagonal; use more damping"
    )


def _pseudo_inverse(factor: Tensor, name: str) -> Tensor:
    eigenvalues, basis = (factor, None) if factor.dim() == 1 else spectrum(factor)
    tolerance = _tolerance(eigenvalues)
    if bool((eigenvalues < -tolerance).any()):
        raise ValueError(
            f"a Kronecker factor of parameter {name} has negative eigenvalues; use damping"
        )
    inverses = eigenvalues.reciprocal().masked_fill(eigenvalues <= tolerance, 0.0)
    return inverses if basis is None else (basis * inverses) @ basis.mT


def _multiply(factors: list[Tensor], matrix: Tensor) -> Tensor:
    """The Kronecker product of the factors, times a vector ``[o]`` or a matrix ``[o, i]``."""
    first, *second = factors
    if first.dim() == 1:
        matrix = first.unsqueeze(1) * matrix if second else first * matrix
    else:
        matrix = first @ matrix
    for factor in second:
        matrix = matrix * factor if factor.dim() == 1 else matrix @ factor.mT
    return matrix


def _as_matrix(tensor: Tensor, transposed: bool, sizes: list[int]) -> Tensor:
    """A tensor of the parameter's shape as the matrix (or vector) that the factors fit."""
    if transposed:
        # [q * i, o, *kernel] -> [q * o, i * kernel], for q groups
        groups = sizes[0] // tensor.shape[1]
        return tensor.unflatten(0, (groups, -1)).transpose(1, 2).reshape(sizes)
    return tensor.reshape(sizes)


def _as_parameter(matrix: Tensor, transposed: bool, parameter: Tensor) -> Tensor:
    if transposed:
        outputs, kernel = parameter.shape[1], parameter.shape[2:]
        return (
            matrix.reshape(len(matrix) // outputs, outputs, -1, *kernel).transpose(1, 2).flatten(0, 1)
        )
    return matrix.reshape(parameter.shape)


# --------------------------------------------------------------------------------------
# Optimizers


class KFLR(_Kronecker):
    """Division by Kronecker factors of the GGN, from the exact Hessian of the loss.

    For a weight with GGN block ``~ kron(B, A)``, and ``gamma = damping + l2``,

        ``D = (B + sqrt(gamma) / pi I)^{-1} (grad + l2 theta) (A + pi sqrt(gamma) I)^{-1}``

    with ``pi^2 = (trace(A) / i) / (trace(B) / o)``, of Martens and Grosse (2015, arXiv:1503.05671,
    section 6.3); for any other parameter ``d = (B + gamma I)^{-1} (grad + l2 theta)``. The update is
    ``theta <- theta - lr D``. Factors are those of Botev, Ritter, Barber (2017, arXiv:1706.03662),
    ``p.kflr``, and have the scale of the loss's reduction. The update rule is that of Dangel, Kunstner,
    Hennig (ICLR 2020, arXiv:1912.10985, section 4).

    A factor that cannot be factorized gets twice the damping, up to ten times over. With ``damping``
    and ``l2`` both zero, inverses are pseudo-inverses: directions without curvature get no step.

    Factors that are diagonal, such as the row frequencies of an embedding, are kept and inverted as
    vectors.

    Args:
        params: a model (extended in place unless it is already), or parameters of extended models as
            any ``torch.optim.Optimizer`` takes them, groups included.
        lr: learning rate.
        damping: ``gamma`` without ``l2``, at least 0. It is part of the inverses, which a changed value
            reaches when they are next computed.
        l2: weight of ``l2 / 2 |theta|^2``, which is added to the loss; its gradient and its curvature.
        momentum: factor of the last step's direction, ``m <- momentum m + d``.
        ema_decay: factors are averaged over steps, ``F <- r F + (1 - r) F_new`` with
            ``r = min(1 - 1/k, ema_decay)`` at the k-th update (section 5; 0.95 there).
        update_every: factors are computed and inverted in every so many steps only.
        kl_clip: bound on the size of a step, see :class:`backpack.optim.CurvatureOptimizer`; 1e-3 is
            usual.
        kfac_approx: see :class:`backpack.extensions.KFLR`.

    Raises:
        ValueError: in :meth:`step`, if a factor is not positive definite, after doublings.
    """

    quantity = extensions.KFLR


class KFAC(_Kronecker):
    """:class:`KFLR` with factors from sampled targets (Martens, Grosse, 2015, arXiv:1503.05671).

    Args:
        params: see :class:`KFLR`, as ``lr``, ``damping``, ``l2``, ``momentum``, ``ema_decay``,
            ``update_every`` and ``kl_clip``.
        mc_samples: draws per data point, default 1.
        generator: source of randomness; its state is not in the ``state_dict``.
        kfac_approx: see :class:`backpack.extensions.KFLR`.
    """

    quantity = extensions.KFAC


class KFRA(_Kronecker):
    """:class:`KFLR` with factors of the batch-averaged recursion (Botev, Ritter, Barber, 2017).

    For networks whose operations form a chain; others raise an error in the backward pass.

    Args:
        params: see :class:`KFLR`, as ``lr``, ``damping``, ``l2``, ``momentum``, ``ema_decay``,
            ``update_every`` and ``kl_clip``.
    """

    quantity = extensions.KFRA


class EKFLR(_EigenvalueCorrected):
    """Division in the eigenbasis of KFLR's factors, by the GGN's own diagonal in that basis.

    ``D = Q_B ((Q_B^T (grad + l2 theta) Q_A) / (E + damping + l2)) Q_A^T``, ``E [o, i]`` the corrected
    eigenvalues (George et al., 2018, arXiv:1806.03884). Nothing is split between factors, so that the
    damping is exact, and always that of the present step. With ``damping`` and ``l2`` both zero,
    directions without curvature get no step.

    Averages over steps are kept as a diagonal in the latest basis: at an update the old average is
    turned into the new basis, of which the diagonal is kept, ``E_old <- (Q_new^T Q_old)^2 E_old`` with
    squared entries, and then averaged as factors are.

    Args:
        params: see :class:`KFLR`, as ``lr``, ``damping``, ``l2``, ``momentum``, ``ema_decay``,
            ``update_every`` and ``kl_clip``.
        kfac_approx: see :class:`backpack.extensions.KFLR`.
    """

    quantity = extensions.EKFLR


class EKFAC(_EigenvalueCorrected):
    """:class:`EKFLR` from sampled targets.

    Args:
        params: see :class:`KFLR`, as ``lr``, ``damping``, ``l2``, ``momentum``, ``ema_decay``,
            ``update_every`` and ``kl_clip``.
        mc_samples: draws per data point, default 1.
        generator: source of randomness; its state is not in the ``state_dict``.
        kfac_approx: see :class:`backpack.extensions.KFLR`.
    """

    quantity = extensions.EKFAC
