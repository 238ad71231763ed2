"""The original's place of :class:`SumGradSquared`."""

from backpack.quantities import SumGradSquared

__all__ = ["SumGradSquared"]
