"""The largest eigenvalue of the Hessian, on the graph that is there, from where it was last."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from backpack import disable
from backpack._torch import foreach_add_
from backpack.cockpit.passed import Group, MissingError
from backpack.cockpit.passes import Call

# Vectors that are kept, and the residual's length beside the eigenvalue, which is that near; and as its
# error is of second order in the residual's, usually within a thousandth.
LARGEST, TOLERANCE = 10, 2e-2
# How often it starts again from the best vector, and the change for which that is not worth while.
CYCLES, CHANGE = 10, 1e-4
Vector = list[Tensor]


class TopEigenvalue:
    """Follows the largest eigenvalue of a loss's Hessian over a training run.

    Where steps have several backward passes, the Hessian of their sum is met in parts. The value is the
    curvature along one vector, which makes a step of the power method with each step of the optimizer:
    exact once it has settled, and less before.

    Args:
        group: the processes that train together.

    Attributes:
        value: of the current step.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.value: float | None = None
        self._vector: Vector | None = None
        # The product of the step's Hessian with the vector, and the number of passes in it.
        self._product: Vector | None = None
        self._passes = 0

    def look(self, call: Call, parameters: Sequence[Tensor], share: float, first: bool) -> None:
        """Take a backward pass into account, before it has begun."""
        with disable(), torch.enable_grad():
            plain = vector_products(call.root, call.gradient, parameters)

        def product(vector: Vector) -> Vector:
            return [self.group.sum(x * share) for x in plain(vector)]

        several, self._passes = self._passes > 1, 1 if first else self._passes + 1
        if first:
            norm = _norm(self._product) if several and self._product is not None else 0.0
            if norm == 0.0 or not math.isfinite(norm):
                self.value, self._vector = lanczos(product, self._vector or starting(parameters))
                # Along an eigenvector the product is that many times the vector.
                self._product = [self.value * x for x in self._vector]
                return
            assert self._product is not None
            self._vector = [x / norm for x in self._product]
            self.value, self._product = 0.0, [torch.zeros_like(x) for x in self._vector]
        assert self._vector is not None and self.value is not None and self._product is not None
        more = product(self._vector)
        self.value += _inner(self._vector, more)
        self._product = [a + b for a, b in zip(self._product, more, strict=True)]


def vector_products(
    roots: Any, weights: Any, parameters: Sequence[Tensor]
) -> Callable[[Vector], Vector]:
    """Products with the Hessian of ``sum weight * root``, on a graph that stays."""
    found = torch.autograd.grad(
        roots, parameters, weights, create_graph=True, retain_graph=True, allow_unused=True
    )
    known = [g for g in found if g is not None and g.requires_grad]

    def product(vector: Vector) -> Vector:
        if not known:
            return [torch.zeros_like(p) for p in parameters]
        along = [v for v, g in zip(vector, found, strict=True) if g is not None and g.requires_grad]
        with disable():
            second = torch.autograd.grad(known, parameters, along, retain_graph=True, allow_unused=True)
        return [
            torch.zeros_like(p) if s is None else s.detach()
            for s, p in zip(second, parameters, strict=True)
        ]

    return product


def starting(parameters: Sequence[Tensor]) -> Vector:
    """A vector without preferences, the same in all processes, from randomness of its own."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    norm = _norm(found)
    return [x / norm for x in found]


def _inner(a: Vector, b: Vector) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def _norm(a: Vector) -> float:
    return _inner(a, a) ** 0.5


def lanczos(
    product: Callable[[Vector], Vector], start: Vector, magnitude: bool = False
) -> tuple[float, Vector]:
    """The largest eigenvalue of a symmetric map, and its eigenvector.

    Args:
        product: the map.
        start: a vector of norm one, the nearer to the eigenvector the better.
        magnitude: the one of largest magnitude instead.

    Example:
        >>> diagonal = torch.tensor([1.0, -4.0, 3.0])
        >>> start = [torch.ones(3) / 3**0.5]
        >>> value, (vector,) = lanczos(lambda v: [diagonal * v[0]], start)
        >>> round(value, 4), [round(abs(float(x)), 4) for x in vector]
        (3.0, [0.0, 0.0, 1.0])
        >>> round(lanczos(lambda v: [diagonal * v[0]], start, magnitude=True)[0], 4)
        -4.0
    """
    value, vector, before = 0.0, start, None
    for _ in range(CYCLES):
        value, vector, settled = _cycle(product, vector, magnitude)
        if settled or (before is not None and abs(value - before) <= CHANGE * abs(value)):
            break
        before = value
    return value, vector


def _cycle(
    product: Callable[[Vector], Vector], start: Vector, magnitude: bool
) -> tuple[float, Vector, bool]:
    basis = [start]
    diagonal: list[float] = []
    beside: list[float] = []
    value, weights = 0.0, torch.ones(1, dtype=torch.float64)
    settled = False
    for k in range(LARGEST):
        w = product(basis[k])
        diagonal.append(_inner(w, basis[k]))
        if not math.isfinite(diagonal[-1]):
            raise MissingError("products with the Hessian are not finite")
        for each in basis:  # against all, as rounding errors would bring them back
            part = _inner(w, each)
            w = [x - part * y for x, y in zip(w, each, strict=True)]
        norm = _norm(w)
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        for j, b in enumerate(beside):
            matrix[j, j + 1] = matrix[j + 1, j] = b
        values, vectors = torch.linalg.eigh(matrix)
        at = int(values.abs().argmax()) if magnitude else len(values) - 1
        value, weights = float(values[at]), vectors[:, at]
        # The residual of the pair is the last entry times what is left.
        settled = norm * abs(float(weights[-1])) <= TOLERANCE * abs(value)
        if settled or norm <= 1e-12 * max(abs(value), 1e-30):
            settled = True
            break
        if k + 1 < LARGEST:
            basis.append([x / norm for x in w])
            beside.append(norm)
    found = [torch.zeros_like(x) for x in start]
    for c, each in zip(weights.tolist(), basis, strict=False):
        foreach_add_(found, each, alpha=c)
    norm = _norm(found)
    return value, [x / norm for x in found], settled
