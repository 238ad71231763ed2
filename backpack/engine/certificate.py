"""The certificate: below the model's output no sample's gradient reaches the rows of another.

Capture follows the samples through the forward pass by rules. Here its result is tried out on the graph
that backward is about to pass through. The output's cotangent is multiplied by a number of its own for
each sample; the gradient at every tap must be multiplied by that number in the rows that capture says
are that sample's. The cotangent is arbitrary, so that what is found holds for the gradient and for the
columns of every curvature alike. The numbers are powers of two, by which floating-point numbers are
multiplied without rounding: gradients agree to the last digit, but for kernels that add in any order.

In large graphs gradients are not held for that: weighted sums of each row are compared, and the
gradients themselves only where these differ by a digit.

That takes two passes through the graph, and is done once for each model and kind of graph, again at a
low rate, and every time where samples were picked by an index or a mask (a loop over samples
picks none: each tensor is one sample's).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from backpack.graph import followed
from backpack.graph.carry import bytes_at
from backpack.graph.nodes import PICKING, children_of, kind_of, upwards
from backpack.graph.recognised import outputs_at
from backpack.graph.scaling import Scale, Starts, agree, along, mask_of, powers, pulled
from backpack.graph.survey import Graph
from backpack.graph.taps import ENDS, Tap, notes
from backpack.samples.axis import SampleAxis
from backpack.samples.separability import generic

Mode = Literal["once", "always", "never"]
MODES: tuple[Mode, ...] = ("once", "always", "never")
# What blocks do that are not told.
default: Mode = "once"
# A graph that was certified is certified again after so many passes.
AGAIN_AFTER = 200
# So many kinds of graphs are kept of a model.
_KINDS = 1024
# Where gradients at all taps take more bytes, weighted sums of them are compared first.
SKETCHED_FROM = 2**24

Named = Callable[[Tap], str]

_passes: weakref.WeakKeyDictionary[nn.Module, dict[int, int]] = weakref.WeakKeyDictionary()
# Kinds of graphs of which nothing but zeros has arrived at some taps.
_silent: set[int] = set()


class Place(NamedTuple):
    """A tap and its node."""

    node: Node
    tap: Tap

    @property
    def edge(self) -> GradientEdge:
        return GradientEdge(self.node, self.tap.place)


def starts_of(graph: Graph) -> Starts:
    """Where samples are last apart: model outputs, and what a loss inside a model is computed from."""
    found: dict[tuple[Node, int], SampleAxis] = {}
    for node in graph.nodes:
        for border in outputs_at(node):
            if border.batch is not None:
                found[node, border.place] = border.batch
        for edge, axis, recording in notes(node).get(ENDS, ()):
            if recording.taps:
                found.setdefault((edge.node, edge.output_nr), recording.among_all(axis))
    return [(GradientEdge(*place), axis) for place, axis in found.items()]


def due(graph: Graph, mode: Mode) -> bool:
    """Whether the graph of a backward pass is to be certified; if not, that counts as one pass."""
    axes = [tap.own for _, tap in graph.taps]
    if not [axis for axis in axes if axis.size != 1]:
        return False
    if any(recording.hides for recording in graph.recordings):
        return True  # for otherwise nothing is known of what derivatives hide
    if mode == "never":
        return False
    picked = [axis for axis in axes if axis.picked is not None]
    gone = any(recording.taps and recording.module() is None for recording in graph.recordings)
    if mode == "always" or gone or any(axis.solo is None for axis in picked):
        return True
    # Tensors of one sample each, in a loop over samples, are told apart by the graph's signature.
    if picked and any(kind_of(node) in PICKING for node in graph.nodes):
        return True
    signature, counted = graph.signature(), _counts(graph)
    passes = [counts.get(signature, 0) for counts in counted]
    again = any(count % AGAIN_AFTER == 0 for count in passes)
    if signature in _silent:  # gates that begin at zero open soon
        again = again or any(count & (count - 1) == 0 for count in passes)
    if not again:
        for counts in counted:
            counts[signature] += 1
    return again


def remember(graph: Graph, silent: bool = False) -> None:
    """The samples were found to be apart; after a failure the next pass is tried out anew.

    ``silent``: at some taps there was nothing to be seen.
    """
    signature = graph.signature()
    if silent and len(_silent) < _KINDS:
        _silent.add(signature)
    else:
        _silent.discard(signature)
    for counts in _counts(graph):
        if len(counts) >= _KINDS:
            counts.clear()
        counts[signature] = counts.get(signature, 0) + 1


def _counts(graph: Graph) -> list[dict[int, int]]:
    """The numbers of passes, by the graphs' signatures, of the models that take part."""
    modules = {id(r): r.module() for r in graph.recordings if r.taps}.values()
    return [_passes.setdefault(module, {}) for module in modules if module is not None]


