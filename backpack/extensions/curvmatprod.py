"""Products with blocks of curvature matrices."""

from backpack.quantities.matrix_products import GGNMP, HMP, PCHMP

__all__ = ["GGNMP", "HMP", "PCHMP"]
