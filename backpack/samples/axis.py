"""Where the samples sit: the sample axis of a tensor.

Letters: ``N`` samples, ``k`` rows per sample where a sample axis holds several (flattened time
steps, patches, heads).

Every tensor that depends on the data carries a :class:`SampleAxis`. Most operations leave the axis
where it is; those that move, merge, drop or mix it are listed in ``movers.py``, ``indexing.py``,
``reductions.py``, ``contractions.py`` and ``writes.py``, those that act on each entry by itself in
``propagate.py``. All others are tried out (``separability.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from backpack._ambient import ambient

MARK = "_backpack_batch"


class Rows:
    """Which sample each row belongs to, where rows were picked by an index."""

    def __init__(self, samples: Tensor, size: int, only: int | None = None) -> None:
        self.samples = samples
        self._slots: Tensor | None = None
        if only is not None:
            self.width = len(samples)
            self.only: int | None = only if len(samples) else None
            return
        order = samples.argsort(stable=True)
        counts = torch.bincount(samples, minlength=size)
        starts = counts.cumsum(0) - counts
        slots = torch.empty_like(samples)
        slots[order] = torch.arange(len(samples), device=samples.device) - starts[samples[order]]
        self._slots = slots
        self.width = int(counts.max()) if len(samples) else 0
        # The sample that all rows belong to, if they belong to one.
        self.only = int(samples[0]) if 0 < self.width == len(samples) else None

    @property
    def slots(self) -> Tensor:
        """The number of each row among those of its sample."""
        if self._slots is None:  # all belong to one: nothing is kept, for there may be many of these
            return torch.arange(len(self.samples), device=self.samples.device)
        return self._slots

    @property
    def nbytes(self) -> int:
        """What it keeps."""
        return 0 if self._slots is None else self.samples.nbytes + self._slots.nbytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and torch.equal(self.samples, other.samples)

    def __hash__(self) -> int:
        return hash(len(self.samples))


# How tentative the axis of a tensor is that a factory function has made.
MADE = 2


@dataclass(frozen=True, slots=True)
class SampleAxis:
    """The sample axis of one tensor.

    Axis ``dim`` has ``outer * size * inner`` entries, samples in the middle: ``inner > 1`` after
    ``[N, T, d] -> [N * T, d]``, ``outer > 1`` after ``[T, N, d] -> [T * N, d]``.

    Attributes:
        size: number of samples ``N``.
        dim: axis that holds them.
        outer: slower-varying factor flattened into that axis.
        inner: faster-varying factor flattened into that axis.
        tentative: the axis is inferred from a matching size: 1 for a second input, 2 (``MADE``) for a
            tensor made by a factory function. It gives way when it disagrees with one that is certain,
            or less tentative.
        lost: why the axis is no longer known, if it is not.
        picked: which sample each entry belongs to, where they follow no pattern (entries picked by an
            index, experts that see some tokens of each sample).
        bare: the tensor is a number, which has no axes; it belongs to the one picked sample.
        length: number of entries of the axis.
    """

    size: int
    dim: int = 0
    outer: int = 1
    inner: int = 1
    tentative: int = 0
    lost: str | None = None
    picked: Rows | None = None
    bare: bool = False
    length: int = field(init=False, compare=False, default=0)

    def __post_init__(self) -> None:
        regular = self.outer * self.size * self.inner
        length = regular if self.picked is None else len(self.picked.samples)
        object.__setattr__(self, "length", length)

    @property
    def width(self) -> int:
        """Number ``k`` of entries per sample (the largest, where they differ)."""
        return self.outer * self.inner if self.picked is None else self.picked.width

    @property
    def plain(self) -> bool:
        """Whether there is one entry for each sample, in order."""
        return self.picked is None and self.outer == self.inner == 1

    @property
    def solo(self) -> int | None:
        """The sample that the whole tensor belongs to, if it belongs to one."""
        return None if self.picked is None else self.picked.only

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of that shape can have this sample axis."""
        if self.bare:
            return not shape
        return 0 <= self.dim < len(shape) and shape[self.dim] == self.length

    def moved(self, dim: int) -> SampleAxis:
        """The same axis at another place."""
        return self.placed(dim, self.outer, self.inner)

    def placed(self, dim: int, outer: int, inner: int) -> SampleAxis:
        """The same samples at another place or with other factors."""
        if dim == self.dim and outer == self.outer and inner == self.inner:
            return self
        if self.picked is None and self.lost is None:
            return regular_axis(self.size, dim, outer, inner, self.tentative)
        return SampleAxis(self.size, dim, outer, inner, self.tentative, self.lost, self.picked)

    def single(self) -> SampleAxis:
        """The axis of a tensor that belongs to one sample, in a batch of that sample alone."""
        if self.solo is None or self.size == 1:
            return self
        if self.bare:
            return solo_axis(0, 1, (), self.picked.samples.device)  # type: ignore[union-attr]
        return regular_axis(1, self.dim, 1, self.length)

    @property
    def counts(self) -> Tensor | None:
        """The number of entries of each sample, where they differ."""
        if self.picked is None or self.width * self.size == self.length:
            return None
        return torch.bincount(self.picked.samples, minlength=self.size)

    def taking(self, index: Tensor | slice, tensor: Tensor) -> SampleAxis:
        """The axis after some of its entries were picked."""
        return picked_axis(
            self.sample_ids(tensor.device)[index], self.size, self.dim, tentative=self.tentative
        )

    def alone(self, place: int, shape: Sequence[int], device: torch.device) -> SampleAxis:
        """The axis of a tensor made from one entry of this axis only."""
        if self.picked is None:
            place += self.length if place < 0 else 0
            sample = place // self.inner % self.size
        else:
            sample = int(self.picked.samples[place])
        return solo_axis(sample, self.size, shape, device, self.tentative)

    def agrees(self, other: SampleAxis) -> bool:
        """Whether two axes place the samples alike."""
        if self is other:
            return True
        if (self.size, self.dim, self.lost) != (other.size, other.dim, other.lost):
            return False
        if self.bare != other.bare:
            return False
        if self.picked is None and other.picked is None:
            return (self.outer, self.inner) == (other.outer, other.inner)
        picked = self.picked or other.picked
        assert picked is not None
        device = picked.samples.device
        return torch.equal(self.sample_ids(device), other.sample_ids(device))

    def among(self, start: int, size: int, device: torch.device) -> SampleAxis:
        """The same entries, where samples are counted from ``start``, of ``size`` altogether."""
        if self.lost:
            return SampleAxis(size, self.dim, self.outer, self.inner, self.tentative, self.lost)
        if self.size == 1 or self.solo is not None:
            length = None if self.bare else self.length
            return _solo_axis(start + (self.solo or 0), size, length, device, self.tentative, self.dim)
        rows = Rows(self.sample_ids(device) + start, size)
        return SampleAxis(size, self.dim, tentative=self.tentative, picked=rows, bare=self.bare)

    def certain(self) -> SampleAxis:
        """The same axis, no longer a guess."""
        return replace(self, tentative=False) if self.tentative else self

    def losing(self, why: str) -> SampleAxis:
        """The axis after an operation that leaves its place unknown."""
        return _lost_axis(self, why) if self.picked is None else replace(self, lost=why)

    def split(self, tensor: Tensor, lead: int = 0, copies: bool = False) -> Tensor:
        """Bring samples to the front: ``[*lead, *shape] -> [*lead, N, k, *rest]``.

        Samples with fewer than ``k`` entries are filled up with zeros, or with ``copies`` of an entry.
        """
        axis = lead + self.dim
        if self.picked is not None:
            tensor = (tensor.unsqueeze(lead) if self.bare else tensor).movedim(axis, 0)
            full = tensor.new_zeros(self.size, self.width, *tensor.shape[1:])
            full = tensor[:1].expand_as(full) if copies and len(tensor) else full
            full = full.index_put((self.picked.samples, self.picked.slots), tensor)
            return full.movedim((0, 1), (lead, lead + 1))
        if self.plain:
            return (tensor.movedim(axis, lead) if self.dim else tensor).unsqueeze(lead + 1)
        if self.dim == 0 and self.outer == 1:
            shape = tensor.shape
            return tensor.reshape(*shape[:lead], self.size, self.inner, *shape[lead + 1 :])
        tensor = tensor.unflatten(axis, (self.outer, self.size, self.inner))
        tensor = tensor.movedim((axis + 1, axis, axis + 2), (lead, lead + 1, lead + 2))
        return tensor.flatten(lead + 1, lead + 2)

    def join(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """Inverse of :meth:`split`."""
        axis = lead + self.dim
        if self.picked is not None:
            tensor = tensor.movedim((lead, lead + 1), (0, 1))
            tensor = tensor[self.picked.samples, self.picked.slots].movedim(0, axis)
            return tensor.squeeze(axis) if self.bare else tensor
        tensor = tensor.unflatten(lead + 1, (self.outer, self.inner))
        tensor = tensor.movedim((lead + 1, lead, lead + 2), (axis, axis + 1, axis + 2))
        return tensor.flatten(axis, axis + 2)

    def rows(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """All axes but the last become shared positions: ``[*lead, N, S, features]``."""
        regular = self.dim == 0 and self.outer == 1 and self.picked is None
        if regular and tensor.dim() > 1 + lead:
            positions = math.prod(tensor.shape[lead:-1]) // max(self.size, 1)
            return tensor.reshape(*tensor.shape[:lead], self.size, positions, tensor.shape[-1])
        split = self.split(tensor, lead)
        return split.flatten(lead + 1, -2) if split.dim() > lead + 2 else split.unsqueeze(-1)

    def sample_ids(self, device: torch.device) -> Tensor:
        """The sample each entry of the axis belongs to."""
        if self.picked is not None:
            return self.picked.samples
        ids = torch.arange(self.size, device=device)
        return ids.repeat_interleave(self.inner).repeat(self.outer)


def regular_axis(
    size: int, dim: int = 0, outer: int = 1, inner: int = 1, tentative: int = 0
) -> SampleAxis:
    """A sample axis in regular order; the same object for the same arguments."""
    return _regular_axis(size, dim, outer, inner, tentative)


@lru_cache(4096)
def _regular_axis(size: int, dim: int, outer: int, inner: int, tentative: int) -> SampleAxis:
    return SampleAxis(size, dim, outer, inner, tentative)


def picked_axis(samples: Tensor, size: int, dim: int = 0, tentative: int = 0) -> SampleAxis:
    """The axis whose entries belong to these samples: regular, if they come in regular order."""
    axis = _regular(samples, size, dim)
    if axis is None:
        return SampleAxis(size, dim, tentative=tentative, picked=Rows(samples, size))
    return replace(axis, tentative=tentative) if tentative else axis


def solo_axis(
    sample: int,
    size: int,
    shape: Sequence[int],
    device: torch.device,
    tentative: int = 0,
    dim: int = 0,
) -> SampleAxis:
    """The axis of a tensor of that shape that belongs to one sample."""
    if size == 1 and shape:
        return regular_axis(1, dim, 1, shape[dim], tentative)
    return _solo_axis(sample, size, shape[dim] if shape else None, device, tentative, dim)


@lru_cache(4096)
def _solo_axis(
    sample: int, size: int, length: int | None, device: torch.device, tentative: int, dim: int
) -> SampleAxis:
    rows = _one_sample(sample, 1 if length is None else length, size, device)
    return SampleAxis(size, dim, tentative=tentative, picked=rows, bare=length is None)


@lru_cache(4096)
def _one_sample(sample: int, length: int, size: int, device: torch.device) -> Rows:
    return Rows(torch.full((1,), sample, device=device).expand(length), size, sample)


@lru_cache(4096)
def _lost_axis(batch: SampleAxis, why: str) -> SampleAxis:
    return replace(batch, lost=why)


NOBODY = -1


def owners_of(axis: SampleAxis, shape: Sequence[int], device: torch.device) -> Tensor:
    """The sample that each entry of a tensor of that shape belongs to (a view)."""
    ids = axis.sample_ids(device)
    return ids.reshape([-1 if d == axis.dim else 1 for d in range(len(shape))]).expand(tuple(shape))


def axis_of(owners: Tensor, size: int) -> SampleAxis | None:
    """The sample axis of a tensor, from the sample that each of its entries belongs to.

    Args:
        owners: samples, of the tensor's shape; ``NOBODY`` for entries that may be anybody's.
        size: number of samples ``N``.

    Returns:
        ``None`` if entries at one place of every axis belong to different samples, or a place of the
        axis belongs to nobody and the others follow no regular order.
    """
    found = None
    for dim in range(owners.dim() if owners.numel() else 0):
        rows = owners.movedim(dim, 0).reshape(owners.shape[dim], -1).amax(1)
        along = rows.reshape([-1 if d == dim else 1 for d in range(owners.dim())])
        if not bool(((owners == along) | (owners == NOBODY)).all()):
            continue
        axis = _regular(rows, size, dim)
        if axis is not None:
            return axis
        if found is None and not bool((rows == NOBODY).any()):
            found = SampleAxis(size, dim, picked=Rows(rows, size))
    return found


def _regular(rows: Tensor, size: int, dim: int) -> SampleAxis | None:
    """The axis on which samples come in regular order, if they do."""
    length = len(rows)
    if not size or length % size:
        return None
    known = rows != NOBODY
    for inner in range(1, length // size + 1):
        outer, rest = divmod(length, size * inner)
        if not rest:
            axis = regular_axis(size, dim, outer, inner)
            if bool(((axis.sample_ids(rows.device) == rows) | ~known).all()):
                return axis
    return None


class Memory(Protocol):
    """What is known of memory that was written through one of several tensors (``aliases.py``)."""

    def axis(self, tensor: Tensor) -> SampleAxis | None:
        """The sample axis of a tensor that looks at this memory."""


def memory_of(tensor: Tensor) -> tuple[int, bool] | None:
    """The key of ``ambient.written``; ``None`` for tensors that are not laid out in memory."""
    if tensor.layout != torch.strided:
        return None
    return tensor.untyped_storage()._cdata, tensor.requires_grad


def sample_axis_of(tensor: Tensor) -> SampleAxis | None:
    """The sample axis of ``tensor``; ``None`` if it does not depend on the data."""
    if ambient.written and not (tensor.is_leaf and tensor.requires_grad):
        memory = ambient.written.get(memory_of(tensor))  # type: ignore[arg-type]
        if memory is not None:
            return memory.axis(tensor)
    return noted(tensor)


def noted(tensor: Tensor) -> SampleAxis | None:
    """What is noted for the tensor itself, whatever was written to its memory later."""
    batch = getattr(tensor, MARK, None)
    return ambient.axes.get(id(tensor)) if batch is None else batch


def mark(tensor: Tensor, batch: SampleAxis) -> None:
    """Note the sample axis on the tensor object itself, so that nothing is kept alive."""
    if id(tensor) in ambient.ids and not hasattr(tensor, MARK):
        ambient.axes[id(tensor)] = batch
    else:
        setattr(tensor, MARK, batch)