def forget() -> None:
    """Certify every graph anew."""
    _passes.clear()
    _silent.clear()
    followed.forget()


def outline(graph: Graph) -> str:
    """The same text in all processes whose graphs are of the same operations and shapes."""
    taps = [
        (tap.op, tap.place, tuple(node._input_metadata[tap.place].shape), tap.own.size, tap.batch.bare)
        for node, tap in graph.taps
    ]
    starts = [(edge.node.name(), edge.output_nr) for edge, _ in starts_of(graph)]
    return repr((starts, taps))


def apart(graph: Graph) -> bool:
    """Whether two passes through the graph show that samples are apart, in little memory.

    Graphs of one :func:`outline` are passed through as often. What does not agree to the last digit is
    for :func:`certify` to look at.
    """
    places = [Place(node, tap) for node, tap in graph.taps if not (tap.batch.lost or tap.above)]
    starts = starts_of(graph)
    if not starts or not places:
        return True
    one, two = _sketched(starts, places, None), _sketched(starts, places, powers)
    same = one.keys() == two.keys() and all(torch.equal(one[place], two[place]) for place in one)
    return same and not any(place.tap.batch.bare for place in places)


def certify(graph: Graph, name: Named) -> list[Tap]:
    """Try out whether samples are apart between the model's output and every tap.

    Args:
        graph: what lies below the root of a backward pass.
        name: how to call the parameters of a tap.

    Returns:
        Taps at which nothing but zeros arrives, of which nothing can be said as yet.

    Raises:
        RuntimeError: if they are not.
    """
    places = [Place(node, tap) for node, tap in graph.taps if not (tap.batch.lost or tap.above)]
    starts = starts_of(graph)
    if not starts or not places:
        return []
    bare = any(place.tap.batch.bare for place in places)
    if not bare and bytes_at([place.edge for place in places]) > SKETCHED_FROM:
        one, two = _sketched(starts, places, None), _sketched(starts, places, powers)
        if one.keys() == two.keys() and all(torch.equal(one[place], two[place]) for place in one):
            return [place.tap for place, sums in one.items() if not bool(sums.any())]
    plain = pulled(starts, [place.edge for place in places], None)
    wrong = _disagreeing(starts, places, plain, powers)
    if wrong:
        # A hook need not be linear; but samples apart vanish together with their own cotangent only.
        digits = (max(axis.size for _, axis in starts) - 1).bit_length()
        masks = [mask_of(digit) for digit in range(digits)]
        wrong = next((w for mask in masks if (w := _disagreeing(starts, places, plain, mask))), [])
    if wrong:
        raise RuntimeError(_explain(graph, starts, wrong[0], name))
    zeros = (g is not None and not bool(g.any()) for g in plain)
    return [place.tap for place, zero in zip(places, zeros, strict=True) if zero]


# --------------------------------------------------------------------------------------
# Passes through the graph

# Numbers of samples times powers of two are as exact as the samples' gradients: so are weighted sums.
Sketches = dict[Place, Tensor]


def _sketched(starts: Starts, places: Sequence[Place], scale: Scale | None) -> Sketches:
    """A weighted sum of each row of the gradients at taps, divided by the row's number.

    Gradients are not held, but at taps without another one below, where autograd is told to stop.
    """
    found: Sketches = {}

    def take(here: Sequence[Place], grads: Sequence[Tensor | None]) -> None:
        for place in here:
            if (g := grads[place.tap.place]) is not None:
                found[place] = _sketch(g, place.tap.batch, scale)

    at: dict[Node, list[Place]] = {}
    for place in places:
        at.setdefault(place.node, []).append(place)
    leads: dict[Node, bool] = {}
    for node in upwards(edge.node for edge, _ in starts):
        leads[node] = any(child in at or leads[child] for child in children_of(node))
    last = [place for place in places if not leads.get(place.node)]
    handles = [node.register_prehook(partial(take, at[node])) for node in at if leads.get(node)]
    try:
        ends = pulled(starts, [place.edge for place in last], scale)
    finally:
        for handle in handles:
            handle.remove()
    for place, g in zip(last, ends, strict=True):
        if g is not None:
            found[place] = _sketch(g, place.tap.batch, scale)
    return found


