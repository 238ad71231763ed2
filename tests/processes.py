"""Several processes of one machine, joined by gloo, that run one function."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

# What takes long to import is imported once, by the process that the others are forked from.
multiprocessing.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "numpy"]
)


def spawn(function: Callable[[int, int], Any], size: int, folder: Path) -> list[Any]:
    """What ``function(rank, size)`` gives in each of ``size`` processes.

    Forked from a server they end without the interpreter's finalization, in which threads of
    gloo that outlive ``destroy_process_group`` may abort the process.
    """
    multiprocessing.start_processes(
        _process, (function, size, str(folder)), nprocs=size, start_method="forkserver"
    )
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(size)]


def _process(rank: int, function: Callable[[int, int], Any], size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=180)
    )
    try:
        torch.save(function(rank, size), f"{folder}/{rank}")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
