"""Lookups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.forms.base import Form
from backpack.forms.lookup import Lookup
from backpack.rules.base import Pairs, op_rule, positions
from backpack.samples.axis import SampleAxis, sample_axis_of


@op_rule(F.embedding)
def embedding(
    batch: SampleAxis,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Pairs | None:
    at = sample_axis_of(input)
    if at is None or at.lost:
        return None
    at = at.single() if batch.size == 1 else at

    def form(g: Tensor) -> Form:
        index, g = at.split(input).flatten(1), batch.rows(g, 1)
        if scale_grad_by_freq:
            counts = torch.bincount(input.flatten(), minlength=weight.shape[0])[index]
            g = g / counts.clamp(min=1).unsqueeze(-1)
        # Rows that fill up are read by nobody; a padding row is a constant.
        there = None if at.counts is None else at.split(torch.ones_like(input)).flatten(1) > 0
        if padding_idx is not None:
            others = index != padding_idx % weight.shape[0]
            there = others if there is None else others & there
        return Lookup(index, g, weight.shape, there, positions(at, index.shape[1]))

    return [(weight, form)]
