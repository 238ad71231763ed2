"""A number of its own for each sample: what is multiplied by it, and comes out multiplied by it.

Powers of two, by which floating-point numbers are multiplied without rounding: what belongs to one
sample agrees to the last digit, but for kernels that add in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backpack.samples.axis import SampleAxis
from backpack.samples.separability import generic

# The number of each sample, from the samples of entries.
Scale = Callable[[Tensor, torch.dtype], Tensor]
# Where samples are apart, with their axes there.
Starts = Sequence[tuple[GradientEdge, SampleAxis]]

_powers: dict[Hashable, Tensor] = {}
_MOST_POWERS = 64


def powers(samples: Tensor, dtype: torch.dtype) -> Tensor:
    """Powers of two without a pattern."""
    levels = 5 if dtype == torch.float16 else 25
    mixed = (samples * 2654435761 + (samples >> 3) * 40503 + 12345) % 1000003
    return torch.pow(2.0, (mixed % levels - levels // 2).to(torch.float64)).to(dtype)


def mask_of(digit: int) -> Scale:
    """Whether the number of a sample has a binary digit."""
    return lambda samples, dtype: ((samples >> digit) & 1).to(dtype)


def along(axis: SampleAxis, like: Tensor, scale: Scale) -> Tensor:
    """The numbers of the samples on their axis, to be multiplied with a tensor."""
    dtype = like.real.dtype if like.is_complex() else like.dtype
    key = None
    if scale is powers and axis.picked is None:  # nearly all: many places have the same
        key = (axis, like.dim(), like.device, dtype)
        if key in _powers:
            return _powers[key]
    numbers = scale(axis.sample_ids(like.device), dtype)
    numbers = numbers.reshape([-1 if d == axis.dim and not axis.bare else 1 for d in range(like.dim())])
    if key is not None:
        if len(_powers) >= _MOST_POWERS:
            _powers.clear()
        _powers[key] = numbers
    return numbers


def agree(before: Tensor, after: Tensor, factors: Tensor) -> bool:
    """Whether ``after`` is ``factors * before``, compared at the scale of ``before``."""
    if not before.numel():
        return True
    positive = factors > 0
    error = (after / torch.where(positive, factors, 1) - torch.where(positive, before, 0)).abs()
    rounding = torch.finfo(error.dtype).eps ** 0.5 * before.abs()
    largest = rounding.nan_to_num(posinf=0.0).amax()
    return not bool((error > largest).any())


def pulled(starts: Starts, targets: Sequence[GradientEdge], scale: Scale | None) -> list[Tensor | None]:
    """Gradients at some places, of an arbitrary cotangent at the starts, scaled sample by sample."""
    columns = []
    for edge, axis in starts:
        about = edge.node._input_metadata[edge.output_nr]
        column = generic(about.shape, torch.empty(0, dtype=about.dtype, device=about.device))
        columns.append(column if scale is None else column * along(axis, column, scale))
    found = torch.autograd.grad(
        [edge for edge, _ in starts], list(targets), columns, retain_graph=True, allow_unused=True
    )
    return list(found)
