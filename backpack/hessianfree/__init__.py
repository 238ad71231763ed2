"""Matrix-vector products with Jacobians, Hessians and the GGN, by plain autograd.

For any parameters of any model, the whole matrix with its off-diagonal blocks included; none of it
needs an extended module. (The extensions ``HMP``, ``GGNMP`` and ``PCHMP`` give one function per
parameter, the product with that parameter's diagonal block.)
"""

from backpack.hessianfree.ggnvp import ggn_vector_product, ggn_vector_product_from_plist
from backpack.hessianfree.hvp import hessian_vector_product
from backpack.hessianfree.lop import L_op, transposed_jacobian_vector_product
from backpack.hessianfree.rop import R_op, jacobian_vector_product

__all__ = [
    "L_op",
    "R_op",
    "ggn_vector_product",
    "ggn_vector_product_from_plist",
    "hessian_vector_product",
    "jacobian_vector_product",
    "transposed_jacobian_vector_product",
]
