"""Counts of the entries of individual gradients, alone or against the values of parameters.

During a backward pass some entries of each parameter are written down; they are counted when the step
is over, all at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backpack.own import Form, Outer

# Multiples of it, without their whole parts, are spread evenly, however many there are.
GOLDEN = 0.6180339887498949
# Products that are gathered for some entries; where there would be more, gradients of some samples are
# written out, unless these are so large that one must do.
GATHERED, SAMPLES, WRITTEN = 2**16, 4, 2**20


def symlog_edges(largest: int = 2, smallest: int = -12) -> list[float]:
    """Bins that need no range: one for each power of ten on both sides, one around zero.

    Example:
        >>> symlog_edges(0, -1)
        [-inf, -1.0, -0.1, 0.1, 1.0, inf]
    """
    powers = [float(f"1e{k}") for k in range(smallest, largest + 1)]
    return [-float("inf"), *(-x for x in reversed(powers)), *powers, float("inf")]


@dataclass(eq=False)
class Entries:
    """Some entries of the ``G_n`` of a parameter.

    Attributes:
        values: the entries, ``[k]``.
        parameters: the parameter's values there, ``[k]``; ``None`` where they are not wanted.
        weight: how many entries each of them stands for.
    """

    values: Tensor
    parameters: Tensor | None
    weight: float


def entries_of(form: Form, parameter: Tensor, most: int, joint: bool) -> Entries:
    """At most so many entries, spread over samples; all of them, if there are no more."""
    size = max(parameter.numel(), 1)
    every = form.columns * form.samples * size
    if every <= most:
        values = form.dense().detach().reshape(-1)
        beside = parameter.detach().flatten().repeat(len(values) // size) if joint else None
        return Entries(values, beside, 1.0)
    if isinstance(form, Outer) and form.positions * most <= GATHERED:
        values, beside = _gathered(form, parameter, most, joint)
    else:
        count = max(-(-most // size), SAMPLES if SAMPLES * size <= WRITTEN else 1)
        chosen = _spread(min(count, form.samples), form.samples, form.like.device)
        flat = form.take(slice(None), chosen).dense().detach().reshape(-1)
        places = _spread(min(most, len(flat)), len(flat), flat.device)
        values, beside = flat[places], parameter.detach().flatten()[places % size] if joint else None
    return Entries(values, beside, every / len(values))


def _spread(count: int, among: int, device: torch.device) -> Tensor:
    """So many numbers below another, evenly spread in any part of them; all, if there are no more."""
    if count >= among:
        return torch.arange(among, device=device)
    places = torch.arange(1, count + 1, dtype=torch.float64, device=device)
    return places.mul_(GOLDEN).frac_().mul_(among).long()


def _gathered(form: Outer, parameter: Tensor, most: int, joint: bool) -> tuple[Tensor, Tensor | None]:
    """Entries without writing out others, and the parameter's values there."""
    v, n, q, _, o = form.g.shape
    a, sizes = form.a, (v, n, q, o, form.inputs.shape[-1])
    places = _spread(most, math.prod(sizes), form.g.device)
    at: list[Tensor] = []
    for size in reversed(sizes):
        at.append(places % size)
        places = places.div(size, rounding_mode="floor")
    i, o_, q_, n_, v_ = at
    # Indices on both sides of a slice: what they pick comes first, positions last.
    values = (form.g[v_, n_, q_, :, o_] * a[n_, q_, :, i]).sum(1)
    if not joint:
        return values.detach(), None
    return values.detach(), form.layout.load(parameter.detach().unsqueeze(0), q, o)[0][q_, o_, i]


def counted(entries: Sequence[Entries], scales: Sequence[float], joint: bool) -> Tensor:
    """Counts ``[bins]``, or ``[bins, bins of parameters' values]``, with :func:`symlog_edges`.

    Args:
        entries: the entries.
        scales: what the values of each are multiplied with.
        joint: whether to count in two dimensions.
    """
    values = torch.cat([e.values.double() * scale for e, scale in zip(entries, scales, strict=True)])
    weights = torch.cat(
        [e.values.new_full((len(e.values),), e.weight, dtype=torch.float64) for e in entries]
    )
    edges = torch.tensor(symlog_edges(), dtype=torch.float64, device=values.device)
    bins, known = len(edges) - 1, ~values.isnan()
    at = _places(values, edges)
    if joint:
        across = torch.cat([e.parameters.double() for e in entries if e.parameters is not None])
        at = at * bins + _places(across, edges)
    counts = torch.bincount(at[known], weights[known], minlength=bins**2 if joint else bins)
    return counts.reshape(bins, bins) if joint else counts


def _places(values: Tensor, edges: Tensor) -> Tensor:
    return (torch.bucketize(values, edges, right=True) - 1).clamp(0, len(edges) - 2)
