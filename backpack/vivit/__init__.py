"""Curvature of low rank from one backward pass: its spectrum, its noise, and steps with it.

loss = lossfunc(model(X), y)
with LowRank() as curvature:
    loss.backward()
pairs = curvature.eigh(k=10)
noise = curvature.derivatives(pairs).snr
"""

from backpack.vivit.lowrank import Derivatives, LowRank, Noise, Pairs
from backpack.vivit.tangent import ntk

__all__ = ["Derivatives", "LowRank", "Noise", "Pairs", "ntk"]
