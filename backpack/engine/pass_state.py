"""What one backward pass knows: its graph, its parameters, and what was refused.

The pass is a chain of classes, each in a file: :class:`PassState`, which knows; ``Saving``, which puts
values on parameters; ``Reducing``, which makes them from what arrives at taps; ``Listening``, which
finds taps and waits for them; and ``Run``, which begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from backpack._torch import executes
from backpack.engine.alone import Budget
from backpack.engine.collect import Leaf
from backpack.engine.debug import Stopwatch
from backpack.engine.exchange import Exchange
from backpack.engine.refusals import Names, parameters_of
from backpack.engine.shards import Shards
from backpack.engine.state import Block
from backpack.graph.forwards import Group, number_alike
from backpack.graph.survey import Graph
from backpack.graph.taps import Source, Tap
from backpack.quantities.base import BackpropExtension
from backpack.quantities.matrix_products import Product
from backpack.sources.columns import ColumnSource
from backpack.sources.table import LossGradient

# Of a run that has not begun, or is over.
NOTHING = Graph()
# Where a backward pass starts, with the gradients there.
Roots = list[tuple[GradientEdge, Tensor]]
# Gradients at a node's outputs, by their numbers.
Gradients = Sequence[Tensor | None] | Mapping[int, Tensor | None]


class PassState:
    """The state of one backward pass, and what is refused in it.

    Args:
        block: the block in which it runs.
        task: its number, or ``None`` for a pass that autograd does not make (``gradient=False``): no
            hook is called then, gradients at taps are handed to ``arrive``.
        keeps: whether what was captured is kept for another pass.
    """

    def __init__(self, block: Block, task: int | None, keeps: bool) -> None:
        self.block = block
        self.task = task
        self.keeps = keeps
        self.graph = NOTHING
        self.leaves: dict[Tensor, Leaf] = {}
        self.uses: dict[Tap, list[tuple[Leaf, Source]]] = {}
        self.groups: list[Group] = []
        # What was refused and left out: reasons by parameters and fields, and parameters as a whole.
        self.without: dict[Tensor | None, dict[str, str]] = {}
        self.dropped: set[Tensor] = set()
        self.modules: list[tuple[nn.Module, set[Tensor]]] = []
        self.handles: list[Any] = []
        self.saved: list[tuple[Tensor, str]] = []
        self.watch = Stopwatch(block.owner.debug)
        # First inputs of operations, for the extension hook.
        self.inputs: dict[Tensor, Tensor] = {}
        self.at_current_node: list[Tap] = []
        self.done = False
        # Parameters that are in parts, if there are any.
        self.shards: Shards | None = None
        processes, rules = block.owner.processes, block.owner.rules
        self.exchange = Exchange(processes, rules) if processes is not None and rules else None
        exts = block.owner.extensions
        self.first_order = [ext for ext in exts if isinstance(ext.source, LossGradient)]
        self.products = [ext for ext in exts if isinstance(ext, Product)]
        self.by_source: dict[ColumnSource, list[BackpropExtension]] = {}
        for ext in exts:
            if ext not in self.first_order and ext not in self.products:
                self.by_source.setdefault(ext.source, []).append(ext)
        self.factored = [ext for ext in self.first_order if not ext.written_out]
        self.written = [ext for ext in self.first_order if ext.written_out]
        self.writes_out = len(self.written) > 1 and any(ext.writes_out for ext in self.first_order)
        # Whether the gradients of parameters come from their forms.
        self.fills = task is None and block.owner.gradient == "forms"
        self.takes_gradient = bool(self.first_order) or self.fills
        self.writes_out |= self.fills and any(ext.writes_out for ext in self.written)
        # Whether nothing else is asked for than gradients of single samples' uses, which autograd
        # computes anyway, and how many of these are held: all, if some quantity is as large.
        self.own_uses_do = self.takes_gradient and not self.factored and self.task is not None
        self.own_uses_do &= block.owner.extension_hook is None
        self.own_budget = Budget(not any(ext.writes_out for ext in self.first_order))
        self.shares_patches = len(self.first_order) + self.fills > 1
        self.frees_previous = [ext.savefield for ext in exts if ext.large]
        # What is known once a parameter's last tap is reached need not wait for its gradient.
        ask = [ext for ext in exts if ext.needs_gradient]
        self.saves_without_gradient = task is None or (not ask and block.owner.extension_hook is None)
        self.needs_totals = any(ext in self.first_order for ext in ask)

    def refuse(
        self,
        error: Exception,
        parameters: Sequence[Tensor] | None = None,
        exts: Sequence[BackpropExtension] | None = None,
        foreign: bool = False,
    ) -> None:
        """Raise a refusal, or leave out what cannot be computed, as the user said."""
        owner, names = self.block.owner, Names(self.graph.recordings)
        given, everything = parameters, self.block.wanted is None and self.block.complete
        if given is not None and not everything:
            given = [p for p in given if p in self.leaves or self._executes(p)]
        if given == [] or not (given or everything or self._computes()):
            return
        if owner.unsupported == "raise" and not foreign:
            raise error
        fields, reason = [ext.savefield for ext in exts or owner.extensions], str(error)
        if owner.unsupported != "skip":
            owner.left_out.warn(fields, reason)
        for p in [leaf.parameter for leaf in self.leaves.values()] if given is None else given:
            owner.left_out.note(self.part(p), names(p), fields, reason)
        if given is None:
            self.without.setdefault(None, {}).update(dict.fromkeys(fields, reason))
        for p in given or ():
            self.without.setdefault(p, {}).update(dict.fromkeys(fields, reason))
        if exts is None:
            self.dropped |= set(given or ())
        for leaf in list(self.leaves.values()):
            if given is None or any(leaf.parameter is p for p in given):
                self._leave_out(leaf)

    def _leave_out(self, leaf: Leaf) -> None:
        """Apply what was refused to a parameter."""
        leaf.without |= self.without.get(None, {}) | self.without.get(leaf.parameter, {})
        for field in leaf.without:
            leaf.states.pop(field, None)
        if leaf.parameter in self.dropped:
            self.leaves.pop(leaf.parameter)
            for tap, uses in self.uses.items():
                self.uses[tap] = [(other, source) for other, source in uses if other is not leaf]

    def _refuse_one(self, leaf: Leaf, ext: BackpropExtension, error: Exception) -> None:
        self.refuse(error, [leaf.parameter], [ext])

    def part(self, parameter: Tensor) -> Tensor:
        """What the user sees of a parameter."""
        return parameter if self.shards is None else self.shards.part(parameter)

    def _executes(self, parameter: Tensor) -> bool:
        """Whether this backward pass computes the parameter's gradient."""
        if self.block.wanted is not None:
            return parameter in self.block.wanted
        return executes(get_gradient_edge(parameter).node)

    def _computes(self) -> bool:
        """Whether this backward pass computes the gradient of any parameter that meets data."""
        used = (source for _, tap in self.graph.taps for source in tap.sources)
        return any(self._executes(p) for source in used for p in parameters_of(source))

    def _clear(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.leaves.clear()
        self.uses.clear()
        self.modules.clear()
        self.inputs.clear()
        self.block.retaining = []
        self.graph = NOTHING
        number_alike(self.groups)
