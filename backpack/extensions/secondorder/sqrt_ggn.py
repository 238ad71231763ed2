"""Square roots of the generalized Gauss-Newton matrix."""

from backpack.quantities import SqrtGGNExact, SqrtGGNMC

__all__ = ["SqrtGGNExact", "SqrtGGNMC"]
