"""Norms of many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backpack._torch import foreach_norm

# So many entries are converted at a time, where squares are added up in double precision.
PRECISE = 2**16


def norms_of(tensors: Sequence[Tensor | None]) -> Tensor:
    """A norm for each tensor, zero where there is none."""
    dense = [t for t in tensors if t is not None and not t.is_sparse]
    if len(dense) == len(tensors) and len({t.dtype for t in dense}) == 1:
        return torch.stack(foreach_norm(dense)).double()
    norms = iter(foreach_norm(dense)) if dense else iter(())
    found = []
    like = next(t for t in tensors if t is not None) if any(t is not None for t in tensors) else None
    zero = torch.zeros(()) if like is None else torch.zeros((), device=like.device)
    for t in tensors:
        if t is None:
            found.append(zero.double())
        elif t.is_sparse:
            found.append(t.coalesce().values().norm().double())
        else:
            found.append(next(norms).double())
    return torch.stack(found)


def squared_norm(tensor: Tensor) -> Tensor:
    """The squared norm of a tensor of any size, added up in double precision."""
    pieces = tensor.detach().reshape(-1).split(PRECISE)
    norms = foreach_norm(list(pieces), 2, dtype=torch.float64)
    return norms[0].square() if len(norms) == 1 else torch.stack(norms).square().sum()


def squared_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The squared norm of each tensor, added up in double precision."""
    small = [t for t in tensors if t.numel() <= PRECISE]
    norms = iter(foreach_norm(small, 2, dtype=torch.float64) if small else ())
    return [next(norms).square() if t.numel() <= PRECISE else squared_norm(t) for t in tensors]
