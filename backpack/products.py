"""Products with curvature blocks of single parameters, by differentiating the kept graph again.

Letters: ``k`` vectors, ``p`` a parameter's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from backpack.backprop import explained, hooks_suspended
from backpack.hessian import Path, bend, gradients

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
        with hooks_suspended(parameter), torch.enable_grad(), explained():
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
        (found,) = torch.autograd.grad(
            [gradient], [place], [vector], retain_graph=True, allow_unused=True
        )
        return _or_zeros(found, parameter)

    return _by_rows(parameter, "hmp", one)


def _jacobian_products(
    places: Sequence[GradientEdge], likes: Sequence[Tensor], parameter: Tensor, vector: Tensor
) -> list[Tensor]:
    """``J v`` at several places, by differentiating the vector-Jacobian product in its vector."""
    dummies = [torch.zeros_like(like).requires_grad_() for like in likes]
    (pulled,) = torch.autograd.grad(
        list(places),
        [get_gradient_edge(parameter)],
        dummies,
        create_graph=True,
        retain_graph=True,
        allow_unused=True,
    )
    if pulled is None or not pulled.requires_grad:
        return [torch.zeros_like(like) for like in likes]
    found = torch.autograd.grad([pulled], dummies, [vector], retain_graph=True, allow_unused=True)
    return [_or_zeros(f, like) for f, like in zip(found, likes, strict=True)]


def ggn_product(starts: Starts, outputs: Sequence[GradientEdge], parameter: Tensor) -> Product:
    """``v -> J^T H J v`` with ``H`` the Hessian in the model outputs."""

    def one(vector: Tensor) -> Tensor:
        return _ggn_vector(starts, outputs, parameter, vector)

    return _by_rows(parameter, "ggnmp", one)


def _ggn_vector(
    starts: Starts, outputs: Sequence[GradientEdge], parameter: Tensor, vector: Tensor
) -> Tensor:
    at = gradients(starts, outputs, create_graph=True)
    used = [(edge, g) for edge, g in zip(outputs, at, strict=True) if g is not None]
    curved = [g for _, g in used if g.requires_grad]
    if not curved:
        return torch.zeros_like(parameter)
    edges = [edge for edge, _ in used]
    forward = _jacobian_products(edges, [g for _, g in used], parameter, vector)
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
    starts: Starts, outputs: Sequence[GradientEdge], parameter: Tensor, modify: str
) -> Product:
    """The generalized Gauss-Newton product plus curved activations, made positive.

    An activation ``phi`` with incoming gradient ``g`` adds ``J^T diag(m(phi'' g)) J``, ``m`` the
    positive part (``"clip"``) or the absolute value (``"abs"``); (Chen et al., arXiv:1802.06502).
    """
    path = Path([edge.node for edge, _ in starts])
    if path.curved_above:
        raise NotImplementedError(
            "PCHMP is defined where all operations between parameters and loss are piecewise linear "
            "or act on single entries; use GGNMP or HMP"
        )

    def one(vector: Tensor) -> Tensor:
        total = _ggn_vector(starts, outputs, parameter, vector)
        places = [GradientEdge(node, 0) for node, _ in path.bends]
        arriving = gradients(starts, places, create_graph=False)
        for (node, _), grad in zip(path.bends, arriving, strict=True):
            found = None if grad is None else bend(node, grad)
            if found is None:
                continue
            below, residual = found
            residual = residual.clamp(min=0) if modify == "clip" else residual.abs()
            (forward,) = _jacobian_products([below], [residual], parameter, vector)
            (back,) = gradients(
                [(below, residual * forward)], [get_gradient_edge(parameter)], create_graph=False
            )
            total = total + _or_zeros(back, parameter)
        return total

    return _by_rows(parameter, "pchmp", one)
