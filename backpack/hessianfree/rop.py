"""Jacobian times vector, on a graph that exists already."""

from __future__ import annotations

import torch
from torch import Tensor

from backpack.graph.tangents import jacobian_products
from backpack.hessianfree._tensors import Tensors, as_tuple, check_like


def R_op(
    ys: Tensors, xs: Tensors, vs: Tensors, retain_graph: bool = True, detach: bool = True
) -> tuple[Tensor, ...]:
    """Multiply ``vs`` by the Jacobian of ``ys`` in ``xs``: ``sum_j (dy_k/dx_j) v_j``.

    Forward mode would need the function itself; on a recorded graph two reverse passes do it:
    ``w -> J^T w`` is linear in ``w``, and the transpose of its derivative is ``J``.
    (J. Townsend, A new trick for calculating Jacobian vector products, 2017.) Where an operation's
    derivative cannot be differentiated, it is applied row by row; every result is checked.

    Args:
        ys: tensor or list of tensors, computed from ``xs``.
        xs: tensor or list of tensors.
        vs: one vector per ``x``, of its shape.
        retain_graph: keep the graph of ``ys`` for further use.
        detach: give plain numbers; otherwise the result can be differentiated (and the graph is
            kept).

    Returns:
        One tensor per ``y``, of its shape; zeros if it depends on no ``x``.

    Raises:
        ValueError: if ``vs`` does not match ``xs``.
        NotImplementedError: if an operation has too many results for that; names it.
    """
    ys, xs, vs = as_tuple(ys), as_tuple(xs), as_tuple(vs)
    check_like("R_op", "vs", vs, "xs", xs)
    found = tuple(jacobian_products(ys, ys, xs, vs, create_graph=not detach))
    if detach and not retain_graph:
        torch.autograd.grad(ys, xs, [torch.zeros_like(y) for y in ys], allow_unused=True)
    return found


def jacobian_vector_product(
    f: Tensors, x: Tensors, v: Tensors, retain_graph: bool = True, detach: bool = True
) -> tuple[Tensor, ...]:
    """Multiply ``v`` by the Jacobian of ``f`` in ``x``; :func:`R_op` by another name.

    Args:
        f: tensor or list of tensors, computed from ``x``.
        x: tensor or list of tensors.
        v: one vector per ``x``, of its shape.
        retain_graph: see :func:`R_op`.
        detach: see :func:`R_op`.

    Returns:
        One tensor per entry of ``f``, of its shape.
    """
    return R_op(f, x, v, retain_graph=retain_graph, detach=detach)
