"""Multiplication by a constant."""

from __future__ import annotations

from torch import Tensor, nn


class ScaleModule(nn.Module):
    """Multiply the input by a constant: ``weight * x``.

    Args:
        weight: the constant, not a parameter.

    Raises:
        ValueError: if ``weight`` is not a ``float``.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not isinstance(weight, float):
            raise ValueError(
                f"ScaleModule: weight must be a float, but got {weight!r} of type "
                f"{type(weight).__name__}."
            )
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        """The scaled input."""
        return input * self.weight

    def extra_repr(self) -> str:
        """The constant."""
        return f"weight={self.weight}"
