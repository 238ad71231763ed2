"""What a pass makes of columns and gradients that arrive: forms, and of these states of quantities."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor
from torch.autograd.graph import GradientEdge

from backpack._torch import current_task
from backpack.engine.alone import OwnUse, form_of_all
from backpack.engine.collect import Leaf, form_of_source, forms_together, reduce
from backpack.engine.layer_io import LayerIO, passes_its_input_on
from backpack.engine.loop import carry_sources
from backpack.engine.pass_state import Gradients, Roots
from backpack.engine.refusals import Names
from backpack.engine.saving import Saving
from backpack.engine.state import Nested
from backpack.forms.base import Dense, Form
from backpack.forms.several import merge
from backpack.graph.outputs import LossRecord
from backpack.graph.survey import Graph
from backpack.graph.taps import Tap
from backpack.rules.convolution import patches_kept
from backpack.sources.columns import Pass


class Reducing(Saving):
    """Takes what arrives at losses and taps to the parameters that it is about."""

    def loss(self, record: LossRecord, edge: GradientEdge, grad: Tensor) -> None:
        """Backward has reached a loss."""
        # A loss inside the model, or within another loss, is an operation like any other.
        if self.block.roots is None and edge.node in self.graph.losses:
            losses = {edge.node: self.graph.losses[edge.node]}
            self.columns([(edge, grad)], replace(self.graph, losses=losses))
        hook = self.block.owner.extension_hook
        if hook is not None and record.module is not None:
            inputs = record.inputs if passes_its_input_on(record.module) else None
            with LayerIO(record.module, inputs()) if inputs is not None else nullcontext():
                hook(record.module)

    def columns(self, roots: Roots, graph: Graph) -> None:
        """Carry the columns of all sources to the taps, and reduce them there."""
        leaves = [leaf for leaf in self.leaves.values() if leaf.uses]
        if leaves and self.by_source:
            block, names = self.block, Names(self.graph.recordings)
            given = Pass(roots, graph, leaves, names, block.owner.chunk_size, block.hooked)
            share = None if self.exchange is None else self._share
            carry_sources(block, self.watch, leaves, given, self.by_source, self.refuse, share)

    def tap(self, taps: list[Tap], grads: Gradients) -> None:
        """Backward has reached a tap's node."""
        if not self.block.nested and current_task() == self.task:
            self.arrive(taps, grads)

    def arrive(self, taps: list[Tap], grads: Gradients) -> None:
        """Take the gradients at a node's outputs to the parameters that its taps are about."""
        ready: dict[Leaf, None] = {}
        if self.block.owner.extension_hook is not None:
            self._keep_inputs(taps)
        for tap in taps:
            g = grads[tap.place]
            column = g.unsqueeze(0) if self.takes_gradient and g is not None else None
            uses, together = self.uses.get(tap, ()), dict[tuple[Leaf, int], Form]()
            if column is not None and len(uses) > 1:
                together = forms_together(self.block, tap, uses, column)
            for leaf, source in uses:
                leaf.arrived |= g is not None
                if (leaf, id(source)) in together:
                    leaf.forms.append(together[leaf, id(source)])
                elif column is not None:
                    if self.shares_patches:
                        with patches_kept():
                            form = form_of_source(self.block, leaf, tap, source, column)
                    else:
                        form = form_of_source(self.block, leaf, tap, source, column)
                    if source.edge is not None and len(leaf.uses) > 1:
                        # The graph of the derived tensor may be gone when the last use comes.
                        form = form.written()
                    leaf.forms.append(form)
                leaf.waiting.discard(tap)
                if not leaf.waiting:
                    ready[leaf] = None
        self._finish(taps, ready)

    def used(self, tap: Tap, uses: list[OwnUse], gradients: Gradients, _: Gradients) -> None:
        """Backward has passed the node of a layer that one sample alone has met."""
        if self.block.nested or current_task() != self.task:
            return
        ready: dict[Leaf, None] = {}
        for use in uses:
            leaf, gradient = use.leaf, gradients[use.place]
            if gradient is not None:
                leaf.arrived = True
                use.take(gradient)
            leaf.waiting.discard(tap)
            if not leaf.waiting:
                ready[leaf] = None
        self._finish([tap], ready)

    def _finish(self, taps: list[Tap], ready: Iterable[Leaf]) -> None:
        """Reduce what is complete, and let go of taps."""
        for leaf in ready:
            if self.watch.runs:
                with self.watch(leaf.parameter):
                    self._contract(leaf)
            else:
                self._contract(leaf)
            if self.saves_without_gradient and leaf.arrived:
                self.save(leaf)
            elif self.saves_without_gradient:
                self._save_on_gradient(leaf)
        for tap in taps:
            self.uses.pop(tap, None)
            if not self.keeps:
                tap.release()

    def _keep_inputs(self, taps: Iterable[Tap]) -> None:
        """What the extension hook finds as the input of a layer."""
        for tap in taps:
            for leaf, _ in self.uses.get(tap, ()):
                if tap.first is not None:
                    self.inputs.setdefault(leaf.parameter, tap.first)

    def _contract(self, leaf: Leaf) -> None:
        """All uses of a parameter are there: reduce its first-order form."""
        leaf.contracted = True
        forms, leaf.forms = leaf.forms, []
        if leaf.alone:
            forms.append(form_of_all(leaf))
        if not forms:
            return
        form = merge(forms)
        with Nested(self.block):
            form = summed = form.tallied() if self.fills else form
            reduce(leaf, self.factored, form)
            if self.writes_out:
                form = Dense(form.dense())  # written out anyway: it serves the others too
                summed = form if not self.fills or summed.adds_up else summed
            reduce(leaf, self.written, form)
            if self.fills or (self.needs_totals and self._needs_total(leaf)):
                leaf.total = summed.total()

    def _needs_total(self, leaf: Leaf) -> bool:
        """Whether the gradient that arrives at the parameter may be another than that of its uses."""
        outside = leaf.parameter in self.graph.outside
        return self.task is None or self.block.roots is None or leaf.hooked or outside
