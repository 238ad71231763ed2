"""Where samples are in the graph of a derivative: from how cotangents with a number for each arrive.

That takes some passes through the graph, and is done once for each kind of graph (its operations, their
order and shapes, and the axes of its taps), and again at a low rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack._torch import leaf_of
from backpack.graph.nodes import ENTRYWISE, PICKING, TERMWISE, is_linear, kind_of
from backpack.graph.region import ALL, Candidate, Region, shape_at
from backpack.graph.scaling import agree, along, powers, pulled
from backpack.graph.taps import TAPS, Tap, notes
from backpack.graph.tracing import axis_at
from backpack.samples.axis import SampleAxis

# A place in the graph: the number of a node in the region's order, and that of its output.
Place = tuple[int, int]
# What was found is found again after so many passes.
AGAIN_AFTER = 200
_CAPACITY = 256
# Products of matrices one by one.
_BATCHED = frozenset({"Bmm", "Baddbmm"})


@dataclass
class Followed:
    """What was found.

    Attributes:
        starts: where samples are last apart below the roots, with their axes; ``None``: the tap's.
        axes: the sample axes of places below that reach parameters other than through a tap.
        arrived: those of them at which cotangents arrive.
        bent: nodes below a curved operation that couples samples.
        unseen: those starts that depend on passes inside of transforms only.
        mixed: taps of the model in whose rows several samples are mixed.
        certain: whether no other axis fits as well.
        uses: for how many passes it has served.
    """

    starts: dict[Place, Candidate | None] = field(default_factory=dict)
    axes: dict[Place, Candidate | None] = field(default_factory=dict)
    arrived: set[Place] = field(default_factory=set)
    bent: set[int] = field(default_factory=set)
    unseen: list[Place] = field(default_factory=list)
    mixed: list[Place] = field(default_factory=list)
    certain: bool = True
    uses: int = 0


_known: dict[int, Followed] = {}


def forget() -> None:
    """Follow the samples of every graph anew."""
    _known.clear()


def follow(region: Region, roots: Sequence[GradientEdge], anew: bool = False) -> Followed:
    """Where samples are below the roots; ``anew``: whatever is known of graphs of this kind."""
    key = _signature(region)
    found = None if anew else _known.get(key)
    if found is not None and found.uses < AGAIN_AFTER:
        found.uses += 1
        return found
    found = _Follower(region).follow(roots)
    if len(_known) >= _CAPACITY:
        _known.clear()
    picks = any(_may_change(region, node, found) for node in region.order)
    if found.certain and found.starts and not found.mixed and not picks:
        _known[key] = found
    return found


def _may_change(region: Region, node: Node, found: Followed) -> bool:
    """Whether an operation may treat other samples alike the next time: by an index, or a matrix."""
    named = found.axes.get((region.index[node], 0))
    if kind_of(node) in _BATCHED and named is not None and named[1].dim == 0:
        return False  # each sample meets a matrix of its own
    kind, children = kind_of(node), [child for child, _ in node.next_functions]
    if kind in PICKING:
        return True
    # What another argument may be, that is no data: it has no node.
    fixed = None in children and not (is_linear(node) or kind in ENTRYWISE)
    return fixed and any(c is not None and bool(region.taps.get(c)) for c in children)


def _signature(region: Region) -> int:
    """The same number for graphs of the same operations and shapes, with the same taps."""
    numbers = region.index
    parts: list[object] = [(each.size, each.place is None) for each in region.recordings]
    for node in region.order:
        parts += [tuple(each) if isinstance(each, list) else each for each in _axes_of(node)]
        parts += [type(node), bool(region.own[node]), bool(region.taps[node])]
        parts += [(numbers.get(child), nr) for child, nr in node.next_functions]  # type: ignore[arg-type]
        parts += [
            shape_at(node, number) for number in region.numbers.get(node, ()) if leaf_of(node) is None
        ]
        for tap in notes(node).get(TAPS, ()):
            axis = tap.own
            parts += [tap.place, axis.dim, axis.outer, axis.size, axis.inner, axis.picked]
    return hash(tuple(parts))


def _axes_of(node: Node) -> list[object]:
    """The axes that an operation is about, as its node keeps them."""
    names = ("_saved_dim", "_saved_dims", "_saved_dim0", "_saved_dim1")
    return [getattr(node, name, None) for name in names]


class _Follower:
    def __init__(self, region: Region) -> None:
        self.region = region
        self.found = Followed()

    def follow(self, roots: Sequence[GradientEdge]) -> Followed:
        self._start(roots)
        if self.found.starts:
            self._follow()
        return self.found

    def _start(self, roots: Sequence[GradientEdge]) -> None:
        """Find where samples are last apart, on every way down from the roots."""
        region, found = self.region, self.found
        stack, seen = [(root, False) for root in roots], set[tuple[Place, bool]]()
        while stack:
            edge, curved = stack.pop()
            node, key = edge.node, (region.index[edge.node], edge.output_nr)
            if (key, curved) in seen or not region.taps[node]:
                continue
            seen.add((key, curved))
            if curved:
                found.bent.add(key[0])
            if TAPS in notes(node):
                if any(tap.place == edge.output_nr and not tap.batch.lost for tap in notes(node)[TAPS]):
                    found.starts[key] = None
                continue
            axis = found.starts.get(key) or self._named(edge) or self._joined(edge)
            if axis is not None:
                if key not in found.starts and not any(TAPS in notes(n) for n in region.taps[node]):
                    found.unseen.append(key)
                found.starts[key] = axis
            else:
                curved = curved or (region.bends(node) and kind_of(node) not in TERMWISE)
                below = [(child, nr) for child, nr in node.next_functions if child is not None]
                stack += [(GradientEdge(*each), curved) for each in below]

    def _named(self, edge: GradientEdge) -> Candidate | None:
        """The axis on which a tensor's rows depend on rows of the same samples at all taps below.

        At a product with constants these may be on any axis. If there are only such products, rows
        are those of a pass inside of a transform, one for each sample.
        """
        region = self.region
        shape = shape_at(edge.node, edge.output_nr)
        candidates = list(region.axes(shape)) if prod(shape) else []
        places: list[tuple[GradientEdge, list[SampleAxis]]] = []
        seen = False
        for node in region.taps[edge.node]:
            taps = [tap for tap in notes(node).get(TAPS, ()) if not tap.batch.lost]
            places += [(GradientEdge(node, tap.place), [tap.batch]) for tap in taps]
            seen = seen or TAPS in notes(node)
            if TAPS not in notes(node):
                own = [region.among_all(each) for each in region.axes(shape_at(node, 0))]
                places.append((GradientEdge(node, 0), own))
        if not seen:
            first = len(region.recordings) - len(region.transformed)
            candidates = [each for each in candidates if each[0] >= first and each[1].plain]
        if not candidates or not places:
            return None
        targets = [place for place, _ in places]
        plain = pulled([(edge, region.among_all(candidates[0]))], targets, None)
        for candidate in candidates:
            scaled = pulled([(edge, region.among_all(candidate))], targets, powers)
            reached = [
                any(agree(before, after, along(own, before, powers)) for own in axes)
                for before, after, (_, axes) in zip(plain, scaled, places, strict=True)
                if before is not None and after is not None
            ]
            if reached and all(reached):
                return candidate
        return None

    def _joined(self, edge: GradientEdge) -> Candidate | None:
        """The axis of what is made from rows of several passes, one after the other."""
        region, parts = self.region, list[tuple[GradientEdge, SampleAxis]]()
        if len(region.recordings) < 2 or prod(shape_at(edge.node, edge.output_nr)) < 2:
            return None
        stack, seen, joins = [edge], set[GradientEdge](), False
        while stack:
            here = stack.pop()
            if here in seen or not region.taps[here.node]:
                continue
            seen.add(here)
            tap = next((t for t in notes(here.node).get(TAPS, ()) if t.place == here.output_nr), None)
            if tap is None and TAPS in notes(here.node) or tap is not None and tap.batch.lost:
                return None
            named = None if tap is not None else self._named(here)
            if tap is not None or named is not None:
                parts.append((here, tap.batch if tap is not None else region.among_all(named)))  # type: ignore[arg-type]
                continue
            joins = joins or kind_of(here.node) in ("Cat", "Stack")
            stack += [GradientEdge(c, nr) for c, nr in here.node.next_functions if c is not None]
        axis = axis_at(edge, parts) if joins else None
        return None if axis is None or axis.lost else (ALL, axis)

    def _places(self) -> Iterator[tuple[Place, GradientEdge]]:
        """What reaches parameters by itself, and all taps."""
        for j, node in enumerate(self.region.order):
            if leaf_of(node) is None and (self.region.own[node] or TAPS in notes(node)):
                for number in sorted(self.region.numbers.get(node, ())):
                    yield (j, number), GradientEdge(node, number)

    def _follow(self) -> None:
        """Pull cotangents from there to what reaches parameters, and to all taps."""
        starts, places = starts_of(self.region, self.found), dict(self._places())
        plain = pulled(starts, list(places.values()), None)
        scaled = pulled(starts, list(places.values()), powers)
        for (place, edge), before, after in zip(places.items(), plain, scaled, strict=True):
            if before is None or after is None:
                continue
            self.found.arrived.add(place)
            taps = [tap for tap in notes(edge.node).get(TAPS, ()) if tap.place == edge.output_nr]
            if not taps:
                self.found.axes[place] = self._axis(edge.node, before, after)
            elif not taps[0].batch.lost and not agree(
                before, after, along(taps[0].batch, before, powers)
            ):
                self.found.mixed.append(place)

    def _axis(self, node: Node, before: Tensor, after: Tensor) -> Candidate | None:
        """The axis of a cotangent with a number for each sample; ``None`` if they are not apart."""
        region, some = self.region, bool(before.any())
        # Nothing tells that the entries of what is made from parameters only are rows.
        constant, several = not region.taps[node], max(r.size or 0 for r in region.recordings) > 1
        if constant and (not several or not some):
            return None
        fitting = [
            candidate
            for candidate in region.axes(before.shape)
            if agree(before, after, along(region.among_all(candidate), before, powers))
        ]
        axes = [region.among_all(candidate) for candidate in fitting]
        if constant and axes and (axes[0].size == 1 or axes[0].solo is not None):
            return None
        self.found.certain &= some and all(axis.agrees(axes[0]) for axis in axes)
        return fitting[0] if fitting else None


def axis_named(region: Region, edge: GradientEdge) -> SampleAxis | None:
    """The sample axis of a tensor below the roots, named after the taps below; ``None``: on none."""
    follower = _Follower(region)
    found = follower._named(edge) or follower._joined(edge)
    return None if found is None else region.among_all(found)


def starts_of(region: Region, found: Followed) -> list[tuple[GradientEdge, SampleAxis]]:
    """Where samples are last apart, with their axes."""
    starts = []
    for (j, number), candidate in found.starts.items():
        node = region.order[j]
        if candidate is None:
            tap: Tap = next(tap for tap in notes(node)[TAPS] if tap.place == number)
            starts.append((GradientEdge(node, number), tap.batch))
        else:
            starts.append((GradientEdge(node, number), region.among_all(candidate)))
    return starts
