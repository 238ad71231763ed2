"""What a backward pass leaves of curvature: traces, diagonals, sampled columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backpack.cockpit.collect import Careful, nested, new_bytes, released
from backpack.own import (
    ColumnSource,
    Context,
    Dense,
    ExactRoot,
    Form,
    HessianRoot,
    SampledRoot,
    Together,
)


class Curvature(Careful):
    """Trace of a parameter's block of a curvature matrix, and its diagonal if that is wanted.

    Args:
        field: the attribute that holds the value until the pass is over.
        failed: called with the name of the matrix, and an error that does not let it be computed.
        matrix: ``"hessian"``, ``"ggn"`` or ``"ggn_mc"`` (the GGN, with sampled targets).
        diagonal: whether the diagonal is wanted.
        generator: source of randomness, one of the monitor's own: training's is left alone.
    """

    needs_gradient = False
    signed = summed = True
    of_complex = None

    def __init__(
        self,
        field: str,
        failed: Callable[[str, Exception], None],
        matrix: str,
        diagonal: bool = False,
        generator: torch.Generator | None = None,
        draws: int = 1,
    ) -> None:
        super().__init__(field, failed)
        self.matrix, self.diagonal = matrix, diagonal
        self.per_sample = not diagonal
        if matrix == "ggn_mc":
            self.source: ColumnSource = SampledRoot(draws, generator)
        else:
            self.source = ExactRoot() if matrix == "ggn" else HessianRoot()

    def reduce(self, form: Form, sign: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.guarded(
            self.matrix, lambda: self._reduce(form, sign), lambda: self._nothing(form.like, form.shape)
        )

    def _nothing(self, like: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        nothing = torch.zeros((), dtype=torch.float64, device=like.device)
        return nothing, like.detach().new_zeros(shape) if self.diagonal else None

    def _reduce(self, form: Form, sign: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            if self.diagonal or isinstance(form, Together):
                diagonal = form.square_sum(sign)
                return diagonal.double().sum(), diagonal if self.diagonal else None
            if sign is None:
                return form.squared_norms().double().sum(), None
            total = torch.zeros((), dtype=torch.float64, device=form.like.device)
            for v in range(form.columns):
                norms = form.take(slice(v, v + 1), slice(None)).squared_norms()
                total = total + (norms * sign[v]).double().sum()
            return total, None

    def add(self, state: Any, other: Any) -> Any:
        diagonal = None if state[1] is None else state[1] + other[1]
        return state[0] + other[0], diagonal

    def zero(self, context: Context) -> Any:
        return self._nothing(context.parameter, context.parameter.shape)


class KeptColumns(Careful):
    """Forms of sampled columns of the GGN, kept until the step's update is known.

    Args:
        field: the attribute that holds them until the pass is over.
        failed: called with ``columns`` and an error that does not let them be kept.
        generator: source of randomness.
    """

    needs_gradient = False
    every_column = True
    of_complex = None

    def __init__(
        self,
        field: str,
        failed: Callable[[str, Exception], None],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(field, failed)
        self.source: ColumnSource = SampledRoot(1, generator)
        self.prepare(0)

    def prepare(self, limit: int, first: bool = True) -> None:
        """A pass begins, of a step whose forms may take so many bytes."""
        self.limit = limit
        if first:
            self.held = 0
            self._storages: set[int] = set()

    @property
    def full(self) -> bool:
        """Whether they took more."""
        return self.held > self.limit

    def reduce(self, form: Form, sign: Tensor | None = None) -> list[Form]:
        return self.guarded("columns", lambda: self._reduce(form), list)

    def _reduce(self, form: Form) -> list[Form]:
        with torch.no_grad():
            through = any(hasattr(each, "vjp") for each in nested(form))
            form = Dense(form.dense()) if through else released(form)
            self.held += new_bytes(form, self._storages)
            return [] if self.full else [form]
