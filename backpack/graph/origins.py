"""What an operand is made from: a parameter by another name, terms of a sum, a derived tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack._torch import leaf_of
from backpack.forms.base import Dense, Form
from backpack.forms.outer import Outer
from backpack.forms.several import Pullback, of_one
from backpack.graph.nodes import IDENTITY, kind_of
from backpack.graph.taps import Source
from backpack.rules.base import ToForm


def sources_of(tensor: Tensor, form: ToForm, linear: bool) -> list[Source]:
    """The parameter that a tensor is, or what it is made from; of a sum its terms."""
    if tensor.grad_fn is None:
        return [Source(tensor, None, form, linear)]
    edge, terms = get_gradient_edge(tensor), None
    if not tensor._backward_hooks:  # which are part of the backward pass
        terms = _terms(edge.node, tensor.shape)
    if terms is None:
        return [source_at(edge, tensor.shape, form, linear)]
    return [source_at(term, tensor.shape, _times(factor, form), linear) for term, factor in terms]


def _terms(node: Node, shape: torch.Size) -> list[tuple[GradientEdge, float]] | None:
    """The terms of a sum, with their factors; ``None`` if it is none, or a term is broadcast."""
    kind = kind_of(node)
    if kind not in ("Add", "Sub"):
        return None
    alpha = node._saved_alpha  # type: ignore[attr-defined]
    found = []
    for (child, number), factor in zip(
        node.next_functions, (1, alpha if kind == "Add" else -alpha), strict=True
    ):
        if child is not None:
            leaf = leaf_of(child)
            size = child._input_metadata[number].shape if leaf is None else leaf.shape
            if torch.Size(size) != shape:
                return None
            found.append((GradientEdge(child, number), factor))
    return found


def _times(factor: complex, form: ToForm) -> ToForm:
    return form if factor == 1 else lambda g: form(factor.conjugate() * g)


def source_at(edge: GradientEdge, shape: torch.Size, form: ToForm, linear: bool) -> Source:
    """The source at a place of the graph, a parameter or a tensor made from parameters."""
    leaf, flips = leaf_of(edge.node), 0
    while leaf is None and len(shape) == 2 and (_renames(edge.node) or _transposes(edge.node)):
        flips += not _renames(edge.node)
        below, number = edge.node.next_functions[0]
        assert below is not None
        edge, leaf = GradientEdge(below, number), leaf_of(below)
    if flips % 2:
        return Source(
            leaf, None if leaf is not None else edge, lambda g: of_one(form(g), _transposed), linear
        )
    return Source(leaf, None if leaf is not None else edge, form, linear)


def _renames(node: Any) -> bool:
    """Whether a tensor is the one below by another name."""
    return kind_of(node) in ("Alias", IDENTITY)


def _transposes(node: Any) -> bool:
    """Whether the axes of a matrix change places (and are not only named)."""
    name = node.name()
    # Axes may be counted from the end.
    if name == "PermuteBackward0":
        return bool(node._saved_dims[0] % 2)
    if name == "TransposeBackward0":
        return bool((node._saved_dim0 - node._saved_dim1) % 2)
    return bool(name == "TBackward0")


def _transposed(form: Form) -> Form:
    """The form of a matrix from the form of its transpose."""
    if isinstance(form, Outer):
        return Outer(form.inputs, form.g, form.layout.transposed(), form.counts)
    if isinstance(form, Dense):
        return Dense(form.values.mT)
    return Pullback(form, lambda m: m.mT, torch.Size(reversed(form.shape)))
