"""Backward: carry columns at one place of the graph to all taps below it, and look at the graph.

Letters: ``v`` columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.graph.above import taps_above
from backpack.graph.recognised import is_nonlinear, known_loss, outputs_at
from backpack.graph.taps import (
    MIXES,
    MODEL_OUTPUT,
    TAPS,
    LossRecord,
    ModelOutput,
    Recording,
    Tap,
    notes,
)

# Columns are carried in chunks whose outputs at all taps stay below this many bytes. On a CPU fresh
# memory costs more than it saves: columns go together only if they are small.
COLUMN_BYTES = {"cpu": 2**24, "cuda": 2**31}
SEVERAL, SMALL_COLUMN = 5, 2**19


@dataclass(eq=False)
class Graph:
    """What lies below the root of a backward pass.

    Attributes:
        taps: taps with their nodes, those nearer to the root first.
        losses: losses with a known Hessian, with their nodes and the model outputs below them.
        outputs: model outputs that reach the root other than through such a loss.
        upper: losses with a known Hessian in their input, which is no linear function of model outputs.
        flat: those of which the root is a linear function, beside known losses.
        bent_by: the first operation above the outputs that is curved, and part of no known loss.
        bare: whether a tap reaches the root neither through a known loss nor a model output.
        unseen: parameters that enter the model at a place that is not a tap, with that place.
        outside: parameters that enter above all model outputs (weight decay in the loss, say).
        refused: parameters that meet data above the outputs in a way that is no tap, with the operation
            and the reason.
        uncovered: taps above the outputs that are below no known loss.
        mixing: why samples are mixed somewhere, if they are.
        nodes: all nodes seen.
        mixed: why a model output that has one row for each sample has them no longer apart.
        recordings: the forward passes they belong to.
        kinds: kinds of all nodes, in the order in which they were seen.
    """

    taps: list[tuple[Node, Tap]] = field(default_factory=list)
    losses: dict[Node, tuple[LossRecord, dict[Node, list[ModelOutput]]]] = field(default_factory=dict)
    outputs: dict[Node, list[ModelOutput]] = field(default_factory=dict)
    upper: dict[Node, LossRecord] = field(default_factory=dict)
    flat: dict[Node, list[ModelOutput]] = field(default_factory=dict)
    bent_by: str | None = None
    bare: bool = False
    unseen: list[tuple[Tensor, str]] = field(default_factory=list)
    outside: set[Tensor] = field(default_factory=set)
    refused: list[tuple[Tensor, str, str]] = field(default_factory=list)
    uncovered: set[Tap] = field(default_factory=set)
    mixing: str | None = None
    mixed: str | None = None
    nodes: set[Node] = field(default_factory=set)
    recordings: list[Recording] = field(default_factory=list)
    kinds: list[Any] = field(default_factory=list)

    def signature(self) -> int:
        """The same number for graphs of the same operations, with the same taps and shapes."""
        taps = (
            (tap.func, tap.place, tap.batch, tuple(node._input_metadata[tap.place].shape))
            for node, tap in self.taps
        )
        return hash((*self.kinds, *taps))

    def joint(self, further: Collection[Node] = ()) -> tuple[dict[Node, list[ModelOutput]], set[Node]]:
        """The model outputs whose Hessian no rule gives, and the known losses that add to it.

        ``further`` are known losses whose rules are not to be used.
        """
        outputs, absorbed, size = dict(self.outputs), set[Node](), -1
        for node in further:
            outputs |= self.losses[node][1]
        while len(outputs) > size:
            size = len(outputs)
            for node, (_, below) in self.losses.items():
                if not outputs.keys().isdisjoint(below):
                    absorbed.add(node)
                    outputs |= below
        return outputs, absorbed


def survey(roots: Sequence[Node], curvature: bool = True) -> Graph:
    """Walk the graph below ``roots``, where a backward pass starts or has arrived.

    Without ``curvature`` losses are not asked for their Hessian.
    """
    graph = Graph()
    tapped: set[Node] = set()
    # (node, whether a known loss was passed, whether a curved operation was, the forward pass it
    # belongs to)
    stack: list[tuple[Node, bool, bool, Recording | None]] = [(r, False, False, None) for r in roots]
    seen: set[tuple[Node, bool, bool, int]] = set()
    while stack:
        node, covered, bent, inside = stack.pop()
        if inside is not None and node in inside.entries:
            inside = None
        if (node, covered, bent, id(inside)) in seen:
            continue
        seen.add((node, covered, bent, id(inside)))
        # Kinds of nodes have types of their own, but for a few, all of one type.
        graph.kinds.append(type(node))
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if inside is None:
                graph.outside.add(leaf)
            else:
                graph.unseen.append((leaf, "its use"))
            continue
        data = notes(node)
        if inside is not None and node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=True) hides what happens inside "
                "it; pass use_reentrant=False"
            )
        if MIXES in data:
            graph.mixing = data[MIXES]
        outputs = outputs_at(node)
        if not covered and not bent:
            found = known_loss(node, bool(outputs), curvature)
            if found is not None and found.curved:
                graph.upper[node] = found.record
            elif found is not None:
                graph.losses[node], covered = (found.record, found.outputs), True
        if outputs and not covered:
            (graph.outputs if bent or not curvature else graph.flat)[node] = outputs
            covered = True
        for border in data.get(MODEL_OUTPUT, ()):
            inside = border.recording
            graph.recordings.append(inside)
            if border.mixed:
                graph.mixed = border.batch.lost  # type: ignore[union-attr]
        # What is curved above a loss makes it part of one that no rule knows.
        if curvature and not covered and not bent and is_nonlinear(node):
            bent, graph.bent_by = True, graph.bent_by or node.name()
        bent = bent and not covered
        taps = data.get(TAPS)
        if taps is None:
            stack += [(child, covered, bent, inside) for child, _ in node.next_functions if child]
            continue
        graph.bare |= not covered
        inside = taps[0].recording
        graph.recordings.append(inside)
        if node not in tapped:
            tapped.add(node)
            graph.taps += [(node, tap) for tap in taps]
            graph.unseen += _inside_tap(node, taps)
        stack += [(below, covered, bent, inside) for tap in taps for below in tap.inputs]
    for _, tap in graph.taps:
        for source in tap.sources:
            if source.edge is not None and not tapped.isdisjoint(_below([source.edge.node])):
                graph.unseen += [(leaf, tap.op) for leaf in leaves_below(source.edge)]
    graph.nodes = {node for node, *_ in seen}
    graph.flat = {node: found for node, found in graph.flat.items() if node not in graph.outputs}
    if not graph.losses and not graph.outputs:
        graph.outputs, graph.flat = graph.flat, {}
    if graph.outside:
        above = taps_above(roots)
        open_to = _open(roots, graph)
        graph.uncovered = {tap for node, tap in above.taps if node in open_to}
        graph.taps = above.taps + graph.taps
        graph.refused = above.refused
    return graph


def _open(roots: Sequence[Node], graph: Graph) -> set[Node]:
    """Nodes above the model's outputs that reach the root other than through a loss with a rule."""
    stack, seen = list(roots), set(roots)
    while stack:
        node = stack.pop()
        if node in graph.losses or node in graph.upper or outputs_at(node):
            continue
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return seen


