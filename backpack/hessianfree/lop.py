"""Transposed Jacobian times vector (reverse mode)."""

from __future__ import annotations

import torch
from torch import Tensor

from backpack.hessianfree._tensors import Tensors, as_tuple, check_like


def L_op(
    ys: Tensors, xs: Tensors, ws: Tensors, retain_graph: bool = True, detach: bool = True
) -> tuple[Tensor, ...]:
    """Multiply ``ws`` by the transposed Jacobian of ``ys`` in ``xs``: ``sum_k (dy_k/dx_j)^T w_k``.

    Args:
        ys: tensor or list of tensors, computed from ``xs``.
        xs: tensor or list of tensors.
        ws: one vector per ``y``, of its shape.
        retain_graph: keep the graph of ``ys`` for further use.
        detach: give plain numbers; otherwise the result can be differentiated (and the graph is
            kept).

    Returns:
        One tensor per ``x``, of its shape; zeros if no ``y`` depends on it.

    Raises:
        ValueError: if ``ws`` does not match ``ys``.
    """
    ys, xs, ws = as_tuple(ys), as_tuple(xs), as_tuple(ws)
    check_like("L_op", "ws", ws, "ys", ys)
    return torch.autograd.grad(
        ys,
        xs,
        ws,
        retain_graph=retain_graph or not detach,
        create_graph=not detach,
        materialize_grads=True,
    )


def transposed_jacobian_vector_product(
    f: Tensors, x: Tensors, v: Tensors, retain_graph: bool = True, detach: bool = True
) -> tuple[Tensor, ...]:
    """Multiply ``v`` by the transposed Jacobian of ``f`` in ``x``; :func:`L_op` by another name.

    Args:
        f: tensor or list of tensors, computed from ``x``.
        x: tensor or list of tensors.
        v: one vector per entry of ``f``, of its shape.
        retain_graph: see :func:`L_op`.
        detach: see :func:`L_op`.

    Returns:
        One tensor per ``x``, of its shape.
    """
    return L_op(f, x, v, retain_graph=retain_graph, detach=detach)
