"""Backward: carry columns at one place of the graph to all taps below it, and look at the graph.

Letters: ``v`` columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.capture import BORDER, LOSS, MIXES, TAPS, Border, LossRecord, Recording, Tap, notes

# Columns are carried in chunks whose outputs at all taps stay below this many bytes.
COLUMN_BYTES = {"cpu": 2**28, "cuda": 2**31}


@dataclass(eq=False)
class Graph:
    """What lies below the root of a backward pass.

    Attributes:
        taps: taps with their nodes, those nearer to the root first.
        losses: losses with a known Hessian.
        outputs: model outputs that reach the root other than through such a loss.
        bare: whether a tap reaches the root neither through a known loss nor a model output.
        unseen: parameters that enter the model at a place that is not a tap, with that place.
        outside: parameters that enter above all model outputs (weight decay in the loss, say).
        mixing: why samples are mixed somewhere, if they are.
        nodes: all nodes seen.
        recordings: the forward passes they belong to.
    """

    taps: list[tuple[Node, Tap]] = field(default_factory=list)
    losses: list[LossRecord] = field(default_factory=list)
    outputs: list[tuple[Node, Border]] = field(default_factory=list)
    bare: bool = False
    unseen: list[tuple[Tensor, str]] = field(default_factory=list)
    outside: set[Tensor] = field(default_factory=set)
    mixing: str | None = None
    nodes: set[Node] = field(default_factory=set)
    recordings: list[Recording] = field(default_factory=list)


def survey(roots: Sequence[Node]) -> Graph:
    """Walk the graph below ``roots``, where a backward pass starts or has arrived."""
    graph = Graph()
    tapped: set[Node] = set()
    # (node, whether a known loss was passed, the forward pass it belongs to)
    stack: list[tuple[Node, bool, Recording | None]] = [(root, False, None) for root in roots]
    seen: set[tuple[Node, bool, int]] = set()
    while stack:
        node, covered, inside = stack.pop()
        if inside is not None and node in inside.entries:
            inside = None
        if (node, covered, id(inside)) in seen:
            continue
        seen.add((node, covered, id(inside)))
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if inside is None:
                graph.outside.add(leaf)
            else:
                graph.unseen.append((leaf, "its use"))
            continue
        data = notes(node)
        if MIXES in data:
            graph.mixing = data[MIXES]
        if LOSS in data:
            if not any(data[LOSS] is record for record in graph.losses):
                graph.losses.append(data[LOSS])
            covered = True
        for border in data.get(BORDER, ()):
            usable = border.batch is not None and not border.batch.lost
            if usable and not covered:
                if all(node is not n for n, _ in graph.outputs):
                    graph.outputs.append((node, border))
                covered = True
            inside = border.recording
            graph.recordings.append(inside)
        taps = data.get(TAPS)
        if taps is None:
            stack += [(child, covered, inside) for child, _ in node.next_functions if child]
            continue
        graph.bare |= not covered
        inside = taps[0].recording
        graph.recordings.append(inside)
        if node not in tapped:
            tapped.add(node)
            graph.taps += [(node, tap) for tap in taps]
            graph.unseen += _inside_tap(node, taps)
        stack += [(below, covered, inside) for tap in taps for below in tap.inputs]
    for _, tap in graph.taps:
        for source in tap.sources:
            if source.edge is not None and not tapped.isdisjoint(_below([source.edge.node])):
                graph.unseen += [(leaf, tap.op) for leaf in leaves_below(source.edge)]
    graph.nodes = {node for node, _, _ in seen}
    return graph


def _inside_tap(node: Node, taps: Sequence[Tap]) -> Iterator[tuple[Tensor, str]]:
    """Parameters that an operation reaches without being among its sources."""
    if any(tap.released for tap in taps):
        return
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


def carry(start: GradientEdge, targets: Sequence[GradientEdge], columns: Tensor) -> list[Tensor | None]:
    """Vector-Jacobian products of all columns, ``[v, *start.shape] -> [v, *target.shape]`` each.

    One column at a time on a CPU, where large temporaries cost more than they save; batched on
    other devices.
    """
    create = torch.is_grad_enabled()
    if columns.device.type != "cpu" and len(columns) > 1:
        try:
            return list(
                torch.autograd.grad(
                    [start],
                    list(targets),
                    [columns],
                    is_grads_batched=True,
                    retain_graph=True,
                    create_graph=create,
                    allow_unused=True,
                )
            )
        except RuntimeError as error:
            if "vmap" not in str(error) and "batching rule" not in str(error):
                raise
    results: list[list[Tensor]] = [[] for _ in targets]
    for column in columns:
        try:
            grads = torch.autograd.grad(
                [start],
                list(targets),
                [column],
                retain_graph=True,
                create_graph=create,
                allow_unused=True,
            )
        except RuntimeError as error:
            if "is not implemented" in str(error):
                raise NotImplementedError(
                    f"an operation of the model cannot be differentiated twice ({error}); for "
                    "attention, run the forward pass inside "
                    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
                ) from error
            raise
        for result, grad in zip(results, grads, strict=True):
            if grad is not None:
                result.append(grad)
    return [None if not r else r[0].unsqueeze(0) if len(r) == 1 else torch.stack(r) for r in results]


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
    return columns.new_zeros(len(columns), *leaf.shape) if result is None else result
