"""Eigenpairs, and what samples say about slope and curvature along them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from backpack.vivit.lowrank import LowRank


class Noise(NamedTuple):
    """Signal-to-noise ratios of directions: squared mean over variance, over samples.

    Attributes:
        slopes: of slopes, ``[K]``.
        curvatures: of curvatures, ``[K]``.
    """

    slopes: Tensor
    curvatures: Tensor


class Derivatives(NamedTuple):
    """Slope and curvature of every sample's loss along directions.

    Attributes:
        gammas: ``e_k^T g_n`` with ``g_n`` the gradient of ``N l_n``, ``[N, K]``. The sign of a
            direction is arbitrary.
        lambdas: ``e_k^T G_n e_k`` with ``G_n`` the GGN of ``N l_n``, ``[N, K]``.
    """

    gammas: Tensor
    lambdas: Tensor

    @property
    def snr(self) -> Noise:
        """Signal-to-noise ratios of slopes and of curvatures."""
        return Noise(*(x.mean(0).square() / x.var(0, unbiased=False) for x in self))


@dataclass(eq=False)
class Eigenpairs:
    """Leading eigenvalues of the GGN of a group of parameters, and their eigenvectors.

    Attributes:
        values: ``[K]``, largest first.
        parameters: the group.
        curvature: where they come from.
        coefficients: the Gram matrix's eigenvectors, ``[R, K]``: those of the rows in ``vectors``.
    """

    values: Tensor
    parameters: list[Tensor]
    curvature: LowRank = field(repr=False)
    coefficients: Tensor = field(repr=False)
    _state: int = field(repr=False, default=0)

    @property
    def current(self) -> bool:
        """Whether the rows are still those that the coefficients are about."""
        return self._state == self.curvature._state

    @cached_property
    def vectors(self) -> list[Tensor]:
        """For each parameter of the group ``[K, *p]``; orthonormal over the group."""
        if not self.current:
            raise RuntimeError(
                "the curvature has changed since these eigenpairs were computed (a further pass, or "
                "merge); ask for their vectors before, or compute them anew"
            )
        found = self.curvature._combine_columns(self.coefficients.mT, self.parameters)
        squares = self.values.new_zeros(len(self), dtype=torch.float64)
        for v in found:
            squares += (
                torch.linalg.vector_norm(v.reshape(len(v), v.shape[1:].numel()), dim=1)
                .double()
                .square()
            )
        lengths = squares.sqrt().clamp(min=float(torch.finfo(torch.float32).tiny))
        return [v.div_(lengths.to(v).reshape(-1, *(1 for _ in v.shape[1:]))) for v in found]

    def __len__(self) -> int:
        return len(self.values)
