"""A backward pass that is not autograd's: every quantity from columns that are carried to the taps.

The gradient at the taps' outputs is one more column. Autograd never multiplies it by the inputs of
layers, which is a third of a gradient's work. ``p.grad`` stays as it is, or is filled from the forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack._torch import AccumulateGrad, leaf_of, static_graphs
from backpack.engine.collect import Leaf
from backpack.engine.refusals import Names
from backpack.engine.run import Run
from backpack.engine.state import Block, Nested
from backpack.forms.complex_pairs import from_pairs
from backpack.graph.nodes import walk
from backpack.graph.retained import retaining
from backpack.sources.table import LossGradient


def pass_down(block: Block, keeps: bool) -> None:
    """Do what an ordinary pass does, in its order, and leave ``p.grad`` as it is."""
    run = Run(block, None, keeps)
    try:
        run.begin()
        with nullcontext() if run.shards is None else run.shards.gathered(last=True):
            _go_down(run)
        run.end()
    finally:
        run.abort()


def fills(block: Block) -> bool:
    """Whether ``p.grad`` is to come from forms, in this pass.

    Without quantities of first order there is nothing that it would be a by-product of; a static graph
    of ``DistributedDataParallel`` is learned in an ordinary pass, and tensors inside of a model keep
    their gradients (``retain_grad()``) in one.
    """
    assert block.roots is not None
    exts = block.owner.extensions
    return (
        block.owner.gradient == "forms"
        and any(isinstance(ext.source, LossGradient) for ext in exts)
        and not static_graphs(edge.node for edge, _ in block.roots)
        and not _retains(block)
    )


def _retains(block: Block) -> bool:
    """Whether a tensor between the leaves and where the pass starts keeps its gradient."""
    tensors = retaining(block.thread)
    if not tensors:
        return False
    nodes = set(walk(edge.node for edge, _ in block.roots or ()))
    return any(tensor.grad_fn in nodes for tensor in tensors)


def fill(block: Block, keeps: bool, inputs: Sequence[Tensor | GradientEdge] | None) -> None:
    """The same, and ``p.grad`` from the forms.

    Leaves that have none, or not all of their gradient in it, get autograd's, from the same pass; where
    they have hooks, from another. Nothing is accumulated before all of it is there.

    Args:
        block: the block.
        keeps: whether the graph is kept.
        inputs: what gradients are wanted of; ``None``: of all leaves.
    """
    keeps, create = keeps or block.owner.retain_graph, torch.is_grad_enabled()
    run = Run(block, None, True)
    try:
        run.begin()
        if run.shards is not None:
            raise NotImplementedError(
                "gradient='forms' of parameters that are in parts (fully_shard): leave the option out, "
                "autograd exchanges their gradients"
            )
        assert block.roots is not None
        starts, weights = zip(*block.roots, strict=True)
        filled = {p for p, leaf in run.leaves.items() if leaf.uses and _comes_from_form(run, leaf)}
        if inputs is None:
            nodes = walk(edge.node for edge in starts)
            inputs = [leaf_of(node) for node in nodes if type(node) is AccumulateGrad]
        others = [each for each in inputs if _leaf_at(each) not in filled]
        leaves = [leaf for leaf in map(_leaf_at, others) if leaf is not None]
        beside = [leaf for leaf in leaves if not leaf._backward_hooks]
        hooked = [each for each in others if _leaf_at(each) not in set(beside)]
        run.keeps = keeps or bool(hooked)
        taps = [tap for _, tap in run.graph.taps]
        found = _go_down(run, beside)
        for p, leaf in run.leaves.items():
            if p in filled and leaf.total is not None:
                total = leaf.total.reshape(leaf.real.shape)
                found[p] = (from_pairs(total) if p.is_complex() else total).to(p.dtype)
        run.end()
        with Nested(block):
            if hooked:
                torch.autograd.backward(starts, weights, keeps, create, inputs=hooked)  # type: ignore[arg-type]
            _accumulate(found, create)
        for tap in () if keeps else taps:
            tap.release()
    finally:
        run.abort()


def _comes_from_form(run: Run, leaf: Leaf) -> bool:
    """Whether all of a parameter's gradient is in its form, and autograd's would be no sparse one."""
    sparse = any(getattr(node, "_saved_sparse", False) for node, _, _ in leaf.uses)
    return not sparse and leaf.parameter not in run.graph.outside


def _leaf_at(place: Tensor | GradientEdge) -> Tensor | None:
    """The leaf that a gradient is wanted of, if it is one."""
    if isinstance(place, Tensor):
        return place if place.is_leaf else None
    return leaf_of(place.node)


class _Deliver(torch.autograd.Function):
    """Gradients that are there, handed to their parameters by autograd."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        # On their device, whose streams wait for each other.
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # Nobody holds them any more, so that autograd need not copy them.
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return None, *gradients


