"""Generalised Gauss-Newton matrix times vector."""

from __future__ import annotations

from torch import Tensor, nn

from backpack.hessianfree._tensors import Tensors, as_tuple
from backpack.hessianfree.hvp import hessian_vector_product
from backpack.hessianfree.lop import L_op
from backpack.hessianfree.rop import R_op


def ggn_vector_product(
    loss: Tensor, output: Tensor, model: nn.Module, v: Tensors
) -> tuple[Tensor, ...]:
    """Multiply ``v`` by the generalised Gauss-Newton matrix of a model's parameters.

    Of those that are trained: frozen ones (``requires_grad=False``) are constants.

    Args:
        loss: scalar, computed from ``output``.
        output: output of the model.
        model: the module; every parameter of it that requires grad counts.
        v: one vector per such parameter, of its shape, in the order of ``model.parameters()``.

    Returns:
        One tensor per parameter that requires grad, of its shape.

    Raises:
        ValueError: if ``v`` does not match these parameters, or there are none.
    """
    v = as_tuple(v)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if not trained:
        raise ValueError("ggn_vector_product: no parameter of the model requires grad.")
    if [each.shape for each in v] != [p.shape for p in trained.values()]:
        raise ValueError(
            f"ggn_vector_product: v must match the parameters that require grad in number and "
            f"shapes, but v has shapes {[list(each.shape) for each in v]} and these are "
            f"{ {name: list(p.shape) for name, p in trained.items()} }"
            + (f" (without {frozen}, which are frozen)." if frozen else ".")
        )
    return ggn_vector_product_from_plist(loss, output, trained.values(), v)


def ggn_vector_product_from_plist(
    loss: Tensor, output: Tensor, plist: Tensors, v: Tensors
) -> tuple[Tensor, ...]:
    """Multiply ``v`` by the generalised Gauss-Newton matrix: ``J^T H J v``.

    ``J`` is the Jacobian of ``output`` in the parameters, ``H`` the Hessian of ``loss`` in
    ``output`` (N. Schraudolph, Fast curvature matrix-vector products, 2002). The graph is kept.

    Args:
        loss: scalar, computed from ``output``.
        output: output of the model.
        plist: parameter or list of parameters.
        v: one vector per parameter, of its shape.

    Returns:
        One tensor per parameter, of its shape; zeros for those that ``output`` does not depend on.

    Raises:
        ValueError: if ``v`` does not match ``plist``.

    Example:
        >>> import torch
        >>> model, X, y = nn.Linear(2, 1, bias=False), torch.eye(2), torch.zeros(2, 1)
        >>> output = model(X)
        >>> loss = nn.MSELoss(reduction="sum")(output, y)
        >>> ggn_vector_product_from_plist(loss, output, model.weight, torch.tensor([[1.0, 2.0]]))
        (tensor([[2., 4.]]),)
    """
    plist = as_tuple(plist)
    (output_direction,) = R_op(output, plist, v)
    (curvature,) = hessian_vector_product(loss, output, output_direction)
    return L_op(output, plist, curvature)
