"""Nodes at which parameters meet data, where no capture has seen it: forms from what nodes keep.

A node's saved tensors are its arguments. Where no rule is known, the node itself is differentiated,
sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node
from torch.utils.checkpoint import CheckpointError

from backpack._ambient import within
from backpack.forms.base import Dense, Form
from backpack.graph.making import lost_form
from backpack.graph.nodes import kind_of
from backpack.graph.origins import source_at
from backpack.graph.tangents import vector_jacobian
from backpack.graph.taps import Source
from backpack.rules.analytic import conjugated_form
from backpack.rules.base import RULES
from backpack.rules.elementwise import reduce_to
from backpack.samples.axis import SampleAxis

# By the number of axes of what they take.
_CONVOLUTIONS = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}
_TRANSPOSED = {3: torch.conv_transpose1d, 4: torch.conv_transpose2d, 5: torch.conv_transpose3d}


def source_of(node: Node, number: int, place: int, axis: SampleAxis) -> Source:
    child, nr = node.next_functions[place]
    assert child is not None
    edge = GradientEdge(child, nr)
    about = child._input_metadata[nr] if not hasattr(child, "variable") else child.variable
    shape = torch.Size(about.shape)
    form = None if axis.lost else _by_rule(node, place, axis, shape)
    if form is None:
        alone = lost_form if axis.lost else _one_by_one(node, number, place, axis, shape)
        return source_at(edge, shape, alone, False)
    if node._input_metadata[number].dtype.is_complex:
        form = conjugated_form(form)
    linear = not (kind_of(node) == "Div" and place == 1)
    return source_at(edge, shape, form, linear)


def _by_rule(
    node: Any, place: int, axis: SampleAxis, shape: torch.Size
) -> Callable[[Tensor], Form] | None:
    """The form of the usual operations, from what their nodes keep."""
    kind = kind_of(node)
    if kind in ("Add", "Sub"):
        factor = 1 if place == 0 else node._saved_alpha if kind == "Add" else -node._saved_alpha
        return lambda g: reduce_to(axis, g if factor == 1 else factor * g, shape)
    if kind == "Mul":
        other = node._saved_self if place else node._saved_other
        return lambda g: reduce_to(axis, g * other, shape)
    if kind == "Div":
        other = node._saved_other
        if place == 0:
            return lambda g: reduce_to(axis, g / other, shape)
        x = node._saved_self
        return lambda g: reduce_to(axis, -g * x / other**2, shape)
    if kind == "Addmm" and place == 0:
        return lambda g: reduce_to(axis, node._saved_beta * g, shape)
    if kind == "Expand":
        return lambda g: reduce_to(axis, g, shape)
    if kind in ("Mm", "Addmm") and axis.dim == 0 and place == len(node.next_functions) - 1:
        x = node._saved_self if kind == "Mm" else node._saved_mat1
        if x is None:
            return None
        scale = 1 if kind == "Mm" else node._saved_alpha
        return _asked(torch.mm, axis, x, 1, _stand_in(x, shape), scale)
    if kind == "ConvolutionBackward" and axis.dim == 0 and place == 2:
        return _convolution_backward(node, axis)
    if kind == "Convolution" and not node._saved_transposed and axis.dim == 0:
        x, weight = node._saved_input, node._saved_weight
        function = _CONVOLUTIONS.get(x.dim())
        if function is None or place == 0:
            return None
        options = (node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_groups)
        bias = weight.new_empty(len(weight))
        return _asked(function, axis, x, place, weight, 1, bias, *options)
    return None


def _convolution_backward(node: Any, axis: SampleAxis) -> Callable[[Tensor], Form] | None:
    """The weight's form of the gradient in a convolution's input: itself a convolution.

    Of the transposed kind, if the convolution was not, with ``grad_output`` as its input.
    """
    g, weight, x = node._saved_grad_output, node._saved_weight, node._saved_input
    function = (_CONVOLUTIONS if node._saved_transposed else _TRANSPOSED).get(g.dim())
    if function is None:
        return None
    stride, padding, dilation = node._saved_stride, node._saved_padding, node._saved_dilation
    groups = node._saved_groups
    if node._saved_transposed:
        return _asked(function, axis, g, 1, weight, 1, None, stride, padding, dilation, groups)
    sizes = zip(x.shape[2:], g.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    rest = tuple(n - (m - 1) * s + 2 * p - d * (k - 1) - 1 for n, m, k, s, p, d in sizes)
    return _asked(function, axis, g, 1, weight, 1, None, stride, padding, rest, groups, dilation)


def _stand_in(x: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of that shape that takes no memory."""
    return x.new_empty(0).expand(0, *shape)[0] if 0 in shape else x.new_zeros(()).expand(shape)


