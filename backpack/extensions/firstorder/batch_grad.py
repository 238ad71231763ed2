"""The original's place of :class:`BatchGrad`."""

from backpack.quantities import BatchGrad

__all__ = ["BatchGrad"]
