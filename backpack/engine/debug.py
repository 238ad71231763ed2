"""What ``backpack(..., debug=True)`` prints: samples, the rule of every tap, and where time goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor

from backpack.engine.refusals import Names, parameters_of
from backpack.graph.survey import Graph
from backpack.graph.taps import MODEL_OUTPUT, Tap, notes
from backpack.samples.axis import SampleAxis

# So many rows are written out.
SHOWN = 12
_NOTHING: AbstractContextManager[None] = nullcontext()


class Stopwatch:
    """Adds up what is spent inside ``with watch(what):``, if it is asked to."""

    def __init__(self, runs: bool) -> None:
        self.runs = runs
        self.costs: dict[Tensor | str, float] = {}

    def __call__(self, what: Tensor | str) -> AbstractContextManager[None]:
        return self._measured(what) if self.runs else _NOTHING

    @contextmanager
    def _measured(self, what: Tensor | str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.costs[what] = self.costs.get(what, 0.0) + time.perf_counter() - start

    def print(self, names: Names) -> None:
        """Print the costs, by what they are spent for."""
        for what, seconds in self.costs.items():
            name = what if isinstance(what, str) else f"quantities of {names(what)}"
            print(f"[DEBUG] {name}: {1e3 * seconds:.2f} ms")


def print_outputs(graph: Graph) -> None:
    """Print which samples the rows of the models' outputs belong to: fields follow the samples."""
    found = {}
    for node in graph.nodes:
        for border in notes(node).get(MODEL_OUTPUT, ()):
            found[id(border.recording), border.place, border.shape] = border
    for border in found.values():
        if border.batch is not None and border.recording.taps:
            module = type(border.recording.module()).__name__
            print(f"[DEBUG] output {tuple(border.shape)} of {module}: {_place(border.batch)}")


def _place(axis: SampleAxis) -> str:
    """Where samples are."""
    if axis.lost:
        return f"samples are not apart ({axis.lost})"
    where = f"samples {axis.size}, axis {axis.dim}"
    if axis.picked is None:
        return where
    rows = axis.picked.samples.tolist()
    shown = ", ".join(map(str, rows[:SHOWN])) + (", ..." if len(rows) > SHOWN else "")
    return f"{where}, rows of samples {shown}"


def print_taps(taps: Iterable[Tap], names: Names) -> None:
    """Print operations in which parameters meet data, with their rules."""
    for tap in taps:
        who = ", ".join(names(p) for s in tap.sources for p in parameters_of(s))
        print(f"[DEBUG] tap {tap.op}: {who} ({_place(tap.batch)}), {tap.rule}")
