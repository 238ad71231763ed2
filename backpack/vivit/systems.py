"""Systems with the damped curvature, solved exactly; influence and predictive covariance.

Letters: ``N`` samples, ``C`` outputs, ``R`` rows of ``V^T`` (columns times samples).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backpack.vivit.matrices import Group, Matrices, fit, like, positive
from backpack.vivit.rows import inner, project


class Systems(Matrices):
    """``(G + damping I)^-1`` by the matrix inversion lemma."""

    def solve(
        self, damping: float, vectors: Sequence[Tensor] | None = None, group: Group = None
    ) -> list[Tensor]:
        """``(G + damping I)^-1 g``, exactly, by the matrix inversion lemma.

        ``[g - V (damping I + V^T V)^-1 V^T g] / damping``.

        Args:
            damping: positive.
            vectors: one tensor for each parameter of the group in place of the gradient ``g``.
            group: the parameters.

        Returns:
            One tensor for each parameter of the group.
        """
        parameters, delta = self._group(group), positive(damping)
        if vectors is None:
            right = [g.double() for g in self._total(parameters, True)]
            products = self._slopes(parameters, True) @ self._shares(parameters)
        else:
            right = [v.double() for v in vectors]
            fit(right, parameters, 0)
            lifted = [v.unsqueeze(0) for v in right]
            dtype = self._precision or torch.float64
            products = project(self._columns(parameters), parameters, lifted, dtype)[0]
        weights = self._inverse(parameters, delta, products.unsqueeze(1)).mT
        inside = self._combine_columns(weights, parameters, True)
        return like([(g - v[0]) / delta for g, v in zip(right, inside, strict=True)], parameters)

    def _inverse(self, parameters: list[Tensor], delta: float, right: Tensor) -> Tensor:
        """``(delta I + V^T V)^-1`` times columns."""
        gram = self._gram(parameters, exact=True)
        damped = gram + delta * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            raise ValueError(
                f"damping {delta:g} is below the rounding errors of the Gram matrix; take a larger "
                "one, or precision=torch.float64"
            )
        return torch.cholesky_solve(right, factor)

    def influence(
        self,
        test: Matrices | Sequence[int] | None = None,
        train: Sequence[int] | None = None,
        damping: float = 1e-3,
        group: Group = None,
    ) -> Tensor:
        """``g_t^T (G + damping I)^-1 g_s`` of individual gradients, ``[tests, trains]``.

        To first order, the loss of ``t`` rises by that much if ``s`` is left out (Koh, Liang, 2017).
        Gradients are those of shares of the loss: of a mean over ``N``, ``1/N`` of each sample's own.

        Args:
            test: the curvature whose samples are tests (``columns=None`` suffices), or places of
                samples of this one; all by default.
            train: places of samples of this one; all by default.
            damping: positive.
            group: the parameters.
        """
        self._refuse_merged("influences")
        parameters, delta = self._group(group), positive(damping)
        slopes = self._slopes(parameters, True)
        if isinstance(test, Matrices):
            test._refuse_merged("influences")
            dtype = self._precision or torch.float64
            others = test._gradients(test._group(parameters))
            direct = inner(others, self._gradients(parameters), parameters, dtype)
            left = inner(self._columns(parameters), others, parameters, dtype)
        else:
            direct, left = self._gradient_gram(parameters, True), slopes
            if test is not None:
                direct, left = direct[list(test)], left[:, list(test)]
        if train is not None:
            direct, slopes = direct[:, list(train)], slopes[:, list(train)]
        found = (direct - left.mT @ self._inverse(parameters, delta, slopes)) / delta
        return self._out(found, parameters)

    def covariance(self, test: Matrices, damping: float, group: Group = None) -> Tensor:
        """Covariance of a network's outputs if its parameters have covariance ``(G + damping I)^-1``.

        The predictive covariance of a linearized Laplace approximation, for a loss that is the negative
        log likelihood of all data (``N`` times a mean) and a prior of precision ``damping``.

        Args:
            test: ``LowRank("jacobian")`` of the inputs to predict at.
            damping: positive.
            group: the parameters.

        Returns:
            ``[tests, C, C]``.
        """
        parameters, delta = self._group(group), positive(damping)
        dtype = self._precision or torch.float64
        outputs, mine = test._columns(test._group(parameters)), self._columns(parameters)
        parts, first = [], 0
        left = inner(mine, outputs, parameters, dtype)
        solved = self._inverse(parameters, delta, left)
        for rows in outputs:
            here = slice(first, first + rows.count)
            first += rows.count
            shape = rows.columns, rows.samples
            direct = inner([rows], [rows], parameters, dtype).reshape(*shape, *shape)
            a, b = (x[:, here].reshape(-1, *shape) for x in (left, solved))
            part = direct.diagonal(0, 1, 3).movedim(2, 0) - torch.einsum("rcn,rdn->ncd", a, b)
            parts.append(part / delta)
        return self._out(torch.cat(parts), parameters)
