"""Counts of the entries of individual gradients, alone or against the values of parameters.

During a backward pass some entries of each parameter are written down; they are counted when the step
is over, all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from backpack.own import Form, Outer

# Multiples of it, without their whole parts, are spread evenly, however many there are.
GOLDEN = 0.6180339887498949
# Products that are gathered for some entries; where there would be more, gradients of some samples are
# written out, unless these are so large that one must do.
GATHERED, SAMPLES, WRITTEN = 2**15, 4, 2**20


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


@lru_cache(maxsize=64)
def _places_in(
    sizes: tuple[int, int, int, int, int, int], most: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Where entries come from, the first position of each: in columns, inputs and the matrix."""
    v, n, q, s, o, i = sizes
    rest = _spread(most, v * n * q * o * i, device)
    at = []
    for size in (i, o, q, n, v):
        at.append(rest % size)
        rest = rest.div(size, rounding_mode="floor")
    i_, o_, q_, n_, v_ = at
    columns = (((v_ * n + n_) * q + q_) * s) * o + o_
    return columns, ((n_ * q + q_) * s) * i + i_, (q_ * o + o_) * i + i_


def _gathered(form: Outer, parameter: Tensor, most: int, joint: bool) -> tuple[Tensor, Tensor | None]:
    """Entries without writing out others, and the parameter's values there."""
    g, a = form.g.detach(), form.a.detach()
    (q, s, o), i = g.shape[2:], a.shape[3]
    columns, inputs, matrix = _places_in((*g.shape, i), most, g.device)
    g, a = g.reshape(-1), a.reshape(-1)
    values = g[columns] * a[inputs]
    for k in range(1, s):
        values += g[columns + k * o] * a[inputs + k * i]
    if not joint:
        return values, None
    return values, form.layout.load(parameter.detach(), q, o).reshape(-1)[matrix]


def counted(entries: Sequence[Entries], scales: Sequence[float], joint: bool) -> Tensor:
    """Counts ``[bins]``, or ``[bins, bins of parameters' values]``, with :func:`symlog_edges`.

    Args:
        entries: the entries.
        scales: what the values of each are multiplied with.
        joint: whether to count in two dimensions.
    """
    device, each = entries[0].values.device, tuple(len(e.values) for e in entries)
    values = torch.cat([e.values for e in entries])
    values = values if values.dtype == torch.float64 else values.float()
    if len(set(scales)) == 1:
        values = values * scales[0]
    else:
        values = values * _repeated(tuple(scales), each, device).to(values.dtype)
    at = _places(values)
    bins = len(symlog_edges()) - 1
    if joint:
        across = torch.cat([e.parameters for e in entries if e.parameters is not None])
        at = at * bins + _places(across)
    weights = _repeated(tuple(e.weight for e in entries), each, device)
    weights = weights.masked_fill(values.isnan(), 0.0)
    counts = torch.bincount(at, weights, minlength=bins**2 if joint else bins)
    return counts.reshape(bins, bins) if joint else counts


@lru_cache(maxsize=8)
def _repeated(numbers: tuple[float, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Each number so many times; the same ones in each step."""
    given = torch.tensor(numbers, dtype=torch.float64, device=device)
    return given.repeat_interleave(torch.tensor(counts, device=device), output_size=sum(counts))


def _places(values: Tensor) -> Tensor:
    """The bin of each value.

    Numbers of one sign and binary exponent have one edge between them at most: they are looked up by
    these bits, which takes a fifth of a search among edges.
    """
    values = values if values.dtype == torch.float64 else values.float()
    whole, shift, classes = _BITS[values.dtype]
    bins, edges = _classes(values.dtype, values.device)
    at = values.view(whole).bitwise_right_shift(shift).bitwise_and_(classes - 1)
    places = bins.index_select(0, at).add_(values >= edges.index_select(0, at))
    return places.clamp_(0, len(symlog_edges()) - 2)


# The whole numbers with as many bits, the bits of the significand, signs times exponents.
_BITS = {torch.float32: (torch.int32, 23, 2**9), torch.float64: (torch.int64, 52, 2**12)}


@lru_cache(maxsize=8)
def _classes(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The bin of the least number of each sign and exponent, and the next edge."""
    whole, shift, classes = _BITS[dtype]
    bits = torch.arange(classes // 2, dtype=whole) << shift
    least = torch.cat([bits.view(dtype), -(bits + 2**shift - 1).view(dtype)])
    least = least.where(~least.isnan(), -torch.inf)
    edges = torch.tensor(symlog_edges(), dtype=torch.float64).to(dtype)
    places = torch.bucketize(least, edges, right=True)
    following = edges[places.clamp(max=len(edges) - 1)]
    return (places - 1).to(device), following.to(device)
