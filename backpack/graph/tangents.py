"""Jacobian times vector on a graph that exists already, by reverse passes alone.

``w -> J^T w`` is linear in ``w``, and the transpose of its derivative is ``J`` (J. Townsend, A new
trick for calculating Jacobian vector products, 2017). Autograd's formulas for ``J^T w`` need not be
differentiable at every ``w`` (``logcumsumexp`` takes logarithms of ``w``), nor at all. So ``w`` has no
zeros, and each product is checked: ``w . (J v) = (J^T w) . v``, whose right-hand side takes no second
derivative. Where that fails, tangents are carried up node by node: where ``w`` has zeros inside the
graph (masks, picked entries), each node has a ``w`` of its own without any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.graph.nodes import upwards

# A node whose vector-Jacobian product cannot be differentiated is multiplied row by row, up to so many.
ROWS = 4096
Place = Tensor | GradientEdge
Key = tuple[Node, int]


def jacobian_products(
    places: Sequence[Place],
    likes: Sequence[Tensor],
    inputs: Sequence[Place],
    vectors: Sequence[Tensor],
    create_graph: bool = False,
) -> list[Tensor]:
    """``J v`` at several places of a graph, which is kept.

    Args:
        places: tensors or their places in the graph.
        likes: tensors of the shapes and types there.
        inputs: what ``J`` differentiates with respect to.
        vectors: ``v``, one for each input. If it is not finite, the result is ``nan``.
        create_graph: whether the result can be differentiated.

    Raises:
        NotImplementedError: if an operation in between has a derivative that is no linear map, or one
            that autograd can neither differentiate nor apply row by row; names the operation.
    """
    if not isfinite(_norm(vectors)):  # some formulas drop nan: of a matrix it would reach everything
        return [torch.full_like(like, torch.nan) for like in likes]
    with torch.enable_grad():
        weights = [_generic(like.shape, like.dtype, like.device) for like in likes]

        def pull(create: bool) -> Sequence[Tensor | None]:
            return torch.autograd.grad(
                list(places),  # type: ignore[arg-type]
                list(inputs),  # type: ignore[arg-type]
                weights,
                create_graph=create,
                retain_graph=True,
                allow_unused=True,
            )

        coarsest = partial(_coarsest, places)
        pulled, found = _attempt(pull, weights, vectors, create_graph, coarsest=coarsest)
        if found is not None:
            return found
        tangents, gains = _tangents(places, inputs, vectors, create_graph)
        keys = [_key(place) for place in places]
        found = [
            tangents.get(key, torch.zeros_like(like)) for key, like in zip(keys, likes, strict=True)
        ]
        scale = _largest(places, weights, gains)
    # What is not finite here comes from values that are not, and is told by itself.
    if isfinite(_norm(found)) and not _adjoint(weights, found, pulled, vectors, scale, coarsest()):
        raise NotImplementedError(
            "the gradient is changed on its way through the graph, such as by a hook of a tensor, in a "
            "way that products with the Jacobian cannot follow; remove the hook"
        )
    return found


def _generic(shape: torch.Size | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A cotangent between 0.5 and 1.5 without a pattern, to be differentiated in."""
    shape = torch.Size(shape)
    steps = torch.arange(1, shape.numel() + 1, device=device, dtype=torch.float32)
    values = (0.5 + (12.9898 * steps).sin().mul(437.585453).frac().abs()).reshape(shape).to(dtype)
    return (values * (1 + 0.5j) if dtype.is_complex else values).requires_grad_()


