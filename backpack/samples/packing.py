"""Packed sequences: the first steps of all sequences, then the second steps of those that have one, ...

Letters: ``B`` sequences, the longest first, of ``T`` steps at most. ``sizes [T]`` says how many of them
have so many steps. Packed data has a row for each step, ``[sizes.sum(), *]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from backpack.samples.axis import SampleAxis, picked_axis, regular_axis
from backpack.samples.entries import moves_entries
from backpack.samples.movers import mover


class Steps(NamedTuple):
    """Where the rows of packed data are in a padded batch.

    Attributes:
        sequence: the sequence of each row.
        step: which of its steps it is.
        lengths: the length of each sequence, ``[B]``.
    """

    sequence: Tensor
    step: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, sizes: Tensor, device: torch.device) -> Steps:
        """From the numbers of sequences that are that long."""
        sizes = sizes.to("cpu").long()
        longest = int(sizes[0]) if len(sizes) else 0
        sequence = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        step = torch.arange(len(sizes)).repeat_interleave(sizes)
        lengths = torch.bincount(sequence, minlength=longest)
        return cls(*(each.to(device) for each in (sequence, step, lengths)))

    def pad(self, rows: Tensor, lead: int = 0) -> Tensor:
        """``[*lead, rows, f] -> [*lead, B, T, f]``, filled up with zeros."""
        rows = rows.movedim(lead, 0)
        steps = int(self.lengths.max()) if len(self.lengths) else 0
        full = rows.new_zeros(len(self.lengths), steps, *rows.shape[1:])
        return full.index_put((self.sequence, self.step), rows).movedim((0, 1), (lead, lead + 1))

    def pack(self, full: Tensor, lead: int = 0) -> Tensor:
        """``[*lead, B, T, f] -> [*lead, rows, f]``."""
        return full.movedim((lead, lead + 1), (0, 1))[self.sequence, self.step].movedim(0, lead)

    def at_ends(self, last: Tensor) -> Tensor:
        """``[v, B, f] -> [v, B, T, f]``: what belongs to each last step, and zeros before."""
        steps = int(self.lengths.max()) if len(self.lengths) else 0
        full = last.new_zeros(last.shape[1], steps, len(last), last.shape[2])
        ends = torch.arange(last.shape[1], device=last.device), self.lengths - 1
        return full.index_put(ends, last.transpose(0, 1)).movedim(2, 0)

    def reversed(self) -> Tensor:
        """The row with which each row changes places if sequences are read from their ends."""
        rows = torch.arange(len(self.step), device=self.step.device)
        place = self.pad(rows.unsqueeze(1))[..., 0]
        return place[self.sequence, self.lengths[self.sequence] - 1 - self.step]


def axis_of_packed(batch: SampleAxis, sizes: Tensor, device: torch.device) -> SampleAxis:
    """The axis of packed data, from one that has a place for each sequence, the longest first."""
    if batch.lost:
        return batch
    if batch.size == 1:
        return regular_axis(1, 0, 1, int(sizes.sum()), batch.tentative)
    ids = batch.sample_ids(device)[Steps.of(sizes, device).sequence]
    return picked_axis(ids, batch.size, tentative=batch.tentative)


def axis_of_sequences(
    batch: SampleAxis, sizes: Tensor, device: torch.device, dim: int = 1
) -> SampleAxis:
    """The axis that has a place for each sequence, the longest first, from that of packed data."""
    if batch.lost:
        return batch
    longest = int(sizes[0]) if len(sizes) else 0
    if batch.size == 1:
        return regular_axis(1, dim, 1, longest, batch.tentative)
    if batch.dim:
        return batch.losing("packed steps that are not on the first axis")
    ids, steps = batch.sample_ids(device), Steps.of(sizes, device)
    if len(ids) != len(steps.step) or not torch.equal(ids, ids[:longest][steps.sequence]):
        return batch.losing(
            "packed steps of one sequence that belong to several samples (see batch_first)"
        )
    return picked_axis(ids[:longest], batch.size, dim, batch.tentative)


@mover("_pack_padded_sequence")
def _pack(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    """Left to the samples of the entries."""
    return batch.losing("sequences packed along the sample axis (see batch_first)")


@mover("_pad_packed_sequence")
def _pad(
    batch: SampleAxis, old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SampleAxis:
    return batch.losing("packed steps of one sequence that belong to several samples (see batch_first)")


moves_entries("_pack_padded_sequence", index=(1, "lengths"))
moves_entries("_pad_packed_sequence", index=(1, "batch_sizes"), fill=(3, "padding_value"))
