"""The original's place of :class:`Variance`."""

from backpack.quantities import Variance

__all__ = ["Variance"]
