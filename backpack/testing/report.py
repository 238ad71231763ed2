"""What a comparison with brute force has found."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Report:
    """What :func:`check` found: the largest relative error of each parameter and quantity.

    Errors are relative to the parameter's largest entry, or to a thousandth of the largest entry of
    all parameters if that is more (gradients that vanish by symmetry are rounding noise). They are
    infinite where a value is not a number, has the wrong shape, is missing although the parameter has a
    gradient, or is there although it has none.
    """

    tolerance: float
    errors: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest error of all."""
        return max(self.errors.values(), default=0.0)

    @property
    def ok(self) -> bool:
        """Whether all errors are within the tolerance."""
        return all(error <= self.tolerance for error in self.errors.values())

    def __str__(self) -> str:
        quantities = list(dict.fromkeys(q for _, q in self.errors))
        names = list(dict.fromkeys(n for n, _ in self.errors))
        width = max([len(n) for n in names], default=0)
        widths = [max(len(q), 8) for q in quantities]
        lines = [" " * width + "  " + "  ".join(map(str.rjust, quantities, widths))]
        for name in names:
            cells = [f"{self.errors[name, q]:.1e}" for q in quantities]
            lines.append(f"{name:<{width}}  " + "  ".join(map(str.rjust, cells, widths)))
        verdict = "agrees with" if self.ok else "DISAGREES with"
        lines.append(
            f"backpack {verdict} brute-force autograd: largest relative error {self.worst:.1e}, "
            f"tolerance {self.tolerance:.0e}"
        )
        return "\n".join(lines)


def error_of(value: Tensor | None, reference: Tensor, least: float) -> float:
    """The largest difference, relative to the largest entry; a missing value stands for zeros."""
    value = torch.zeros_like(reference) if value is None else value
    if value.shape != reference.shape or value.is_complex() != reference.is_complex():
        return float("inf")
    value = value.to(reference)
    if not reference.numel():
        return 0.0
    error = float((value - reference).abs().max()) / (max(float(reference.abs().max()), least) or 1.0)
    return float("inf") if error != error else error
