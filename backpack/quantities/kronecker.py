"""Kronecker factors of curvature blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from backpack.forms.at_output import AtOutput
from backpack.forms.base import Form, Positioned, Sharing
from backpack.forms.lookup import Lookup
from backpack.forms.outer import Outer
from backpack.forms.products import spectrum
from backpack.forms.several import Part
from backpack.kronecker.eigen import KroneckerEigen
from backpack.kronecker.factored import KroneckerFactored
from backpack.quantities.base import BackpropExtension, Sampled
from backpack.quantities.combining import Blocks, Never, Rule
from backpack.quantities.reading import Reader
from backpack.sources.table import AveragedRoot, ExactRoot


class _Kronecker(BackpropExtension):
    of: ClassVar[Reader[KroneckerFactored]] = Reader()
    needs_gradient = False
    large = every_use = summed = True
    of_complex = None
    combine: Rule | None = Blocks(1)
    kfac_approx: Sharing = None

    def _choose(self, kfac_approx: Sharing) -> None:
        if kfac_approx not in (None, "expand", "reduce"):
            raise ValueError(f"kfac_approx must be 'expand', 'reduce' or None, got {kfac_approx!r}")
        self.kfac_approx = kfac_approx

    def reduce(self, form: Form, sign: Tensor | None = None) -> Any:
        factors = [factor.matrix() for factor in form.kronecker(self.kfac_approx)]
        rows = _averaged_over(form, self.kfac_approx)
        return KroneckerFactored.fitting(factors, form.shape, _layout(form), rows)

    def update(self, state: Any, form: Form, sign: Tensor | None = None) -> Any:
        factors = form.kronecker(self.kfac_approx)
        grown = [
            old + factor.matrix() if factor.grows else old
            for old, factor in zip(state, factors, strict=True)
        ]
        return KroneckerFactored.fitting(grown, state.shape, state.layout, state.averaged_over)


def _layout(form: Form) -> str:
    """Where in a parameter the matrix is that its Kronecker factors fit."""
    form = form.form if isinstance(form, (Part, AtOutput)) else form
    if isinstance(form, Lookup):
        return "in_out"
    return form.layout.kind if isinstance(form, Outer) and len(form.shape) > 1 else "out_in"


def _averaged_over(form: Form, sharing: Sharing) -> int:
    """The number of rows that the factor of the inputs is an average over."""
    form = form.together() if isinstance(form, Part) else form
    form = form.form if isinstance(form, AtOutput) else form
    groups = form.inputs.shape[1] if isinstance(form, Outer) else 1
    if sharing == "expand" and isinstance(form, Positioned):
        return max(form.all_positions * groups, 1)
    return max(form.samples * groups, 1)


class KFLR(_Kronecker):
    """Kronecker factors from exact columns (Botev, Ritter, Barber, 2017): a list of matrices.

    The list is a :class:`~backpack.kronecker.KroneckerFactored`, with products, inverses and samples.
    Weight ``[B, A]`` with GGN block ``~ kron(B, A)`` over the row-major weight; other parameters
    ``[B]``, their exact block. With output-gradient columns ``g [v, n, s, o]`` and inputs
    ``a [n, s, i]``: ``B = sum_{v,n} (sum_s g)(sum_s g)^T``, which carries the loss's reduction and is
    the block of the layer's bias; ``A = 1/N sum_{n,s} a a^T``. Exact for one sample and one position.
    A factor that would have more than 16,384 rows is its diagonal, a vector, instead: for the row
    frequencies of a table that is all of it, for the outputs of a language model's head it leaves out
    what couples two words, and of a parameter of another kind (a table that is the head, too) it is the
    diagonal of the block (of a parameter of several axes from 4,097 numbers on). All that can be done
    with the list takes vectors in place of matrices.
    A weight of more axes in an einsum is the matrix that its outputs and inputs make where they follow
    each other (``"ntd,dhk->nthk"`` has ``[A, B]``), and has one factor otherwise.
    For transposed convolutions the pair approximates the block of ``weight.transpose(0, 1)``.

    Of several batches: ``B`` is added, each with its weight in the loss, and ``A`` is averaged by
    numbers of samples. Adding up factors by hand counts ``A`` once for each batch: for three batches
    the block is three times too large. :func:`backpack.accumulate` goes over a data set,
    :meth:`backpack.kronecker.KroneckerFactored.add` puts two results together.

    Args:
        kfac_approx: what to make of the ``S`` positions that share a weight (Eschenhagen et al., 2023,
            arXiv:2311.00636). ``None``: as above, the original library's scale. ``"expand"``: they
            are further samples, ``B = sum_{v,n,s} g g^T`` and ``A = 1/(N S) sum_{n,s} a a^T``;
            exact for deep linear networks with a square loss at every position.
            ``"reduce"``: they are averaged, ``A = 1/N sum_n (mean_s a)(mean_s a)^T`` and ``B`` as
            above; exact for deep linear networks that average positions, with a square
            loss.

    Raises:
        ValueError: for another ``kfac_approx``.
    """

    savefield = "kflr"
    source = ExactRoot()

    def __init__(self, kfac_approx: Sharing = None) -> None:
        self._choose(kfac_approx)


class KFAC(Sampled, _Kronecker):
    """Kronecker factors from Monte-Carlo columns (Martens, Grosse, 2015); layout as :class:`KFLR`.

    Of several batches, as of :class:`KFLR`, ``B`` is added and ``A`` is averaged; adding up both makes
    the block of three batches three times too large. See :func:`backpack.accumulate`.

    Args:
        mc_samples: draws per data point.
        generator: source of randomness.
        kfac_approx: see :class:`KFLR`.
    """

    savefield = "kfac"

    def __init__(
        self,
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        kfac_approx: Sharing = None,
    ) -> None:
        super().__init__(mc_samples, generator)
        self._choose(kfac_approx)


class KFRA(_Kronecker):
    """Kronecker factors by a batch-averaged recursion (Botev, Ritter, Barber, 2017).

    Layout as :class:`KFLR`. The matrix that goes down, ``M = sum_n H_n`` at the model output, is
    averaged over the batch after each operation, ``M <- 1/N sum_n J_n^T M J_n``. Equal to KFLR for the
    last layer, and for linear networks whose loss Hessian does not depend on the sample.

    ``M`` has as many rows as a sample has numbers at that place: feasible for small networks only.

    Values of several batches do not combine.

    Raises:
        NotImplementedError: in the backward pass, if operations do not form a chain.
    """

    savefield = "kfra"
    source = AveragedRoot()
    combine = Never(
        "kfra averages a matrix over the batch after every operation, which values of batches do not "
        "tell; use KFLR or KFAC"
    )


class EmpiricalKFAC(_Kronecker):
    """Kronecker factors of the empirical Fisher, ``kfac_empirical``; layout as :class:`KFLR`.

    The column is the gradient itself: ``kron(B, A) ~ sum_n g_n g_n^T``, ``g_n = d l_n / d p`` as scaled
    by the loss's reduction, of which :class:`SumGradSquared` is the diagonal (for a mean over ``N``
    samples, ``N`` times this has the scale of the other curvature matrices).

    Of several batches: as :class:`KFLR`, with the square of each weight.

    Args:
        kfac_approx: see :class:`KFLR`.
    """

    savefield = "kfac_empirical"
    combine = Blocks(2)

    def __init__(self, kfac_approx: Sharing = None) -> None:
        self._choose(kfac_approx)


class _EigenvalueCorrected(_Kronecker):
    of: ClassVar[Reader[KroneckerEigen]] = Reader()  # type: ignore[assignment]
    refines = True
    combine: Rule | None = Blocks(1)
    bases: Mapping[Tensor, Sequence[Tensor]] | None = None
    # The quantity whose factors have the eigenvectors.
    factors: type[BackpropExtension]

    def _within(self, bases: Mapping[Tensor, Sequence[Tensor]] | None) -> None:
        if bases is not None:
            self.bases, self.refines = bases, False

    def begin(self, parameter: Tensor, form: Form, sign: Tensor | None = None) -> Any:
        if self.bases is None:
            return self.reduce(form, sign)
        if parameter not in self.bases:
            raise ValueError(
                f"{self.savefield}: no eigenvectors are given for a parameter of shape "
                f"{tuple(parameter.shape)} that the loss reaches"
            )
        bases = list(self.bases[parameter])
        return KroneckerEigen(bases, form.rotated_square_sum(bases), form.shape, _layout(form))

    def update(self, state: Any, form: Form, sign: Tensor | None = None) -> Any:
        if self.bases is None:
            return super().update(state, form, sign)
        return self.refine(state, form)

    def refine(self, state: Any, form: Form) -> KroneckerEigen:
        if isinstance(state, KroneckerEigen):
            more = form.rotated_square_sum(state.eigenvectors)
            values = state.eigenvalues + more
            return KroneckerEigen(state.eigenvectors, values, state.shape, state.layout)
        bases = [spectrum(factor)[1] for factor in state]
        return KroneckerEigen(bases, form.rotated_square_sum(bases), state.shape, state.layout)

    def before(self) -> BackpropExtension | None:
        if self.bases is not None:
            return None
        factors = copy.copy(self)
        factors.__class__ = self.factors  # type: ignore[assignment]
        factors.savefield = f"{self.savefield}_factors"
        return factors

    def after(self, values: Mapping[Tensor, Any]) -> BackpropExtension:
        within = copy.copy(self)
        within._within({p: value.eig().eigenvectors for p, value in values.items()})
        return within


class EKFLR(_EigenvalueCorrected, KFLR):
    """:class:`KFLR` with corrected eigenvalues (George et al., 2018, arXiv:1806.03884).

    ``p.ekflr``, a :class:`~backpack.kronecker.KroneckerEigen`, has ``eigenvectors [Q_B, Q_A]`` of the
    Kronecker factors and ``eigenvalues``, the diagonal of the GGN block in that basis:
    ``sum_{v,n} (Q_B^T G_{vn} Q_A)^2``. Of all matrices with these eigenvectors it is the nearest to the
    block in Frobenius norm.

    Of several batches: eigenvalues in one given basis are added. The basis is that of the factors of
    all batches, which takes a pass over them of its own (:func:`backpack.accumulate` makes both).

    Args:
        kfac_approx: see :class:`KFLR`.
        bases: eigenvectors for each parameter, such as ``{p: p.kflr.eig().eigenvectors}``, in place of
            those of the pass's own factors.
    """

    savefield = "ekflr"
    factors = KFLR

    def __init__(
        self, kfac_approx: Sharing = None, bases: Mapping[Tensor, Sequence[Tensor]] | None = None
    ) -> None:
        super().__init__(kfac_approx)
        self._within(bases)


class EKFAC(_EigenvalueCorrected, KFAC):
    """:class:`EKFLR` from Monte-Carlo columns, ``p.ekfac``; factors and eigenvalues share the draws.

    Over several batches, or with ``bases``, eigenvalues have draws of their own.

    Args:
        mc_samples: draws per data point.
        generator: source of randomness.
        kfac_approx: see :class:`KFLR`.
        bases: see :class:`EKFLR`.
    """

    savefield = "ekfac"
    factors = KFAC

    def __init__(
        self,
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        kfac_approx: Sharing = None,
        bases: Mapping[Tensor, Sequence[Tensor]] | None = None,
    ) -> None:
        super().__init__(mc_samples, generator, kfac_approx)
        self._within(bases)
