"""Outputs of a model as one tensor: of tuples, dictionaries and objects all tensors with rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tensors_in(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """What is computed and kept in containers and in attributes of objects, each tensor once."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (torch.nn.Parameter, torch.nn.Module, type)):
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        parts = list(value.values())
    else:
        parts = list(value) if isinstance(value, (list, tuple)) else []
    parts += vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors_in(part, seen)]


class Outputs:
    """Joins what a model returns, and gives it back as it was.

    Args:
        dim: the axis of rows.

    Attributes:
        held: what requires grad and has no rows, of what was joined last.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._kept: Any = None
        self._joined: list[Tensor] = []
        self.held: list[Tensor] = []

    @property
    def alone(self) -> bool:
        """Whether the model returned a tensor."""
        return isinstance(self._kept, Tensor)

    def join(self, output: Any) -> Tensor:
        """A tensor as it is; of others ``[rows, *]``.

        Raises:
            ValueError: if there is no tensor with rows that requires grad, or numbers of rows differ.
        """
        self._kept, self._joined, self.held = output, [], []
        if isinstance(output, Tensor):
            return output
        tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        parts = list({id(x): x for x in tensors if x.dim() > self.dim}.values())
        rows = {x.shape[self.dim] for x in parts}
        if len(rows) != 1 or len({x.dtype for x in parts}) != 1:
            shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
            raise ValueError(
                f"the output is a {type(output).__name__} with tensors of shapes {shapes or 'none'} "
                "that require grad; check compares those with rows for the samples, as many in each"
            )
        self._joined = parts
        self.held = [x for x in tensors if not any(x is part for part in parts)]
        flat = [x.movedim(self.dim, 0).reshape(x.shape[self.dim], -1) for x in parts]
        return torch.cat(flat, 1)

    def split(self, joined: Tensor, held: Sequence[Tensor] = ()) -> Any:
        """What :meth:`join` was given last, with these numbers; what has no rows is held constant.

        ``held`` stands for what has no rows.
        """
        if self.alone:
            return joined
        shapes = [x.movedim(self.dim, 0).shape for x in self._joined]
        columns = joined.split([shape[1:].numel() for shape in shapes], 1)
        memo: dict[int, Any] = {id(x): x.detach() for x in tensors_in(self._kept)}
        memo |= {id(x): value for x, value in zip(self.held, held, strict=False)}
        for x, shape, part in zip(self._joined, shapes, columns, strict=True):
            memo[id(x)] = part.reshape(shape).movedim(0, self.dim)
        return copy.deepcopy(self._kept, memo)
