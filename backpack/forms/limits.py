"""How much memory a piece of work may take, by kind of device: what a new device needs to have set.

Figures for CPUs were measured (docs/costs.md); those for CUDA are larger, since there each call of a
kernel costs more than what is read again.
"""

from __future__ import annotations


class Limit(dict[str, int]):
    """Numbers by kind of device (``"cpu"``), with one for all that are not named.

    Example:
        >>> limit = Limit(2**20, cuda=2**28)
        >>> limit["cuda"] == 2**28, limit["xpu"] == 2**20
        (True, True)
    """

    def __init__(self, other: int, **devices: int) -> None:
        super().__init__(devices)
        self.other = other

    def __missing__(self, device: str) -> int:
        return self.other


# A block of individual gradients is squared and summed while it is in the processor's cache.
BLOCK_BYTES = Limit(2**20, cpu=2**20, cuda=2**28)

# So many bytes of a matrix are written out at a time, into memory that stays in the cache.
STRIP_BYTES = Limit(2**20, cpu=2**20, cuda=2**28)

# Patches written out for a product over all samples.
PATCH_BYTES = Limit(2**24, cpu=2**24, cuda=2**28)

# Rows of a form, and the patches they are made from, where each is written out to be used once.
TILE_BYTES = Limit(2**22, cpu=2**22, cuda=2**28)

# Patches that are kept while the columns of a loss are carried.
KEPT_BYTES = Limit(2**28, cpu=2**28, cuda=2**31)

# Columns that are carried through the graph at once.
COLUMN_BYTES = Limit(2**28, cpu=2**24, cuda=2**31)

# From so many positions on, adding up individual gradients takes less time than the product.
ADDED_FROM = Limit(32, cpu=8, cuda=32)