def _attempt(
    pull: Callable[[bool], Sequence[Tensor | None]],
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    create_graph: bool,
    scale: float = 0.0,
    coarsest: Callable[[], float] = float,
) -> tuple[Sequence[Tensor | None], list[Tensor] | None]:
    """``J^T w``, and ``J v`` by differentiating it in ``w``; ``None`` where that does not work."""
    try:
        pulled = pull(True)
    except (RuntimeError, NotImplementedError):
        return pull(False), None  # which raises an error that has another cause once more
    pairs = [
        (g, v)
        for g, v in zip(pulled, vectors, strict=True)
        if g is not None and g.requires_grad and g.numel()
    ]
    found: Sequence[Tensor | None] = [None] * len(weights)
    if pairs:
        try:
            found = torch.autograd.grad(
                [g for g, _ in pairs],
                list(weights),
                [v for _, v in pairs],
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        except (RuntimeError, NotImplementedError):
            return pulled, None  # has no second derivative
    result = [torch.zeros_like(w) if f is None else f for f, w in zip(found, weights, strict=True)]
    if not create_graph:
        result = [each.detach() for each in result]
    fits = _adjoint(weights, result, pulled, vectors, scale)
    # Some operations in between may be in a precision that is less (autocast).
    fits = fits or _adjoint(weights, result, pulled, vectors, scale, coarsest())
    return pulled, result if fits else None


def _adjoint(
    weights: Sequence[Tensor],
    found: Sequence[Tensor],
    pulled: Sequence[Tensor | None],
    vectors: Sequence[Tensor],
    scale: float,
    coarsest: float = 0.0,
) -> bool:
    """Whether ``w . (J v) = (J^T w) . v``, up to rounding of numbers of a scale.

    ``coarsest`` is the rounding of operations in between, if that is more than at both ends.

    True also where the right-hand side is not finite, and there is nothing to compare with.
    """
    pairs = [(g, v) for g, v in zip(pulled, vectors, strict=True) if g is not None]
    right, right_size = _product(pairs)
    if not isfinite(right_size):
        return True
    left, left_size = _product(list(zip(weights, found, strict=True)))
    dtypes = [t.dtype for t in (*weights, *(g for g, _ in pairs))]
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    eps = max(eps, coarsest)
    # A comparison with nan is false.
    return abs(left - right) <= eps**0.5 * (left_size + right_size) + 100 * eps * scale


def _coarsest(places: Sequence[Place]) -> float:
    """The largest rounding error of an operation's result in the graph."""
    about = (meta for node in upwards(_edge(p).node for p in places) for meta in node._input_metadata)
    dtypes = {meta.dtype for meta in about if meta.dtype.is_floating_point or meta.dtype.is_complex}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def _product(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """A real inner product, and a size that its rounding error is small against.

    The sum of absolute terms would not do as that size: of a million terms of random signs it is a
    thousand times the sum, and hides one that is wrong.
    """
    total, squares = 0.0, 0.0
    for a, b in pairs:
        terms = _wide(a).conj() * _wide(b)
        total += float(terms.real.sum())
        squares += float(terms.abs().square().sum())
    return total, squares**0.5 + abs(total)


# --------------------------------------------------------------------------------------
# Node by node


def _edge(place: Place) -> GradientEdge:
    return get_gradient_edge(place) if isinstance(place, Tensor) else place


def _key(place: Place) -> Key:
    edge = _edge(place)
    return edge.node, edge.output_nr


def _tangents(
    places: Sequence[Place], inputs: Sequence[Place], vectors: Sequence[Tensor], create_graph: bool
) -> tuple[dict[Key, Tensor], dict[Key, float]]:
    """Tangents of all nodes between inputs and places, from below upwards.

    Returns:
        The tangents, and how large their terms are (these may cancel) for a cotangent of norm one.
    """
    tangents: dict[Key, Tensor] = {}
    gains: dict[Key, float] = {}

    def add(key: Key, tangent: Tensor) -> None:
        tangents[key] = tangents[key] + tangent if key in tangents else tangent

    for each, vector in zip(inputs, vectors, strict=True):
        add(_key(each), vector)
    order = upwards([_edge(place).node for place in places])
    used = {_key(place) for place in places}
    used |= {(child, nr) for node in order for child, nr in node.next_functions if child is not None}
    for node in order:
        children = node.next_functions
        below = [None if child is None else tangents.get((child, nr)) for child, nr in children]
        if any(t is not None for t in below):
            outputs = [i for i in range(len(node._input_metadata)) if (node, i) in used]
            found, gain = _through(node, outputs, below, create_graph)
            for place, tangent in zip(outputs, found, strict=True):
                add((node, place), tangent)
                gains[node, place] = gain
    return tangents, gains


def _largest(places: Sequence[Place], weights: Sequence[Tensor], gains: dict[Key, float]) -> float:
    """The largest term at a node, which rounding errors compare with.

    All of them may cancel higher up, as in a vector that is divided by its norm.
    """
    found = torch.autograd.grad(
        list(places),  # type: ignore[arg-type]
        [GradientEdge(*key) for key in gains],
        list(weights),
        retain_graph=True,
        allow_unused=True,
    )
    terms = [_norm([g]) * gain for g, gain in zip(found, gains.values(), strict=True) if g is not None]
    return max((term for term in terms if isfinite(term)), default=0.0)


def _through(
    node: Node, outputs: Sequence[int], below: Sequence[Tensor | None], create_graph: bool
) -> tuple[list[Tensor], float]:
    """Tangents of some of a node's outputs from those of its inputs, and how large their terms are."""
    metas = node._input_metadata
    weights = [_generic(metas[i].shape, metas[i].dtype, metas[i].device) for i in outputs]
    vectors = [t for t in below if t is not None]

    def pull(create: bool) -> list[Tensor | None]:
        with torch.set_grad_enabled(create):
            return _pulled(node, dict(zip(outputs, weights, strict=True)), below)

    # Of numbers that cancel (a softmax of one entry) the derivative is known up to their rounding.
    scale = _norm(weights) * _norm(vectors)
    pulled, found = _attempt(pull, weights, vectors, create_graph, scale)
    sizes = (_product([(g, v)])[1] for g, v in zip(pulled, vectors, strict=True) if g is not None)
    gain = max(sizes, default=0.0) / max(_norm(weights), 1e-30)
    if found is not None:
        return found, gain
    if create_graph or sum(w.numel() for w in weights) > ROWS:
        raise NotImplementedError(
            f"the derivative of an operation of the model ({node.name()}) cannot be differentiated, "
            "which products with its Jacobian need; write that operation in another way (for "
            "attention, run the forward pass inside "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH))"
        )
    with torch.no_grad():
        found = _by_rows(node, outputs, weights, below)
    if not _adjoint(weights, found, pulled, vectors, scale):
        raise NotImplementedError(
            f"the backward pass of an operation of the model ({node.name()}) is not linear in the "
            "gradient that arrives, so that it belongs to no Jacobian"
        )
    return found, gain


