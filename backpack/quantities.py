"""Quantities: small functions of canonical forms.

Letters: ``N`` samples, ``v`` columns, ``p`` a parameter's shape, ``l_n`` the n-th sample's share of
the loss as scaled by its reduction (``1/N`` for ``"mean"``), ``J_n`` the Jacobian of the model's
n-th output in the parameter, ``H_n`` the Hessian of ``l_n`` in that output.

A quantity reduces a form to a state, adds the states of further columns, and finishes when the
parameter's gradient is complete. All scales follow ``p.grad``: ``sum_n grad_batch_n = p.grad``.
Numbers and names: BackPACK (Dangel, Kunstner, Hennig, ICLR 2020, arXiv:1912.10985).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from backpack.columns import ColumnSource
from backpack.combining import Added, Blocks, Functions, Joined, Moments, Never, Rule
from backpack.factors import Form, Lookup, Outer, Sharing, Single, positions_of, spectrum
from backpack.kronecker import KroneckerEigen, KroneckerFactored
from backpack.sources import (
    AveragedRoot,
    ExactRoot,
    HessianRoot,
    LossGradient,
    NoColumns,
    RandomSigns,
    SampledRoot,
)


class Context(NamedTuple):
    """What is known when a parameter's gradient is complete.

    Attributes:
        parameter: the parameter.
        samples: number of samples.
        gradient: gives its gradient.
        zeros: gives a column of zeros, in the form in which columns would reach the parameter.
    """

    parameter: Tensor
    samples: int
    gradient: Callable[[], Tensor]
    zeros: Callable[[], Form]


class BackpropExtension:
    """A quantity, saved to ``parameter.<savefield>``.

    Subclass it to add one: give ``savefield`` and ``source``, and :meth:`reduce`; the rest has
    defaults. What it needs is said by attributes of the class, and by nothing else: neither the name of
    the field nor which methods it has. The defaults are right for any quantity; other values save work.

    Attributes:
        savefield: the attribute of a parameter that holds the value.
        source: the columns it is computed from (:mod:`backpack.sources`).
        per_sample: whether single samples of a form are looked at. With ``False``, a form of Hessian
            columns may be :class:`~backpack.factors.Together`, whose samples cannot be told apart.
        needs_gradient: whether :meth:`finish` may ask for the gradient. With ``False``, the value is
            saved before the gradient is there.
        written_out: whether a form that is written out (``Dense``) is as good as any. With ``True``, it
            may be given one that was written out for another quantity.
        writes_out: whether it writes out the whole form in any case.
        every_column: whether columns that do not reach a parameter are kept, as zeros.
        every_use: whether a form is that of all uses of a parameter, also where its columns reach some
            of them only (the others have columns of zeros).
        signed: whether exact columns may come with signs, where the Hessian of the loss is indefinite.
        refines: whether the columns are looked at again, by :meth:`refine`.
        large: whether the value of an earlier pass is let go before this one's is computed.
        mixed: whether the value has a meaning where samples are mixed (batch norm in training mode), as
            each row's contribution.
        combine: how values of several batches make that of all of them (:mod:`backpack.combining`), for
            :func:`backpack.accumulate`; ``None``: not said, an error there.

    Example:
        >>> from backpack import backpack, extend
        >>> class GradientMax(BackpropExtension):
        ...     savefield = "grad_max"
        ...
        ...     def reduce(self, form, sign=None):
        ...         return form.dense()[0].flatten(1).abs().amax(1)
        >>> model = extend(torch.nn.Linear(4, 3))
        >>> with backpack(GradientMax()):
        ...     model(torch.rand(5, 4)).sum().backward()
        >>> model.weight.grad_max.shape, model.bias.grad_max
        (torch.Size([5]), tensor([1., 1., 1., 1., 1.]))
    """

    savefield: str
    source: ColumnSource = LossGradient()
    per_sample: bool = True
    needs_gradient: bool = True
    written_out: bool = False
    writes_out: bool = False
    every_column: bool = False
    every_use: bool = False
    signed: bool = False
    refines: bool = False
    large: bool = False
    mixed: bool = False
    combine: Rule | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            raise NotImplementedError(
                f"{type(self).__name__} takes no such arguments: quantities are not written once per "
                "kind of module here. A quantity of your own is one subclass of BackpropExtension "
                "with `savefield` and `reduce(form)`, for all modules at once"
            )

    def set_module_extension(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, and say what to do instead: there is one rule for all quantities.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "quantities are not written once per kind of module here: any module works as it is. To "
            "make an operation of yours faster, write one rule for all quantities "
            "(backpack.own.op_rule); to compute something else, subclass backpack.own.BackpropExtension"
        )

    def get_subsampling(self) -> Sequence[int] | None:
        """The samples that are kept; ``None``: all."""
        return self.subsampling

    subsampling: Sequence[int] | None = None

    def reduce(self, form: Form, sign: Tensor | None = None) -> Any:
        """The state for the columns of one form (``sign [v, n]``: weights of Hessian columns)."""
        raise NotImplementedError

    def begin(self, parameter: Tensor, form: Form, sign: Tensor | None = None) -> Any:
        """The state for the first columns that reach a parameter."""
        return self.reduce(form, sign)

    def add(self, state: Any, other: Any) -> Any:
        """The state for the columns of both."""
        return state + other

    def update(self, state: Any, form: Form, sign: Tensor | None = None) -> Any:
        """The state with further columns."""
        return self.add(state, self.reduce(form, sign))

    def refine(self, state: Any, form: Form) -> Any:
        """The state after a second look at columns; once :meth:`reduce` has seen all of them."""
        raise NotImplementedError

    def finish(self, state: Any, context: Context) -> Any:
        """The value to save."""
        return state

    def zero(self, context: Context) -> Any:
        """The value for a parameter that no column reaches; by default that of a column of zeros."""
        form = context.zeros()
        state = self.begin(context.parameter, form)
        return self.finish(self.refine(state, form) if self.refines else state, context)

    def before(self) -> BackpropExtension | None:
        """What must be known of all batches of a data set first, in a pass over them of its own."""
        return None

    def after(self, values: Mapping[Tensor, Any]) -> BackpropExtension:
        """The quantity, given the values of :meth:`before` for each parameter."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _index(subsampling: Sequence[int] | None, samples: int) -> slice | Tensor:
    if subsampling is None:
        return slice(None)
    index = torch.as_tensor(list(subsampling), dtype=torch.long)
    if index.numel() and (int(index.max()) >= samples or int(index.min()) < -samples):
        raise IndexError(
            f"subsampling {list(subsampling)} is out of range for a batch of {samples} samples"
        )
    return index % samples if index.numel() else index


