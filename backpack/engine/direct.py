"""A backward pass without the gradient: every quantity from columns that are carried to the taps.

The gradient at the taps' outputs is one more column. Autograd never multiplies it by the inputs of
layers, which is a third of a gradient's work.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.engine.refusals import Names
from backpack.engine.run import Run
from backpack.engine.state import Block, Nested


def pass_down(block: Block, keeps: bool) -> None:
    """Do what an ordinary pass does, in its order, and leave ``p.grad`` as it is."""
    run = Run(block, None, keeps)
    try:
        run.begin()
        with nullcontext() if run.shards is None else run.shards.gathered(last=True):
            _refuse_changed(run)
            _reach_losses(run)
            _reach_taps(run)
            for leaf in run.leaves.values():
                if not leaf.uses:  # a parameter without entries
                    run.save(leaf)
        run.end()
    finally:
        run.abort()


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


def _reach_taps(run: Run) -> None:
    for leaf in run.leaves.values():
        leaf.arrived = True
    taps = [(node, tap) for node, tap in run.graph.taps if tap in run.uses]
    grads: list[Tensor | None] = [None] * len(taps)
    if run.first_order:
        edges = [GradientEdge(node, tap.place) for node, tap in taps]
        # Forms above the model's outputs are made from nodes, which must not be freed yet.
        keeps = run.keeps or any(tap.above for _, tap in taps)
        grads = _gradients(run, edges, keeps)
    for i, (_, tap) in enumerate(taps):
        grad, grads[i] = grads[i], None
        run.arrive([tap], {tap.place: grad})


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
