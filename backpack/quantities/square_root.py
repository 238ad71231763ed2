"""Square roots of the generalized Gauss-Newton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from backpack.forms.base import Form
from backpack.quantities.base import BackpropExtension, Context, Sampled, per_sample_shape, sample_index
from backpack.quantities.combining import Joined
from backpack.quantities.reading import Reader
from backpack.sources.table import ExactRoot


class _SquareRoot(BackpropExtension):
    of: ClassVar[Reader[Tensor]] = Reader()
    needs_gradient = False
    every_column = large = True
    of_complex = "complex"
    combine = Joined(0.5, axis=1)

    def reduce(self, form: Form, sign: Tensor | None = None) -> list[Tensor]:
        index = sample_index(self.subsampling, form.samples)
        return [form.take(slice(None), index).dense()]

    def finish(self, state: list[Tensor], context: Context) -> Tensor:
        return state[0] if len(state) == 1 else torch.cat(state)

    def zero(self, context: Context) -> Tensor:
        full = context.parameter.new_zeros(0, *per_sample_shape(context))
        return full[:, sample_index(self.subsampling, context.samples)]


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


class SqrtGGNMC(Sampled, _SquareRoot):
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
