"""Individual gradients: themselves, norms, second moment, variance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from backpack.forms.base import Form
from backpack.quantities.base import BackpropExtension, Context, per_sample_shape, sample_index
from backpack.quantities.combining import Added, Joined, Moments
from backpack.quantities.reading import Reader


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
    of_complex = "complex"
    of: ClassVar[Reader[Tensor]] = Reader()
    combine = Joined(1)
    needs_gradient = False
    written_out = large = mixed = True

    def __init__(self, subsampling: Sequence[int] | None = None) -> None:
        self.subsampling = subsampling
        self.writes_out = subsampling is None

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        index = sample_index(self.subsampling, form.samples)
        return form.take(slice(None), index).dense()[0]

    def zero(self, context: Context) -> Tensor:
        full = context.parameter.new_zeros(per_sample_shape(context))
        return full[sample_index(self.subsampling, context.samples)]


class BatchL2Grad(BackpropExtension):
    """Squared norms ``batch_l2[n] = ||d l_n / d p||^2`` of individual gradients, shape ``[N]``.

    Of several batches: concatenated, each with its weight in the loss squared.
    """

    savefield = "batch_l2"
    of: ClassVar[Reader[Tensor]] = Reader()
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
    of_complex = "sum"
    of: ClassVar[Reader[Tensor]] = Reader()
    combine = Added(2)
    needs_gradient = False
    written_out = large = True

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        return form.square_sum()

    def zero(self, context: Context) -> Tensor:
        return torch.zeros_like(context.parameter)


class Variance(BackpropExtension):
    """``variance = 1/N sum_n g_n^2 - (1/N sum_n g_n)^2``, ``g_n = d l_n / d p``, shape ``p``.

    The biased variance of the individual gradients as scaled by the loss's reduction, equal to
    ``grad_batch.var(0, unbiased=False)``.

    Of several batches: from their means and variances, :class:`backpack.quantities.combining.Moments`.
    """

    savefield = "variance"
    of_complex = "sum"
    of: ClassVar[Reader[Tensor]] = Reader()
    combine = Moments()
    written_out = large = True

    def reduce(self, form: Form, sign: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        return form.centred_square_sum()

    def finish(self, state: tuple[Tensor | None, Tensor], context: Context) -> Tensor:
        centre, squares = state
        n, offset = context.samples or float("nan"), context.gradient()
        if centre is not None:
            offset = torch.sub(offset, centre, alpha=n)
        if torch.is_grad_enabled():
            return (squares / n - offset * offset / n**2).clamp(min=0)
        return squares.div_(n).addcmul_(offset, offset, value=-1 / n**2).clamp_(min=0)

    def zero(self, context: Context) -> Tensor:
        return torch.zeros_like(context.parameter)
