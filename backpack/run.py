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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack import chain, hessian, products
from backpack.backprop import (
    COLUMN_BYTES,
    Graph,
    bytes_at,
    carry,
    cut,
    leaves_below,
    pull_back,
    survey,
)
from backpack.blocks import Block, Nested, current_block
from backpack.checks import Names, check, parameters_of
from backpack.exposed import Exposed, passes_its_input_on
from backpack.factors import Dense, Form, Pullback, merge, of_one, products_kept
from backpack.losses import differentiate_twice
from backpack.quantities import BackpropExtension, BatchGrad, Context, Kind, Product
from backpack.rules import patches_kept
from backpack.taps import LossRecord, Source, Tap

# Gradients at a node's outputs, by their numbers.
Arrived = Sequence[Tensor | None] | Mapping[int, Tensor | None]

_BY_COLUMNS = ("exact", "sampled", "averaged")
_NOTHING: AbstractContextManager[None] = nullcontext()


class _Leaf:
    """What is collected for one parameter."""

    def __init__(self, parameter: Tensor, samples: int) -> None:
        self.parameter = parameter
        self.samples = samples
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
        self.absorbed: set[Node] = set()
        self.leaves: dict[Tensor, _Leaf] = {}
        self.uses: dict[Tap, list[tuple[_Leaf, Source]]] = {}
        self.modules: list[tuple[nn.Module, set[Tensor]]] = []
        self.handles: list[Any] = []
        self.saved: list[tuple[Tensor, str]] = []
        self.costs: dict[Tensor | str, float] = {}
        # First inputs of operations, for the extension hook.
        self.inputs: dict[Tensor, Tensor] = {}
        self.here: list[Tap] = []
        self.done = False
        exts = block.owner.extensions
        self.first_order = [ext for ext in exts if ext.kind.name == "gradient"]
        self.second_order: dict[Kind, list[BackpropExtension]] = {}
        for ext in exts:
            if ext.kind.name != "gradient":
                self.second_order.setdefault(ext.kind, []).append(ext)
        self.whole = any(isinstance(e, BatchGrad) and e.subsampling is None for e in self.first_order)
        self.large = [ext.savefield for ext in exts if ext.large]
        # What is known once a parameter's last tap is reached need not wait for its gradient.
        ask = [ext for ext in exts if type(ext).finish is not BackpropExtension.finish]
        self.early = not ask and block.owner.extension_hook is None
        self.totals = any(ext in self.first_order for ext in ask)

    # ----------------------------------------------------------------------------------
    # Beginning

    def begin(self) -> None:
        """Survey the graph, check that nothing is missed, and listen at taps and parameters."""
        roots = self.block.roots
        if roots is None:
            return
        graph = survey([edge.node for edge, _ in roots], bool(self.second_order))
        self.listen(graph)
        if not graph.taps:
            warnings.warn(
                "no extended model takes part in this backward pass, so that there is nothing to "
                "compute (extend(model) before its forward pass, which must not run in disable())",
                stacklevel=2,
            )
        if graph.outputs and any(kind.name in _BY_COLUMNS for kind in self.second_order):
            self._differentiate(roots, graph)
        self._hessian(roots)
        if Kind("product") in self.second_order:
            self._products(roots, graph)

    def _products(self, roots: list[tuple[GradientEdge, Tensor]], graph: Graph) -> None:
        """Functions that go through the graph again; ``_Watch`` made backward keep it."""
        joint, absorbed = graph.joint()
        outputs = [record.edge for node, (record, _) in graph.losses.items() if node not in absorbed]
        outputs += [GradientEdge(node, b.place) for node, bs in joint.items() for b in bs]
        for leaf in self.leaves.values():
            for ext in self.second_order[Kind("product")]:
                assert isinstance(ext, Product)
                p = leaf.parameter
                if ext.curvature == "hessian":
                    function = products.hessian_product(roots, p)
                elif ext.curvature == "ggn":
                    function = products.ggn_product(roots, outputs, p)
                else:
                    function = products.positive_curvature_product(roots, outputs, p, ext.modify)
                leaf.states[ext.savefield] = _quietly(function)

    def _differentiate(self, roots: list[tuple[GradientEdge, Tensor]], graph: Graph) -> None:
        """What has no rule: its Hessian, in all model outputs together, by differentiating twice.

        Known losses of other outputs are left out, and are carried down when backward reaches them.
        """
        outputs, self.absorbed = graph.joint()
        known = graph.losses.keys() - self.absorbed
        places = [(GradientEdge(n, b.place), b.batch) for n, bs in outputs.items() for b in bs]
        create = torch.is_grad_enabled()
        with self._nested(), torch.enable_grad(), cut(outputs.keys() | known):
            gradients = torch.autograd.grad(
                [edge for edge, _ in roots],
                [edge for edge, _ in places],
                [weight for _, weight in roots],
                create_graph=True,
                allow_unused=True,
            )
            found = [
                (g, edge, batch)
                for g, (edge, batch) in zip(gradients, places, strict=True)
                if g is not None and batch is not None
            ]
            if not found:
                return
            loss = differentiate_twice(found, create)
        self.columns([edge for _, edge, _ in found], loss, found[0][0].new_ones(()).detach())

    def reach(self, node: Node) -> None:
        """A loss or model output of a backward call whose roots were not seen."""
        if self.block.roots is None and node not in self.graph.nodes:
            self.listen(survey([node], bool(self.second_order)))

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
            leaf = self.leaves[parameter] = _Leaf(parameter, tap.batch.size)
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

    def _await(self, leaf: _Leaf) -> None:
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
        """Backward has reached a loss: carry its columns to all taps."""
        node = edge.node
        # A loss inside the model, or within another loss, is an operation like any other.
        wanted = any(kind.name in _BY_COLUMNS for kind in self.second_order)
        if wanted and node in self.graph.losses and node not in self.absorbed:
            self.columns([record.edge], record.hessian, grad)
        if self.block.roots is None:
            self._hessian([(edge, grad)])
        hook = self.block.owner.extension_hook
        if hook is not None and record.module is not None:
            hook(record.module)

    def _hessian(self, starts: list[tuple[GradientEdge, Tensor]]) -> None:
        leaves = list(self.leaves.values())
        joint, absorbed = self.graph.joint()
        outputs = [
            (GradientEdge(node, border.place), border.batch)
            for node, borders in joint.items()
            for border in borders
            if border.batch is not None
        ]
        outputs += [
            (record.edge, record.hessian.batch)
            for node, (record, _) in self.graph.losses.items()
            if node not in absorbed and self.second_order
        ]
        wanted = any(kind.name in ("hessian", "sampled_hessian") for kind in self.second_order)
        if wanted and joint:
            places = [(GradientEdge(n, b.place), b.batch) for n, bs in joint.items() for b in bs]
            with self._nested(), cut(joint.keys() | self.graph.losses.keys() - absorbed):
                hessian.refuse_mixing(starts, [(e, b) for e, b in places if b is not None])
        for kind, exts in self.second_order.items():
            per_sample = any(ext.savefield.endswith("_batch") for ext in exts)
            with self._nested():
                if kind.name == "hessian":
                    found = hessian.diagonal(starts, leaves, per_sample, outputs)
                elif kind.name == "sampled_hessian":
                    found = hessian.sampled(starts, leaves, per_sample, outputs, *kind[1:])
                else:
                    continue
                for leaf, form, sign in found:
                    self._reduce(leaf, exts, form, sign)

    def columns(self, starts: list[GradientEdge], loss: Any, grad: Tensor) -> None:
        """Carry the columns of one loss to all taps and reduce them there."""
        uses = (use for leaf in self.leaves.values() for use in leaf.uses)
        taps = list({id(tap): (node, tap) for node, tap, _ in uses}.values())
        if not taps:
            return
        with patches_kept():
            for kind, exts in self.second_order.items():
                if kind.name in _BY_COLUMNS:
                    self._carry(kind, exts, starts, loss, grad, taps)

    def _carry(
        self,
        kind: Kind,
        exts: list[BackpropExtension],
        starts: list[GradientEdge],
        loss: Any,
        grad: Tensor,
        taps: list[tuple[Node, Tap]],
    ) -> None:
        if kind.name == "averaged":
            self._averaged(starts, loss, grad, [tap for _, tap in taps], exts)
            return
        for ext in exts:
            if ext.refines and any(ext.savefield in leaf.states for leaf in self.leaves.values()):
                raise NotImplementedError(
                    f"{ext.savefield} has eigenvectors of one loss's factors, but backward has reached "
                    "another loss; use KFLR or KFAC, or call backward on each loss"
                )
        targets = [GradientEdge(node, tap.place) for node, tap in taps]
        drawn = [loss.sampled(grad, *kind[1:])] if kind.name == "sampled" else None
        exact = loss if any(ext.every_column for ext in exts) else loss.fewest()
        for refining in (False, True):
            some = [ext for ext in exts if ext.refines] if refining else exts
            chunks = drawn or exact.columns(grad, self._chunk(loss, targets))
            for chunk in chunks if some else ():
                with self._nested():
                    parts = [chunk] if isinstance(chunk, Tensor) else chunk
                    with self._timed("columns carried to all taps"):
                        arrived = carry(starts, targets, parts)
                    at = {id(tap): g for (_, tap), g in zip(taps, arrived, strict=True)}
                    del arrived
                    self._arrived(at, len(parts[0]), some, refining)
                    del at  # before the next columns are carried

    def _arrived(
        self, at: dict[int, Tensor | None], columns: int, exts: list[BackpropExtension], refining: bool
    ) -> None:
        """Reduce columns that have arrived at all taps."""
        with products_kept():
            for leaf in self.leaves.values():
                with self._timed(leaf.parameter):
                    self._arrived_at(leaf, at, columns, exts, refining)

    def _arrived_at(
        self,
        leaf: _Leaf,
        at: dict[int, Tensor | None],
        columns: int,
        exts: list[BackpropExtension],
        refining: bool,
    ) -> None:
        form = self._form(leaf, at)
        if form is None:
            shape = (columns, leaf.samples, *leaf.parameter.shape)
            zeros = Dense(leaf.parameter.detach().new_zeros(()).expand(shape))
            self._reduce(leaf, [ext for ext in exts if ext.every_column], zeros)
        elif refining:
            for ext in exts:
                leaf.states[ext.savefield] = ext.refine(leaf.states[ext.savefield], form)
        else:
            self._reduce(leaf, exts, form)

    def _averaged(
        self,
        starts: list[GradientEdge],
        loss: Any,
        grad: Tensor,
        taps: list[Tap],
        exts: list[BackpropExtension],
    ) -> None:
        if len(starts) > 1:
            raise NotImplementedError("kfra needs one model output; use KFLR or KFAC")
        names = Names(self.graph.recordings)
        for leaf in self.leaves.values():
            if len(leaf.uses) > 1:
                raise NotImplementedError(
                    f"kfra: its recursion is defined for chains of operations only, but parameter "
                    f"{names(leaf.parameter)} is used several times; use KFLR or KFAC"
                )
        with self._nested():
            chunks = loss.fewest().columns(grad, self._chunk(loss, starts))
            columns = (chunk if isinstance(chunk, Tensor) else chunk[0] for chunk in chunks)
            samples = next(iter(self.leaves.values())).samples
            at = chain.averaged(starts[0], samples, columns, taps)
            self._arrived({id(tap): at.get(id(tap)) for tap in taps}, 0, exts, False)

    def _chunk(self, loss: Any, targets: list[GradientEdge]) -> int:
        if self.block.owner.chunk_size is not None:
            return self.block.owner.chunk_size
        per_column = bytes_at(targets)
        return max(1, COLUMN_BYTES.get(loss.f.device.type, 2**28) // max(per_column, 1))

    def _form(self, leaf: _Leaf, at: dict[int, Tensor | None]) -> Form | None:
        forms = [
            self._source_form(leaf, source, g)
            for _, tap, source in leaf.uses
            if (g := at[id(tap)]) is not None
        ]
        return merge(forms) if forms else None

    def _source_form(self, leaf: _Leaf, source: Source, g: Tensor) -> Form:
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
        leaf: _Leaf,
        exts: Iterable[BackpropExtension],
        form: Form,
        sign: Tensor | None = None,
    ) -> None:
        for ext in exts:
            if ext.savefield in leaf.states:
                state = ext.update(leaf.states[ext.savefield], form, sign)
            else:
                state = ext.reduce(form, sign)
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
        ready: dict[_Leaf, None] = {}
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

    def _contract(self, leaf: _Leaf) -> None:
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

    def _needs_total(self, leaf: _Leaf) -> bool:
        """Whether the gradient that arrives at the parameter may be another than that of its uses."""
        return self.block.roots is None or leaf.hooked or leaf.parameter in self.graph.outside

    # ----------------------------------------------------------------------------------
    # Saving

    def complete(self, leaf: _Leaf, gradient: Tensor) -> None:
        """A parameter's gradient is complete: save its quantities."""
        if self.block.nested or torch._C._current_graph_task_id() != self.task:
            return

        self.save(leaf, gradient)

    def save(self, leaf: _Leaf, gradient: Tensor | None = None) -> None:
        """Save a parameter's quantities, and call the extension hook."""

        def total() -> Tensor:
            found = gradient if leaf.total is None else leaf.total
            if found is None:
                raise RuntimeError(
                    "a quantity asks for the gradient where it is not known: in `zero`, or of second "
                    "order in a pass with gradient=False"
                )
            return found.to_dense() if found.is_sparse else found

        context = Context(leaf.parameter, leaf.samples, total)
        detaches = not torch.is_grad_enabled()
        for ext in self.block.owner.extensions:
            if ext.savefield in leaf.states:
                value = ext.finish(leaf.states.pop(ext.savefield), context)
            else:
                value = ext.zero(context)
            setattr(leaf.parameter, ext.savefield, _detached(value) if detaches else value)
            self.saved.append((leaf.parameter, ext.savefield))
        self._call_hook(leaf)

    def _call_hook(self, leaf: _Leaf) -> None:
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
        self.graph, self.absorbed = Graph(), set()


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
    if isinstance(value, list):
        return [_detached(each) for each in value]
    return value
