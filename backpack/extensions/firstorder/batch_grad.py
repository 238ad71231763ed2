"""The original's place of :class:`BatchGrad`."""

from backpack.quantities.first_order import BatchGrad

__all__ = ["BatchGrad"]
