"""A training monitor that one leaves switched on, built on the quantities.

    from backpack.cockpit import watch

    monitor = watch(model, optimizer, every=10, path="run.jsonl")

See :func:`watch`. The training loop is not touched.
"""

from backpack.cockpit.alarms import (
    Alarm,
    AlphaRange,
    DeadUnits,
    Exploding,
    Finding,
    HardSamples,
    NonFinite,
    Spike,
    UpdateRatio,
    Vanishing,
)
from backpack.cockpit.callbacks import LightningCockpit, TransformersCockpit
from backpack.cockpit.cockpit import Cockpit
from backpack.cockpit.configurations import hess_trace, tic_diag, tic_trace
from backpack.cockpit.history import History
from backpack.cockpit.measures import Measure
from backpack.cockpit.monitor import Monitor
from backpack.cockpit.passed import MissingError
from backpack.cockpit.plotter import CockpitPlotter
from backpack.cockpit.sinks import CSV, TensorBoard
from backpack.cockpit.step import Step
from backpack.cockpit.watching import watch

__all__ = [
    "CSV",
    "Alarm",
    "AlphaRange",
    "Cockpit",
    "CockpitPlotter",
    "DeadUnits",
    "Exploding",
    "Finding",
    "HardSamples",
    "History",
    "LightningCockpit",
    "Measure",
    "MissingError",
    "Monitor",
    "NonFinite",
    "Spike",
    "Step",
    "TensorBoard",
    "TransformersCockpit",
    "UpdateRatio",
    "Vanishing",
    "hess_trace",
    "tic_diag",
    "tic_trace",
    "watch",
]
