"""Products with blocks of curvature matrices."""

from backpack.quantities import GGNMP, HMP, PCHMP

__all__ = ["GGNMP", "HMP", "PCHMP"]
