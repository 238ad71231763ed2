"""Fresh memory for large results."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor

# From this size on, memory comes fresh from the system, page by page as it is written.
LARGE = 2**23


def fresh(like: Tensor, shape: Sequence[int]) -> Tensor:
    """``like.new_empty(shape)``; on a CPU in huge pages where the system leaves that to programs.

    The first write to a page costs several times what writing it costs; a huge page (of 2 MB) stands
    for 512 of them. ``BACKPACK_HUGE_PAGES=0`` in the environment switches it off.
    """
    memory = like.new_empty(shape)
    if memory.device.type == "cpu" and memory.nbytes >= LARGE and (advise := _advise()):
        first = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # Only advice: where it is not taken, pages are small.
        advise(first, memory.data_ptr() + memory.nbytes - first)
    return memory


def fresh_zeros(like: Tensor, shape: Sequence[int]) -> Tensor:
    """``like.new_zeros(shape)``, as :func:`fresh`."""
    return fresh(like, shape).zero_()


@cache
def _advise() -> Callable[[int, int], object] | None:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or os.environ.get("BACKPACK_HUGE_PAGES") == "0":
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is None:
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda start, length: function(start, length, advice)
