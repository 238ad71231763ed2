"""Matrices of inner products between rows, for groups of parameters, each computed once.

Letters: ``N`` samples, ``R`` rows of ``V^T`` (columns times samples).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backpack.vivit.passes import Passes
from backpack.vivit.rows import Beside, Rows, combine, inner

Group = nn.Module | Iterable[Tensor] | None


class Matrices(Passes):
    """Groups of parameters, and the matrices that all results are made from."""

    def _refuse_merged(self, what: str) -> None:
        if self._merged:
            raise RuntimeError(
                f"{what} are of single samples, which are no longer known after merge(); ask before, "
                "give more memory, or go through the data again (backpack.vivit.derivatives_over)"
            )

    def _group(self, group: Group) -> list[Tensor]:
        if not self._passes:
            raise RuntimeError("no backward pass has run inside this block of LowRank")
        if group is None:
            return self.parameters
        if isinstance(group, nn.Module):
            group = [p for p in group.parameters() if p in self._order]
        parameters = list(group)
        if not parameters:
            raise ValueError("a group has no parameters")
        if len(set(parameters)) < len(parameters):
            raise ValueError("a group names a parameter twice")
        for parameter in parameters:
            if parameter not in self._order:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} took no part in the backward pass "
                    "(frozen, unused, or of another model); leave it out of the group"
                )
        return parameters

    def _sides(self, place: str, parameters: list[Tensor]) -> tuple[list[Rows], list[int]]:
        """Rows of each pass, and its number of samples."""
        if place == "gradients" and not self._keeps_gradients:
            raise RuntimeError("individual gradients are asked for, but gradients=False was given")
        rows, samples = [], []
        for each in self._passes:
            sizes = {each.samples[p] for p in parameters if p in each.samples}
            if len(sizes) > 1:
                raise ValueError(
                    f"parameters of one group meet batches of different sizes, {sorted(sizes)}: their "
                    "samples cannot be matched; ask for groups of one size each"
                )
            for size in sizes:
                rows.append(getattr(each, place)[size])
                samples.append(size)
        return rows, samples

    def _columns(self, parameters: list[Tensor]) -> list[Rows]:
        return self._sides("columns", parameters)[0]

    def _gradients(self, parameters: list[Tensor]) -> list[Rows]:
        return self._sides("gradients", parameters)[0]

    def _samples(self, parameters: list[Tensor]) -> int:
        return sum(self._sides("columns", parameters)[1])

    def _dtype(self, parameters: list[Tensor]) -> torch.dtype:
        """Precision of the products between rows, and of eigenvalues, which are no better."""
        return self._precision or torch.promote_types(parameters[0].dtype, torch.float32)

    def _once(
        self, what: str, parameters: list[Tensor], exact: bool, make: Callable[[Any], Any]
    ) -> Any:
        """A matrix of a group, computed once; ``exact``: in double, unless told otherwise."""
        dtype, group = self._precision or (torch.float64 if exact else None), frozenset(parameters)
        for precision in {dtype, torch.float64}:
            if (what, group, precision) in self._known:
                return self._known[what, group, precision]
        found = self._known[what, group, dtype] = make(dtype)
        return found

    def _gram(self, parameters: list[Tensor], exact: bool = False) -> Tensor:
        """``V^T V [R, R]``, in double precision."""
        rows = self._columns(parameters)

        def make(dtype: torch.dtype | None) -> Tensor:
            if not self._joins(parameters):
                return inner(rows, rows, parameters, dtype)
            # The gradient is one more column.
            (mine,), (gradients,) = rows, self._gradients(parameters)
            both = [Beside(mine, gradients)]
            whole, group = inner(both, both, parameters, dtype), frozenset(parameters)
            self._known["slopes", group, dtype] = whole[: mine.count, mine.count :]
            self._known["gradients", group, dtype] = whole[mine.count :, mine.count :]
            return whole[: mine.count, : mine.count]

        return self._once("gram", parameters, exact, make)

    def _joins(self, parameters: list[Tensor]) -> bool:
        """Whether products with individual gradients cost little beside those of columns."""
        if not self._keeps_gradients:
            return False
        rows = self._columns(parameters) + self._gradients(parameters)
        same = len(rows) == 2 and len({(each.samples, each.scale) for each in rows}) == 1
        return same and rows[0].scale == 1 and rows[0].columns > 2

    def _slopes(self, parameters: list[Tensor], exact: bool = False) -> Tensor:
        """``V^T g_n [R, N]``."""
        rows, gradients = self._columns(parameters), self._gradients(parameters)
        make = lambda d: inner(rows, gradients, parameters, d)  # noqa: E731
        return self._once("slopes", parameters, exact, make)

    def _gradient_gram(self, parameters: list[Tensor], exact: bool = False) -> Tensor:
        """``g_n^T g_m [N, N]``."""
        rows = self._gradients(parameters)
        return self._once("gradients", parameters, exact, lambda d: inner(rows, rows, parameters, d))

    def _spectrum(self, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the Gram matrix, largest first, and its eigenvectors."""

        def make(_: Any) -> tuple[Tensor, Tensor]:
            gram = self._gram(parameters).to(self._dtype(parameters))
            values, vectors = torch.linalg.eigh(gram)
            return values.flip(0).double(), vectors.flip(1).double()

        found: tuple[Tensor, Tensor] = self._once("spectrum", parameters, False, make)
        return found

    def _shares(self, parameters: list[Tensor]) -> Tensor:
        """Weights of individual gradients in the gradient, ``[N]``: those of a subset count more."""
        parts = [
            torch.full((rows.samples,), rows.weight, dtype=torch.float64)
            for rows in self._gradients(parameters)
        ]
        return torch.cat(parts).to(parameters[0].device)

    def _combine_columns(
        self, weights: Tensor, parameters: list[Tensor], exact: bool = False
    ) -> list[Tensor]:
        dtype = self._precision or (torch.float64 if exact else None)
        return combine(self._columns(parameters), parameters, weights, dtype)

    def _total(self, parameters: list[Tensor], exact: bool = False) -> list[Tensor]:
        """The gradient, from individual ones."""
        dtype = self._precision or (torch.float64 if exact else None)
        weights = self._shares(parameters).unsqueeze(0)
        found = combine(self._gradients(parameters), parameters, weights, dtype)
        return [each[0] for each in found]

    def _out(self, x: Tensor, group: Any) -> Tensor:
        """A result, in the precision of the parameters."""
        parameters = group if isinstance(group, list) else self._group(group)
        return x.to(torch.promote_types(parameters[0].dtype, torch.float32))


def positive(damping: float) -> float:
    delta = float(damping)
    if not delta > 0:
        raise ValueError(f"damping must be positive, got {damping!r}")
    return delta


def fit(vectors: Sequence[Tensor], parameters: Sequence[Tensor], lead: int) -> None:
    shapes = [v.shape[lead:] for v in vectors]
    counts = {v.shape[:lead] for v in vectors}
    if shapes != [p.shape for p in parameters] or len(counts) > 1:
        before = "K, " if lead else ""
        raise ValueError(
            f"vectors of shapes {[list(v.shape) for v in vectors]} do not fit the parameters of the "
            f"group, [{before}*p] for p of {[list(p.shape) for p in parameters]}"
        )


def like(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    return [t.to(p.dtype) for t, p in zip(tensors, parameters, strict=True)]
