"""One backward pass of a step, and the processes that share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backpack.cockpit.collect import Piece
from backpack.cockpit.histograms import Entries
from backpack.cockpit.small import Small


class MissingError(Exception):
    """Something that a quantity needs is not there; the message says why."""


@dataclass
class Passed:
    """One backward pass of a step.

    Attributes:
        loss: its loss.
        share: the factor of its ``G_n`` in the step's gradient.
        pieces: what it has left, by parameter.
        small: individual gradients of parameters of few entries.
        entries: of these, for histograms.
        curvature: trace and diagonal of curvature matrices, by matrix and parameter.
        columns: forms of sampled columns of the GGN, by parameter; ``None`` if they were not kept.
        losses: each sample's share of the loss; ``None`` where that cannot be read.
        unread: why it cannot.
        raw: parameters that meet the model's inputs.
    """

    loss: Tensor
    share: float = 1.0
    pieces: dict[Tensor, Piece] = field(default_factory=dict)
    small: list[Small] = field(default_factory=list)
    entries: list[Entries] = field(default_factory=list)
    curvature: dict[str, dict[Tensor, Any]] = field(default_factory=dict)
    columns: dict[Tensor, list[Any]] | None = None
    losses: Tensor | None = None
    unread: Exception | None = None
    raw: set[Tensor] = field(default_factory=set)

    def has(self, part: str) -> bool:
        """Whether a part of the pieces (``ends``) was computed for all parameters."""
        together = {p for small in self.small for p in small.parameters}
        alone = [piece for p, piece in self.pieces.items() if p not in together]
        known = all(part in small.sums for small in self.small)
        return bool(self.pieces) and known and all(getattr(each, part) is not None for each in alone)

    @property
    def keeps(self) -> bool:
        """Whether there are forms to project with."""
        pieces = (piece for piece in self.pieces.values() if piece.reached)
        return any(small.kept for small in self.small) or any(p.form is not None for p in pieces)

    def merge_into(self, first: Passed) -> None:
        """Add what is as large as a parameter to that of another pass: it is there once."""
        ratio = self.share / first.share
        for p, piece in self.pieces.items():
            other = first.pieces.get(p)
            if other is None:
                continue
            if piece.gradient is not None and other.gradient is not None:
                other.gradient = _added(other.gradient, piece.gradient, ratio, other.merged)
                if piece.squares is not None and other.squares is not None:
                    other.squares = _added(other.squares, piece.squares, ratio**2, other.merged)
                piece.gradient = piece.squares = None
                piece.merged = other.merged = True
        for matrix, mine in self.curvature.items():
            theirs = first.curvature.get(matrix, {})
            for p in [p for p in mine if p in theirs]:
                trace, diagonal = mine.pop(p)
                before, known = theirs[p]
                if known is not None and diagonal is not None:
                    known = known + diagonal * ratio
                theirs[p] = before + trace * ratio, known

    @property
    def samples(self) -> int:
        """Number of samples.

        Raises:
            MissingError: if parameters meet different numbers of them.
        """
        sizes = {piece.samples for piece in self.pieces.values()}
        if len(sizes) != 1:
            raise MissingError(
                "parameters meet different numbers of samples"
                if sizes
                else "no pass through the model was seen"
            )
        return sizes.pop()

    def rows(
        self,
        parameters: Sequence[Tensor],
        alone: Callable[[Piece], Tensor | None],
        together: Callable[[Small], Tensor | None],
    ) -> Tensor | None:
        """Numbers for each parameter and sample, ``[parameters, ..., N]``; zeros where there is none.

        Args:
            parameters: the parameters.
            alone: a piece -> its numbers, ``[..., N]``, or ``None`` if they were not computed.
            together: the same for several parameters at once.

        Raises:
            MissingError: if parameters meet different numbers of samples.
        """
        found: dict[Tensor, Tensor] = {}
        if not self.samples:
            return None
        for small in self.small:
            rows = together(small)
            if rows is None:
                return None
            if len(small.parameters) == len(parameters):
                return rows
            found |= zip(small.parameters, rows, strict=True)
        for p, piece in self.pieces.items():
            if p not in found:
                row = alone(piece)
                if row is None:
                    return None
                found[p] = row
        like = next(iter(found.values()))
        zeros = torch.zeros_like(like) if len(found) < len(parameters) else like
        return torch.stack([found.get(p, zeros).to(zeros) for p in parameters]).double()


def _added(total: Tensor, part: Tensor, factor: float, ours: bool) -> Tensor:
    """The sum, in the memory of the total if that is nobody else's."""
    return total.add_(part, alpha=factor) if ours else total.add(part, alpha=factor)


class Group:
    """Processes that train together, of which there is one."""

    size = 1
    first = True

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""
        return tensor
