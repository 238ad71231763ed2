"""Optimizers that divide by Kronecker-factored curvature.

Letters: ``B``, ``A`` the factors of a weight, ``[o, o]`` and ``[i, i]``; ``gamma = damping + l2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from backpack import extensions
from backpack.forms.base import Dense, Form
from backpack.forms.lookup import Lookup
from backpack.forms.outer import Outer
from backpack.forms.products import spectrum
from backpack.forms.sums import Sum
from backpack.kronecker.block import KroneckerBlock
from backpack.kronecker.eigen import KroneckerEigen
from backpack.kronecker.factored import KroneckerFactored
from backpack.kronecker.matrices import (
    as_matrix,
    as_parameter,
    multiply,
    pi_damping,
    transposed,
    working,
)
from backpack.optim.base import Params, State
from backpack.optim.curvature import CurvatureOptimizer, Use, made
from backpack.optim.factors import damped_inverse, mixed, overlap, rounding, thinned
from backpack.quantities.base import BackpropExtension
from backpack.quantities.combining import Blocks, Never, Rule, Sums, SumUp


class _Kronecker(CurvatureOptimizer):
    """The options that all share."""

    quantity: type[BackpropExtension]
    _shares_work = True

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

    def _block(self, use: Use) -> KroneckerBlock:
        """The quantity; its layout says where its matrix is in the parameter."""
        if not isinstance(use.quantity, KroneckerBlock):
            raise RuntimeError(
                f"{self._extension.savefield} of parameter {use.name} does not come from this "
                "optimizer's quantity; call loss.backward() within `with optimizer.backpack():`"
            )
        return use.quantity

    def _update(self, use: Use, decay: float) -> State:
        """Damped inverses of the averaged factors."""
        block = self._block(use)
        assert isinstance(block, KroneckerFactored)
        factors = [working(factor) for factor in block]
        # The factor that is a sum over samples has the scale of the loss, the other has none.
        factors[block.grows] = factors[block.grows] / use.scale
        factors = [thinned(factor) for factor in factors]
        # Without averages factors are not kept, and an average that begins later begins here.
        if decay and "factors" in use.state:
            old = map(working, use.state["factors"])
            factors = [mixed(o, new, decay) for o, new in zip(old, factors, strict=True)]
        shifts = pi_damping(factors, use.gamma)
        inverses = [damped_inverse(f, s, use.name) for f, s in zip(factors, shifts, strict=True)]
        dtype = use.parameter.dtype
        new: State = {
            "transposed": block.layout == "convt",
            "inverses": [f.to(dtype) for f in inverses],
        }
        if use.group["ema_decay"]:
            new["factors"] = [factor.to(dtype) for factor in factors]
        return new

    def _solve(self, use: Use, state: State) -> Tensor:
        inverses = state["inverses"]
        matrix = as_matrix(use.gradient, state["transposed"], [len(each) for each in inverses])
        return as_parameter(multiply(inverses, matrix), state["transposed"], use.parameter.shape)


class _EigenvalueCorrected(_Kronecker):
    """Division in the eigenbasis of the factors."""

    _shares_work = False

    # The quantity that leaves eigenvalues for later.
    holding: type[BackpropExtension]

    def __init__(self, *args: Any, micro_batches: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if micro_batches or self.processes is not None:
            self._extension.__class__ = self.holding
        else:
            self._extension.combine = Never(
                "eigenvalues are those in the basis of all micro-batches' factors, for which what they "
                "are computed from must be held; pass micro_batches=True to the optimizer"
            )

    def _update(self, use: Use, decay: float) -> State:
        block = use.quantity.eigen() if isinstance(use.quantity, Held) else self._block(use)
        assert isinstance(block, KroneckerEigen)
        bases = [working(each) for each in block.eigenvectors]
        eigenvalues = working(block.eigenvalues) / use.scale
        if decay:
            old = zip(use.state["bases"], bases, strict=True)
            overlaps = [overlap(new, working(each)) for each, new in old]
            carried = multiply(overlaps, working(use.state["eigenvalues"]))
            eigenvalues = carried.lerp(eigenvalues, 1 - decay)
        dtype = use.parameter.dtype
        return {
            "transposed": block.layout == "convt",
            "bases": [each.to(dtype) for each in bases],
            "eigenvalues": eigenvalues.to(dtype),
        }

    def _solve(self, use: Use, state: State) -> Tensor:
        bases, eigenvalues = state["bases"], state["eigenvalues"]
        matrix = as_matrix(use.gradient, state["transposed"], list(eigenvalues.shape))
        rotated = multiply([transposed(each) for each in bases], matrix)
        if use.gamma:
            rotated = rotated / (eigenvalues + use.gamma)
        else:
            small = eigenvalues <= rounding(eigenvalues)
            rotated = (rotated / eigenvalues).masked_fill(small, 0.0)
        return as_parameter(multiply(bases, rotated), state["transposed"], use.parameter.shape)


class Held(NamedTuple):
    """What eigenvalues in a basis that is not known yet are computed from."""

    factors: KroneckerFactored
    # With the weights of their losses.
    forms: list[tuple[float, Form]]

    def eigen(self) -> KroneckerEigen:
        """Eigenvectors of the factors, eigenvalues of the forms."""
        bases = [spectrum(factor)[1] for factor in self.factors]
        values = [weight * form.rotated_square_sum(bases) for weight, form in self.forms]
        total = sum(values[1:], values[0])
        return KroneckerEigen(bases, total, self.factors.shape, self.factors.layout)


class _AllHeld(Rule):
    """Factors combine, forms are collected; of several processes, eigenvalues are added."""

    blocks = Blocks()
    everywhere = True

    def across(self, part: Held, samples: Sequence[int], sum_up: SumUp) -> Sums:
        factors = yield from self.blocks.across(part.factors, samples, sum_up)
        eigen = Held(factors, part.forms).eigen()
        found = yield from self.blocks.across(eigen, samples, sum_up)
        return found

    def take(self, value: Held, context: Any) -> Held:
        return value

    def weigh(self, part: Held, factor: float) -> Held:
        factors = self.blocks.weigh(part.factors, factor)
        assert isinstance(factors, KroneckerFactored)
        return Held(factors, [(weight * factor, form) for weight, form in part.forms])

    def add(self, part: Held, other: Held) -> Held:
        return Held(part.factors.add(other.factors), part.forms + other.forms)

    def absent(self, part: Held, seen: int, samples: int) -> Held:
        factors = self.blocks.absent(part.factors, seen, samples)
        assert isinstance(factors, KroneckerFactored)
        return Held(factors, [])


class _Holding(extensions.BackpropExtension):
    """EKFAC or EKFLR whose eigenvalues are left for later."""

    combine: Rule | None = _AllHeld()

    def begin(self, parameter: Tensor, form: Form, sign: Tensor | None = None) -> Any:
        return Held(self.reduce(form, sign), [(1.0, _held(form))])

    def update(self, state: Any, form: Form, sign: Tensor | None = None) -> Any:
        return Held(super().update(state.factors, form, sign), [*state.forms, (1.0, _held(form))])


class _HoldingEKFLR(_Holding, extensions.EKFLR):
    refines = summed = False


class _HoldingEKFAC(_Holding, extensions.EKFAC):
    refines = summed = False


def _held(form: Form) -> Form:
    """A form that needs neither graph nor inputs, which may be written over."""
    if isinstance(form, Outer):
        return replace(form, inputs=form.a.clone())
    if isinstance(form, Lookup):
        return replace(form, index=form.index.clone())
    if isinstance(form, Sum):
        return Sum(tuple(map(_held, form.forms)))
    return Dense(form.dense())


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
        process_local: say that each process trains a model of its own, see
            :class:`backpack.optim.BackpackOptimizer`.
        process_group: processes that train one model, see there.
        kfac_approx: see :class:`backpack.extensions.KFLR`.

    Raises:
        ValueError: in :meth:`step`, if a factor is not positive definite, after doublings.
    """

    quantity = extensions.KFLR