def _samples_shape(context: Context) -> tuple[int, ...]:
    return (context.samples, *context.parameter.shape)


# --------------------------------------------------------------------------------------
# First order


class BatchGrad(BackpropExtension):
    """Individual gradients ``grad_batch[n] = d l_n / d p``, shape ``[N, *p]``.

    They sum to the gradient as it is before hooks of the parameter (``p.register_hook``), which change
    ``p.grad`` alone, here and for all quantities: a function of the sum tells nothing of its terms. If
    the hook is a linear map, apply it to ``grad_batch[n]``.

    Of several batches: concatenated, each with its weight in the loss.

    Args:
        subsampling: samples to keep, in that order (may repeat, may be negative); default all. The
            scale stays that of the full batch.
    """

    savefield = "grad_batch"
    combine = Joined(1)
    needs_gradient = False
    written_out = large = mixed = True

    def __init__(self, subsampling: Sequence[int] | None = None) -> None:
        self.subsampling = subsampling
        self.writes_out = subsampling is None

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        index = _index(self.subsampling, form.samples)
        return form.take(slice(None), index).dense()[0]

    def zero(self, context: Context) -> Tensor:
        full = context.parameter.new_zeros(_samples_shape(context))
        return full[_index(self.subsampling, context.samples)]


class BatchL2Grad(BackpropExtension):
    """Squared norms ``batch_l2[n] = ||d l_n / d p||^2`` of individual gradients, shape ``[N]``.

    Of several batches: concatenated, each with its weight in the loss squared.
    """

    savefield = "batch_l2"
    combine = Joined(2)
    needs_gradient, written_out = False, True

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        return form.squared_norms()

    def zero(self, context: Context) -> Tensor:
        return context.parameter.new_zeros(context.samples)


