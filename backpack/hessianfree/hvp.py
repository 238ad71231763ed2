"""Hessian times vector."""

from __future__ import annotations

import torch
from torch import Tensor

from backpack.hessianfree._tensors import Tensors, as_tuple, check_like, vjp_of_differentiable


def hessian_vector_product(
    f: Tensor,
    params: Tensors,
    v: Tensors,
    grad_params: Tensors | None = None,
    detach: bool = True,
) -> tuple[Tensor, ...]:
    """Multiply ``v`` by the Hessian of a scalar ``f``: ``sum_k (d^2 f / dp_j dp_k) v_k``.

    Differentiates the gradient (B. A. Pearlmutter, Fast exact multiplication by the Hessian, 1994).
    The graph of ``f`` is kept.

    Args:
        f: scalar, computed from ``params``.
        params: tensor or list of tensors.
        v: one vector per parameter, of its shape.
        grad_params: gradient of ``f`` in ``params`` if it is known, computed with
            ``create_graph=True``; saves one pass in every further product.
        detach: give plain numbers; otherwise the result can be differentiated.

    Returns:
        One tensor per parameter, of its shape; zeros for those that ``f`` does not depend on.

    Raises:
        ValueError: if ``v`` or ``grad_params`` does not match ``params``, or ``grad_params`` was
            computed without a graph.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_vector_product((x**3).sum(), x, torch.ones(2))
        (tensor([ 6., 12.]),)
    """
    params, v = as_tuple(params), as_tuple(v)
    check_like("hessian_vector_product", "v", v, "params", params)
    if grad_params is None:
        gradient = torch.autograd.grad(f, params, create_graph=True, materialize_grads=True)
    else:
        gradient = as_tuple(grad_params)
        check_like("hessian_vector_product", "grad_params", gradient, "params", params)
        if not any(each.requires_grad for each in gradient):
            raise ValueError(
                "hessian_vector_product: grad_params has no graph to differentiate; compute it "
                "with torch.autograd.grad(f, params, create_graph=True), or leave it out."
            )
    return vjp_of_differentiable(gradient, params, v, retain_graph=True, create_graph=not detach)
