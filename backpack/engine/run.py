"""One backward pass: listens at taps and parameters, contracts, saves, and frees.

Order of events: the loss's node is reached (columns are carried to all taps in a nested pass), each
tap's node is reached (first-order forms), each parameter's gradient is complete (fields are saved, the
extension hook runs), the pass ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack._torch import (
    current_node,
    current_task,
    executes,
    has_values,
    ran_compiled,
    static_graphs,
)
from backpack.engine import certificate
from backpack.engine.collect import Leaf, form_of_source, form_of_zeros, reduce
from backpack.engine.debug import Stopwatch, print_forms, print_outputs, print_taps
from backpack.engine.exchange import Exchange, samples_of
from backpack.engine.layer_io import LayerIO, passes_its_input_on
from backpack.engine.left_out import REFUSALS
from backpack.engine.loop import carry_sources
from backpack.engine.refusals import Names, check, parameters_of
from backpack.engine.shards import (
    Shards,
    begin_together,
    no_products,
    refuse_in_parts,
    rules_in_parts,
    shards_below,
)
from backpack.engine.state import Block, ExtensionHook, Nested, current_block
from backpack.forms.base import Dense
from backpack.forms.several import merge
from backpack.graph.forwards import (
    Group,
    groups_below,
    number_alike,
    number_further,
    refuse_open,
    several_forwards,
    unseen_group,
)
from backpack.graph.retained import retaining
from backpack.graph.survey import Graph, survey
from backpack.graph.taps import LossRecord, Source, Tap
from backpack.kronecker.block import KroneckerBlock
from backpack.quantities import products
from backpack.quantities.base import BackpropExtension, Context
from backpack.quantities.matrix_products import Product
from backpack.quantities.reading import note_found
from backpack.rules.convolution import patches_kept
from backpack.sources.columns import ColumnSource, Pass, cotangent_places
from backpack.sources.table import LossGradient

# Of a run that has not begun, or is over.
NOTHING = Graph()
# Where a backward pass starts, with the gradients there.
Roots = list[tuple[GradientEdge, Tensor]]
# Gradients at a node's outputs, by their numbers.
Gradients = Sequence[Tensor | None] | Mapping[int, Tensor | None]


class Run:
    """The state of one backward pass.

    Args:
        block: the block in which it runs.
        task: its number, or ``None`` for a pass that autograd does not make (``gradient=False``): no
            hook is called then, gradients at taps are handed to :meth:`arrive`.
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
        self.shares_patches = len(self.first_order) + self.fills > 1
        self.frees_previous = [ext.savefield for ext in exts if ext.large]
        # What is known once a parameter's last tap is reached need not wait for its gradient.
        ask = [ext for ext in exts if ext.needs_gradient]
        self.saves_without_gradient = task is None or (not ask and block.owner.extension_hook is None)
        self.needs_totals = any(ext in self.first_order for ext in ask)

    # ----------------------------------------------------------------------------------
    # Beginning

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
        if not graph.taps and any(ran_compiled(node) for node in graph.nodes):
            raise RuntimeError(
                "the forward pass ran compiled, so that backpack saw none of its operations; call the "
                "model inside of the backpack(...) block, where it runs uncompiled, and extend it; a "
                "function that holds the block must not be compiled itself (compile its parts)"
            )
        if not graph.taps:
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
                            roots, outputs, p, ext.modify, graph.losses
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

    def _due(self, graph: Graph) -> bool:
        """Whether it is to be tried out that samples are apart, which some quantity asks for."""
        if graph.mixing or not (self.first_order or self.by_source):
            return False
        if not all(has_values(gradient) for _, gradient in self.block.roots or ()):
            return False
        return certificate.due(graph, self.block.owner.certify)

    def _certify(self, graph: Graph) -> None:
        names = Names(graph.recordings)
        with Nested(self.block), self.watch("certificate that samples are apart"):
            certificate.certify(graph, names.of)

    def _survey(self, roots: list[Node]) -> Graph:
        self.block.wrappers = static_graphs(roots) or self.block.wrappers
        exts = self.block.owner.extensions
        curvature = any(ext.source.second_order for ext in exts)
        with Nested(self.block):
            anew = self.block.owner.certify == "always"
            graph = survey(roots, curvature, anew)
            several = several_forwards(graph) or bool(graph.transformed)
            if self.block.owner.forwards != "same" and several:
                self.groups = groups_below(roots)
                if self.block.owner.forwards == "further":
                    self.groups += unseen_group(graph)
                    number_further(self.groups)
                    return survey(roots, curvature, anew)
                if any(ext.per_sample for ext in exts):
                    refuse_open(roots, self.groups)
            return graph

    def listen(self, graph: Graph) -> None:
        """Add taps of ``graph`` that are not yet known."""
        if self.block.roots is not None:
            self.graph, fresh = graph, graph.taps  # there is no other
        else:
            self.graph = Graph() if self.graph is NOTHING else self.graph
            fresh = self.graph.take(graph)
        names = Names(graph.recordings)
        extensions, rooted = self.block.owner.extensions, self.block.roots is not None
        self._expect(graph, names)
        check(graph, fresh, names, extensions, rooted, self.refuse)
        nodes: dict[Node, list[Tap]] = {}
        everything = self.block.wanted is None and self.block.complete
        for node, tap in fresh:
            nodes.setdefault(node, []).append(tap)
            for source in tap.sources:
                for parameter in parameters_of(source):
                    if everything or self._executes(parameter):
                        self._use(parameter, node, tap, source, names)
        for node, taps in nodes.items() if self.task is not None else ():
            self._listen_at_node(node, taps)
        if self.block.owner.extension_hook is not None:
            self._own_modules(fresh)
        if self.block.owner.debug:
            print_outputs(graph)
            print_taps((tap for _, tap in fresh), names)
            forms = [(p, form_of_zeros(self.block, leaf)) for p, leaf in self.leaves.items()]
            print_forms(forms, extensions, names)

    def _expect(self, graph: Graph, names: Names) -> None:
        """Parameters that take part, whose values are this block's at its end, or gone."""
        wanted, found = self.block.wanted, list[Tensor]()
        if wanted is None and not self.block.complete:
            for _, tap in graph.taps:
                found += _parameters(tap, self._executes)
        else:
            for recording in {id(r): r for r in graph.recordings}.values():
                found += [
                    p for p in _parameters_in(recording.module()) if wanted is None or p in wanted
                ]
            found += graph.outside if wanted is None else graph.outside & wanted
        taken = self.block.expect(map(self.part, found))
        if taken is not None:
            raise RuntimeError(
                f"parameter {names(taken)} takes part in a backward pass of another thread, whose "
                "block of backpack(...) is open and saves to the same fields: each thread would find "
                "values of the other's batch. Give each thread a model of its own (copy.deepcopy), or "
                "hold a lock around the block and whatever reads the fields"
            )

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
        if given == []:
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

    def _use(self, parameter: Tensor, node: Node, tap: Tap, source: Source, names: Names) -> None:
        if self.dropped and parameter in self.dropped:
            return
        leaf = self.leaves.get(parameter)
        if leaf is None and parameter.is_complex():
            return self.refuse(names.complex(parameter), [parameter])
        if leaf is None:
            leaf = self.leaves[parameter] = Leaf(parameter, tap.batch.size, self._refuse_one)
            if self.without:
                self._leave_out(leaf)
            for field, reason in self.without.get(None, {}).items() if self.without else ():
                self.block.owner.left_out.note(self.part(parameter), names(parameter), [field], reason)
            if not self.saves_without_gradient or not parameter.numel():
                self._save_on_gradient(leaf)
            for field in self.frees_previous:
                self.part(parameter).__dict__.pop(field, None)
        if leaf.samples != tap.batch.size:
            return self.refuse(names.sizes(parameter, leaf.samples, tap.batch.size), [parameter])
        if leaf.contracted:
            raise RuntimeError(
                f"parameter {names(parameter)} is reached by several losses of one backward call; add "
                "them up and call backward on the sum"
            )
        leaf.places.append((node, tap, source))
        if not parameter.numel():
            return  # its quantities are those of a parameter that no column reaches
        leaf.uses.append((node, tap, source))
        self.uses.setdefault(tap, []).append((leaf, source))
        leaf.waiting.add(tap)

    def _listen_at_node(self, node: Node, taps: list[Tap]) -> None:
        """Take notice when backward reaches a node with taps."""
        if node is current_node():
            self.at_current_node = taps  # whose hooks are being called already
        else:
            self.handles.append(node.register_prehook(partial(self.tap, taps)))

    def taps_at_current_node(self, grads: Gradients) -> None:
        """Backward began, or was first seen, at a node with taps."""
        here, self.at_current_node = self.at_current_node, []
        if here:
            self.tap(here, grads)

    def _save_on_gradient(self, leaf: Leaf) -> None:
        """Save a parameter's quantities when its gradient is complete."""
        if self.task is None:
            return
        self.handles.append(leaf.parameter.register_hook(partial(self.complete, leaf)))

    def _own_modules(self, fresh: Iterable[tuple[Node, Tap]]) -> None:
        known = {id(module) for module, _ in self.modules}
        for _, tap in fresh:
            root = tap.recording.module()
            if root is None or id(root) in known:
                continue
            for module in root.modules():
                own: set[Tensor] = {p for p in module.parameters(recurse=False) if p in self.leaves}
                if own and id(module) not in known:
                    self.modules.append((module, own))
                known.add(id(module))

    # ----------------------------------------------------------------------------------
    # Second order

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

    # ----------------------------------------------------------------------------------
    # First order

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
            for leaf, source in self.uses.get(tap, ()):
                leaf.arrived |= g is not None
                if column is not None:
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

    # ----------------------------------------------------------------------------------
    # Saving

    def complete(self, leaf: Leaf, gradient: Tensor) -> None:
        """A parameter's gradient is complete: save its quantities."""
        if self.block.nested or current_task() != self.task:
            return
        self.save(leaf, gradient)

    def save(self, leaf: Leaf, gradient: Tensor | None = None) -> None:
        """Save a parameter's quantities, and call the extension hook."""

        def total() -> Tensor:
            found = gradient if leaf.total is None else leaf.total
            if found is None:
                raise RuntimeError(
                    "a quantity asks for the gradient where it is not known: its class does not say "
                    "needs_gradient = True, or it is in `zero`, or of second order in a pass with "
                    "gradient=False"
                )
            return found.to_dense() if found.is_sparse else found

        parameter, states = leaf.parameter, leaf.states
        context = Context(parameter, leaf.samples, total, partial(form_of_zeros, self.block, leaf))
        detaches = not torch.is_grad_enabled()
        for ext in self.block.owner.extensions:
            field = ext.savefield
            if field in leaf.without:
                continue
            reached = field in states
            try:
                state = states.pop(field, None)
                value = ext.finish(state, context) if reached else ext.zero(context)
            except REFUSALS as error:
                self._refuse_one(leaf, ext, error)
                continue
            if self.exchange is not None and field in self.exchange.rules:
                self.exchange.take(ext, value, context, reached)
            else:
                self._set(parameter, field, _detached(value) if detaches else value)
        leaf.let_go()
        if self.shards is not None and self.exchange is not None:
            # At once, for whole values of all parameters are what nobody has room for.
            with torch.no_grad(), Nested(self.block):
                self._exchange(self.exchange, {parameter: Names(self.graph.recordings)(parameter)})
        if self.block.owner.extension_hook is not None:
            self._call_hook(leaf, self.block.owner.extension_hook)

    def _set(self, parameter: Tensor, field: str, value: Any) -> None:
        if self.shards is not None and self.exchange is not None:
            value = self.shards.own(parameter, self.exchange.rules[field], value, self.exchange.gathers)
            parameter = self.shards.part(parameter)
        setattr(parameter, field, value)
        note_found(parameter, field)
        self.saved.append((parameter, field))
        self.block.saved.add((id(parameter), field))

    def _call_hook(self, leaf: Leaf, hook: ExtensionHook) -> None:
        """Call the extension hook with modules all of whose parameters have their quantities."""
        for module, waiting in self.modules:
            if leaf.parameter in waiting:
                waiting.discard(leaf.parameter)
                if not waiting:
                    own = module.parameters(recurse=False)
                    inputs = [self.inputs.pop(p) for p in own if p in self.inputs]
                    exposed = inputs and passes_its_input_on(module)
                    with LayerIO(module, inputs[:1]) if exposed else nullcontext():
                        hook(module)

    # ----------------------------------------------------------------------------------
    # Ending

    def _share(self, exts: Sequence[BackpropExtension]) -> None:
        assert self.exchange is not None
        self.exchange.share(exts, self.leaves.values(), self._known())

    def _known(self) -> dict[Tensor, str]:
        """Parameters that may have values here or in other processes, with names."""
        names = Names(self.graph.recordings).all()
        if self.shards is not None:
            return {p: names.get(p, "") for p in self.leaves}
        return {p: names.get(p, "") for p in (*self.block.expected.values(), *self.leaves)}

    def _exchange(self, exchange: Exchange, known: Mapping[Tensor, str]) -> None:
        """Put values together with those of other processes."""
        owner = self.block.owner
        samples = samples_of(self.leaves.values())
        for p, field, value, why in exchange.run(known, samples, self.without):
            if why is None:
                self._set(p, field, value)
                continue
            reason = f"{why} (in another process)"
            owner.left_out.note(self.part(p), known[p], [field], reason)
            if owner.unsupported != "skip":
                owner.left_out.warn([field], reason)

    def end(self) -> None:
        """The backward pass is over."""
        if self.exchange is not None and self.shards is None:
            with torch.no_grad(), Nested(self.block):
                self._exchange(self.exchange, self._known())
        self.done = True
        self.watch.print(Names(self.graph.recordings))
        self._clear()
        if self.task is not None:
            self.block.runs.pop(self.task, None)

    def abort(self) -> None:
        """The backward pass raised: take back what was saved."""
        if not self.done:
            for parameter, field in self.saved:
                parameter.__dict__.pop(field, None)
            if self.shards is not None:
                self.shards.reset()
        self._clear()

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


def _parameters(tap: Tap, executes: Callable[[Tensor], bool]) -> list[Tensor]:
    return [p for source in tap.sources for p in parameters_of(source) if executes(p)]


def _parameters_in(module: nn.Module | None) -> Iterator[Tensor]:
    """The parameters of a module and all modules in it; ``module.parameters()``, in less time."""
    modules = [module] if module is not None else []
    seen = set(map(id, modules))
    for each in modules:
        for parameter in each._parameters.values():
            if parameter is not None:
                yield parameter
        for child in each._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                modules.append(child)


def _quietly(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function's own passes through the graph are no business of an open block."""

    def product(mat: Tensor) -> Tensor:
        block = current_block()
        if block is None:
            return function(mat)
        with Nested(block):
            return function(mat)

    return product


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if isinstance(value, KroneckerBlock):
        return value.detach() if any(t.requires_grad for t in value._tensors()) else value
    if isinstance(value, list):
        return [_detached(each) for each in value]
    return value
