"""How spaces of eigenvectors compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backpack.vivit.lowrank import Eigenpairs

Directions = Eigenpairs | Sequence[Tensor]


def overlap(first: Directions, second: Directions) -> float:
    """How much of one space of directions lies in another, between zero and one.

    ``|A B^T|^2 / min(K, L)`` for orthonormal rows ``A [K, D]`` and ``B [L, D]``: the mean squared
    cosine of the angles between them. Random spaces have ``max(K, L) / D``.

    Args:
        first: eigenpairs, or tensors ``[K, *p]`` for each parameter, orthonormal together.
        second: others, of the same parameters.

    Raises:
        ValueError: if shapes differ.
    """
    a, b = (each.vectors if isinstance(each, Eigenpairs) else list(each) for each in (first, second))
    if [x.shape[1:] for x in a] != [y.shape[1:] for y in b]:
        raise ValueError("overlap: directions are of different parameters")
    with torch.no_grad():
        products = sum(_flat(x) @ _flat(y).mT for x, y in zip(a, b, strict=True))
    assert isinstance(products, Tensor)
    return float(products.square().sum()) / max(min(products.shape), 1)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), x.shape[1:].numel())