def _inside_tap(node: Node, taps: Sequence[Tap]) -> Iterator[tuple[Tensor, str]]:
    """Parameters that an operation reaches without being among its sources."""
    if any(tap.released for tap in taps) or all(tap.args is not None for tap in taps):
        return  # a plain layer's sources are all there is
    stops = {below for tap in taps for below in tap.inputs}
    known: set[Tensor] = set()
    for tap in taps:
        for source in tap.sources:
            known |= {source.leaf} if source.leaf is not None else set(leaves_below(source.edge))
    for leaf in _leaves(_below([child for child, _ in node.next_functions if child], stops)):
        if leaf not in known:
            yield leaf, taps[0].op


def leaves_below(edge: GradientEdge | None) -> list[Tensor]:
    """The leaf tensors a derived tensor was made from."""
    return _leaves(_below([edge.node])) if edge is not None else []


def _leaves(nodes: Iterable[Node]) -> list[Tensor]:
    leaves = [getattr(node, "variable", None) for node in nodes]
    return [leaf for leaf in leaves if leaf is not None]


def _below(nodes: list[Node], stops: Collection[Node] = ()) -> dict[Node, None]:
    """Nodes and all that lie below them, up to ``stops``."""
    seen: dict[Node, None] = {}
    while nodes:
        node = nodes.pop()
        if node not in seen and node not in stops:
            seen[node] = None
            nodes += [child for child, _ in node.next_functions if child]
    return seen