def _accumulate(found: dict[Tensor, Tensor], create_graph: bool) -> None:
    """Accumulate gradients by autograd, so that all hooks of the parameters are called."""
    parameters, gradients = list(found), list(found.values())
    found.clear()
    if create_graph and parameters:
        torch.autograd.backward(parameters, gradients, create_graph=True)
    elif parameters:
        with torch.enable_grad():
            root = _Deliver.apply(gradients, *parameters)
        torch.autograd.backward(root)


def _go_down(run: Run, beside: Sequence[Tensor] = ()) -> dict[Tensor, Tensor]:
    """Compute all quantities; the gradients of further leaves, from the same pass."""
    _refuse_changed(run)
    _reach_losses(run)
    found = _reach_taps(run, beside)
    for leaf in run.leaves.values():
        if not leaf.uses:  # a parameter without entries
            run.save(leaf)
    return found


def _refuse_changed(run: Run) -> None:
    for _, tap in run.graph.taps:
        if tap.changed:
            who = Names(run.graph.recordings).of(tap)
            raise RuntimeError(
                f"an input of {tap.op} (parameters {who}) was modified by an in-place operation "
                "after the forward pass; use the out-of-place version of that operation, or call "
                "backward before it"
            )


def _reach_losses(run: Run) -> None:
    """Losses have a part in their hooks only: their columns were carried when the pass began."""
    if run.block.owner.extension_hook is None:
        return
    records = {node: record for node, (record, _) in run.graph.losses.items()}
    edges = [GradientEdge(node, 0) for node in records]
    for record, edge, grad in zip(records.values(), edges, _gradients(run, edges), strict=True):
        if grad is not None:
            run.loss(record, edge, grad)


def _reach_taps(run: Run, beside: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    for leaf in run.leaves.values():
        leaf.arrived = True
    taps = [(node, tap) for node, tap in run.graph.taps if tap in run.uses]
    grads: list[Tensor | None] = [None] * len(taps)
    found: dict[Tensor, Tensor] = {}
    if run.takes_gradient:
        edges = [GradientEdge(node, tap.place) for node, tap in taps]
        edges += [get_gradient_edge(leaf) for leaf in beside]
        # Some forms are made by nodes, which must not be freed yet.
        keeps = run.keeps or any(tap.by_node or tap.above for _, tap in taps)
        grads = _gradients(run, edges, keeps)
        others = zip(beside, grads[len(taps) :], strict=True)
        found = {leaf: grad for leaf, grad in others if grad is not None}
        del grads[len(taps) :]
    for i, (_, tap) in enumerate(taps):
        grad, grads[i] = grads[i], None
        run.arrive([tap], {tap.place: grad})
    return found


def _gradients(run: Run, edges: list[GradientEdge], retain: bool = True) -> list[Tensor | None]:
    if not edges:
        return []
    assert run.block.roots is not None
    starts, weights = zip(*run.block.roots, strict=True)
    # Where backward goes on, autograd notes the gradient before hooks of the user change it.
    changed: dict[Node, Any] = {}
    nodes = {edge.node for edge in edges}
    handles = [node.register_prehook(partial(changed.__setitem__, node)) for node in nodes]
    try:
        with Nested(run.block):
            found = torch.autograd.grad(
                starts,
                edges,
                weights,
                retain_graph=retain,
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
    finally:
        for handle in handles:
            handle.remove()
    return [
        changed[edge.node][edge.output_nr] if edge.node in changed else gradient
        for edge, gradient in zip(edges, found, strict=True)
    ]
