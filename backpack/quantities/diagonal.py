"""Diagonals of the generalized Gauss-Newton and of the Hessian."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from backpack.forms.base import Form
from backpack.quantities.base import BackpropExtension, Context, Sampled, per_sample_shape
from backpack.quantities.combining import Added, Joined
from backpack.quantities.reading import Reader
from backpack.sources.table import ExactRoot, HessianRoot, RandomSigns


class _Diagonal(BackpropExtension):
    of: ClassVar[Reader[Tensor]] = Reader()
    per_sample = needs_gradient = False
    large = signed = summed = True
    of_complex = "sum"
    combine = Added(1)

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        return form.square_sum(sign)

    def zero(self, context: Context) -> Tensor:
        return torch.zeros_like(context.parameter)


class _BatchDiagonal(BackpropExtension):
    of: ClassVar[Reader[Tensor]] = Reader()
    needs_gradient = False
    large = signed = summed = True
    of_complex = "sum"
    combine = Joined(1)

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        return form.square_sum_per_sample(sign)

    def zero(self, context: Context) -> Tensor:
        return context.parameter.new_zeros(per_sample_shape(context))


class DiagGGNExact(_Diagonal):
    """``diag_ggn_exact = diag(sum_n J_n^T H_n J_n)``, shape ``p``.

    Of several batches: added, each with its weight in the loss; so are all diagonals.
    """

    savefield = "diag_ggn_exact"
    source = ExactRoot()


class DiagGGNMC(Sampled, _Diagonal):
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


class BatchDiagGGNMC(Sampled, _BatchDiagonal):
    """Monte-Carlo estimate of :class:`BatchDiagGGNExact`, shape ``[N, *p]``.

    Args:
        mc_samples: draws per data point.
        generator: source of randomness.
    """

    savefield = "diag_ggn_mc_batch"


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


class DiagHessianMC(Sampled, _Diagonal):
    """Unbiased estimate of :class:`DiagHessian` (Hutchinson, 1990; Bekas et al., 2007), ``diag_h_mc``.

    Random signs ``u`` at the outputs of the operations in which parameters meet data give
    ``E[(J^T u) (J^T H u)] = diag(J^T H J)``: two passes through the graph for each draw.

    Args:
        mc_samples: draws.
        generator: source of randomness.
    """

    savefield = "diag_h_mc"
    _drawn = RandomSigns


class BatchDiagHessianMC(Sampled, _BatchDiagonal):
    """Unbiased estimate of :class:`BatchDiagHessian`, ``diag_h_mc_batch``, shape ``[N, *p]``.

    Args:
        mc_samples: draws.
        generator: source of randomness.
    """

    savefield = "diag_h_mc_batch"
    _drawn = RandomSigns
