"""Normalization, and other parameters of channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.forms.base import Dense, Form
from backpack.rules.base import ParameterForms, channel_sum, op_rule
from backpack.rules.elementwise import reduce_to
from backpack.samples.axis import SampleAxis, sample_axis_of


def _per_channel(
    batch: SampleAxis, normalized: Callable[[], Tensor], weight: Tensor | None, bias: Tensor | None
) -> ParameterForms | None:
    if batch.dim != 0:
        return None
    return [
        (weight, lambda g: channel_sum(batch, g * normalized())),
        (bias, lambda g: channel_sum(batch, g)),
    ]


@op_rule(F.layer_norm)
def layer_norm(
    batch: SampleAxis,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> ParameterForms | None:
    """``statistics`` are mean and inverse deviation of each row, if they are known."""
    if sample_axis_of(input) is None:
        return None
    shape = torch.Size(normalized_shape)

    def normalized() -> Tensor:
        if statistics is not None and not torch.is_grad_enabled():
            return (input - statistics[0]).mul_(statistics[1]).to(input.dtype)
        # On CPUs torch takes twice as long without a weight.
        return F.layer_norm(input, shape, input.new_ones(shape), None, eps)

    return [
        (weight, lambda g: reduce_to(batch, g * normalized(), shape)),
        (bias, lambda g: reduce_to(batch, g, shape)),
    ]


@op_rule(F.rms_norm)
def rms_norm(
    batch: SampleAxis,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> ParameterForms | None:
    if sample_axis_of(input) is None:
        return None
    shape = torch.Size(normalized_shape)
    return [(weight, lambda g: reduce_to(batch, g * F.rms_norm(input, list(shape), eps=eps), shape))]


@op_rule(F.group_norm)
def group_norm(
    batch: SampleAxis,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> ParameterForms | None:
    return _per_channel(batch, lambda: F.group_norm(input, num_groups, eps=eps), weight, bias)


@op_rule(F.instance_norm)
def instance_norm(
    batch: SampleAxis,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> ParameterForms | None:
    if use_input_stats:
        return _per_channel(batch, lambda: F.instance_norm(input, eps=eps), weight, bias)
    return batch_norm(batch, input, running_mean, running_var, weight, bias, eps=eps)


@op_rule(F.batch_norm)
def batch_norm(
    batch: SampleAxis,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> ParameterForms | None:
    def normalized() -> Tensor:
        if training:
            return F.batch_norm(input, None, None, training=True, eps=eps)
        return F.batch_norm(input, running_mean, running_var, eps=eps)

    return _per_channel(batch, normalized, weight, bias)


@op_rule(torch.prelu, F.prelu, Tensor.prelu)
def prelu(batch: SampleAxis, input: Tensor, weight: Tensor) -> ParameterForms | None:
    if batch.dim != 0 or input.dim() < 2 or sample_axis_of(input) is None:
        return None
    shape = weight.shape

    def form(g: Tensor) -> Form:
        form = channel_sum(batch, g * input.clamp(max=0))
        if shape.numel() == 1:
            return Dense(form.values.sum(2, keepdim=True).reshape(*form.values.shape[:2], *shape))
        return form

    return [(weight, form)]
