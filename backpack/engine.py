"""The ``with`` block: runs the river from loss to parameters, saves, and frees.

Order of events in one backward pass inside the block: the loss's node is reached (columns are carried
to all taps in a nested pass), each tap's node is reached (first-order forms), each parameter's
gradient is complete (fields are saved, the extension hook runs), the pass ends. A *run* is the state
of one such pass.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from backpack import capture, chain, hessian, products
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
from backpack.factors import Dense, Form, Pullback, merge, products_kept
from backpack.losses import differentiate_twice
from backpack.quantities import BackpropExtension, BatchGrad, Context, Kind, Product, Variance
from backpack.rules import patches_kept
from backpack.taps import LossRecord, Recording, Source, Tap

ExtensionHook = Callable[[nn.Module], None]
_BY_COLUMNS = ("exact", "sampled", "averaged")
_NOTHING: AbstractContextManager[None] = nullcontext()


class backpack:  # noqa: N801
    """Compute quantities during the backward passes inside the block.

    Example:
        >>> with backpack(Variance(), DiagGGNExact()):  # doctest: +SKIP
        ...     loss.backward()
        >>> parameter.variance, parameter.diag_ggn_exact  # doctest: +SKIP

    Args:
        *exts: quantities, instances of the classes in :mod:`backpack.extensions`. Of two that save
            to the same field the later counts.
        extension_hook: called with every module that owns parameters as soon as their quantities are
            saved, and before that with an extended loss module. Torch's own layers (recurrent ones and
            attention aside) have ``input0`` and ``output`` during the call.
        debug: print what was captured.
        retain_graph: keep what was captured although ``backward`` frees the graph's buffers.
        chunk_size: number of second-order columns carried through the graph at a time; by default
            as many as fit a memory budget.

    Raises:
        ValueError: if ``exts`` holds anything but instances of extensions.

    Blocks may be nested (the inner one counts) and used again. A block belongs to the thread that
    entered it.
    """

    def __init__(
        self,
        *exts: BackpropExtension,
        extension_hook: ExtensionHook | None = None,
        debug: bool = False,
        retain_graph: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        for ext in exts:
            if isinstance(ext, type):
                raise ValueError(
                    f"backpack expects instances of extensions, but got the class {ext.__name__}; "
                    f"write backpack({ext.__name__}())"
                )
            if not isinstance(ext, BackpropExtension):
                raise ValueError(f"backpack expects instances of extensions, but got {ext!r}")
        fields = [ext.savefield for ext in exts]
        for name in sorted({name for name in fields if fields.count(name) > 1}):
            warnings.warn(f"several extensions save to '{name}'; the last one counts", stacklevel=2)
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}")
        self.extensions = tuple({ext.savefield: ext for ext in exts}.values())
        self.extension_hook = extension_hook
        self.debug = debug
        self.retain_graph = retain_graph
        self.chunk_size = chunk_size
        self._blocks: list[_Block] = []

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.extensions) or self.extension_hook is not None

    def __enter__(self) -> backpack:
        block = _Block(self)
        self._blocks.append(block)
        block.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self._blocks.pop().close()


class _Block:
    """One entry of a ``with`` statement: its thread, its runs, and the roots of backward calls."""

    def __init__(self, owner: backpack) -> None:
        self.owner = owner
        self.thread = threading.get_ident()
        self.runs: dict[int, Run] = {}
        self.roots: list[tuple[GradientEdge, Tensor]] | None = None
        self.wanted: set[Tensor] | None = None
        self.nested = 0
        self.watch = _Watch(self)

    def open(self) -> None:
        _open_blocks.append(self)
        capture.reached = _reached
        self.watch.__enter__()

    def close(self) -> None:
        self.watch.__exit__(None, None, None)
        _open_blocks.remove(self)
        for run in list(self.runs.values()):
            run.abort()
        self.runs.clear()


_open_blocks: list[_Block] = []


def _current_block() -> _Block | None:
    """The innermost block of this thread; autograd's device threads share the only thread's."""
    if not _open_blocks:
        return None
    ident = threading.get_ident()
    for block in reversed(_open_blocks):
        if block.thread == ident:
            return block
    for thread in threading.enumerate():
        if thread.ident == ident and not isinstance(thread, threading._DummyThread):
            return None
    if len({block.thread for block in _open_blocks}) > 1:
        raise RuntimeError(
            "several threads have entered backpack(...), and a backward pass on a device cannot be "
            "told apart between them; let one thread at a time use backpack"
        )
    return _open_blocks[-1]


class _Watch(TorchFunctionMode):
    """Sees calls of ``backward`` and ``torch.autograd.grad`` inside a block."""

    def __init__(self, block: _Block) -> None:
        super().__init__()
        self.block = block

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        products = any(ext.kind.name == "product" for ext in self.block.owner.extensions)
        if products and func in (Tensor.backward, torch.autograd.grad) and not self.block.nested:
            kwargs = {**kwargs, "retain_graph": True}
        if func is Tensor.backward:
            gradient = kwargs.get("gradient", args[1] if len(args) > 1 else None)
            return self._backward(func, args, kwargs, [args[0]], [gradient])
        if func is torch.autograd.grad:
            outputs = kwargs.get("outputs", args[0] if args else ())
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            gradients = kwargs.get("grad_outputs", args[2] if len(args) > 2 else None)
            if gradients is None:
                gradients = [None] * len(outputs)
            elif isinstance(gradients, Tensor):
                gradients = [gradients]
            inputs = kwargs.get("inputs", args[1] if len(args) > 1 else ())
            inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
            batched = kwargs.get("is_grads_batched")
            if batched or any(isinstance(t, Tensor) and t.dim() for t in outputs):
                # A Jacobian or Hessian product, not the gradient of a loss.
                with _Nested(self.block):
                    return func(*args, **kwargs)
            wanted = {t for t in inputs if isinstance(t, Tensor)}
            return self._backward(func, args, kwargs, list(outputs), list(gradients), wanted)
        return func(*args, **kwargs)

    def _backward(
        self,
        func: Any,
        args: tuple,
        kwargs: dict,
        outputs: list,
        gradients: list,
        wanted: set[Tensor] | None = None,
    ) -> Any:
        block, outer = self.block, (self.block.roots, self.block.wanted)
        plain = all(isinstance(t, Tensor) and t.grad_fn is not None for t in outputs)
        if block.nested or not plain or not block.owner.active or _current_block() is not block:
            return func(*args, **kwargs)
        for t in outputs:
            if not (math.isfinite(t.item()) if t.numel() == 1 else bool(torch.isfinite(t).all())):
                raise ValueError(
                    f"backpack: the loss is not finite ({t.detach().flatten()[:3].tolist()}); look "
                    "for NaN in the inputs or a learning rate that is too large"
                )
        block.wanted = wanted
        block.roots = [
            (get_gradient_edge(t), torch.ones_like(t) if g is None else g)
            for t, g in zip(outputs, gradients, strict=True)
        ]
        # The run begins before anything is executed and freed.
        handles = [e.node.register_prehook(partial(_run_begins, block)) for e, _ in block.roots]
        try:
            return func(*args, **kwargs)
        finally:
            block.roots, block.wanted = outer
            for handle in handles:
                handle.remove()


def _run_begins(block: _Block, grads: Any) -> None:
    """A backward call seen by the block's watch has reached its root."""
    if not block.nested and capture.disable.should_store_io():
        _run_of(block)


