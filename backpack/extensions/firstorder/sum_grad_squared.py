"""The original's place of :class:`SumGradSquared`."""

from backpack.quantities.first_order import SumGradSquared

__all__ = ["SumGradSquared"]