class SumGradSquared(BackpropExtension):
    """Second moment ``sum_grad_squared = sum_n (d l_n / d p)^2``, elementwise, shape ``p``.

    Of several batches: added, each with its weight in the loss squared.
    """

    savefield = "sum_grad_squared"
    combine = Added(2)
    needs_gradient, written_out = False, True

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        return form.square_sum()

    def zero(self, context: Context) -> Tensor:
        return torch.zeros_like(context.parameter)


class Variance(BackpropExtension):
    """``variance = 1/N sum_n g_n^2 - (1/N sum_n g_n)^2``, ``g_n = d l_n / d p``, shape ``p``.

    The biased variance of the individual gradients as scaled by the loss's reduction, equal to
    ``grad_batch.var(0, unbiased=False)``.

    Of several batches: from their means and variances, :class:`backpack.combining.Moments`.
    """

    savefield = "variance"
    combine = Moments()
    written_out = True

    def reduce(self, form: Form, sign: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        return form.centred_square_sum()

    def finish(self, state: tuple[Tensor | None, Tensor], context: Context) -> Tensor:
        centre, squares = state
        n, offset = context.samples or float("nan"), context.gradient()
        if centre is not None:
            offset = offset - n * centre
        if torch.is_grad_enabled():
            return (squares / n - offset * offset / n**2).clamp(min=0)
        return squares.div_(n).addcmul_(offset, offset, value=-1 / n**2).clamp_(min=0)

    def zero(self, context: Context) -> Tensor:
        return torch.zeros_like(context.parameter)


# --------------------------------------------------------------------------------------
# Generalized Gauss-Newton


class _Sampled(BackpropExtension):
    """Monte-Carlo columns."""

    _drawn: ClassVar[type[SampledRoot] | type[RandomSigns]] = SampledRoot

    def __init__(self, mc_samples: int = 1, generator: torch.Generator | None = None) -> None:
        if isinstance(mc_samples, bool) or not isinstance(mc_samples, int) or mc_samples < 1:
            raise ValueError(f"mc_samples must be a positive integer, got {mc_samples!r}")
        self.source: SampledRoot | RandomSigns = self._drawn(mc_samples, generator)

    def get_num_mc_samples(self) -> int:
        """Number of Monte-Carlo samples per data point."""
        return self.source.draws

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mc_samples={self.source.draws})"


class _Diagonal(BackpropExtension):
    per_sample = needs_gradient = False
    signed = True
    combine = Added(1)

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        return form.square_sum(sign)

    def zero(self, context: Context) -> Tensor:
        return torch.zeros_like(context.parameter)


class _BatchDiagonal(BackpropExtension):
    needs_gradient = False
    large = signed = True
    combine = Joined(1)

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        return form.square_sum_per_sample(sign)

    def zero(self, context: Context) -> Tensor:
        return context.parameter.new_zeros(_samples_shape(context))


class DiagGGNExact(_Diagonal):
    """``diag_ggn_exact = diag(sum_n J_n^T H_n J_n)``, shape ``p``.

    Of several batches: added, each with its weight in the loss; so are all diagonals.
    """

    savefield = "diag_ggn_exact"
    source = ExactRoot()


class DiagGGNMC(_Sampled, _Diagonal):
    """Unbiased Monte-Carlo estimate of :class:`DiagGGNExact`, shape ``p``.

    Targets are drawn from the model's predictive distribution (Schraudolph, 2002); for losses that
    are no likelihood, columns are ``H_n^(1/2) z`` with ``z`` standard normal.

    Args:
        mc_samples: draws per data point.
        generator: source of randomness; default torch's own, so ``torch.manual_seed`` applies.
    """

    savefield = "diag_ggn_mc"


class BatchDiagGGNExact(_BatchDiagonal):
    """``diag_ggn_exact_batch[n] = diag(J_n^T H_n J_n)``, shape ``[N, *p]``; sums to the diagonal.

    Of several batches: concatenated, each with its weight in the loss.
    """

    savefield = "diag_ggn_exact_batch"
    source = ExactRoot()


