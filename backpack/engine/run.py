"""One backward pass, and how it begins; what it does then is in the classes below it, a file each.

Order of events: the loss's node is reached (columns are carried to all taps in a nested pass), each
tap's node is reached (first-order forms), each parameter's gradient is complete (fields are saved, the
extension hook runs), the pass ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack._torch import called_compiled, ran_compiled
from backpack.engine import certificate
from backpack.engine.exchange import Exchange
from backpack.engine.left_out import REFUSALS
from backpack.engine.listening import Listening
from backpack.engine.pass_state import NOTHING, Roots
from backpack.engine.refusals import Names
from backpack.engine.shards import (
    Shards,
    begin_together,
    no_products,
    refuse_in_parts,
    rules_in_parts,
    shards_below,
)
from backpack.engine.state import Nested, current_block
from backpack.graph.retained import retaining
from backpack.graph.survey import Graph
from backpack.quantities import products
from backpack.sources.columns import cotangent_places


class Run(Listening):
    """One backward pass; see :class:`backpack.engine.pass_state.PassState` for its arguments."""

    def begin(self) -> None:
        """Survey the graph, check that nothing is missed, and listen at taps and parameters."""
        self.block.retaining = retaining(self.block.thread)
        roots = self.block.roots
        if roots is None:
            return
        if self.exchange is not None and torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph=True: values that are exchanged between processes cannot be "
                "differentiated; leave out process_group"
            )
        nodes = [edge.node for edge, _ in roots]
        self.shards = shards_below(nodes)
        if self.shards is not None:
            return self._begin_in_parts(self.shards, nodes, roots)
        graph = self._survey(nodes)
        self.listen(graph)
        if self._due(graph):
            self._certify(graph)
        self._begin_columns(graph, roots)

    def _begin_columns(self, graph: Graph, roots: Roots) -> None:
        # Some backends leave no node of their own in the graph.
        if not graph.taps and (any(ran_compiled(node) for node in graph.nodes) or called_compiled()):
            raise RuntimeError(
                "the forward pass ran compiled, so that backpack saw none of its operations; call the "
                "model inside of the backpack(...) block, where it runs uncompiled, and extend it; a "
                "function that holds the block must not be compiled itself (compile its parts)"
            )
        if not graph.taps and not self.block.owner.quiet:
            warnings.warn(
                "no extended model takes part in this backward pass, so that there is nothing to "
                "compute (extend(model) before its forward pass, which must not run in disable(), nor "
                "compiled: a compiled model runs uncompiled inside of the block)",
                stacklevel=2,
            )
        self.columns(roots, graph)
        if self.products:
            self._products(roots, graph)

    def _begin_in_parts(self, shards: Shards, nodes: list[Node], roots: Roots) -> None:
        """Begin where parameters are in parts, which all processes gather and let go of together."""
        owner, graph = self.block.owner, NOTHING
        processes = shards.processes(owner.processes, owner.group_size, owner.gather)
        due, error, outline = False, None, None
        try:
            with shards.quiet():
                graph = self._survey(nodes)
            refuse_in_parts(owner, graph)
            self.exchange = Exchange(processes, rules_in_parts(owner))
            if self.block.wanted is not None:
                self.block.wanted = {shards.whole(p) for p in self.block.wanted}
            if self.products:
                self.refuse(no_products(self.products), None, self.products)
            self.listen(graph)
            due = self._due(graph)
            outline = certificate.outline(graph) if due else None
        except Exception as problem:
            error = problem
        names = Names(graph.recordings)
        reached = [names(p) for p in self.leaves]
        certifies, alike = begin_together(processes, error, outline, reached)
        if certifies and alike:
            with shards.passing(), Nested(self.block):
                fine = certificate.apart(graph)
            certifies = not all(processes.objects(fine))
            if not certifies:
                certificate.remember(graph)
        if not (certifies or self.by_source):
            return self._begin_columns(graph, roots)
        with shards.gathered():
            try:
                if due and certifies:
                    self._certify(graph)
                self._begin_columns(graph, roots)
            except Exception as problem:
                error = problem
            processes.agree(error)

    def _products(self, roots: Roots, graph: Graph) -> None:
        """Functions that go through the graph again; ``_Watch`` made backward keep it."""
        at_outputs = [edge for edge, _ in cotangent_places(graph)]
        records = [record for record, _ in graph.losses.values()] + list(graph.upper.values())
        at_losses = [record.edge for record in records]
        for leaf, ext in [(leaf, ext) for leaf in self.leaves.values() for ext in self.products]:
            if ext.savefield not in leaf.without:
                p = leaf.parameter
                above = all(tap.above for _, tap, _ in leaf.places)
                outputs = at_losses if above else at_outputs
                try:
                    if ext.curvature == "hessian":
                        function = products.hessian_product(roots, p)
                    elif ext.curvature == "ggn":
                        function = products.ggn_product(roots, outputs, p)
                    else:
                        function = products.positive_curvature_product(
                            roots, outputs, leaf, ext.modify, graph.losses
                        )
                except REFUSALS as error:
                    self._refuse_one(leaf, ext, error)
                else:
                    leaf.states[ext.savefield] = _quietly(function)

    def reach(self, node: Node) -> None:
        """A loss or model output of a backward call whose roots were not seen."""
        if self.block.roots is None and self.block.owner.forwards == "further":
            raise RuntimeError(
                "with forwards='further' the call must be loss.backward(), not "
                "torch.autograd.backward(loss): all forward passes have to be known before the first"
            )
        if self.block.roots is None and node not in self.graph.nodes:
            self.shards = shards_below([node])
            if self.shards is not None:
                raise NotImplementedError(
                    "where parameters are in parts (fully_shard) the call must be loss.backward(), not "
                    "torch.autograd.backward(loss)"
                )
            graph = self._survey([node])
            self.listen(graph)
            if self._due(graph):
                self._certify(graph)


def _quietly(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function's own passes through the graph are no business of an open block."""

    def product(mat: Tensor) -> Tensor:
        block = current_block()
        if block is None:
            return function(mat)
        with Nested(block):
            return function(mat)

    return product
