"""The original's place of :class:`Variance`."""

from backpack.quantities.first_order import Variance

__all__ = ["Variance"]
