"""Products in Einstein notation, of data with a weight of any number of axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backpack.forms.base import Dense, Form
from backpack.forms.layout import Layout
from backpack.forms.outer import Outer
from backpack.forms.several import Pullback
from backpack.rules.base import ParameterForms, op_rule, positions
from backpack.samples.axis import SampleAxis, sample_axis_of
from backpack.samples.contractions import einsum_labels


@op_rule(torch.einsum)
def einsum(batch: SampleAxis, equation: Any, *operands: Any) -> ParameterForms | None:
    """Of two factors, one of them without samples.

    Labels of the weight that the result has are outputs, those it shares with the data and that are
    summed are inputs, those that all three have number groups; the data's other labels are positions.
    """
    factors = operands[0] if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
    if not isinstance(equation, str) or len(factors) != 2 or batch.bare or batch.lost:
        return None
    data = [sample_axis_of(t) is not None for t in factors]
    if sum(data) != 1:
        return None
    terms, result = einsum_labels(equation, [t.dim() for t in factors])
    weight, x = factors if data[1] else (factors[1], factors[0])
    own, theirs = terms if data[1] else (terms[1], terms[0])
    found = _Labels.of(own, theirs, result, batch)
    sizes: dict[Any, int] = {}
    for tensor, labels in ((weight, own), (x, theirs)):
        for label, size in zip(labels, tensor.shape, strict=True):
            if sizes.setdefault(label, size) != size:  # broadcast
                return None
    return None if found is None else [(weight, lambda g: found.form(g, x, weight.shape, sizes))]


class _Labels:
    """The labels of a product of data with a weight, by what they do.

    Attributes:
        batch: the result's sample axis.
        own: the weight's, ``theirs`` the data's and ``result`` the result's.
        groups: that all three have.
        outputs: of the weight and the result.
        inputs: of the weight and the data.
        positions: the data's others, without the samples.
    """

    def __init__(self, own: list[Any], theirs: list[Any], result: list[Any], batch: SampleAxis) -> None:
        self.batch, self.own, self.theirs, self.result = batch, own, theirs, result
        self.sample = result[batch.dim]
        self.groups = [c for c in own if c in theirs and c in result]
        self.outputs = [c for c in own if c not in theirs]
        self.inputs = [c for c in own if c in theirs and c not in result]
        self.positions = [c for c in theirs if c not in own and c != self.sample]

    @staticmethod
    def of(own: list[Any], theirs: list[Any], result: list[Any], batch: SampleAxis) -> _Labels | None:
        """``None`` where it is no such product."""
        repeats = any(len(set(labels)) < len(labels) for labels in (own, theirs, result))
        if repeats or batch.dim >= len(result):
            return None
        labels = _Labels(own, theirs, result, batch)
        summed = any(c not in theirs and c not in result for c in own)
        apart = labels.sample in theirs and labels.sample not in own
        return labels if apart and not summed else None

    def form(self, g: Tensor, x: Tensor, shape: torch.Size, sizes: dict[Any, int]) -> Form:
        """The form of the weight for columns ``g``."""
        a = self._arranged(x, self.theirs, self.inputs, sizes)
        columns = self._arranged(g, self.result, self.outputs, sizes, 1)
        order = [*self.groups, *self.outputs, *self.inputs]
        counts = positions(self.batch, a.shape[2])
        if not self.inputs:
            values = (columns * a).sum(3).reshape(*columns.shape[:2], *(sizes[c] for c in order))
            return Dense(_permuted(values, order, self.own))
        if self.own == order:
            return Outer(a, columns, Layout(shape), counts)
        if self.own == [*self.inputs, *self.outputs]:
            return Outer(a, columns, Layout(shape, "in_out"), counts)
        plain = Outer(a, columns, Layout(torch.Size(sizes[c] for c in order)), counts)
        return Pullback(plain, lambda m: _permuted(m, order, self.own), shape)

    def _arranged(
        self, x: Tensor, labels: list[Any], last: list[Any], sizes: dict[Any, int], lead: int = 0
    ) -> Tensor:
        """``[*lead, N, groups, positions, last]``; what ``x`` does not depend on is repeated."""
        wanted = [self.sample, *self.groups, *self.positions, *last]
        absent = [c for c in wanted if c not in labels]
        x = x.reshape(*x.shape, *(1 for _ in absent)) if absent else x
        places = [*labels, *absent]
        x = x.permute(*range(lead), *(lead + places.index(c) for c in wanted))
        x = x.expand(*x.shape[: lead + 1], *(sizes.get(c, -1) for c in wanted[1:]))
        x = x.reshape(
            *x.shape[: lead + 1], *(_size(sizes, part) for part in (self.groups, self.positions, last))
        )
        batch = self.batch.moved(0)
        if batch.plain:
            return x
        return batch.split(x, lead).transpose(lead + 1, lead + 2).flatten(lead + 2, lead + 3)


def _size(sizes: dict[Any, int], labels: Sequence[Any]) -> int:
    size = 1
    for label in labels:
        size *= sizes[label]
    return size


def _permuted(x: Tensor, labels: list[Any], wanted: list[Any]) -> Tensor:
    """Axes at the end of ``x``, in another order."""
    lead = x.dim() - len(labels)
    return x.permute(*range(lead), *(lead + labels.index(c) for c in wanted))
