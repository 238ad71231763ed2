"""Quantities: small functions of canonical forms.

Letters: ``N`` samples, ``v`` columns, ``p`` a parameter's shape, ``l_n`` the n-th sample's share of
the loss as scaled by its reduction (``1/N`` for ``"mean"``), ``J_n`` the Jacobian of the model's
n-th output in the parameter, ``H_n`` the Hessian of ``l_n`` in that output.

A quantity reduces a form to a state, adds the states of further columns, and finishes when the
parameter's gradient is complete. All scales follow ``p.grad``: ``sum_n grad_batch_n = p.grad``.
Numbers and names: BackPACK (Dangel, Kunstner, Hennig, ICLR 2020, arXiv:1912.10985).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from backpack.forms.base import Form
from backpack.forms.complex_pairs import as_pairs, from_pairs
from backpack.quantities.combining import Rule
from backpack.quantities.reading import Reader
from backpack.sources.columns import ColumnSource
from backpack.sources.table import LossGradient, RandomSigns, SampledRoot


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

    def in_pairs(self) -> Context:
        """The same of a complex parameter as a real one with an axis of two at its end."""
        gradient = self.gradient
        pairs = as_pairs(self.parameter.detach())
        return self._replace(parameter=pairs, gradient=lambda: as_pairs(gradient()))


# What becomes of a value of pairs of real numbers.
OfComplex = Literal["complex", "sum", "kept"] | None


def _of_complex(value: Any, way: OfComplex) -> Any:
    """A value of pairs of real numbers as that of a complex parameter."""
    if way == "complex":
        return from_pairs(value)
    return value.sum(-1) if way == "sum" else value


def listed(extensions: BackpropExtension | Sequence[BackpropExtension]) -> list[BackpropExtension]:
    """Quantities as a list, also where one is given alone."""
    alone = isinstance(extensions, (BackpropExtension, type))
    return [extensions] if alone else list(extensions)  # type: ignore[list-item, arg-type]


class BackpropExtension:
    """A quantity, saved to ``parameter.<savefield>``.

    Subclass it to add one: give ``savefield`` and ``source``, and :meth:`reduce`; the rest has
    defaults. What it needs is said by attributes of the class, and by nothing else: neither the name of
    the field nor which methods it has. The defaults are right for any quantity; other values save work.

    Attributes:
        savefield: the attribute of a parameter that holds the value.
        of: reads the value from a parameter, ``Variance.of(p)``, or says why there is none; subclasses
            may give its type (``of: ClassVar[Reader[Tensor]] = Reader()``).
        source: the columns it is computed from (:mod:`backpack.sources`).
        per_sample: whether single samples of a form are looked at. With ``False``, a form of Hessian
            columns may be :class:`~backpack.own.Together`, whose samples cannot be told apart.
        needs_gradient: whether :meth:`finish` may ask for the gradient. With ``False``, the value is
            saved before the gradient is there.
        written_out: whether a form that is written out (``Dense``) is as good as any. With ``True``, it
            may be given one that was written out for another quantity.
        writes_out: whether it writes out the whole form in any case.
        every_column: whether columns that do not reach a parameter are kept, as zeros.
        every_use: whether a form is that of all uses of a parameter, also where its columns reach some
            of them only (the others have columns of zeros).
        signed: whether exact columns may come with signs, where the Hessian of the loss is indefinite.
        summed: whether only sums over all columns of a form are asked for: ``square_sum``,
            ``square_sum_per_sample``, ``squared_norms``, ``kronecker``, ``rotated_square_sum``. With
            ``True``, of exact columns at the layer that makes the loss's input it may be
            :class:`~backpack.own.AtOutput`, for which none of them is made.
        refines: whether the columns are looked at again, by :meth:`refine`.
        large: whether the value of an earlier pass is let go before this one's is computed.
        mixed: whether the value has a meaning where samples are mixed (batch norm in training mode), as
            each row's contribution.
        of_complex: what is saved for a complex parameter. Its forms are those of its real and imaginary
            parts, ``G [v, N, *p, 2]``, and so are the ``parameter`` and ``gradient`` that methods are
            given. ``"complex"``: the value ends in that axis, and is made complex; ``"sum"``: it is
            summed over that axis; ``"kept"``: it is saved as it is; ``None``: complex parameters are
            refused.
        combine: how values of several batches make that of all (:class:`backpack.own.Rule`), for
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
    of: ClassVar[Reader[Any]] = Reader()
    source: ColumnSource = LossGradient()
    per_sample: bool = True
    needs_gradient: bool = True
    written_out: bool = False
    writes_out: bool = False
    every_column: bool = False
    every_use: bool = False
    signed: bool = False
    summed: bool = False
    refines: bool = False
    large: bool = False
    mixed: bool = False
    of_complex: OfComplex = "kept"
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
        """The samples that are kept, under the original's name; ``None``: all."""
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

    def conclude(self, state: Any, context: Context, reached: bool) -> Any:
        """What is saved: by :meth:`finish`, or by :meth:`zero` if no column reached the parameter.

        For a complex parameter these are asked about pairs of real numbers.
        """
        if not context.parameter.is_complex():
            return self.finish(state, context) if reached else self.zero(context)
        pairs = context.in_pairs()
        return _of_complex(self.finish(state, pairs) if reached else self.zero(pairs), self.of_complex)

    def before(self) -> BackpropExtension | None:
        """What must be known of all batches of a data set first, in a pass over them of its own."""
        return None

    def after(self, values: Mapping[Tensor, Any]) -> BackpropExtension:
        """The quantity, given the values of :meth:`before` for each parameter."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def sample_index(subsampling: Sequence[int] | None, samples: int) -> slice | Tensor:
    if subsampling is None:
        return slice(None)
    index = torch.as_tensor(list(subsampling), dtype=torch.long)
    if index.numel() and (int(index.max()) >= samples or int(index.min()) < -samples):
        raise IndexError(
            f"subsampling {list(subsampling)} is out of range for a batch of {samples} samples"
        )
    return index % samples if index.numel() else index


def per_sample_shape(context: Context) -> tuple[int, ...]:
    return (context.samples, *context.parameter.shape)


class Sampled(BackpropExtension):
    """Monte-Carlo columns."""

    _drawn: ClassVar[type[SampledRoot] | type[RandomSigns]] = SampledRoot

    def __init__(self, mc_samples: int = 1, generator: torch.Generator | None = None) -> None:
        if isinstance(mc_samples, bool) or not isinstance(mc_samples, int) or mc_samples < 1:
            raise ValueError(f"mc_samples must be a positive integer, got {mc_samples!r}")
        self.source: SampledRoot | RandomSigns = self._drawn(mc_samples, generator)

    def get_num_mc_samples(self) -> int:
        """Number of draws for each sample, under the original's name."""
        return self.source.draws

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mc_samples={self.source.draws})"
