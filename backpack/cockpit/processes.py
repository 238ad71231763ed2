"""Processes that train one model together: numbers are of the whole batch, by sums over all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from backpack.cockpit.passed import Group


class Distributed(Group):
    """The processes of a ``DistributedDataParallel`` model.

    The gradient is the mean over processes, each of which sees a part of the batch.

    Args:
        group: torch's process group.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size = torch.distributed.get_world_size(group)
        self.first = torch.distributed.get_rank(group) == 0

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total


def processes_of(model: nn.Module, together: bool = False) -> Group:
    """The processes that train a model; of a plain module this one alone.

    Args:
        model: the model.
        together: whether all processes of the default group train it, which a plain module does not
            tell.
    """
    group: Any = None
    if isinstance(model, nn.parallel.DistributedDataParallel):
        group = model.process_group
    elif not (together and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Group()
    found = Distributed(group)
    return found if found.size > 1 else Group()