class BatchDiagGGNMC(_Sampled, _BatchDiagonal):
    """Monte-Carlo estimate of :class:`BatchDiagGGNExact`, shape ``[N, *p]``.

    Args:
        mc_samples: draws per data point.
        generator: source of randomness.
    """

    savefield = "diag_ggn_mc_batch"


class _SquareRoot(BackpropExtension):
    needs_gradient = False
    every_column = large = True
    combine = Joined(0.5, axis=1)

    def reduce(self, form: Form, sign: Tensor | None = None) -> list[Tensor]:
        index = _index(self.subsampling, form.samples)
        return [form.take(slice(None), index).dense()]

    def finish(self, state: list[Tensor], context: Context) -> Tensor:
        return state[0] if len(state) == 1 else torch.cat(state)

    def zero(self, context: Context) -> Tensor:
        full = context.parameter.new_zeros(0, *_samples_shape(context))
        return full[:, _index(self.subsampling, context.samples)]


class SqrtGGNExact(_SquareRoot):
    """Square root ``V^T`` of the GGN, ``G = V V^T = sum_n J_n^T H_n J_n``, shape ``[C, N, *p]``.

    ``C`` is the number of model outputs per sample, or of the numbers that the loss is computed from,
    where these are fewer. Concatenated over parameters it gives the full
    matrix, blocks between parameters included.

    Of several batches: concatenated along ``N``, each with the root of its weight in the loss.

    Args:
        subsampling: samples to keep; the scale stays that of the full batch.
    """

    savefield = "sqrt_ggn_exact"
    source = ExactRoot()

    def __init__(self, subsampling: Sequence[int] | None = None) -> None:
        self.subsampling = subsampling


