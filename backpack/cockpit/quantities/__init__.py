"""The original's 19 quantities, with its values, where its users import them; ours: ``measures.py``."""

from backpack.cockpit.quantities.alpha import Alpha
from backpack.cockpit.quantities.curvature import HessMaxEV, HessTrace, TICDiag, TICTrace
from backpack.cockpit.quantities.first import (
    CABS,
    Distance,
    EarlyStopping,
    GradNorm,
    InnerTest,
    Loss,
    MeanGSNR,
    NormTest,
    OrthoTest,
    Parameters,
    Time,
    UpdateSize,
)
from backpack.cockpit.quantities.histograms import GradHist1d, GradHist2d

__all__ = [
    "CABS",
    "Alpha",
    "Distance",
    "EarlyStopping",
    "GradHist1d",
    "GradHist2d",
    "GradNorm",
    "HessMaxEV",
    "HessTrace",
    "InnerTest",
    "Loss",
    "MeanGSNR",
    "NormTest",
    "OrthoTest",
    "Parameters",
    "TICDiag",
    "TICTrace",
    "Time",
    "UpdateSize",
]
