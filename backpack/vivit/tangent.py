"""The empirical tangent kernel of a network, from forms of its Jacobian."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from backpack import extend, unextend
from backpack.vivit.lowrank import LowRank
from backpack.vivit.rows import Rows, inner, traces

Inputs = Tensor | tuple[Tensor, ...]


def ntk(
    model: nn.Module,
    X1: Inputs,
    X2: Inputs | None = None,
    *,
    trace: bool = False,
    parameters: Iterable[Tensor] | None = None,
    batch_size: int | None = None,
    precision: torch.dtype | None = None,
) -> Tensor:
    """The empirical tangent kernel ``J(x) J(x')^T`` of a network's outputs.

    The Jacobian is not written out. Dropout and the like should be off (``model.eval()``), for inputs
    would meet other networks.

    Args:
        model: any module, with an output whose first axis holds samples. It need not be extended.
        X1: input, or a tuple of inputs; samples are on the first axis.
        X2: inputs on the other side; the same by default.
        trace: sum over equal outputs instead of telling all pairs of outputs apart.
        parameters: those to differentiate in; all that require grad by default.
        batch_size: number of samples on either side that are held in memory at a time; default all.
        precision: of the products; that of the model by default.

    Returns:
        ``[N, C, M, C]``, or ``[N, M]`` with ``trace``; ``C`` counts the numbers of a sample's output.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> ntk(model, torch.rand(4, 3), torch.rand(5, 3)).shape
        torch.Size([4, 2, 5, 2])
        >>> ntk(model, torch.rand(4, 3), trace=True).shape
        torch.Size([4, 4])
    """
    group = None if parameters is None else list(parameters)
    first = _tuple(X1)
    second = first if X2 is None else _tuple(X2)
    with _extended(model):
        lines: list[list[Tensor]] = []
        for i, mine in enumerate(_tiles(first, batch_size)):
            left = _jacobian(model, mine, group)
            tiles = []
            for j, other in enumerate(_tiles(second, batch_size)):
                if X2 is None and j < i:
                    tiles.append(_transposed(lines[j][i], trace))
                    continue
                right = left if X2 is None and j == i else _jacobian(model, other, group)
                tiles.append(_kernel(left, right, trace, precision))
            lines.append(tiles)
    return torch.cat([torch.cat(tiles, 1 if trace else 2) for tiles in lines])


def _tuple(X: Inputs) -> tuple[Tensor, ...]:
    return X if isinstance(X, tuple) else (X,)


def _tiles(X: tuple[Tensor, ...], size: int | None) -> Iterator[tuple[Tensor, ...]]:
    samples = len(X[0])
    for first in range(0, samples, size or max(samples, 1)):
        yield tuple(x[first : first + (size or samples)] for x in X)


@contextmanager
def _extended(model: nn.Module) -> Iterator[None]:
    """The model is extended within the block, and as it was afterwards."""
    before = any(getattr(each, "_backpack_extend", False) for each in model.modules())
    if not getattr(model, "_backpack_root", False):
        extend(model)
    try:
        yield
    finally:
        if not before:
            unextend(model)


def _jacobian(
    model: nn.Module, X: tuple[Tensor, ...], group: list[Tensor] | None
) -> tuple[Rows, list[Tensor]]:
    """Forms of the Jacobian, and the parameters that they are about."""
    curvature = LowRank("jacobian", gradients=False, gradient=False)
    with torch.enable_grad(), curvature:
        output = model(*X)
        if not isinstance(output, Tensor):
            raise ValueError(f"ntk: the model's output must be a tensor, got {type(output).__name__}")
        output.sum().backward()
    parameters = curvature.parameters
    if group is not None:
        known = set(parameters)
        parameters = [p for p in group if p in known]
    (rows,) = curvature._columns(parameters)
    return rows, parameters


def _kernel(
    left: tuple[Rows, list[Tensor]],
    right: tuple[Rows, list[Tensor]],
    trace: bool,
    precision: torch.dtype | None,
) -> Tensor:
    (a, mine), (b, others) = left, right
    parameters = list(dict.fromkeys(chain(mine, others)))
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    if trace:
        return traces(a, b, parameters, precision).to(dtype)
    rows = [a]
    found = inner(rows, rows if a is b else [b], parameters, precision)
    found = found.reshape(a.columns, a.samples, b.columns, b.samples)
    return found.permute(1, 0, 3, 2).to(dtype)


def _transposed(kernel: Tensor, trace: bool) -> Tensor:
    return kernel.mT if trace else kernel.permute(2, 3, 0, 1)
