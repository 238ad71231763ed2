"""What backward passes leave: rows of ``V^T`` and individual gradients, as forms.

Letters: ``N`` samples, ``R`` rows of ``V^T`` (columns times samples).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from backpack import backpack
from backpack.own import (
    BackpropExtension,
    ColumnSource,
    ExactRoot,
    LeadingRoot,
    LossGradient,
    OutputBasis,
    SampledRoot,
)
from backpack.vivit.kept import Keep, Kept, Numbered
from backpack.vivit.rows import Rows, memory_of

COLUMN_FIELD, GRADIENT_FIELD = "_vivit_columns", "_vivit_gradients"
Self = TypeVar("Self", bound="Passes")


class Collected(NamedTuple):
    """What one backward pass leaves of each parameter."""

    columns: dict[Tensor, Kept]
    gradients: dict[Tensor, Kept]

    def take(self, place: str, parameter: Tensor, kept: Kept) -> None:
        found: dict[Tensor, Kept] = getattr(self, place)
        if parameter in found:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} was reached by two backward passes "
                "inside one block of LowRank; enter the block once for each pass (their samples are "
                "then joined), or call backward on the sum of the losses"
            )
        found[parameter] = kept


@dataclass
class Pass:
    """Rows of one backward pass, by parameter and then by number of samples."""

    samples: dict[Tensor, int] = field(default_factory=dict)
    columns: dict[int, Rows] = field(default_factory=dict)
    gradients: dict[int, Rows] = field(default_factory=dict)


class Passes:
    """A block that keeps the forms of backward passes; see :class:`backpack.vivit.LowRank`.

    Args:
        source: the columns' source; ``None``: none are kept.
        subsampling: the samples of columns, and of gradients.
        gradients: whether individual gradients are kept.
        precision: of products between rows.
        extensions: further quantities to compute in the same passes.
        options: what else :class:`backpack.backpack` takes.
    """

    def __init__(
        self,
        source: ColumnSource | None,
        subsampling: tuple[list[int] | None, list[int] | None],
        gradients: bool,
        precision: torch.dtype | None,
        extensions: Sequence[BackpropExtension],
        options: dict[str, Any],
    ) -> None:
        self._source, self._subsampling = Numbered(source), subsampling
        self._precision = precision
        self._keeps_gradients, self.extensions, self.options = gradients, tuple(extensions), options
        self._passes: list[Pass] = []
        self._open: tuple[backpack, Collected] | None = None
        self._order: dict[Tensor, None] = {}
        self._known: dict[Any, Any] = {}
        # Counts changes of the rows.
        self._state = 0
        # Whether samples are no longer known one by one, and the trace of what was left out.
        self._merged, self._lost = False, 0.0

    def __enter__(self: Self) -> Self:
        if self._open is not None:
            raise RuntimeError("this block of LowRank is open already")
        self._source.restart()
        collected = Collected({}, {})
        columns, gradients = self._subsampling
        exts: list[BackpropExtension] = [
            Keep(COLUMN_FIELD, self._source, columns, _delivery(collected, "columns"))
        ]
        if self._keeps_gradients:
            deliver = _delivery(collected, "gradients")
            exts.append(Keep(GRADIENT_FIELD, LossGradient(), gradients, deliver))
        block = backpack(*exts, *self.extensions, **self.options)
        self._open = block, collected
        block.__enter__()
        return self

    def __exit__(self, kind: Any, *exc: object) -> None:
        assert self._open is not None
        (block, collected), self._open = self._open, None
        block.__exit__(kind, *exc)
        for parameter in {**collected.columns, **collected.gradients}:
            for name in (COLUMN_FIELD, GRADIENT_FIELD):
                parameter.__dict__.pop(name, None)
        if kind is None and (collected.columns or collected.gradients):
            self._take(collected, self._source.sizes)

    def _take(self, collected: Collected, sizes: Sequence[int]) -> None:
        """Make rows of the forms of one backward pass, whose chunks have so many columns."""
        firsts = [sum(sizes[:number]) for number in range(len(sizes))]
        found = Pass()
        for parameter, (samples, pieces) in collected.columns.items():
            kept = samples if self._subsampling[0] is None else len(self._subsampling[0])
            scale = (samples / kept) ** 0.5 if kept else 1.0
            rows = found.columns.setdefault(samples, Rows(sum(sizes), kept, scale))
            rows.add(parameter, pieces, firsts)
            found.samples[parameter] = samples
        for parameter, (samples, pieces) in collected.gradients.items():
            kept = samples if self._subsampling[1] is None else len(self._subsampling[1])
            weight = samples / kept if kept else 1.0
            rows = found.gradients.setdefault(samples, Rows(1, kept, weight=weight))
            rows.add(parameter, pieces, [0])
            found.samples[parameter] = samples
        for samples, rows in found.gradients.items():
            if samples in found.columns and self._subsampling == (None, None):
                rows.share(found.columns[samples])
        self._passes.append(found)
        self._order |= {p: None for p in self._source.order if p in found.samples}
        self._order |= dict.fromkeys(found.samples)
        self._changed()

    def _changed(self) -> None:
        self._known.clear()
        self._state += 1

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that took part, in the order of the models that hold them."""
        return list(self._order)

    def release(self) -> None:
        """Let go of everything that was kept."""
        self._passes.clear()
        self._order.clear()
        self._merged, self._lost = False, 0.0
        self._changed()

    @property
    def samples(self) -> int:
        """Number of samples of all passes (the largest, where groups differ in it)."""
        return sum(max(each.samples.values(), default=0) for each in self._passes)

    @property
    def memory(self) -> int:
        """Bytes of what is kept, activations of the model among it."""
        sides = [r for p in self._passes for r in (*p.columns.values(), *p.gradients.values())]
        return memory_of(sides)

    @property
    def lost(self) -> float:
        """Trace of the part of ``G`` that :meth:`merge` has left out."""
        return self._lost

    def scale(self, factor: float) -> None:
        """Make the loss ``factor`` times what it was, ``G`` and gradients with it."""
        if not factor > 0:
            raise ValueError(f"factor must be positive, got {factor!r}")
        for each in self._passes:
            for rows in each.columns.values():
                rows.scale *= factor**0.5
            for rows in each.gradients.values():
                rows.scale *= factor
        self._lost *= factor
        self._changed()


def source_of(
    columns: Any, mc_samples: int = 1, top: int = 1, generator: torch.Generator | None = None
) -> ColumnSource | None:
    """The source that is called so.

    Raises:
        ValueError: if there is none.
    """
    for name, count in (("mc_samples", mc_samples), ("top", top)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a positive integer, got {count!r}")
    if columns is None or isinstance(columns, ColumnSource):
        return columns
    known = {
        "exact": ExactRoot(),
        "mc": SampledRoot(mc_samples, generator),
        "top": LeadingRoot(top),
        "jacobian": OutputBasis(),
    }
    if columns not in known:
        raise ValueError(f"columns must be one of {[*known]}, None or a source, got {columns!r}")
    return known[columns]


def checked(subsampling: Sequence[int] | None) -> list[int] | None:
    if subsampling is None:
        return None
    found = [int(each) for each in subsampling]
    if len(set(found)) < len(found):
        raise ValueError(f"subsampling {found} names a sample twice")
    return found


def _delivery(collected: Collected, place: str) -> Callable[[Tensor, Kept], None]:
    """Where :class:`Keep` brings forms; refers to nothing but what one pass leaves."""

    def deliver(parameter: Tensor, kept: Kept) -> None:
        collected.take(place, parameter, kept)

    return deliver
