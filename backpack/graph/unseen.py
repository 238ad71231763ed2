"""Model outputs that were made where no operation was seen: in scripted code, inside of transforms.

Capture does not know where their samples are. That is tried out when backward starts: a cotangent with
a number for each sample must arrive at the taps below with the numbers of their samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.autograd.graph import GradientEdge, Node

from backpack.graph.nodes import walk
from backpack.graph.outputs import ModelOutput
from backpack.graph.scaling import Starts, agree, along, powers, pulled
from backpack.graph.taps import MODEL_OUTPUT, Tap, notes
from backpack.graph.tracing import axis_at
from backpack.samples.axis import SampleAxis, regular_axis

_WHY = "it is made by operations that nobody has seen, and its rows depend on several samples"


def locate(outputs: Sequence[tuple[Node, ModelOutput]], taps: Sequence[tuple[Node, Tap]]) -> bool:
    """Find where the samples of such outputs are, or that they are mixed; whether there are any."""
    found = False
    for node, output in outputs:
        recording, below = output.recording, set(walk([node]))
        places = [
            (GradientEdge(where, tap.place), tap.own)
            for where, tap in taps
            if where in below and tap.recording.module() is recording.module() and not tap.own.lost
        ]
        places = [(edge, axis) for edge, axis in places if axis.size == recording.size]
        if places:
            axis = _axis(GradientEdge(node, output.place), output, places)
            axis = axis or regular_axis(recording.size or 0, recording.batch_dim).losing(_WHY)
            kept = notes(node)[MODEL_OUTPUT]
            kept[:] = [replace(each, own=axis) if each is output else each for each in kept]
            found = True
    return found


def _axis(edge: GradientEdge, output: ModelOutput, taps: Starts) -> SampleAxis | None:
    """The axis of the output whose rows depend on rows of the same samples at the taps below."""
    size, shape = output.recording.size or 0, output.shape
    places = [place for place, _ in taps]
    regular = [
        regular_axis(size, dim, outer, inner)
        for dim, length in enumerate(shape)
        if length and length % size == 0
        for outer, inner in dict.fromkeys(((1, length // size), (length // size, 1)))
    ]
    # The batch's place first.
    regular.sort(key=lambda axis: axis.dim != output.recording.batch_dim)
    plain = pulled([(edge, regular[0])], places, None) if regular else []
    for candidate in regular:
        scaled = pulled([(edge, candidate)], places, powers)
        reached = [
            agree(before, after, along(axis, before, powers))
            for before, after, (_, axis) in zip(plain, scaled, taps, strict=True)
            if before is not None and after is not None
        ]
        if reached and all(reached):
            return candidate
    try:
        return axis_at(edge, taps)
    except RuntimeError:  # what is scripted may not be differentiable twice
        return None