class SqrtGGNMC(_Sampled, _SquareRoot):
    """Monte-Carlo square root of the GGN, shape ``[mc_samples, N, *p]``.

    Args:
        mc_samples: draws per data point.
        subsampling: samples to keep; the scale stays that of the full batch.
        generator: source of randomness.
    """

    savefield = "sqrt_ggn_mc"

    def __init__(
        self,
        mc_samples: int = 1,
        subsampling: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(mc_samples, generator)
        self.subsampling = subsampling


class _Kronecker(BackpropExtension):
    needs_gradient = False
    every_use = True
    combine: Rule | None = Blocks(1)
    kfac_approx: Sharing = None

    def _choose(self, kfac_approx: Sharing) -> None:
        if kfac_approx not in (None, "expand", "reduce"):
            raise ValueError(f"kfac_approx must be 'expand', 'reduce' or None, got {kfac_approx!r}")
        self.kfac_approx = kfac_approx

    def reduce(self, form: Form, sign: Tensor | None = None) -> Any:
        factors = [factor.matrix() for factor in form.kronecker(self.kfac_approx)]
        rows = _averaged_over(form, self.kfac_approx)
        return KroneckerFactored(factors, form.shape, _layout(form), rows)

    def update(self, state: Any, form: Form, sign: Tensor | None = None) -> Any:
        factors = form.kronecker(self.kfac_approx)
        grown = [
            old + factor.matrix() if factor.grows else old
            for old, factor in zip(state, factors, strict=True)
        ]
        return KroneckerFactored(grown, state.shape, state.layout, state.averaged_over)


def _layout(form: Form) -> str:
    """Where in a parameter the matrix is that its Kronecker factors fit."""
    form = form.form if isinstance(form, Single) else form
    if isinstance(form, Lookup):
        return "columns"
    return form.layout.kind if isinstance(form, Outer) and len(form.shape) > 1 else "rows"


def _averaged_over(form: Form, sharing: Sharing) -> int:
    """The number of rows that the factor of the inputs is an average over."""
    form = form.together() if isinstance(form, Single) else form
    groups = form.inputs.shape[1] if isinstance(form, Outer) else 1
    shared = sharing == "expand" and isinstance(form, (Outer, Lookup))
    rows = positions_of(form) if shared else form.samples  # type: ignore[arg-type]
    return max(rows * groups, 1)


class KFLR(_Kronecker):
    """Kronecker factors from exact columns (Botev, Ritter, Barber, 2017): a list of matrices.

    The list is a :class:`~backpack.kronecker.KroneckerFactored`, with products, inverses and samples.
    Weight ``[B, A]`` with GGN block ``~ kron(B, A)`` over the row-major weight; other parameters
    ``[B]``, their exact block. With output-gradient columns ``g [v, n, s, o]`` and inputs
    ``a [n, s, i]``: ``B = sum_{v,n} (sum_s g)(sum_s g)^T``, which carries the loss's reduction and is
    the block of the layer's bias; ``A = 1/N sum_{n,s} a a^T``. Exact for one sample and one position.
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


class KFAC(_Sampled, _Kronecker):
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


# --------------------------------------------------------------------------------------
# Hessian


class DiagHessian(_Diagonal):
    """Diagonal of the Hessian of the loss, ``diag_h``, shape ``p``; exact for any architecture.

    Terms of the loss that involve parameters but no data (weight decay) are left out.
    """

    savefield = "diag_h"
    source = HessianRoot()


class BatchDiagHessian(_BatchDiagonal):
    """``diag_h_batch[n]``, the Hessian diagonal of ``l_n``, shape ``[N, *p]``."""

    savefield = "diag_h_batch"
    source = HessianRoot()


class DiagHessianMC(_Sampled, _Diagonal):
    """Unbiased estimate of :class:`DiagHessian` (Hutchinson, 1990; Bekas et al., 2007), ``diag_h_mc``.

    Random signs ``u`` at the outputs of the operations in which parameters meet data give
    ``E[(J^T u) (J^T H u)] = diag(J^T H J)``: two passes through the graph for each draw.

    Args:
        mc_samples: draws.
        generator: source of randomness.
    """

    savefield = "diag_h_mc"
    _drawn = RandomSigns


class BatchDiagHessianMC(_Sampled, _BatchDiagonal):
    """Unbiased estimate of :class:`BatchDiagHessian`, ``diag_h_mc_batch``, shape ``[N, *p]``.

    Args:
        mc_samples: draws.
        generator: source of randomness.
    """

    savefield = "diag_h_mc_batch"
    _drawn = RandomSigns


# --------------------------------------------------------------------------------------
# Products with curvature blocks


class Product(BackpropExtension):
    """A function saved to the parameter; the graph is kept for it."""

    source = NoColumns()
    needs_gradient = False
    combine = Functions(1)
    curvature: Literal["ggn", "hessian", "positive"]
    modify = "clip"

    def __init__(self, savefield: str | None = None) -> None:
        if savefield is not None:
            self.savefield = savefield

    def zero(self, context: Context) -> Any:
        return torch.zeros_like


class GGNMP(Product):
    """Products with the parameter's block of the generalized Gauss-Newton.

    ``ggnmp(mat)`` maps ``[K, *p]`` (or one vector ``p``) to the same shape, after the ``with`` block
    too: the graph is kept until the field is overwritten or deleted.

    Of several batches: the sum, whose graphs are all kept.

    Args:
        savefield: another name of the field.
    """

    savefield = "ggnmp"
    curvature = "ggn"


class HMP(Product):
    """Products with the parameter's block of the Hessian, ``hmp(mat)``, as :class:`GGNMP`.

    Args:
        savefield: another name of the field.
    """

    savefield = "hmp"
    curvature = "hessian"


class PCHMP(Product):
    """Products with the block of the positive-curvature Hessian (Chen et al., arXiv:1802.06502).

    The generalized Gauss-Newton plus the curvature of activations, made positive entry by entry.

    Args:
        savefield: another name of the field.
        modify: ``"clip"`` negative curvature of activations to zero, or take its ``"abs"`` value.

    Raises:
        KeyError: for another ``modify``.
    """

    savefield = "pchmp"
    curvature = "positive"

    def __init__(self, savefield: str | None = None, modify: str = "clip") -> None:
        super().__init__(savefield)
        if modify not in ("clip", "abs"):
            raise KeyError(f"modify must be 'clip' or 'abs', got {modify!r}")
        self.modify = modify