class KFAC(_Kronecker):
    """:class:`KFLR` with factors from sampled targets (Martens, Grosse, 2015, arXiv:1503.05671).

    Args:
        params: see :class:`KFLR`, as ``lr``, ``damping``, ``l2``, ``momentum``, ``ema_decay``,
            ``update_every``, ``kl_clip``, ``process_local`` and
            ``process_group``.
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
            ``update_every``, ``kl_clip``, ``process_local`` and
            ``process_group``.
    """

    quantity = extensions.KFRA


class EKFLR(_EigenvalueCorrected):
    """Division in the eigenbasis of KFLR's factors, by the GGN's own diagonal in that basis.

    ``D = Q_B ((Q_B^T (grad + l2 theta) Q_A) / (E + damping + l2)) Q_A^T``, ``E [o, i]`` the corrected
    eigenvalues (George et al., 2018, arXiv:1806.03884). Nothing is split between factors, so that the
    damping is exact, and always that of the present step. With ``damping`` and ``l2`` both zero,
    directions without curvature get no step.

    The basis is that of all micro-batches' factors, for which the inputs of layers and the gradients at
    their outputs are held until the step, if there are to be several (``micro_batches=True``).

    Averages over steps are kept as a diagonal in the latest basis: at an update the old average is
    turned into the new basis, of which the diagonal is kept, ``E_old <- (Q_new^T Q_old)^2 E_old`` with
    squared entries, and then averaged as factors are.

    Args:
        params: see :class:`KFLR`, as ``lr``, ``damping``, ``l2``, ``momentum``, ``ema_decay``,
            ``update_every``, ``kl_clip``, ``process_local`` and
            ``process_group``.
        micro_batches: allow several backward passes before a step, at the cost of that memory.
        kfac_approx: see :class:`backpack.extensions.KFLR`.
    """

    quantity, holding = extensions.EKFLR, _HoldingEKFLR


class EKFAC(_EigenvalueCorrected):
    """:class:`EKFLR` from sampled targets.

    Args:
        params: see :class:`KFLR`, as ``lr``, ``damping``, ``l2``, ``momentum``, ``ema_decay``,
            ``update_every``, ``kl_clip``, ``process_local`` and
            ``process_group``.
        micro_batches: see :class:`EKFLR`.
        mc_samples: draws per data point, default 1.
        generator: source of randomness; its state is not in the ``state_dict``.
        kfac_approx: see :class:`backpack.extensions.KFLR`.
    """

    quantity, holding = extensions.EKFAC, _HoldingEKFAC
