"""Gram matrices of windows that overlap, in which each product of two places is made once.

What lies under one place of a sliding kernel lies under the next one a step later. So two places meet
the same pairs of inputs as the next two, but at the borders, and one product for each distance between
places serves all pairs at that distance: of the ``K (K + 1) / 2`` pairs along one axis ``K`` are left.
Nothing is subtracted: sums of terms that pairs have in common are only made once.

Letters: ``k`` places of the kernel along one axis, ``t`` places of the input along it, ``r`` rows
(samples, groups, positions along other axes), ``f`` features (channels, places along other axes).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backpack.forms.memory import fresh
from backpack.forms.products import write_gram

# Products of fewer features take longer than their number says.
NARROW = 32


class Overlap(NamedTuple):
    """Place ``k + 1`` of a kernel's axis meets what place ``k`` meets ``shift`` positions later.

    Attributes:
        axis: which axis of the kernel.
        kernel: its number of places.
        length: number of positions along it.
        shift: in positions.
    """

    axis: int
    kernel: int
    length: int
    shift: int


def overlap_of(windows: Tensor, ndim: int) -> Overlap | None:
    """An axis along which windows ``[n, q, c, *kernel, *positions]`` overlap enough, or ``None``.

    Read from how they lie in memory, so that it is true of any tensor.
    """
    found = None
    features = windows.shape[2 : 3 + ndim].numel()
    for axis in range(ndim):
        inside, outside = 3 + axis, 3 + ndim + axis
        kernel, length = windows.shape[inside], windows.shape[outside]
        step, stride = windows.stride(inside), windows.stride(outside)
        if kernel < 2 or features // kernel < NARROW or stride < 1 or step < stride or step % stride:
            continue
        shift = step // stride
        # There must be positions that all places have in common, more than at the borders.
        if 2 * shift * (kernel - 1) <= length and (found is None or kernel > found.kernel):
            found = Overlap(axis, kernel, length, shift)
    return found


def overlapping_gram(windows: Tensor, ndim: int, overlap: Overlap, step: int) -> Tensor:
    """``sum_{n,q,s} a a^T`` of windows ``[n, q, c, *kernel, *positions]``, as a matrix.

    Args:
        windows: a view.
        ndim: number of axes of the kernel.
        overlap: from :func:`overlap_of`.
        step: number of samples whose inputs are written out at a time.
    """
    inside, places = windows.shape[2 : 3 + ndim], overlap.kernel
    size = inside.numel()
    shape = places, places, size // places, size // places
    blocks, parts = fresh(windows, shape), windows.split(step)
    _fill(blocks, _inputs(parts[0], ndim, overlap), overlap)
    if len(parts) > 1:
        more = windows.new_zeros(shape)  # what is below the diagonal is not written
        for part in parts[1:]:
            _fill(more, _inputs(part, ndim, overlap), overlap)
            blocks += more
    for k in range(places):
        for m in range(k):
            blocks[k, m] = blocks[m, k].mT
    features = [d for j, d in enumerate(inside) if j != overlap.axis + 1]
    sides = blocks.reshape(places, places, *features, *features)
    sides = sides.movedim((0, 1), (overlap.axis + 1, overlap.axis + ndim + 2))
    result = fresh(windows, sides.shape)
    result.copy_(sides)
    return result.reshape(size, size)


def _inputs(windows: Tensor, ndim: int, overlap: Overlap) -> Tensor:
    """What windows show along the axis, once for all of its places, ``[t, r, f]``."""
    inside, outside = 3 + overlap.axis, 3 + ndim + overlap.axis
    rows = [0, 1, *(d for d in range(3 + ndim, 3 + 2 * ndim) if d != outside)]
    features = [2, *(d for d in range(3, 3 + ndim) if d != inside)]
    turned = windows.permute(inside, outside, *rows, *features)
    shift, length = overlap.shift, overlap.length
    inputs = fresh(windows, (length + shift * (overlap.kernel - 1), *turned.shape[2:]))
    inputs[:length] = turned[0]
    for k in range(1, overlap.kernel):  # each place shows so much more at the end
        inputs[length + shift * (k - 1) : length + shift * k] = turned[k, -shift:]
    return inputs.flatten(-len(features)).flatten(1, -2)


def _fill(blocks: Tensor, inputs: Tensor, overlap: Overlap) -> None:
    """Write products of places ``k <= m`` to ``[k, m, f, f]``."""
    shift, length = overlap.shift, overlap.length
    for distance in range(overlap.kernel):
        offset, end = shift * distance, overlap.kernel - 1 - distance
        # Positions of place k begin at shift * k. All pairs have those from the last one's first to the
        # first one's last; what is before, places have up to some one, what comes after, from one on.
        pairs = blocks.diagonal(distance).movedim(2, 0)
        left, right = _sides(inputs, shift * end, length, offset)
        if distance:
            torch.mm(left, right, out=pairs[end])
        else:
            write_gram(right, pairs[end])
        for k in range(end - 1, -1, -1):
            sides = _sides(inputs, shift * k, shift * (k + 1), offset)
            torch.addmm(pairs[k + 1], *sides, out=pairs[k])
        after = inputs.new_zeros(pairs.shape[1:])
        for k in range(end):
            after.addmm_(*_sides(inputs, length + shift * k, length + shift * (k + 1), offset))
            pairs[k + 1] += after


def _sides(inputs: Tensor, start: int, stop: int, offset: int) -> tuple[Tensor, Tensor]:
    """What is multiplied for places from ``start`` on with those ``offset`` further."""
    return inputs[start:stop].flatten(0, 1).mT, inputs[start + offset : stop + offset].flatten(0, 1)
