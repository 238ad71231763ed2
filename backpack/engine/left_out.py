"""What a block left out, and why: quantities that a parameter cannot have, while the others go on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from backpack.quantities.reading import note_missing

Mode = Literal["raise", "warn", "skip"]
MODES: tuple[Mode, ...] = get_args(Mode)
# Refusals; other errors are never passed over.
REFUSALS = (NotImplementedError, ValueError)


class Missing(NamedTuple):
    """A quantity that a parameter does not have.

    Attributes:
        parameter: the parameter.
        name: its name in the extended model, or its shape.
        savefield: the quantity's field.
        reason: why.
    """

    parameter: Tensor
    name: str
    savefield: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: no {self.savefield}: {self.reason}"


class LeftOut(list[Missing]):
    """All that was left out in a block; ``print`` shows a line for each parameter and reason."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def reasons(self, parameter: Tensor) -> dict[str, str]:
        """Why a parameter has no value, by fields."""
        return {each.savefield: each.reason for each in self if each.parameter is parameter}

    def note(self, parameter: Tensor, name: str, fields: Iterable[str], reason: str) -> None:
        """Add quantities of a parameter that are missing for a reason."""
        known = self.reasons(parameter)
        for field in fields:
            if field not in known:
                self.append(Missing(parameter, name, field, reason))
                note_missing(parameter, field, reason)

    def warn(self, fields: Iterable[str], reason: str) -> None:
        """Say so, once in a block."""
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"backpack leaves out {', '.join(fields)}: {reason}", stacklevel=2)

    def __str__(self) -> str:
        lines: dict[tuple[str, str], list[str]] = {}
        for each in self:
            lines.setdefault((each.name, each.reason), []).append(each.savefield)
        if not lines:
            return "nothing was left out"
        return "\n".join(f"{name}: no {', '.join(f)}: {why}" for (name, why), f in lines.items())
