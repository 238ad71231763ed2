"""One backward pass: listens at taps and parameters, contracts, carries columns, saves, and frees.

Order of events: the loss's node is reached (columns are carried to all taps in a nested pass), each
tap's node is reached (first-order forms), each parameter's gradient is complete (fields are saved, the
extension hook runs), the pass ends.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.engine import certificate
from backpack.engine.layer_io import Exposed, passes_its_input_on
from backpack.engine.refusals import Names, check, parameters_of
from backpack.engine.state import Block, Nested, current_block
from backpack.forms.base import Dense, Form
from backpack.forms.products import products_kept
from backpack.forms.several import Pullback, Together, merge, of_one
from backpack.graph.survey import Graph, carry, leaves_below, pull_back, survey
from backpack.graph.taps import LossRecord, Source, Tap
from backpack.kronecker.objects import KroneckerBlock
from backpack.quantities import products as products
from backpack.quantities.base import BackpropExtension, Context
from backpack.quantities.matrix_products import Product
from backpack.rules.convolution import patches_kept
from backpack.sources.columns import Columns, ColumnSource, Pass, Wanted, cotangent_places
from backpack.sources.table import LossGradient

# Gradients at a node's outputs, by their numbers.
Arrived = Sequence[Tensor | None] | Mapping[int, Tensor | None]
# A node and the number of one of its outputs.
Place = tuple[Node, int]

_NOTHING: AbstractContextManager[None] = nullcontext()


class Leaf:
    """What is collected for one parameter."""

    def __init__(self, parameter: Tensor, samples: int) -> None:
        self.parameter = parameter
        self.samples = samples
        # Where it meets data; the same but for parameters without entries, which no column reaches.
        self.places: list[tuple[Node, Tap, Source]] = []
        self.uses: list[tuple[Node, Tap, Source]] = []
        self.waiting: set[Tap] = set()
        self.forms: list[Form] = []
        self.states: dict[str, Any] = {}
        self.total: Tensor | None = None
        self.contracted = False
        # Whether a gradient has arrived at one of its taps.
        self.arrived = False
        self.hooked = bool(getattr(parameter, "_backward_hooks", None))


class Run:
    """The state of one backward pass."""

    def __init__(self, block: Block, task: int, keeps: bool) -> None:
        self.block = block
        self.task = task
        self.keeps = keeps
        self.graph = Graph()
        self.leaves: dict[Tensor, Leaf] = {}
        self.uses: dict[Tap, list[tuple[Leaf, Source]]] = {}
        self.modules: list[tuple[nn.Module, set[Tensor]]] = []
        self.handles: list[Any] = []
        self.saved: list[tuple[Tensor, str]] = []
        self.costs: dict[Tensor | str, float] = {}
        # First inputs of operations, for the extension hook.
        self.inputs: dict[Tensor, Tensor] = {}
        self.here: list[Tap] = []
        self.done = False
        exts = block.owner.extensions
        self.first_order = [ext for ext in exts if isinstance(ext.source, LossGradient)]
        self.products = [ext for ext in exts if isinstance(ext, Product)]
        self.by_source: dict[ColumnSource, list[BackpropExtension]] = {}
        for ext in exts:
            if ext not in self.first_order and ext not in self.products:
                self.by_source.setdefault(ext.source, []).append(ext)
        self.whole = any(ext.writes_out for ext in self.first_order)
        self.large = [ext.savefield for ext in exts if ext.large]
        # What is known once a parameter's last tap is reached need not wait for its gradient.
        ask = [ext for ext in exts if ext.needs_gradient]
        self.early = not ask and block.owner.extension_hook is None
        self.totals = any(ext in self.first_order for ext in ask)

    # ----------------------------------------------------------------------------------
    # Beginning

    def begin(self) -> None:
        """Survey the graph, check that nothing is missed, and listen at taps and parameters."""
        roots = self.block.roots
        if roots is None:
            return
        graph = self._survey([edge.node for edge, _ in roots])
        self.listen(graph)
        self._certify(graph)
        if not graph.taps:
            warnings.warn(
                "no extended model takes part in this backward pass, so that there is nothing to "
                "compute (extend(model) before its forward pass, which must not run in disable())",
                stacklevel=2,
            )
        self.columns(roots, graph)
        if self.products:
            self._products(roots, graph)

    def _products(self, roots: list[tuple[GradientEdge, Tensor]], graph: Graph) -> None:
        """Functions that go through the graph again; ``_Watch`` made backward keep it."""
        outputs = [edge for edge, _ in cotangent_places(graph)]
        for leaf in self.leaves.values():
            for ext in self.products:
                p = leaf.parameter
                if ext.curvature == "hessian":
                    function = products.hessian_product(roots, p)
                elif ext.curvature == "ggn":
                    function = products.ggn_product(roots, outputs, p)
                else:
                    function = products.positive_curvature_product(roots, outputs, p, ext.modify)
                leaf.states[ext.savefield] = _quietly(function)

    def reach(self, node: Node) -> None:
        """A loss or model output of a backward call whose roots were not seen."""
        if self.block.roots is None and node not in self.graph.nodes:
            graph = self._survey([node])
            self.listen(graph)
            self._certify(graph)

    def _certify(self, graph: Graph) -> None:
        """Try out that samples are apart, if that is due and any quantity asks for samples."""
        if graph.mixing or not (self.first_order or self.by_source):
            return
        if not certificate.due(graph, self.block.owner.certify):
            return
        names = Names(graph.recordings)
        with self._nested(), self._timed("certificate that samples are apart"):
            certificate.certify(graph, names.of)

    def _survey(self, roots: list[Node]) -> Graph:
        with self._nested():
            return survey(roots, any(ext.source.second_order for ext in self.block.owner.extensions))

    def listen(self, graph: Graph) -> None:
        """Add taps of ``graph`` that are not yet known."""
        known = {id(tap) for _, tap in self.graph.taps}
        fresh = [(node, tap) for node, tap in graph.taps if id(tap) not in known]
        self.graph.taps += fresh
        self.graph.losses |= graph.losses
        self.graph.outputs |= graph.outputs
        self.graph.recordings += graph.recordings
        self.graph.outside |= graph.outside
        self.graph.nodes |= graph.nodes
        names = Names(graph.recordings)
        extensions, rooted = self.block.owner.extensions, self.block.roots is not None
        check(graph, fresh, names, extensions, rooted)
        nodes: dict[Node, list[Tap]] = {}
        for node, tap in fresh:
            nodes.setdefault(node, []).append(tap)
            for source in tap.sources:
                leaves = [source.leaf] if source.leaf is not None else leaves_below(source.edge)
                for parameter in leaves:
                    if self._executes(parameter):
                        self._use(parameter, node, tap, source, names)
        for node, taps in nodes.items():
            self._hear(node, taps)
        if self.block.owner.extension_hook is not None:
            self._own_modules(fresh)
        if self.block.owner.debug:
            self._print(fresh, names)

    def _executes(self, parameter: Tensor) -> bool:
        """Whether this backward pass computes the parameter's gradient."""
        if self.block.wanted is not None:
            return parameter in self.block.wanted
        return self.block.complete or torch._C._will_engine_execute_node(
            get_gradient_edge(parameter).node
        )

    def _use(self, parameter: Tensor, node: Node, tap: Tap, source: Source, names: Names) -> None:
        leaf = self.leaves.get(parameter)
        if parameter.is_complex():
            raise NotImplementedError(
                f"parameter {names(parameter)} is complex, for which quantities are not defined; "
                "use two real parameters (torch.view_as_complex), or requires_grad_(False)"
            )
        if leaf is None:
            leaf = self.leaves[parameter] = Leaf(parameter, tap.batch.size)
            if not self.early or not parameter.numel():
                self._await(leaf)
            for field in self.large:
                parameter.__dict__.pop(field, None)
        if leaf.samples != tap.batch.size:
            raise RuntimeError(
                f"parameter {names(parameter)} meets batches of {leaf.samples} and of "
                f"{tap.batch.size} samples in one backward pass; individual samples cannot be matched"
            )
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

    def _hear(self, node: Node, taps: list[Tap]) -> None:
        """Take notice when backward reaches a node with taps."""
        if node is torch._C._current_autograd_node():
            self.here = taps  # whose hooks are being called already
        else:
            self.handles.append(node.register_prehook(partial(self.tap, taps)))

    def tap_here(self, grads: Arrived) -> None:
        """Backward began, or was first seen, at a node with taps."""
        here, self.here = self.here, []
        if here:
            self.tap(here, grads)

    def _await(self, leaf: Leaf) -> None:
        """Save a parameter's quantities when its gradient is complete."""
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

    def _print(self, fresh: Iterable[tuple[Node, Tap]], names: Names) -> None:
        for _, tap in fresh:
            who = ", ".join(names(p) for s in tap.sources for p in parameters_of(s))
            place = f"samples {tap.batch.size}, axis {tap.batch.dim}"
            print(f"[DEBUG] tap {tap.op}: {who} ({place}), {tap.rule}")

    def _timed(self, what: Tensor | str) -> AbstractContextManager[None]:
        """In debug mode, add up what is spent inside the block."""
        return self._stopwatch(what) if self.block.owner.debug else _NOTHING

    @contextmanager
    def _stopwatch(self, what: Tensor | str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.costs[what] = self.costs.get(what, 0.0) + time.perf_counter() - start

    def _print_costs(self) -> None:
        names = Names(self.graph.recordings)
        for what, seconds in self.costs.items():
            name = what if isinstance(what, str) else f"quantities of {names(what)}"
            print(f"[DEBUG] {name}: {1e3 * seconds:.2f} ms")

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
            hook(record.module)

    def columns(self, roots: list[tuple[GradientEdge, Tensor]], graph: Graph) -> None:
        """Carry the columns of all sources to the taps, and reduce them there."""
        leaves = [leaf for leaf in self.leaves.values() if leaf.uses]
        if not leaves or not self.by_source:
            return
        names = Names(self.graph.recordings)
        given = Pass(roots, graph, leaves, names, self.block.owner.chunk_size, self.block.hooked)
        with patches_kept(), self._nested():
            for source, exts in self.by_source.items():
                self._refuse_refining(exts)
                wanted = Wanted(
                    any(ext.per_sample for ext in exts),
                    all(ext.signed for ext in exts),
                    any(ext.every_column for ext in exts),
                )
                refined = [ext for ext in exts if ext.refines]
                chunks = source.chunks(given, wanted)
                kept = list(chunks) if refined and source.random else None
                self._take_all(kept or chunks, exts, given, False)
                if refined:
                    self._take_all(kept or source.chunks(given, wanted), refined, given, True)

    def _refuse_refining(self, exts: list[BackpropExtension]) -> None:
        for ext in exts:
            if ext.refines and any(ext.savefield in leaf.states for leaf in self.leaves.values()):
                raise NotImplementedError(
                    f"{ext.savefield} has eigenvectors of one loss's factors, but backward has reached "
                    "another loss; call loss.backward() on their sum, or use KFLR or KFAC"
                )

    def _take_all(
        self, chunks: Iterable[Columns], exts: list[BackpropExtension], given: Pass, refining: bool
    ) -> None:
        for columns in chunks:
            with self._timed("columns carried to all taps"):
                at = self._carry(columns, given)
            with products_kept():
                for leaf in self.leaves.values():
                    if leaf.uses and (columns.about is None or leaf.parameter in columns.about):
                        with self._timed(leaf.parameter):
                            self._take(leaf, columns, at, exts, refining)
            del at  # before the next columns are carried

    def _carry(self, columns: Columns, given: Pass) -> dict[Place, Tensor | None]:
        """Columns at taps, by places of the graph."""
        if columns.carried:
            places = [(edge.node, edge.output_nr) for edge in columns.starts]
            return dict(zip(places, columns.values, strict=True))
        targets = given.taps if columns.about is None else given.taps_of(columns.about)
        found = carry(columns.starts, targets, columns.values)
        return dict(zip(((edge.node, edge.output_nr) for edge in targets), found, strict=True))

    def _take(
        self,
        leaf: Leaf,
        columns: Columns,
        at: dict[Place, Tensor | None],
        exts: list[BackpropExtension],
        refining: bool,
    ) -> None:
        """Reduce columns that have arrived at the taps of a parameter, or at the parameter itself."""
        count = len(columns.values[0])
        # Factors of inputs are those of all uses, also where these columns reach some of them only.
        absent = count if any(ext.every_use for ext in exts) else 0
        form = self._own_form(leaf, at) if columns.carried else None
        form = self._form(leaf, at, absent) if form is None else form
        if form is None:
            shape = (count, leaf.samples, *leaf.parameter.shape)
            zeros = Dense(leaf.parameter.detach().new_zeros(()).expand(shape))
            self._reduce(leaf, [ext for ext in exts if ext.every_column], zeros)
        elif refining:
            for ext in exts:
                leaf.states[ext.savefield] = ext.refine(leaf.states[ext.savefield], form)
        else:
            self._reduce(leaf, exts, form, columns.sign)

    def _own_form(self, leaf: Leaf, at: dict[Place, Tensor | None]) -> Form | None:
        """The form of columns at the parameter itself, if there are any."""
        own = at.get((get_gradient_edge(leaf.parameter).node, 0))
        if own is None:
            return None
        return Together(own, leaf.samples) if own.dim() == 1 + leaf.parameter.dim() else Dense(own)

    def _form(self, leaf: Leaf, at: dict[Place, Tensor | None], absent: int) -> Form | None:
        """The form of all uses that columns have reached, or of all if ``absent`` columns stand in."""
        arrived = [at.get((node, tap.place)) for node, tap, _ in leaf.uses]
        if all(g is None for g in arrived):
            return None
        forms = []
        for (node, tap, source), g in zip(leaf.uses, arrived, strict=True):
            if g is None and absent:
                about = node._input_metadata[tap.place]
                g = torch.zeros(absent, *about.shape, dtype=about.dtype, device=about.device)
            if g is not None:
                forms.append(self._source_form(leaf, source, g))
        return merge(forms)

    def _zeros(self, leaf: Leaf) -> Form:
        """A column of zeros, in the form in which columns would reach a parameter."""
        zero, forms = leaf.parameter.detach().new_zeros(()), []
        with self._nested():
            for node, tap, source in leaf.places:
                at = node._input_metadata[tap.place]
                if source.edge is None:
                    forms.append(source.form(zero.to(at.dtype).expand(1, *at.shape)))
                else:  # whose graph may be gone
                    forms.append(Dense(zero.expand(1, leaf.samples, *leaf.parameter.shape)))
        return merge(forms)

    def _source_form(self, leaf: Leaf, source: Source, g: Tensor) -> Form:
        form = source.form(g)
        if source.edge is None:
            return form
        vjp = partial(self._pull_back, source.edge, leaf.parameter)
        return of_one(form, lambda each: Pullback(each, vjp, leaf.parameter.shape))

    def _pull_back(self, edge: GradientEdge, parameter: Tensor, columns: Tensor) -> Tensor:
        with self._nested():
            return pull_back(edge, parameter, columns)

    def _reduce(
        self,
        leaf: Leaf,
        exts: Iterable[BackpropExtension],
        form: Form,
        sign: Tensor | None = None,
    ) -> None:
        for ext in exts:
            if ext.savefield in leaf.states:
                state = ext.update(leaf.states[ext.savefield], form, sign)
            else:
                state = ext.begin(leaf.parameter, form, sign)
            leaf.states[ext.savefield] = state

    def _nested(self) -> Nested:
        return Nested(self.block)

    # ----------------------------------------------------------------------------------
    # First order

    def tap(self, taps: list[Tap], grads: Arrived) -> None:
        """Backward has reached a tap's node."""
        if not self.block.nested and torch._C._current_graph_task_id() == self.task:
            self.arrive(taps, grads)

    def arrive(self, taps: list[Tap], grads: Arrived) -> None:
        """Take the gradients at a node's outputs to the parameters that its taps are about."""
        ready: dict[Leaf, None] = {}
        for tap in taps if self.block.owner.extension_hook is not None else ():
            for leaf, _ in self.uses.get(tap, ()):
                if tap.first is not None:
                    self.inputs.setdefault(leaf.parameter, tap.first)
        for tap in taps:
            g = grads[tap.place]
            column = g.unsqueeze(0) if self.first_order and g is not None else None
            for leaf, source in self.uses.get(tap, ()):
                leaf.arrived |= g is not None
                if column is not None:
                    with patches_kept() if len(self.first_order) > 1 else _NOTHING:
                        form = self._source_form(leaf, source, column)
                    if source.edge is not None and len(leaf.uses) > 1:
                        # The graph of the derived tensor may be gone when the last use comes.
                        form = form.written()
                    leaf.forms.append(form)
                leaf.waiting.discard(tap)
                if not leaf.waiting:
                    ready[leaf] = None
        for leaf in ready:
            with self._timed(leaf.parameter):
                self._contract(leaf)
            if self.early and leaf.arrived:
                self.save(leaf)
            elif self.early:
                self._await(leaf)
        for tap in taps if not self.keeps else ():
            tap.release()

    def _contract(self, leaf: Leaf) -> None:
        """All uses of a parameter are there: reduce its first-order form."""
        leaf.contracted = True
        forms, leaf.forms = leaf.forms, []
        if not forms:
            return
        form = merge(forms)
        others = [ext for ext in self.first_order if ext.written_out]
        with self._nested():
            self._reduce(leaf, [ext for ext in self.first_order if not ext.written_out], form)
            if self.whole and len(others) > 1:
                form = Dense(form.dense())  # written out anyway: it serves the others too
            self._reduce(leaf, others, form)
            if self.totals and self._needs_total(leaf):
                leaf.total = form.total()

    def _needs_total(self, leaf: Leaf) -> bool:
        """Whether the gradient that arrives at the parameter may be another than that of its uses."""
        return self.block.roots is None or leaf.hooked or leaf.parameter in self.graph.outside

    # ----------------------------------------------------------------------------------
    # Saving

    def complete(self, leaf: Leaf, gradient: Tensor) -> None:
        """A parameter's gradient is complete: save its quantities."""
        if self.block.nested or torch._C._current_graph_task_id() != self.task:
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

        context = Context(leaf.parameter, leaf.samples, total, partial(self._zeros, leaf))
        detaches = not torch.is_grad_enabled()
        for ext in self.block.owner.extensions:
            if ext.savefield in leaf.states:
                value = ext.finish(leaf.states.pop(ext.savefield), context)
            else:
                value = ext.zero(context)
            setattr(leaf.parameter, ext.savefield, _detached(value) if detaches else value)
            self.saved.append((leaf.parameter, ext.savefield))
        self._call_hook(leaf)

    def _call_hook(self, leaf: Leaf) -> None:
        """Call the extension hook with modules all of whose parameters have their quantities."""
        hook = self.block.owner.extension_hook
        if hook is None:
            return
        for module, waiting in self.modules:
            if leaf.parameter in waiting:
                waiting.discard(leaf.parameter)
                if not waiting:
                    own = module.parameters(recurse=False)
                    inputs = [self.inputs.pop(p) for p in own if p in self.inputs]
                    exposed = inputs and passes_its_input_on(module)
                    with Exposed(module, inputs[0]) if exposed else nullcontext():
                        hook(module)

    # ----------------------------------------------------------------------------------
    # Ending

    def end(self) -> None:
        """The backward pass is over."""
        self.done = True
        self._print_costs()
        self._clear()
        self.block.runs.pop(self.task, None)

    def abort(self) -> None:
        """The backward pass raised: take back what was saved."""
        if not self.done:
            for parameter, field in self.saved:
                parameter.__dict__.pop(field, None)
        self._clear()

    def _clear(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.leaves.clear()
        self.uses.clear()
        self.modules.clear()
        self.inputs.clear()
        self.graph = Graph()


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
        return value.detach()
    if isinstance(value, list):
        return [_detached(each) for each in value]
    return value
