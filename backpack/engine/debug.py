"""What ``backpack(..., debug=True)`` prints: samples, rules and forms of all taps, where time goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor

from backpack.engine.costs import cost_of, described
from backpack.engine.refusals import Names, parameters_of
from backpack.forms.base import Form
from backpack.graph.survey import Graph
from backpack.graph.taps import MODEL_OUTPUT, Tap, notes
from backpack.quantities.base import BackpropExtension
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


def print_forms(
    forms: Iterable[tuple[Tensor, Form]], exts: Sequence[BackpropExtension], names: Names
) -> None:
    """Print what parameters' forms are made of, and what their values will take."""
    for parameter, form in forms:
        sizes = [(ext.savefield, cost_of(ext, form, None).bytes) for ext in exts]
        known = ", ".join(f"{name} {size / 2**20:.3g} MB" for name, size in sizes if size is not None)
        print(
            f"[DEBUG] form of {names(parameter)}: {described(form)}" + (f"; {known}" if known else "")
        )
