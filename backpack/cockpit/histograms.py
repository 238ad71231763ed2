"""Counts of the entries of individual gradients, alone or against the values of parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backpack.own import Form


def symlog_edges(largest: int = 2, smallest: int = -12) -> list[float]:
    """Bins that need no range: one for each power of ten on both sides, one around zero.

    Example:
        >>> symlog_edges(0, -1)
        [-inf, -1.0, -0.1, 0.1, 1.0, inf]
    """
    powers = [float(f"1e{k}") for k in range(smallest, largest + 1)]
    return [-float("inf"), *(-x for x in reversed(powers)), *powers, float("inf")]


@dataclass(eq=False)
class Counts:
    """How entries of ``scale * G_n`` are counted.

    Attributes:
        edges: of the bins, increasing; the outer ones may be infinite.
        values: edges of the parameters' values, for counts in two dimensions.
        scale: what entries are multiplied with, besides the number of samples.
        samples: that number; by default that of the form.
        entries: how many entries are looked at for each parameter, those of the first samples.
    """

    edges: Tensor
    values: Tensor | None = None
    scale: float = 1.0
    samples: int | None = None
    entries: int | None = None

    def of(self, form: Form, parameter: Tensor) -> Tensor:
        """Counts ``[bins]``, or ``[bins, bins of values]``."""
        scale = self.scale * (form.samples if self.samples is None else self.samples)
        if self.entries is not None and self.entries < form.samples * parameter.numel():
            form = form.take(slice(None), slice(0, max(1, self.entries // max(parameter.numel(), 1))))
        edges = (self.edges / scale).to(form.like)
        if self.values is None:
            return form.histogram(edges)
        rows = torch.bucketize(parameter.flatten(), self.values.to(parameter), right=True) - 1
        return _joint(form, edges, rows.clamp(0, len(self.values) - 2), len(self.values) - 1)


def _joint(form: Form, edges: Tensor, rows: Tensor, count: int) -> Tensor:
    """Counts of gradient entries in bins, for each bin of the parameter's value."""
    bins = len(edges) - 1
    total = torch.zeros(bins * count, dtype=torch.long, device=edges.device)
    for _, _, g in form.blocks():
        flat = g.reshape(-1, len(rows))
        at = (torch.bucketize(flat, edges, right=True) - 1).clamp(0, bins - 1)
        total += torch.bincount((at * count + rows).flatten(), minlength=len(total))
    return total.reshape(bins, count)