def _run_of(block: _Block) -> Run:
    task = torch._C._current_graph_task_id()
    run = block.runs.get(task)
    if run is None:
        keeps = torch._C._autograd._get_current_graph_task_keep_graph()
        run = block.runs[task] = Run(block, task, keeps or block.owner.retain_graph)
        Variable._execution_engine.queue_callback(run.end)
        run.begin()
    return run


def _reached(recording: Recording, loss: LossRecord | None, grads: Any) -> None:
    """Backward has reached a loss or a model output."""
    block = _current_block() if capture.disable.should_store_io() else None
    if block is None or not block.owner.active:
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            recording.release()
        return
    if block.nested:
        return
    run, node = _run_of(block), torch._C._current_autograd_node()
    run.reach(node)
    if loss is not None:
        run.loss(loss, GradientEdge(node, 0), grads[0])


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
        self.hooked = bool(getattr(parameter, "_backward_hooks", None))


class Run:
    """The state of one backward pass."""

    def __init__(self, block: _Block, task: int, keeps: bool) -> None:
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
        self.done = False
        exts = block.owner.extensions
        self.first_order = [ext for ext in exts if ext.kind.name == "gradient"]
        self.second_order: dict[Kind, list[BackpropExtension]] = {}
        for ext in exts:
            if ext.kind.name != "gradient":
                self.second_order.setdefault(ext.kind, []).append(ext)

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
        names = _Names(graph.recordings)
        self._check(graph, fresh, names)
        nodes: dict[Node, list[Tap]] = {}
        for node, tap in fresh:
            nodes.setdefault(node, []).append(tap)
            for source in tap.sources:
                leaves = [source.leaf] if source.leaf is not None else leaves_below(source.edge)
                for parameter in leaves:
                    if self._executes(parameter):
                        self._use(parameter, node, tap, source, names)
        for node, taps in nodes.items():
            self.handles.append(node.register_prehook(partial(self.tap, taps)))
        if self.block.owner.extension_hook is not None:
            self._own_modules(fresh)
        if self.block.owner.debug:
            self._print(fresh, names)

    def _executes(self, parameter: Tensor) -> bool:
        """Whether this backward pass computes the parameter's gradient."""
        if self.block.wanted is not None:
            return parameter in self.block.wanted
        return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)

    def _check(self, graph: Graph, fresh: list[tuple[Node, Tap]], names: _Names) -> None:
        if any(recording.packed for recording in graph.recordings):
            raise NotImplementedError(
                "the model packs sequences (pack_padded_sequence), which leaves no axis for samples; "
                "give recurrent layers the padded batch, and pick each sample's last valid step"
            )
        if graph.unseen:
            raise RuntimeError(names.unseen(graph.unseen))
        for recording in {id(tap.recording): tap.recording for _, tap in fresh}.values():
            hidden = [p for ref in recording.unseen if (p := ref()) is not None and p.requires_grad]
            if hidden:
                reached = {p for _, tap in fresh for s in tap.sources for p in _parameters(s)}
                hidden = [p for p in hidden if p not in reached]
            if hidden:
                raise RuntimeError(
                    f"parameter {names(hidden[0])} takes part in the forward pass only through "
                    "'.data', which autograd does not see: it has no gradient and no quantities. Use "
                    "the parameter itself, or requires_grad_(False) if it is meant to be constant"
                )
        for _, tap in fresh:
            if tap.released:
                raise RuntimeError(
                    f"the graph of {tap.op} was already backpropagated through; call the earlier "
                    "backward with retain_graph=True, or run the forward pass again"
                )
            if tap.batch.lost:
                who = ", ".join(names(p) for s in tap.sources for p in _parameters(s))
                raise RuntimeError(
                    f"cannot tell which axis of the output of {tap.op} (parameters {who}) holds the "
                    f"samples: {tap.batch.lost}. Keep samples on one axis, or pass the right "
                    "batch_dim to extend"
                )
        if graph.mixed and fresh:
            raise RuntimeError(
                f"cannot tell which axis of the model's output holds the samples: {graph.mixed}. Keep "
                "samples on one axis, or compute a loss that compares samples inside the model"
            )
        if graph.mixing and self.second_order | {e.kind: [] for e in self.first_order}:
            self._refuse_mixing(graph.mixing)
        if Kind("product") in self.second_order and self.block.roots is None:
            raise RuntimeError(
                "products with curvature (GGNMP, HMP, PCHMP) keep the graph, for which the call must "
                "be loss.backward(), not torch.autograd.backward(loss)"
            )
        if self.second_order and (graph.bare or (graph.outputs and self.block.roots is None)):
            fields = ", ".join(e.savefield for es in self.second_order.values() for e in es)
            raise RuntimeError(
                f"{fields} need a loss that backpack knows, but backward reached the model other "
                "than through one. Extend the loss module (lossfunc = extend(CrossEntropyLoss())), "
                "and call loss.backward()"
            )

    def _refuse_mixing(self, why: str) -> None:
        text = (
            f"{why} mixes the samples of a batch, so that quantities of individual samples are not "
            "defined; call model.eval(), or use a norm that keeps samples apart (GroupNorm)"
        )
        for ext in self.block.owner.extensions:
            if not isinstance(ext, BatchGrad):
                raise NotImplementedError(f"{ext.savefield}: {text}")
        warnings.warn(f"{text}. grad_batch holds each row's contribution to the gradient", stacklevel=2)

    def _use(self, parameter: Tensor, node: Node, tap: Tap, source: Source, names: _Names) -> None:
        leaf = self.leaves.get(parameter)
        if parameter.is_complex():
            raise NotImplementedError(
                f"parameter {names(parameter)} is complex, for which quantities are not defined; "
                "use two real parameters (torch.view_as_complex), or requires_grad_(False)"
            )
        if leaf is None:
            leaf = self.leaves[parameter] = _Leaf(parameter, tap.batch.size)
            self.handles.append(parameter.register_hook(partial(self.complete, leaf)))
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

    def _print(self, fresh: Iterable[tuple[Node, Tap]], names: _Names) -> None:
        for _, tap in fresh:
            who = ", ".join(names(p) for s in tap.sources for p in _parameters(s))
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
        names = _Names(self.graph.recordings)
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
        names = _Names(self.graph.recordings)
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
        return Pullback(form, vjp, leaf.parameter.shape)

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

    def _nested(self) -> _Nested:
        return _Nested(self.block)

    # ----------------------------------------------------------------------------------
    # First order

    def tap(self, taps: list[Tap], grads: Sequence[Tensor | None]) -> None:
        """Backward has reached a tap's node."""
        if self.block.nested or torch._C._current_graph_task_id() != self.task:
            return
        ready = []
        for tap in taps:
            g = grads[tap.place] if self.first_order else None
            column = None if g is None else g.unsqueeze(0)
            for leaf, source in self.uses.get(tap, ()):
                if column is not None:
                    with patches_kept() if len(self.first_order) > 1 else _NOTHING:
                        form = self._source_form(leaf, source, column)
                    if source.edge is not None and len(leaf.uses) > 1:
                        # The graph of the derived tensor may be gone when the last use comes.
                        form = Dense(form.dense())
                    leaf.forms.append(form)
                leaf.waiting.discard(tap)
                if not leaf.waiting:
                    ready.append(leaf)
        for leaf in ready:
            with self._timed(leaf.parameter):
                self._contract(leaf)
        for tap in taps:
            if self.block.owner.extension_hook is not None:
                first = tap.args[0] if tap.args else tap.input() if tap.input else None
                for leaf, _ in self.uses.get(tap, ()):
                    if first is not None:
                        self.inputs.setdefault(leaf.parameter, first)
            if not self.keeps:
                tap.release()

    def _contract(self, leaf: _Leaf) -> None:
        """All uses of a parameter are there: reduce its first-order form."""
        if leaf.contracted:
            return
        leaf.contracted = True
        forms, leaf.forms = leaf.forms, []
        if not forms:
            return
        form = merge(forms)
        whole = any(isinstance(e, BatchGrad) and e.subsampling is None for e in self.first_order)
        others = [ext for ext in self.first_order if ext.written_out]
        with self._nested():
            self._reduce(leaf, [ext for ext in self.first_order if not ext.written_out], form)
            if whole and len(others) > 1:
                form = Dense(form.dense())  # written out anyway: it serves the others too
            self._reduce(leaf, others, form)
            if any(isinstance(ext, Variance) for ext in self.first_order):
                if self.block.roots is None or leaf.hooked or leaf.parameter in self.graph.outside:
                    leaf.total = form.total()

    # ----------------------------------------------------------------------------------
    # Saving

    def complete(self, leaf: _Leaf, gradient: Tensor) -> None:
        """A parameter's gradient is complete: save its quantities."""
        if self.block.nested or torch._C._current_graph_task_id() != self.task:
            return

        def total() -> Tensor:
            if leaf.total is not None:
                return leaf.total
            return gradient.to_dense() if gradient.is_sparse else gradient

        context = Context(leaf.parameter, leaf.samples, total)
        for ext in self.block.owner.extensions:
            if ext.savefield in leaf.states:
                value = ext.finish(leaf.states.pop(ext.savefield), context)
            else:
                value = ext.zero(context)
            if not torch.is_grad_enabled():
                value = _detached(value)
            setattr(leaf.parameter, ext.savefield, value)
            self.saved.append((leaf.parameter, ext.savefield))
        hook = self.block.owner.extension_hook
        if hook is None:
            return
        for module, waiting in self.modules:
            if leaf.parameter in waiting:
                waiting.discard(leaf.parameter)
                if not waiting:
                    own = module.parameters(recurse=False)
                    inputs = [self.inputs.pop(p) for p in own if p in self.inputs]
                    exposed = inputs and _passes_its_input_on(module)
                    with _Exposed(module, inputs[0]) if exposed else nullcontext():
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


