"""Several forward passes below one loss: is row ``n`` of each the same sample, or another one?

Both are common. Two views of the same samples are compared (siamese networks), a loss has a term for
each of two passes; or the batch comes in parts, one forward pass for each sample of another size or
each step of an episode. What the graph shows is used: rows that meet are of one sample. Rows that are
joined to a longer batch, and single rows whose losses are added up, may be either: the user says it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from torch.autograd.graph import Node

from backpack.graph.nodes import children_of, kind_of, upwards, walk
from backpack.graph.taps import MODEL_OUTPUT, TAPS, Place, Recording, notes

Forwards = Literal["same", "further"]
FORWARDS: tuple[Forwards, ...] = get_args(Forwards)

_JOINS = frozenset({"Cat", "Stack"})


def passes_below(roots: Sequence[Node]) -> list[Recording]:
    """The forward passes that a backward pass goes through, in the order in which they ran."""
    found = {each.number: each for node in walk(roots) for each in _passes_at(notes(node))}
    return [found[number] for number in sorted(found)]


def _passes_at(data: dict) -> Iterable[Recording]:
    """Forward passes with parameters that a node is an output or an operation of."""
    yield from (b.recording for b in data.get(MODEL_OUTPUT, ()) if b.recording.taps)
    yield from (tap.recording for tap in data.get(TAPS, ()))


def place_one_after_another(passes: Sequence[Recording]) -> None:
    """Samples of each forward pass are further ones."""
    total = sum(each.size or 0 for each in passes)
    first = 0
    for each in passes:
        each.place = Place(first, total)
        first += each.size or 0


def forget_places(passes: Iterable[Recording]) -> None:
    """Forward passes are about the same samples again."""
    for each in passes:
        each.place = None


def ambiguous(roots: Sequence[Node]) -> str | None:
    """Why samples of several forward passes may be the same or not, as far as the graph shows."""
    walk = _Walk(roots)
    if len(walk.passes) < 2 or walk.chained:
        return None
    for node in walk.meetings:
        if kind_of(node) in _JOINS:
            return f"their outputs are joined to a longer batch (at {node.name()})"
    if not walk.met and all(each.size == 1 for each in walk.passes.values()):
        return "each of one sample, whose losses are added up"
    return None


class _Walk:
    """Where outputs of different forward passes come together.

    Attributes:
        passes: the forward passes, by their numbers.
        meetings: nodes with outputs of different passes below different children.
        met: whether some of these compute more than a number, and do more than join them.
        chained: whether an output of one is an input of another.
    """

    def __init__(self, roots: Sequence[Node]) -> None:
        self.passes: dict[int, Recording] = {}
        self.meetings: list[Node] = []
        self.met = self.chained = False
        self.below: dict[Node, frozenset[int]] = {}
        for node in upwards(roots, self._enter):
            if node not in self.below:
                self.below[node] = self._leave(node)

    def _enter(self, node: Node) -> list[Node]:
        here = {each.number: each for each in _passes_at(notes(node))}
        if not here:
            return children_of(node)
        self.passes |= here
        self.below[node] = frozenset(here)
        self.chained |= any(
            each.number not in here for n in walk([node]) for each in _passes_at(notes(n))
        )
        return []

    def _leave(self, node: Node) -> frozenset[int]:
        children = [self.below[child] for child in children_of(node)]
        found = frozenset[int]().union(*children)
        apart = [numbers for numbers in children if numbers]
        if len(found) > 1 and len(set(apart)) > 1:
            self.meetings.append(node)
            number = any(not shape.shape for shape in node._input_metadata)
            self.met |= not number and kind_of(node) not in _JOINS
        return found