def _asked(
    function: Any, axis: SampleAxis, x: Tensor, place: int, weight: Tensor, scale: Any, *more: Any
) -> Callable[[Tensor], Form] | None:
    """What the rule of an operation says of its argument at a place (the weight, or the bias)."""
    x = x.detach() if not torch.is_grad_enabled() else x
    with within(axes={id(x): axis}):
        pairs = RULES[function](axis, x, weight, *more)
    wanted = weight if place == 1 else more[0]
    for tensor, form in pairs or ():
        if tensor is wanted:
            return form if scale == 1 else _scaled(form, scale)
    return None


def _scaled(form: Callable[[Tensor], Form], scale: Any) -> Callable[[Tensor], Form]:
    return lambda g: form(scale * g)


def _one_by_one(
    node: Node, number: int, place: int, axis: SampleAxis, shape: torch.Size
) -> Callable[[Tensor], Form]:
    """The vector-Jacobian product of the node itself, of one sample's columns after another's."""

    def pulled(c: Tensor) -> Tensor:
        try:
            found = vector_jacobian(node, {number: c}, place)
        except CheckpointError as error:
            name = node.name().removesuffix("Backward")
            raise RuntimeError(
                f"inside of a checkpoint the backward of {name} can be called only once, and not for "
                "each sample: call it outside of the checkpoint, give it a rule "
                "(backpack.own.op_rule), or freeze its parameters with requires_grad_(False)"
            ) from error
        return c.new_zeros(shape) if found is None else found

    def form(g: Tensor) -> Form:
        if not bool(g.any()):  # the node may be freed
            return Dense(g.new_zeros(()).expand(len(g), axis.size, *shape))
        if axis.size == 1:
            return Dense(torch.stack([pulled(c) for c in g]).unsqueeze(1))
        ids, found = axis.sample_ids(g.device), []
        for n in range(axis.size):
            own = (ids == n).reshape([-1 if d == axis.dim else 1 for d in range(g.dim() - 1)])
            found.append(torch.stack([pulled(c * own) for c in g]))
        values = torch.stack(found, 1)
        if isinstance(node, BackwardCFunction):
            _check_sum(node, values, torch.stack([pulled(c) for c in g]))
        return Dense(values)

    return form


def _check_sum(node: Node, parts: Tensor, whole: Tensor) -> None:
    """The backward of a custom Function may be anything: only a linear one has samples of its own.

    Raises:
        RuntimeError: if the gradients of samples ``[v, N, *p]`` do not add up to the batch's.
    """
    tolerance = torch.finfo(parts.dtype).eps ** 0.5 * parts.abs().sum(1).amax()
    if bool(((parts.sum(1) - whole).abs() > tolerance).any()):
        name = node.name().removesuffix("Backward")
        raise RuntimeError(
            f"the backward of {name}, a custom autograd.Function, is not linear in the gradient that "
            "arrives: what it gives for single samples does not add up to what it gives for the batch, "
            "so that a sample has no gradient of its own. Freeze its parameters with "
            "requires_grad_(False), or give it a rule (backpack.own.op_rule)"
        )
