"""Choosing samples along an axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def subsample(
    tensor: Tensor, dim: int = 0, subsampling: Sequence[int] | Tensor | None = None
) -> Tensor:
    """Entries ``subsampling`` along axis ``dim``: ``tensor[:, ..., subsampling, ..., :]``.

    Args:
        tensor: any tensor.
        dim: axis of the samples; may be negative.
        subsampling: indices, which may repeat and be negative. ``None`` takes all.

    Returns:
        ``tensor`` itself for ``None``, else a copy whose axis ``dim`` has ``len(subsampling)``
        entries.

    Raises:
        IndexError: if an index, or ``dim``, is out of range.
        TypeError: if ``subsampling`` is a mask.

    Example:
        >>> subsample(torch.arange(6).reshape(2, 3), dim=1, subsampling=[2, -3, 2])
        tensor([[2, 0, 2],
                [5, 3, 5]])
    """
    if subsampling is None:
        return tensor
    indices = subsampling.tolist() if isinstance(subsampling, Tensor) else list(subsampling)
    if any(isinstance(index, bool) for index in indices):
        raise TypeError("subsample: expected indices of samples, but got a mask.")
    size = tensor.size(dim)
    # Checked here because on a GPU an index out of range ends the process' CUDA context.
    for index in indices:
        if not -size <= index < size:
            raise IndexError(
                f"subsample: index {index} is out of range for axis {dim} with {size} samples."
            )
    chosen = torch.tensor([index % size for index in indices], dtype=torch.long)
    return tensor.index_select(dim, chosen.to(tensor.device))
