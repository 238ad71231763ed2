"""What the optimizer does to the parameters, in the memory of one copy of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backpack._torch import foreach_copy_, foreach_neg_, foreach_sub, foreach_sub_
from backpack.cockpit.norms import norms_of


class Moves:
    """Notes where parameters were before a step, and says what the step has added.

    Args:
        parameters: the parameters.

    Attributes:
        reference: where they were at the beginning, if distances to it are wanted.
        update: what the step has added to each, once it is over.
        norms: norms of the parameters before the step, ``[parameters]``.
        distances: norms of their distances to the beginning, if these are wanted.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.reference: list[Tensor] | None = None
        self.forget()

    def _now(self) -> list[Tensor]:
        # Asked anew each time: `p.data = ...` puts other memory in place.
        return [p.detach() for p in self.parameters]

    def forget(self) -> None:
        """No step has begun."""
        self._before: list[Tensor] | None = None
        self.update: list[Tensor] | None = None
        self.norms: Tensor | None = None
        self.distances: Tensor | None = None

    @torch.no_grad()
    def begin(self, distances: bool) -> None:
        """A step begins.

        Args:
            distances: whether the distances are wanted.
        """
        self.forget()
        now = self._now()
        if distances:
            if self.reference is None:
                self.reference = [p.clone() for p in now]
            self.reference = [r.to(p) for r, p in zip(self.reference, now, strict=True)]
            self._before = list(foreach_sub(now, self.reference))
            self.distances = norms_of(self._before)
            foreach_copy_(self._before, now)
        else:
            self._before = [p.clone() for p in now]
        self.norms = norms_of(now)

    @torch.no_grad()
    def end(self) -> None:
        """The step is over."""
        if self._before is not None:
            update, self._before = self._before, None
            foreach_sub_(update, self._now())
            foreach_neg_(update)
            self.update = update
