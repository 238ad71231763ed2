"""One tensor or several: what the functions of this package take and give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Tensors = Tensor | Iterable[Tensor]


def as_tuple(tensors: Tensors) -> tuple[Tensor, ...]:
    """A tensor, or an iterable of them (a generator too), as a tuple."""
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def check_like(
    caller: str, name: str, vectors: Sequence[Tensor], like_name: str, like: Sequence[Tensor]
) -> None:
    """Raise where vectors do not match the tensors they stand beside in number and shape."""
    if [v.shape for v in vectors] != [t.shape for t in like]:
        raise ValueError(
            f"{caller}: {name} must match {like_name} in number and shapes, but {name} has shapes "
            f"{[list(v.shape) for v in vectors]} and {like_name} "
            f"{[list(t.shape) for t in like]}."
        )


def vjp_of_differentiable(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    retain_graph: bool,
    create_graph: bool,
) -> tuple[Tensor, ...]:
    """Transposed Jacobian times vectors, where outputs without a graph count as constants.

    For outputs that are derivatives themselves: those of a linear function require no grad.
    """
    pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(each) for each in inputs)
    return torch.autograd.grad(
        [output for output, _ in pairs],
        inputs,
        [vector for _, vector in pairs],
        retain_graph=retain_graph,
        create_graph=create_graph,
        materialize_grads=True,
    )
