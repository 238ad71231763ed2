"""Rows of a result that are sums over rows: by a constant matrix, or over segments.

A constant matrix may join rows of one sample only: an adjacency matrix with a block for each graph, a
matrix that sums the nodes of each. What tells is where it is not zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backpack._ambient import ambient
from backpack.samples.axis import NOBODY, SampleAxis, axis_of, sample_axis_of
from backpack.samples.movers import argument, mover


def axis_by_matrix(batch: SampleAxis, matrix: Tensor, dim: int) -> SampleAxis | None:
    """The axis of the rows of ``matrix @ x``, from that of the rows of ``x``.

    Args:
        batch: the axis of ``x``, which is summed over.
        matrix: ``[rows of the result, rows of x]``.
        dim: where the rows of the result are.

    Returns:
        ``None`` if a row of the result is made from rows of several samples, or the matrix is no
        constant.
    """
    constant = not matrix.requires_grad and matrix.dim() == 2 and matrix.shape[1] == batch.length
    own = sample_axis_of(matrix)
    if not constant or batch.bare or (own is not None and not own.tentative and not own.lost):
        return None
    entries = matrix.detach()
    entries = entries.to_sparse() if entries.layout != torch.sparse_coo else entries
    entries = entries.coalesce()
    row, column = entries.indices()[:, entries.values() != 0]
    ids = batch.sample_ids(entries.device)[column]
    return axis_by_groups(row, ids, batch, len(matrix), dim)


def axis_by_groups(
    group: Tensor, ids: Tensor, batch: SampleAxis, count: int, dim: int
) -> SampleAxis | None:
    """The axis of groups of rows, from the group and the sample of each; ``None`` if some are mixed."""
    highest = torch.full((count,), NOBODY, dtype=ids.dtype, device=ids.device)
    highest = highest.scatter_reduce(0, group, ids, "amax")
    if not bool((highest[group] == ids).all()):
        return None
    free = highest == NOBODY
    if bool(free.any()):
        # Rows that are made from nothing are anybody's.
        for known in ambient.stated:
            if known.length == count and not known.bare and known.size == batch.size:
                here = known.sample_ids(ids.device)
                if bool((free | (here == highest)).all()):
                    highest = here
                    break
    axis = axis_of(highest, batch.size)
    return None if axis is None else axis.moved(dim)


@mover("segment_reduce")
def _segments(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    lengths, dim = kwargs.get("lengths"), kwargs.get("axis", 0) % old.dim()
    if batch.dim != dim:
        return batch
    if old is argument(args, kwargs, 0, "data") and dim == 0 and isinstance(lengths, Tensor):
        group = torch.arange(len(lengths), device=old.device).repeat_interleave(lengths.to(old.device))
        axis = axis_by_groups(group, batch.sample_ids(old.device), batch, len(lengths), 0)
        if axis is not None:
            return axis
    return batch.losing("segments that have rows of several samples")
