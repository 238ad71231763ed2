"""The original's place of :class:`BatchL2Grad`."""

from backpack.quantities import BatchL2Grad

__all__ = ["BatchL2Grad"]