def _norm(tensors: Sequence[Tensor]) -> float:
    return sum(float(_wide(t).abs().square().sum()) for t in tensors) ** 0.5


def _wide(tensor: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    tensor = tensor.detach().to_dense()
    if tensor.device.type == "mps":
        return tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _pulled(
    node: Node, cotangents: dict[int, Tensor], below: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of a node's inputs that have tangents; no hook is called."""
    call: Any = getattr(node, "apply", None)
    children: Sequence[tuple[Node | None, int]] = node.next_functions
    metas = node._input_metadata
    if call is None:
        got = node(*(cotangents.get(i) for i in range(len(metas))))  # type: ignore[operator]
        got = got if isinstance(got, tuple) else (got,)
    else:  # a torch.autograd.Function, which answers for arguments that are no tensors too
        zeros = (torch.zeros(m.shape, dtype=m.dtype, device=m.device) for m in metas)
        got = call(*(cotangents.get(i, zero) for i, zero in enumerate(zeros)))
        got = got if isinstance(got, tuple) else (got,)
        asked = iter([g for g, asked in zip(got, node.needs_input_grad, strict=False) if asked])  # type: ignore[attr-defined]
        got = [None if child is None else next(asked) for child, _ in children]
    found: list[Tensor | None] = []
    for grad, (child, place), tangent in zip(got, children, below, strict=True):
        if tangent is not None:
            found.append(None if grad is None else _fitted(grad, child._input_metadata[place]))  # type: ignore[union-attr]
    return found


def vector_jacobian(node: Node, cotangents: dict[int, Tensor], place: int) -> Tensor | None:
    """The gradient of one of a node's inputs, from those at its outputs; no hook is called."""
    nothing = torch.empty(0)
    below = [nothing if i == place else None for i in range(len(node.next_functions))]
    return _pulled(node, cotangents, below)[0]


def _fitted(grad: Tensor, meta: Any) -> Tensor:
    """A gradient in the shape and type of what it is for, as the engine makes it."""
    grad = grad if grad.shape == meta.shape else grad.sum_to_size(meta.shape)
    if meta.dtype.is_complex or not grad.is_complex():
        return grad if grad.dtype == meta.dtype else grad.to(meta.dtype)
    return grad.real.to(meta.dtype)


def _by_rows(
    node: Node, outputs: Sequence[int], weights: Sequence[Tensor], below: Sequence[Tensor | None]
) -> list[Tensor]:
    """``(J v)_k = (J^T e_k) . v``, entry by entry: takes no second derivative."""
    vectors, found = [t for t in below if t is not None], [torch.zeros_like(w) for w in weights]
    for place, result in enumerate(found):
        parts: tuple[Any, ...] = (1, 1j) if result.is_complex() else (1,)
        for k in range(result.numel()):
            for part in parts:
                units = [torch.zeros_like(w) for w in weights]
                units[place].view(-1)[k] = part
                grads = _pulled(node, dict(zip(outputs, units, strict=True)), below)
                pairs = [(g, v) for g, v in zip(grads, vectors, strict=True) if g is not None]
                result.view(-1)[k] += part * _product(pairs)[0]
    return found
