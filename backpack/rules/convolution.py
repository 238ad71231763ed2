"""Convolutions, and the patches that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack._ambient import ambient, within
from backpack.forms.base import Form
from backpack.forms.layout import Layout, Patches
from backpack.forms.limits import KEPT_BYTES
from backpack.forms.outer import Outer
from backpack.rules.base import OpRule, ParameterForms, channel_sum, op_rule, positions
from backpack.samples.axis import SampleAxis, sample_axis_of


def patches_kept() -> within:
    """Within the block, patches of the same input are made once, as far as memory goes."""
    return within(patches={}, patch_bytes=0)


def kept(key: Any, compute: Callable[[], Tensor | Patches]) -> Tensor | Patches:
    """Patches, written out once at most within :func:`patches_kept`."""
    if ambient.patches is None:
        return compute()
    key = key, torch.is_grad_enabled()  # those of one mode are not differentiable in the other
    if key in ambient.patches:
        return ambient.patches[key]
    value = compute()
    like = value.windows if isinstance(value, Patches) else value
    size = value.shape.numel() * like.element_size()
    if ambient.patch_bytes + size <= KEPT_BYTES[like.device.type]:
        if isinstance(value, Patches):
            value.keep = True
        ambient.patches[key] = value
        ambient.patch_bytes += size
    return value


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * length if len(value) == 1 else value


def unfold(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """Patches of ``x [n, c, *space]`` under a sliding window, ``[n, c, *kernel, *positions]``."""
    if any(lo or hi for lo, hi in padding):
        x = F.pad(x, [p for pair in reversed(padding) for p in pair])
    ndim = len(kernel)
    for d in range(ndim):
        x = x.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])
        x = x[..., :: dilation[d]]
    return x.movedim(tuple(range(2, 2 + ndim)), tuple(range(-ndim, 0)))


def _patches(batch: SampleAxis, x: Tensor, ndim: int, groups: int) -> Tensor | Patches:
    """``[N k, c, *kernel, *positions] -> [n, q, s, i]``."""
    x = x.unflatten(1, (groups, -1))
    if batch.plain:
        return Patches(x, ndim)
    x = x.flatten(-ndim).flatten(2, -2)
    return batch.split(x).permute(0, 2, 1, 4, 3).flatten(2, 3)


def _channels(batch: SampleAxis, g: Tensor, groups: int) -> Tensor:
    """``[v, N k, c, *positions] -> [v, n, q, s, o]``."""
    g = g.flatten(3).unflatten(2, (groups, -1))
    if batch.plain:
        return g.mT
    return batch.split(g, 1).permute(0, 1, 3, 2, 5, 4).flatten(3, 4)


def _conv(ndim: int) -> OpRule:
    def convolution(
        batch: SampleAxis,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> ParameterForms | None:
        if sample_axis_of(input) is None or batch.dim != 0 or input.dim() != ndim + 2:
            return None
        kernel, layout = weight.shape[2:], Layout(weight.shape)

        def weight_form(g: Tensor) -> Form:
            step, spread = _tuple(stride, ndim), _tuple(dilation, ndim)
            if padding == "same":
                widths = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
                margins = [(w // 2, w - w // 2) for w in widths]
            else:
                margins = [(p, p) for p in _tuple(0 if padding == "valid" else padding, ndim)]

            def patches() -> Tensor | Patches:
                return _patches(batch, unfold(input, kernel, step, margins, spread), ndim, groups)

            a = kept((id(input), id(weight), step, *margins, spread), patches)
            columns = _channels(batch, g, groups)
            return Outer(a, columns, layout, positions(batch, columns.shape[3]))

        return [(weight, weight_form), (bias, lambda g: channel_sum(batch, g))]

    return convolution


def _conv_transpose(ndim: int) -> OpRule:
    def transposed_convolution(
        batch: SampleAxis,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> ParameterForms | None:
        if sample_axis_of(input) is None or batch.dim != 0 or input.dim() != ndim + 2:
            return None
        kernel, layout = weight.shape[2:], Layout(weight.shape, "convt")

        def weight_form(g: Tensor) -> Form:
            """A transposed convolution is a convolution of the input spread out with zeros."""
            step, spread = _tuple(stride, ndim), _tuple(dilation, ndim)
            pads, extra = _tuple(padding, ndim), _tuple(output_padding, ndim)
            size = [(n - 1) * s + 1 for n, s in zip(input.shape[2:], step, strict=True)]
            spread_out = input.new_zeros(*input.shape[:2], *size)
            places: tuple[Any, ...] = (..., *(slice(None, None, s) for s in step))
            spread_out[places] = input
            margins = [
                (d * (k - 1) - p, d * (k - 1) - p + e)
                for d, k, p, e in zip(spread, kernel, pads, extra, strict=True)
            ]
            patches = unfold(spread_out, kernel, (1,) * ndim, margins, spread)
            patches = patches.flip(tuple(range(2, 2 + ndim)))
            columns = _channels(batch, g, groups)
            counts = positions(batch, columns.shape[3])
            return Outer(_patches(batch, patches, ndim, groups), columns, layout, counts)

        return [(weight, weight_form), (bias, lambda g: channel_sum(batch, g))]

    return transposed_convolution


for _ndim, _forward, _transposed in (
    (1, (torch.conv1d, F.conv1d), (torch.conv_transpose1d, F.conv_transpose1d)),
    (2, (torch.conv2d, F.conv2d), (torch.conv_transpose2d, F.conv_transpose2d)),
    (3, (torch.conv3d, F.conv3d), (torch.conv_transpose3d, F.conv_transpose3d)),
):
    op_rule(*_forward)(_conv(_ndim))
    op_rule(*_transposed)(_conv_transpose(_ndim))
