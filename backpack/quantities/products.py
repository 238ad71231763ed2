"""Products with curvature blocks of single parameters, by differentiating the kept graph again.

Letters: ``k`` vectors, ``p`` a parameter's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.graph.carry import differentiable_twice, hooks_suspended
from backpack.graph.outputs import LossRecord
from backpack.graph.recognised import second_derivative
from backpack.graph.tangents import jacobian_products
from backpack.graph.tracing import cut
from backpack.sources.columns import Leaf, gradients
from backpack.sources.curvature_map import CurvatureMap

Starts = Sequence[tuple[GradientEdge, Tensor]]


Product = Callable[[Tensor], Tensor]


def _by_rows(parameter: Tensor, name: str, one: Callable[[Tensor], Tensor]) -> Product:
    """A function of ``[k, *p]`` (or one vector ``p``) from a function of one vector."""

    def product(mat: Tensor) -> Tensor:
        single = mat.shape == parameter.shape
        if not single and mat.shape[1:] != parameter.shape:
            raise ValueError(
                f"{name} expects vectors of shape [K, {', '.join(map(str, parameter.shape))}], but "
                f"got {list(mat.shape)}"
            )
        with hooks_suspended(parameter), torch.enable_grad():
            rows = [one(row) for row in ([mat] if single else mat)]
        return rows[0] if single else torch.stack(rows) if rows else torch.zeros_like(mat)

    return product


def _or_zeros(found: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if found is None else found.detach()


def hessian_product(starts: Starts, parameter: Tensor) -> Product:
    """``v -> H_pp v`` of the function that was differentiated."""
    place = get_gradient_edge(parameter)

    def one(vector: Tensor) -> Tensor:
        (gradient,) = gradients(starts, [place], create_graph=True)
        if gradient is None or not gradient.requires_grad:
            return torch.zeros_like(parameter)
        with differentiable_twice():
            (found,) = torch.autograd.grad(
                [gradient], [place], [vector], retain_graph=True, allow_unused=True
            )
        return _finite(_or_zeros(found, parameter), vector, "hmp")

    return _by_rows(parameter, "hmp", one)


def _finite(result: Tensor, vector: Tensor, name: str) -> Tensor:
    """Refuse what is not finite though its vector is, and the other way round."""
    result = result.to_dense()  # of a table with sparse gradients
    if not bool(torch.isfinite(vector).all()):
        return torch.full_like(result, torch.nan)
    if not bool(torch.isfinite(result).all()):
        raise ValueError(
            f"{name}: the product is not finite; an operation of the model has no derivative at these "
            "values (a norm or square root at zero, rows that are masked as a whole), or overflows"
        )
    return result


def ggn_product(starts: Starts, outputs: Sequence[GradientEdge], parameter: Tensor) -> Product:
    """``v -> J^T H J v`` with ``H`` the Hessian in the model outputs."""

    def one(vector: Tensor) -> Tensor:
        return _finite(_ggn_vector(starts, outputs, parameter, vector), vector, "ggnmp")

    return _by_rows(parameter, "ggnmp", one)


def _ggn_vector(
    starts: Starts, outputs: Sequence[GradientEdge], parameter: Tensor, vector: Tensor
) -> Tensor:
    # One output may be computed from another: each is a variable of its own.
    nodes = {edge.node for edge in outputs}
    with cut(nodes):
        at = gradients(starts, outputs, create_graph=True)
    used = [(edge, g) for edge, g in zip(outputs, at, strict=True) if g is not None]
    curved = [g for _, g in used if g.requires_grad]
    if not curved:
        return torch.zeros_like(parameter)
    edges = [edge for edge, _ in used]
    forward = jacobian_products(edges, [g for _, g in used], [get_gradient_edge(parameter)], [vector])
    with differentiable_twice(), cut(nodes):
        back = torch.autograd.grad(
            curved,
            edges,
            [f for f, (_, g) in zip(forward, used, strict=True) if g.requires_grad],
            retain_graph=True,
            allow_unused=True,
        )
    kept = [(edge, b) for edge, b in zip(edges, back, strict=True) if b is not None]
    (found,) = gradients(kept, [get_gradient_edge(parameter)], create_graph=False)
    return _or_zeros(found, parameter)


def positive_curvature_product(
    starts: Starts,
    outputs: Sequence[GradientEdge],
    leaf: Leaf,
    modify: str,
    losses: Mapping[Node, tuple[LossRecord, Any]] | None = None,
) -> Product:
    """The generalized Gauss-Newton product plus curved activations, made positive.

    An activation ``phi`` with incoming gradient ``g`` adds ``J^T diag(m(phi'' g)) J``, ``m`` the
    positive part (``"clip"``) or the absolute value (``"abs"``); (Chen et al., arXiv:1802.06502).
    """
    path, parameter = CurvatureMap([edge.node for edge, _ in starts], known=losses), leaf.parameter
    if not path.enters_linearly(leaf):
        raise NotImplementedError(
            "PCHMP is defined where a parameter meets data in operations that are linear in it, and "
            "not again above (no recurrent layer, no reparametrised weight); use GGNMP or HMP"
        )
    if get_gradient_edge(parameter).node in path.curved_above:
        raise NotImplementedError(
            "PCHMP is defined where all operations between a parameter and the loss are piecewise "
            "linear or act on single entries (batch norm in training mode does not); use GGNMP or HMP"
        )

    def one(vector: Tensor) -> Tensor:
        total = _ggn_vector(starts, outputs, parameter, vector)
        places = [GradientEdge(node, 0) for node, _ in path.nonlinear]
        arriving = gradients(starts, places, create_graph=False)
        for (node, _), grad in zip(path.nonlinear, arriving, strict=True):
            found = None if grad is None else second_derivative(node, grad)
            if found is None:
                continue
            below, residual = found
            residual = residual.clamp(min=0) if modify == "clip" else residual.abs()
            (forward,) = jacobian_products(
                [below], [residual], [get_gradient_edge(parameter)], [vector]
            )
            (back,) = gradients(
                [(below, residual * forward)], [get_gradient_edge(parameter)], create_graph=False
            )
            total = total + _or_zeros(back, parameter)
        return _finite(total, vector, "pchmp")

    return _by_rows(parameter, "pchmp", one)
