"""Between one long vector and tensors of the parameters' shapes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def vector_to_parameter_list(vec: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Cut a vector into tensors of the parameters' shapes, in their order.

    The inverse of ``torch.nn.utils.parameters_to_vector``, except that the parameters are not
    changed: the result views ``vec``.

    Args:
        vec: ``[D]``, ``D`` the number of entries of all parameters.
        parameters: tensors, of which only the shapes are used.

    Returns:
        One tensor per parameter.

    Raises:
        ValueError: if ``vec`` is not a vector of ``D`` entries.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> weight, bias = vector_to_parameter_list(torch.arange(6.0), model.parameters())
        >>> bias
        tensor([4., 5.])
    """
    shapes = [parameter.shape for parameter in parameters]
    total = sum(shape.numel() for shape in shapes)
    if vec.shape != (total,):
        raise ValueError(
            f"vector_to_parameter_list: the parameters have {total} entries, but the vector has "
            f"shape {list(vec.shape)}."
        )
    chunks = torch.split(vec, [shape.numel() for shape in shapes])
    return [chunk.view(shape) for chunk, shape in zip(chunks, shapes, strict=True)]
