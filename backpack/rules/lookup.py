"""Lookups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.forms.base import Form
from backpack.forms.lookup import Lookup
from backpack.rules.base import ParameterForms, op_rule, positions
from backpack.samples.axis import SampleAxis, picked_axis, sample_axis_of


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
) -> ParameterForms | None:
    at = sample_axis_of(input)
    if at is None or at.lost:
        return None
    at = at.single() if batch.size == 1 else at

    def form(g: Tensor) -> Form:
        if scale_grad_by_freq:
            counts = torch.bincount(input.flatten(), minlength=weight.shape[0])[input]
            g = g / counts.clamp(min=1).unsqueeze(-1)
        return _looked_up(at, batch, input, g, weight.shape, padding_idx)

    return [(weight, form)]


@op_rule(F.embedding_bag)
def embedding_bag(
    batch: SampleAxis,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> ParameterForms | None:
    """Sums and means of rows: each position of a bag is a lookup."""
    if mode == "max" or batch.dim != 0 or batch.bare:
        return None
    if per_sample_weights is not None and per_sample_weights.requires_grad:
        return None

    def form(g: Tensor) -> Form:
        bags, index = _bags(input, offsets, g.shape[1]), input.flatten()
        share = g.new_ones(index.shape)
        padding = None if padding_idx is None else index == padding_idx % weight.shape[0]
        if padding is not None:
            share = share.masked_fill(padding, 0)
        if mode == "mean":
            sizes = g.new_zeros(g.shape[1]).index_add(0, bags, share)
            share = share / sizes.clamp(min=1)[bags]
        if per_sample_weights is not None:
            share = share * per_sample_weights.flatten()
        if scale_grad_by_freq:
            share = share / torch.bincount(index, minlength=weight.shape[0]).clamp(min=1)[index]
        at = picked_axis(batch.sample_ids(g.device)[bags], batch.size)
        rows = g[:, bags] * share.unsqueeze(1)
        if padding is not None:  # a row that is not finite, too
            rows = rows.masked_fill(padding.unsqueeze(1), 0)
        return _looked_up(at, at, index, rows, weight.shape)

    return [(weight, form)]


def _bags(input: Tensor, offsets: Tensor | None, count: int) -> Tensor:
    """The bag that each position is in."""
    if offsets is None:
        return torch.arange(count, device=input.device).repeat_interleave(input.shape[1])
    places = torch.arange(len(input), device=input.device)
    return torch.searchsorted(offsets[:count].to(places), places, right=True) - 1


def _looked_up(
    at: SampleAxis,
    batch: SampleAxis,
    index: Tensor,
    g: Tensor,
    shape: torch.Size,
    padding_idx: int | None = None,
) -> Lookup:
    """The form of lookups ``index`` with sample axis ``at``, from columns ``g`` with axis ``batch``."""
    rows = at.split(index).flatten(1)
    # Rows that fill up are read by nobody; a padding row is a constant.
    there = None if at.counts is None else at.split(torch.ones_like(index)).flatten(1) > 0
    if padding_idx is not None:
        others = rows != padding_idx % shape[0]
        there = others if there is None else others & there
    return Lookup(rows, batch.rows(g, 1), shape, there, positions(at, rows.shape[1]))
