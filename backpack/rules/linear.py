"""Linear maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.forms.base import Dense, Form
from backpack.forms.layout import Layout
from backpack.forms.outer import Outer
from backpack.rules.base import ParameterForms, op_rule, outer_form, position_sum
from backpack.rules.elementwise import reduce_to
from backpack.samples.axis import SampleAxis, sample_axis_of


@op_rule(F.linear)
def linear(
    batch: SampleAxis, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> ParameterForms | None:
    if sample_axis_of(input) is None or weight.dim() != 2:
        return None
    layout = Layout(weight.shape)
    if input.dim() == 2 and batch.plain and batch.dim == 0:
        return [
            (weight, lambda g: Outer(input[:, None, None], g[:, :, None, None], layout)),
            (bias, Dense),
        ]
    if input.dim() == 2 and batch.size == 1 and batch.picked is None:  # all rows are one sample's
        return [
            (weight, lambda g: Outer(input[None, None], g[:, None, None], layout)),
            (bias, lambda g: Dense(g.sum(1, keepdim=True))),
        ]
    return [
        (weight, lambda g: outer_form(batch, input, g, layout)),
        (bias, lambda g: Dense(position_sum(batch.rows(g, 1)))),
    ]


@op_rule(torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, Tensor.__rmatmul__)
def matmul(
    batch: SampleAxis, input: Tensor, other: Tensor | None = None, *, mat2: Tensor | None = None
) -> ParameterForms | None:
    right = mat2 if other is None else other
    if right is None:
        return None
    return (_times_matrix if sample_axis_of(right) is None else _matrix_times)(batch, input, right)


def _times_matrix(batch: SampleAxis, x: Tensor, w: Tensor, scale: float = 1.0) -> ParameterForms | None:
    """``x @ w`` with a matrix or vector ``w``."""
    if w.dim() > 2 or x.dim() < 2:
        return None
    layout = Layout(w.shape, "in_out")

    def form(g: Tensor) -> Form:
        g = g if w.dim() == 2 else g.unsqueeze(-1)
        return outer_form(batch, x, g if scale == 1 else scale * g, layout)

    return [(w, form)]


def _matrix_times(batch: SampleAxis, w: Tensor, x: Tensor, scale: float = 1.0) -> ParameterForms | None:
    """``w @ x`` with a matrix ``w``: the transpose of ``x^T @ w^T``."""
    if w.dim() != 2 or x.dim() < 2:
        return None
    layout, last = Layout(w.shape), x.dim() - 1
    swapped = batch.moved({last: last - 1, last - 1: last}.get(batch.dim, batch.dim))

    def form(g: Tensor) -> Form:
        return outer_form(swapped, x.mT, scale * g.mT, layout)

    return [(w, form)]


@op_rule(torch.addmm, Tensor.addmm)
def addmm(
    batch: SampleAxis, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> ParameterForms | None:
    product = (_times_matrix if sample_axis_of(mat2) is None else _matrix_times)(
        batch, mat1, mat2, scale=alpha
    )
    if product is None:
        return None
    shape = input.shape
    return [(input, lambda g: reduce_to(batch, g if beta == 1 else beta * g, shape)), *product]