class _Nested:
    """Hooks that fire while backpack itself differentiates are not meant for it."""

    def __init__(self, block: _Block) -> None:
        self.block = block

    def __enter__(self) -> None:
        self.block.nested += 1

    def __exit__(self, *exc: object) -> None:
        self.block.nested -= 1


def _passes_its_input_on(module: nn.Module) -> bool:
    """Whether a module's operation has the module's own input: layers of torch."""
    if not type(module).__module__.startswith("torch.nn.modules"):
        return False
    several = isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear))
    return not several and getattr(module, "padding_mode", "zeros") == "zeros"


class _Exposed:
    """``module.input0`` and ``module.output`` while an extension hook looks at a layer.

    The output is no longer there, as nothing in backward needs it: it is computed if it is asked for.
    ``torch.nn.Module`` looks for attributes it does not have among its buffers.
    """

    def __init__(self, module: nn.Module, input0: Tensor) -> None:
        self.module, self.input0 = module, input0

    def __enter__(self) -> None:
        self.module.__dict__["input0"] = self.input0
        self.module.__dict__["_buffers"] = _Buffers(self.module._buffers)
        self.module.__dict__["_buffers"].compute = self.output

    def output(self) -> Tensor:
        with torch.no_grad():
            return self.module.forward(self.input0)

    def __exit__(self, *exc: object) -> None:
        self.module.__dict__.pop("input0", None)
        self.module.__dict__["_buffers"] = dict(self.module._buffers)


