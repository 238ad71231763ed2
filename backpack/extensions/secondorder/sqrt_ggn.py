"""Square roots of the generalized Gauss-Newton matrix."""

from backpack.quantities.square_root import SqrtGGNExact, SqrtGGNMC

__all__ = ["SqrtGGNExact", "SqrtGGNMC"]
