"""Figures of tutorials look like those of the benchmarks."""

from __future__ import annotations

from typing import Any

import matplotlib
from cycler import cycler

from benchmarks.pictures import FAINT, INK, LINES


def style(gallery: dict[str, Any], script: str) -> None:
    """Called before each script; what it draws with, where it says nothing else."""
    matplotlib.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=LINES),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.grid": False,
            "grid.color": FAINT,
            "legend.frameon": False,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