class _Buffers(dict):
    """A module's buffers and its output."""

    compute: Callable[[], Tensor]

    def __contains__(self, name: object) -> bool:
        return name == "output" or super().__contains__(name)

    def __missing__(self, name: str) -> Tensor:
        if name != "output":
            raise KeyError(name)
        return self.compute()


def _quietly(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function's own passes through the graph are no business of an open block."""

    def product(mat: Tensor) -> Tensor:
        block = _current_block()
        if block is None:
            return function(mat)
        with _Nested(block):
            return function(mat)

    return product


class _Names:
    """Names of parameters, for messages; looked up when one is asked for."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self.recordings = recordings

    def __call__(self, parameter: Tensor) -> str:
        for recording in self.recordings:
            module = recording.module()
            for name, each in module.named_parameters() if module is not None else ():
                if each is parameter:
                    return f"'{name}'"
        return f"of shape {tuple(parameter.shape)}"

    def unseen(self, unseen: Sequence[tuple[Tensor, str]]) -> str:
        parameter, where = unseen[0]
        return (
            f"parameter {self(parameter)} takes part in the loss in a way that backpack cannot see "
            f"(at {where}): inside a scripted or compiled module, a custom autograd.Function, code "
            "that ran outside the extended module, or with data in which samples are mixed. Write "
            "that part with ordinary torch functions inside the extended module, or freeze the "
            "parameter with requires_grad_(False)"
        )


def _parameters(source: Source) -> list[Tensor]:
    return [source.leaf] if source.leaf is not None else leaves_below(source.edge)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, list):
        return [_detached(each) for each in value]
    return value
