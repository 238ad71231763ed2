"""Tensors that share memory share their samples: what is known of memory written through a view.

A sample axis is noted on a tensor, and its views get theirs from it. A write that puts the entries of
one sample where those of another were changes what all tensors of the same memory hold. From then on,
and until the forward pass ends, the sample that each entry of that memory belongs to is kept here, and
read by all of them; what is noted on the tensors themselves no longer counts.

Autograd sees no writes to what does not require grad (``detach``, ``data``, ``no_grad``): for tensors
that do, rows are still where they were. So memory is known twice, once for either kind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from backpack._ambient import ambient
from backpack._torch import storage_users
from backpack.samples.axis import MADE, NOBODY, SampleAxis, axis_of, mark, memory_of, noted, owners_of

# The owner of entries in which samples are mixed.
_MIXED = NOBODY - 1
_WHY = "an in-place operation through a view wrote other samples' rows"


class Written:
    """The sample that each entry of a piece of memory belongs to.

    Args:
        tensor: one of those that look at it.
        size: number of samples.
    """

    def __init__(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        # While this is held the address belongs to no other memory; the memory itself may go.
        self.storage = StorageWeakRef(storage)
        self.itemsize = tensor.element_size()
        self.size = size
        self.why = _WHY
        self.certain = False
        self.owners = torch.full(
            (storage.nbytes() // self.itemsize,), NOBODY, dtype=torch.int64, device=tensor.device
        )
        self.known: dict[tuple[Any, ...], SampleAxis | None] = {}

    def seen(self, tensor: Tensor) -> Tensor:
        """The part that a tensor looks at, in its shape."""
        return self.owners.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def axis(self, tensor: Tensor) -> SampleAxis | None:
        """The sample axis of a tensor that looks at this memory."""
        if tensor.element_size() != self.itemsize:
            return SampleAxis(self.size, lost="other numbers were made of the same memory")
        key = (tensor.shape, tensor.stride(), tensor.storage_offset())
        if key not in self.known:
            self.known[key] = self._find(self.seen(tensor))
        found = self.known[key]
        if found is None:  # nobody's: what it was made like may still be known
            found = noted(tensor)
            return None if found is not None and found.lost else found
        return found

    def _find(self, owners: Tensor) -> SampleAxis | None:
        if not owners.numel() or bool((owners == NOBODY).all()):
            return None
        mixed = bool((owners == _MIXED).any())
        found = None if mixed else axis_of(owners if owners.dim() else owners[None], self.size)
        if found is None:
            found = SampleAxis(self.size, lost=self.why)
        return found if self.certain else replace(found, tentative=True)

    def write(self, tensor: Tensor, axis: SampleAxis) -> None:
        """Entries of ``tensor`` belong to these samples from now on."""
        if tensor.element_size() != self.itemsize:
            self.owners.fill_(_MIXED)
        elif axis.lost:
            self.seen(tensor).fill_(_MIXED)
            self.why = axis.lost
        else:
            self.seen(tensor).copy_(owners_of(axis, tensor.shape, self.owners.device))
        self.certain |= not axis.tentative
        self.known.clear()


def wrote(tensor: Tensor, before: SampleAxis | None, after: SampleAxis, shared: bool) -> None:
    """An operation in place has left ``tensor`` with other samples, perhaps: all aliases learn it.

    Args:
        tensor: what was written to.
        before: its sample axis before.
        after: its sample axis now.
        shared: whether others looked at the same memory before.
    """
    key = memory_of(tensor)
    memory = None if key is None else ambient.written.get(key)
    if memory is None and (key is None or not shared or _same(before, after)):
        mark(tensor, after)
        return
    assert key is not None
    if memory is None:
        memory = _begun(tensor, before, after.size)
        ambient.written = {**ambient.written, key: memory}
    assert isinstance(memory, Written)
    memory.write(tensor, after)
    mark(tensor, after)


def _same(before: SampleAxis | None, after: SampleAxis) -> bool:
    return before is not None and not before.lost and before.agrees(after)


def is_shared(tensor: Tensor) -> bool:
    """Whether other tensors may look at the same memory."""
    if tensor._base is not None:
        return True
    if tensor.layout != torch.strided:
        return False
    # One count is the tensor's, one that of the object asked for here.
    return storage_users(tensor) > 2


def _begun(tensor: Tensor, before: SampleAxis | None, size: int) -> Written:
    """What was known before the first write, from the marks of a tensor and of what it is a view of."""
    address, requires_grad = memory_of(tensor)  # type: ignore[misc]
    memory = Written(tensor, size)
    constant = ambient.written.get((address, False)) if requires_grad else None
    if isinstance(constant, Written):  # no more than values so far
        memory.owners.copy_(constant.owners)
        memory.certain = constant.certain
        return memory
    base = tensor._base
    for each, axis in ((tensor, before), (base, None if base is None else noted(base))):
        # What was made by a factory belongs to nobody.
        if (
            each is not None
            and axis is not None
            and axis.tentative < MADE
            and each.layout == torch.strided
        ):
            memory.write(each, axis)
    return memory


def through_base(tensor: Tensor) -> SampleAxis | None:
    """The axis of a view that no operation that was seen has made, from what it is a view of."""
    base = tensor._base
    axis = None if base is None else noted(base)
    if base is None or axis is None or axis.tentative or base.layout != torch.strided:
        return None
    memory = Written(base, axis.size)
    memory.write(base, axis)
    return memory.axis(tensor)


def places_of(tensor: Tensor, base: Tensor) -> Tensor | None:
    """Where the entries of a view are among those of what it is a view of, in row-major order."""
    if base.layout != torch.strided or tensor.element_size() != base.element_size():
        return None
    size = base.untyped_storage().nbytes() // base.element_size()
    memory = torch.full((size,), NOBODY, device=base.device)
    count = torch.arange(base.numel(), device=base.device).reshape(base.shape)
    memory.as_strided(base.shape, base.stride(), base.storage_offset()).copy_(count)
    found = memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).clone()
    return None if bool((found == NOBODY).any()) else found
