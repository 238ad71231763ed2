"""Several processes that work on parts of one batch, by ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

# Tensors are summed up together, up to so many bytes at a time.
BUCKET_BYTES = 2**25

# Shape and dtype of a tensor.
About = tuple[Any, torch.dtype]


class Processes:
    """A process group, and what is done with it. Every method must be called by all of its processes.

    Args:
        group: torch's process group.
        gather: whether values of single samples are gathered from all processes.

    Raises:
        RuntimeError: if ``torch.distributed`` is not set up.
    """

    def __init__(self, group: Any, gather: bool = True) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "process_group needs torch.distributed; call torch.distributed.init_process_group first"
            )
        self.group, self.gathers = group, gather
        self.size: int = distributed.get_world_size(group)
        self.rank: int = distributed.get_rank(group)
        if self.rank < 0:
            raise RuntimeError("this process is not in the process_group")

    def objects(self, mine: Any) -> list[Any]:
        """Small objects of all processes, in the order of their ranks."""
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, mine, group=self.group)
        return found

    def agree(self, error: Exception | None) -> None:
        """Go on if there is no error in any process.

        Raises:
            Exception: the process's own error, or a ``RuntimeError`` with that of another one.
        """
        told = self.objects(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, each in enumerate(told):
            if each is not None:
                raise RuntimeError(f"in process {rank} of the process_group: {each}")

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over processes, of as many tensors of the same shapes in each."""
        found: list[Tensor] = list(tensors)
        for places in _buckets(tensors):
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in places])
            distributed.all_reduce(flat, group=self.group)
            self._take(found, places, flat)
        return found

    def states(
        self, mine: Mapping[int, Mapping[str, Any]], device: torch.device | None
    ) -> list[dict[int, dict[str, Any]]]:
        """Tensors, lists of tensors and small objects by numbers and names, of each process."""
        flat: list[Tensor] = []

        def placed(value: Any) -> Any:
            if isinstance(value, Tensor):
                flat.append(value)
                return _Place(len(flat) - 1)
            return [placed(each) for each in value] if isinstance(value, (list, tuple)) else value

        plans = self.objects(
            ({i: {k: placed(v) for k, v in state.items()} for i, state in mine.items()}, _abouts(flat))
        )
        tensors = self.gather(flat, [about for _, about in plans], device or torch.device("cpu"))

        def filled(value: Any, given: Sequence[Tensor]) -> Any:
            if isinstance(value, _Place):
                return given[value.number]
            return [filled(each, given) for each in value] if isinstance(value, list) else value

        return [
            {i: {k: filled(v, given) for k, v in state.items()} for i, state in plan.items()}
            for (plan, _), given in zip(plans, tensors, strict=True)
        ]

    def gather(
        self, mine: Sequence[Tensor], about: Sequence[Sequence[About]], device: torch.device
    ) -> list[list[Tensor]]:
        """Tensors of each process, in any number and of any shapes.

        Args:
            mine: those of this process.
            about: what those of each process are.
            device: where they are.
        """
        found = []
        for rank, each in enumerate(about):
            tensors = (
                mine if rank == self.rank else [torch.empty(s, dtype=d, device=device) for s, d in each]
            )
            # Of the same layout in all, by which rounding errors may go.
            tensors = [tensor.detach().contiguous() for tensor in tensors]
            for places in _buckets(tensors):
                flat = torch.cat([tensors[i].reshape(-1) for i in places])
                distributed.broadcast(flat, group=self.group, group_src=rank)
                if rank != self.rank:
                    self._take(tensors, places, flat)
            found.append(tensors)
        return found

    def _take(self, tensors: list[Tensor], places: Sequence[int], flat: Tensor) -> None:
        parts = flat.split([tensors[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            part = part.reshape(tensors[i].shape)
            # Memory of its own, which is not held by the value of another parameter.
            tensors[i] = part if len(places) == 1 else part.clone()


class _Place(NamedTuple):
    number: int


def _abouts(tensors: Sequence[Tensor]) -> list[About]:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def _buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of tensors of one kind each, in groups of limited size; those without entries in none."""
    found: list[list[int]] = []
    last: dict[Any, tuple[list[int], int]] = {}
    for i, tensor in enumerate(tensors):
        if not tensor.numel():
            continue
        kind, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        bucket, full = last.get(kind, ([], BUCKET_BYTES))
        if full + size > BUCKET_BYTES:
            bucket, full = [], 0
            found.append(bucket)
        bucket.append(i)
        last[kind] = bucket, full + size
    return found
