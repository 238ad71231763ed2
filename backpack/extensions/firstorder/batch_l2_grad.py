"""The original's place of :class:`BatchL2Grad`."""

from backpack.quantities.first_order import BatchL2Grad

__all__ = ["BatchL2Grad"]
