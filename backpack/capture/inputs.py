"""Which of a model's inputs carries the batch, where they differ in size.

The first does, but for what a larger input explains: a square mask ``[T, T]`` or positions ``[T]``
beside ``[N, T, d]``. Shapes alone cannot always tell; the model's output must then have as many rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def carriers(tensors: Sequence[Tensor], dim: int) -> list[int]:
    """Places of the inputs whose axis ``dim`` may hold the samples; the first one counts."""
    left = [j for j, x in enumerate(tensors) if x.dim() > dim]
    left = [j for j in left if tensors[j].dtype != torch.bool] or left
    # Square ones first: a mask must not explain other inputs.
    for kind in (_square, _flat) if len(left) > 1 else ():
        for j in [j for j in left if kind(tensors[j])]:
            if any(_explains(tensors[k], tensors[j], dim) for k in left if k != j):
                left.remove(j)
    return left


def doubtful(x: Tensor) -> bool:
    """Whether an input may be a mask or positions, as far as its shape goes."""
    return _square(x) or _flat(x)


def _core(x: Tensor) -> tuple[int, ...]:
    """The shape without leading axes of length one."""
    shape = tuple(x.shape)
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def _square(x: Tensor) -> bool:
    core = _core(x)
    return len(core) == 2 and core[0] == core[1]


def _flat(x: Tensor) -> bool:
    return len(_core(x)) < 2


def _explains(larger: Tensor, x: Tensor, dim: int) -> bool:
    """Whether the axis of a mask, or of positions, may be one of a larger input's other axes.

    Whole numbers are explained by such only: ids of tokens ``[N]`` may come with states ``[2, N, d]``.
    """
    if larger.dim() <= dim or (larger.is_floating_point() and not x.is_floating_point()):
        return False
    if larger.dim() < max(len(_core(x)), 2) or (_square(x) and _square(larger)):
        return False
    # Of as many axes are the ids of tokens beside a mask, or beside their positions.
    ids = not larger.is_floating_point() and (x.is_floating_point() or not _square(x))
    if larger.dim() <= (len(_core(x)) if _square(x) else x.dim()) and not ids:
        return False
    rest = (*larger.shape[:dim], *larger.shape[dim + 1 :])
    return not _core(x) or _core(x)[0] in rest
