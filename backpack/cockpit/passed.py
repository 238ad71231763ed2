"""One backward pass of a step, and the processes that share it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from backpack.cockpit.collect import Piece


class MissingError(Exception):
    """Something that a quantity needs is not there; the message says why."""


@dataclass
class Passed:
    """One backward pass of a step.

    Attributes:
        loss: its loss.
        share: the factor of its ``G_n`` in the step's gradient.
        pieces: what it has left, by parameter.
        curvature: trace and diagonal of curvature matrices, by matrix and parameter.
        columns: forms of sampled columns of the GGN, by parameter; ``None`` if they were not kept.
        losses: each sample's share of the loss; ``None`` where that cannot be read.
        unread: why it cannot.
        raw: parameters that meet the model's inputs.
    """

    loss: Tensor
    share: float = 1.0
    pieces: dict[Tensor, Piece] = field(default_factory=dict)
    curvature: dict[str, dict[Tensor, Any]] = field(default_factory=dict)
    columns: dict[Tensor, list[Any]] | None = None
    losses: Tensor | None = None
    unread: Exception | None = None
    raw: set[Tensor] = field(default_factory=set)

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


class Group:
    """Processes that train together, of which there is one."""

    size = 1
    first = True

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""
        return tensor