def bytes_at(places: Sequence[GradientEdge]) -> int:
    """Memory that one column takes at these places."""
    sizes = (edge.node._input_metadata[edge.output_nr] for edge in places)
    return sum(prod(size.shape) * size.dtype.itemsize for size in sizes)


def columns_at_once(places: Sequence[GradientEdge], device: str, chunk_size: int | None) -> int:
    """How many columns are held at these places at a time.

    Args:
        places: where a column takes memory; twice if it does so twice.
        device: kind of device they are on.
        chunk_size: what the user asked for; by default as many as fit the budget.
    """
    if chunk_size is not None:
        return chunk_size
    return max(1, COLUMN_BYTES.get(device, 2**28) // max(bytes_at(places), 1))


def carry(
    start: GradientEdge | Sequence[GradientEdge],
    targets: Sequence[GradientEdge],
    columns: Tensor | Sequence[Tensor],
    passing: Sequence[GradientEdge] = (),
) -> list[Tensor | None]:
    """Vector-Jacobian products of all columns, ``[v, *start.shape] -> [v, *target.shape]`` each.

    With several starts, the ``v``-th column is that of all of them together.

    Batched on devices, and on a CPU where columns are small. Large ones go one at a time there: fresh
    memory costs more than it saves. Their size is that at the targets and at the places in ``passing``.
    """
    starts = [start] if isinstance(start, GradientEdge) else start
    columns = [columns] if isinstance(columns, Tensor) else columns
    # Where columns start they have arrived.
    here = dict(zip(((edge.node, edge.output_nr) for edge in starts), columns, strict=True))
    if len(starts) == 1 and here.keys() & {(edge.node, edge.output_nr) for edge in targets}:
        further = [edge for edge in targets if (edge.node, edge.output_nr) not in here]
        carried = iter(carry(starts, further, columns) if further else ())
        arrived = (here.get((edge.node, edge.output_nr)) for edge in targets)
        return [next(carried) if found is None else found for found in arrived]
    create = torch.is_grad_enabled()
    count = len(columns[0])
    small = count >= SEVERAL and bytes_at([*targets, *passing]) <= SMALL_COLUMN
    if count > 1 and (small or columns[0].device.type != "cpu"):
        # Some operations cannot be batched, or only with errors of all kinds: then one by one.
        with suppress(RuntimeError):
            return list(
                torch.autograd.grad(
                    list(starts),
                    list(targets),
                    list(columns),
                    is_grads_batched=True,
                    retain_graph=True,
                    create_graph=create,
                    allow_unused=True,
                )
            )
    results: list[list[Tensor]] = [[] for _ in targets]
    for column in zip(*columns, strict=True):
        with differentiable_twice():
            grads = torch.autograd.grad(
                list(starts),
                list(targets),
                list(column),
                retain_graph=True,
                create_graph=create,
                allow_unused=True,
            )
        for result, grad in zip(results, grads, strict=True):
            if grad is not None:
                result.append(grad)
    return [None if not r else r[0].unsqueeze(0) if len(r) == 1 else torch.stack(r) for r in results]


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Say in our words where torch has no second derivative of an operation."""
    try:
        yield
    except RuntimeError as error:
        if "is not implemented" not in str(error) or "cannot be differentiated twice" in str(error):
            raise
        raise NotImplementedError(
            f"an operation of the model or the loss cannot be differentiated twice ({error}); for "
            "attention, run the forward pass inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        ) from error


@contextmanager
def hooks_suspended(leaf: Tensor) -> Iterator[None]:
    """Keep tensor hooks (the user's, and our own) from changing what arrives at a leaf."""
    hooks = leaf._backward_hooks
    kept = dict(hooks) if hooks else {}
    if hooks:
        hooks.clear()
    try:
        yield
    finally:
        if hooks is not None:
            hooks.update(kept)


def pull_back(edge: GradientEdge, leaf: Tensor, columns: Tensor) -> Tensor:
    """Columns at a derived tensor carried on to a leaf, ``[m, *t] -> [m, *p]``."""
    with hooks_suspended(leaf):
        (result,) = carry(edge, [get_gradient_edge(leaf)], columns)
    return leaf.new_zeros(len(columns), *leaf.shape) if result is None else result