@torch.no_grad()
def _sketch(g: Tensor, axis: SampleAxis, scale: Scale | None) -> Tensor:
    """``[rows]``, or two numbers of each for complex gradients."""
    rows = torch.view_as_real(g).movedim(axis.dim, 0) if g.is_complex() else g.movedim(axis.dim, 0)
    if rows.dim() > 1 and rows.numel():
        rows = rows @ generic(rows.shape[-1:], rows)
        rows = rows.flatten(1) @ generic(rows[0].shape, rows).flatten() if rows.dim() > 1 else rows
    if scale is None:
        return rows
    return rows / scale(axis.sample_ids(g.device), rows.dtype)


def _disagreeing(
    starts: Starts, places: Sequence[Place], plain: Sequence[Tensor | None], scale: Scale
) -> list[Place]:
    """Taps whose gradient is not scaled as their samples are."""
    scaled = pulled(starts, [place.edge for place in places], scale)
    found = []
    for place, before, after in zip(places, plain, scaled, strict=True):
        if before is None or after is None:
            continue
        factors = along(place.tap.batch, before, scale)
        if not agree(before, after, factors):
            found.append(place)
    return found


# --------------------------------------------------------------------------------------
# Where it fails


def _explain(graph: Graph, starts: Starts, place: Place, name: Named) -> str:
    where = _first_mixed(graph, starts, place)
    if where is None:
        what = (
            f"rows of the output of {place.tap.op} belong to other samples than it seemed in the "
            "forward pass"
        )
    else:
        what = (
            f"the samples of a batch are mixed at {where.name()}, between {place.tap.op} and the output"
        )
    return (
        f"parameter {name(place.tap)}: {what}, so that its quantities of individual samples would be "
        "wrong (found by scaling each sample's share of the gradient). Keep samples on one axis and "
        "apart there; for batch statistics call model.eval() or use a norm within samples. "
        "backpack(..., certify='never') leaves this check out"
    )


def _first_mixed(graph: Graph, starts: Starts, place: Place) -> Node | None:
    """The operation nearest to the output that hands gradients of several samples to one entry."""
    order = _between(starts, place.node)
    edges = [GradientEdge(node, 0) for node in order]
    plain, scaled = pulled(starts, edges, None), pulled(starts, edges, powers)
    (size,) = {axis.size for _, axis in starts if axis.size == place.tap.batch.size}
    dirty: set[Node] = set()
    for node, before, after in zip(order, plain, scaled, strict=True):
        if before is not None and after is not None and not _owned(before, after, size):
            dirty.add(node)
    for node in order:
        above = [other for other in order if any(child is node for child, _ in other.next_functions)]
        if node in dirty and dirty.isdisjoint(above):
            return above[-1] if above else node  # of a sum of branches the one that is longer
    return None


def _between(starts: Starts, target: Node) -> list[Node]:
    """Nodes on ways from the starts to a node, those nearer to the starts first."""
    order = upwards((edge.node for edge, _ in starts), lambda n: [] if n is target else children_of(n))
    leads: dict[Node, bool] = {}
    for node in order:
        leads[node] = node is target or any(leads[child] for child in children_of(node))
    return [node for node in reversed(order) if leads[node]]


def _owned(before: Tensor, after: Tensor, size: int) -> bool:
    """Whether every entry was scaled by the number of one of the samples."""
    factors = powers(torch.arange(size, device=before.device), before.dtype).unique()
    eps = torch.finfo(before.dtype).eps ** 0.5 * before.abs().amax()
    error = torch.stack([(after / factor - before).abs() for factor in factors]).amin(0)
    return not bool((error > eps).any())
