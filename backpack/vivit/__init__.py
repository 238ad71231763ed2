"""Curvature of low rank from one backward pass: its spectrum, its noise, and steps with it.

loss = lossfunc(model(X), y)
with LowRank() as curvature:
loss.backward()
pairs = curvature.eigh(k=10)
noise = curvature.derivatives(pairs).snr
"""

from backpack.vivit.computations import (
    DirectionalDampedNewtonComputation,
    DirectionalDerivativesComputation,
    EighComputation,
    EigvalshComputation,
)
from backpack.vivit.data import derivatives_over, over
from backpack.vivit.figures import draw_noise, draw_overlaps, draw_spectrum
from backpack.vivit.lanczos import Density, Ritz, lanczos, spectral_density
from backpack.vivit.lowrank import Derivatives, Eigenpairs, LowRank, Noise
from backpack.vivit.operators import GGN, Hessian, Operator
from backpack.vivit.spaces import overlap
from backpack.vivit.tangent import ntk

__all__ = [
    "Density",
    "Derivatives",
    "DirectionalDampedNewtonComputation",
    "DirectionalDerivativesComputation",
    "EighComputation",
    "EigvalshComputation",
    "GGN",
    "Hessian",
    "LowRank",
    "Noise",
    "Operator",
    "Eigenpairs",
    "Ritz",
    "derivatives_over",
    "draw_noise",
    "draw_overlaps",
    "draw_spectrum",
    "lanczos",
    "ntk",
    "over",
    "overlap",
    "spectral_density",
]
