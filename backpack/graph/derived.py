"""Tensors made from parameters only: those whose entries are functions of single entries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack._torch import leaf_of, shows
from backpack.graph.carry import pull_back
from backpack.graph.nodes import children_of, kind_of, upwards
from backpack.graph.taps import notes
from backpack.samples.separability import generic

# Operations that act on single entries, where nothing is broadcast.
_ENTRIES = frozenset(
    """Add Sub Rsub Mul Div Neg Exp Exp2 Expm1 Log Log1P Sqrt Rsqrt Pow Reciprocal Softplus LogSigmoid
    Sigmoid Tanh Sin Cos Abs Relu LeakyRelu Elu Silu Gelu Erf Clamp ClampMin ClampMax Clone Alias
    ToCopy Where MaskedFill NativeDropout""".split()
)


# On nodes of derived tensors: the leaves that :func:`mixed_leaves` has found.
_MIXED = "backpack_mixed_leaves"


def entry_derivatives(edge: GradientEdge, parameter: Tensor) -> Tensor | None:
    """Derivatives of a tensor whose entries are functions of the parameter's entries, one of each.

    Args:
        edge: the tensor's place in the graph.
        parameter: a parameter that it is made from.

    Returns:
        Of the parameter's shape; ``None`` if it is no such tensor.
    """
    if parameter.is_complex() or edge.node._input_metadata[edge.output_nr].dtype.is_complex:
        return None  # a derivative of complex numbers need not be one number
    if id(parameter) in mixed_leaves(edge.node):
        return None
    nodes = _way(edge.node, parameter)
    shape = parameter.shape
    if any(kind_of(node) not in _ENTRIES for node in nodes):
        return None
    if any(torch.Size(node._input_metadata[0].shape) != shape for node in nodes):
        return None
    weights = generic(shape, parameter.detach())
    found, weighted = pull_back(edge, parameter, torch.stack([torch.ones_like(weights), weights]))
    # A hook in between may do anything.
    expected = (found * weights).detach()
    eps = torch.finfo(parameter.dtype).eps ** 0.75
    alike = (weighted.detach() - expected).abs() <= eps * expected.abs()
    return found if shows(alike.all(), True) else None


def mixed_leaves(node: Node) -> set[int]:
    """Ids of leaves of whose entries several are mixed on some way up to a node."""
    known: set[int] | None = notes(node).get(_MIXED)
    if known is None:
        known = notes(node)[_MIXED] = _mixed_leaves(node)
    return known


def _mixed_leaves(node: Node) -> set[int]:
    found, stack, seen = set[int](), [(node, False)], set[tuple[Node, bool]]()
    while stack:
        visit = stack.pop()
        if visit in seen:
            continue
        seen.add(visit)
        here, mixed = visit
        leaf = leaf_of(here)
        if leaf is None:
            mixed = mixed or kind_of(here) not in _ENTRIES
            stack += [(child, mixed) for child in children_of(here)]
        elif mixed:
            found.add(id(leaf))
    return found


def _way(start: Node, parameter: Tensor) -> list[Node]:
    """The nodes between a tensor and a parameter."""
    reaches: dict[Node, bool] = {}
    for node in upwards([start]):
        reaches[node] = leaf_of(node) is parameter or any(reaches[c] for c in children_of(node))
    return [node for node, leads in reaches.items() if leads and leaf_of(node) is None]
