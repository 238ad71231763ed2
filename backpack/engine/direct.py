"""A backward pass without the gradient: every quantity from columns that are carried to the taps.

The gradient at the taps' outputs is one more column. Autograd never multiplies it by the inputs of
layers, which is a third of a gradient's work.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.engine.refusals import Names
from backpack.engine.run import Run
from backpack.engine.state import Block


class DirectRun(Run):
    """One call of ``backward`` that leaves ``p.grad`` as it is."""

    def __init__(self, block: Block, keeps: bool) -> None:
        super().__init__(block, -1, keeps)
        self.early = True

    def pass_down(self) -> None:
        """Do what an ordinary pass does, in its order."""
        self.begin()
        for _, tap in self.graph.taps:
            if tap.changed:
                who = Names(self.graph.recordings).of(tap)
                raise RuntimeError(
                    f"an input of {tap.op} (parameters {who}) was modified by an in-place operation "
                    "after the forward pass; use the out-of-place version of that operation, or call "
                    "backward before it"
                )
        self._reach_losses()
        self._reach_taps()
        for leaf in self.leaves.values():
            if not leaf.uses:  # a parameter without entries
                self.save(leaf)
        self.end()

    def _reach_losses(self) -> None:
        """Losses have a part in their hooks only: their columns were carried when the pass began."""
        if self.block.owner.extension_hook is None:
            return
        records = {node: record for node, (record, _) in self.graph.losses.items()}
        edges = [GradientEdge(node, 0) for node in records]
        for record, edge, grad in zip(records.values(), edges, self._gradients(edges), strict=True):
            if grad is not None:
                self.loss(record, edge, grad)

    def _reach_taps(self) -> None:
        for leaf in self.leaves.values():
            leaf.arrived = True
        taps = [(node, tap) for node, tap in self.graph.taps if tap in self.uses]
        grads: list[Tensor | None] = [None] * len(taps)
        if self.first_order:
            edges = [GradientEdge(node, tap.place) for node, tap in taps]
            grads = self._gradients(edges, self.keeps)
        for i, (_, tap) in enumerate(taps):
            grad, grads[i] = grads[i], None
            self.arrive([tap], {tap.place: grad})

    def _gradients(self, edges: list[GradientEdge], retain: bool = True) -> list[Tensor | None]:
        if not edges:
            return []
        assert self.block.roots is not None
        starts, weights = zip(*self.block.roots, strict=True)
        # Where backward goes on, autograd notes the gradient before hooks of the user change it.
        changed: dict[Node, Any] = {}
        nodes = {edge.node for edge in edges}
        handles = [node.register_prehook(partial(changed.__setitem__, node)) for node in nodes]
        try:
            with self._nested():
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

    def _hear(self, *_: Any) -> None:
        """No hook is called: all gradients are at hand."""

    def _await(self, *_: Any) -> None:
        pass

    def _needs_total(self, *_: Any) -> bool:
        return True
