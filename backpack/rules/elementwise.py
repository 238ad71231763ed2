"""Broadcasting arithmetic, and writes in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backpack.forms.base import Dense, Form
from backpack.rules.base import ParameterForms, op_rule
from backpack.samples.axis import SampleAxis, axis_of, owners_of, sample_axis_of


def reduce_to(batch: SampleAxis, g: Tensor, shape: torch.Size) -> Dense:
    """Sum columns over the axes along which a tensor of ``shape`` was broadcast.

    Args:
        batch: sample axis of the output.
        g: columns times elementwise derivative, ``[v, *output.shape]``.
        shape: the tensor's shape; aligned with the output's from the right.
    """
    if batch.bare:
        return Dense(batch.split(g, 1).sum(2).reshape(*g.shape[:1], batch.size, *shape))
    ndim = g.dim() - 1
    padded = (1,) * (ndim - len(shape)) + tuple(shape)
    if padded[batch.dim] != 1 and batch.length != 1:
        # The tensor has an entry of its own for every sample.
        sums = [d + 1 for d in range(ndim) if padded[d] == 1 and g.shape[d + 1] != 1]
        g = (g.sum(sums, keepdim=True) if sums else g).reshape(g.shape[0], 1, *shape)
        own = torch.arange(batch.size, device=g.device).unsqueeze(1) == batch.sample_ids(g.device)
        at = batch.dim - (ndim - len(shape))
        own = own.reshape(batch.size, *(-1 if d == at else 1 for d in range(len(shape))))
        return Dense(g * own.to(g.dtype))
    g = batch.split(g, 1)
    rest = [padded[d] for d in range(ndim) if d != batch.dim]
    sums = [2] + [3 + j for j, size in enumerate(rest) if size == 1]
    return Dense(g.sum(sums).reshape(*g.shape[:2], *shape))


@op_rule(Tensor.__setitem__)
def setitem(batch: SampleAxis, target: Tensor, index: Any, values: Any) -> ParameterForms | None:
    """``target[index] = values``."""
    whole = target.shape
    count = torch.arange(target.numel(), device=target.device).reshape(whole)
    # The index may be another when it is asked for.
    places = count[index]

    def kept(g: Tensor) -> Form:
        """The target, where nothing was written."""
        g = g.flatten(1).index_fill(1, places.reshape(-1), 0).reshape(g.shape)
        return reduce_to(batch, g, whole)

    if not isinstance(values, Tensor):
        return [(target, kept)]
    shape = values.shape

    def form(g: Tensor) -> Form:
        g = g.flatten(1)[:, places]
        samples = owners_of(batch, whole, g.device).reshape(-1)[places]
        axis = axis_of(samples, batch.size)
        inner = shape[max(len(shape) - places.dim(), 0) :]
        if axis is not None:
            return Dense(reduce_to(axis, g, inner).values.reshape(len(g), batch.size, *shape))
        mine = torch.arange(batch.size, device=g.device).reshape(-1, *[1] * samples.dim()) == samples
        each = g.unsqueeze(1) * mine
        for _ in range(places.dim() - len(inner)):
            each = each.sum(2)
        each = each.sum_to_size(*each.shape[:2], *inner)
        return Dense(each.reshape(*each.shape[:2], *shape))

    return [(target, kept), (values, form)]


def _scaled(g: Tensor, alpha: Any) -> Tensor:
    return g if alpha == 1 else alpha * g


def _added(batch: SampleAxis, x: Any, scale: Any) -> ParameterForms:
    if not isinstance(x, Tensor):
        return []
    shape = x.shape
    return [(x, lambda g: reduce_to(batch, _scaled(g, scale), shape))]


@op_rule(torch.add, Tensor.add, Tensor.__radd__)
def add(batch: SampleAxis, input: Any, other: Any, *, alpha: Any = 1) -> ParameterForms | None:
    return _added(batch, input, 1) + _added(batch, other, alpha)


@op_rule(torch.sub, Tensor.sub)
def sub(batch: SampleAxis, input: Any, other: Any, *, alpha: Any = 1) -> ParameterForms | None:
    return _added(batch, input, 1) + _added(batch, other, -alpha)


@op_rule(torch.mul, Tensor.mul, torch.multiply, Tensor.multiply, Tensor.__rmul__)
def mul(batch: SampleAxis, input: Any, other: Any) -> ParameterForms | None:
    source, factor = (other, input) if sample_axis_of(input) is not None else (input, other)
    if not isinstance(source, Tensor):
        return []
    shape = source.shape
    return [(source, lambda g: reduce_to(batch, g * factor, shape))]
