"""Curvature of the operations between taps and loss: the exact Hessian diagonal.

Letters: ``v`` columns, ``n`` samples, ``o`` numbers per sample at a tap's output.

Between loss and taps the Hessian is ``J^T H J`` of the loss plus what curved operations add. Three
exact ways, from cheap to general:

* *columns*: if all operations in between are linear, piecewise linear, or curve each entry by
  itself, every such entry adds one signed column ``sqrt(|phi'' g|) e_k`` (Dangel et al., 2020, eq.
  (16) and appendix A.3), carried on like those of the loss. For the layer right below such an operation
  their sum is known without any (:mod:`backpack.sources.at_output`).
* *output Hessian*: for a parameter that enters linearly and once, ``sum_k (J^T e_k)(J^T H e_k)``,
  with ``H e_k`` by differentiating twice at the tap's output, for all samples at once.
* *parameter Hessian*: entry by entry, by differentiating the gradient.

And one by chance, :func:`sampled`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack._torch import has_values, shows
from backpack.graph.carry import carry, columns_at_once, differentiable_twice, hooks_suspended
from backpack.graph.nodes import BATCH_NORMS, LINEAR, PRODUCTS, children_of, kind_of, upwards, walk
from backpack.graph.outputs import LossRecord, loss_at
from backpack.graph.recognised import second_derivative
from backpack.graph.taps import NONLINEAR, TAPS, notes
from backpack.graph.tracing import cut
from backpack.losses.blocks import HessianBlocks
from backpack.samples.axis import SampleAxis
from backpack.sources.at_output import forms_at_output
from backpack.sources.columns import Columns, Leaf, Pass, Starts, gradients


def diagonal(given: Pass, per_sample: bool, summed: bool = False) -> Iterator[Columns]:
    """Signed columns whose squares sum to the Hessian diagonal of the function that is differentiated.

    Args:
        given: the backward pass.
        per_sample: whether the diagonals of single samples are needed.
        summed: whether there may be forms of all columns at once.
    """
    path = CurvatureMap([edge.node for edge, _ in given.roots], given.outputs, given.graph.losses)
    clean: list[Leaf] = []
    by_output: list[Leaf] = []
    by_entry: list[Leaf] = []
    for leaf in given.leaves:
        linear = path.linear_in(leaf) and not given.graph.within
        single = len(leaf.uses) == 1
        if linear and all(node not in path.curved_above for node, _, _ in leaf.uses):
            clean.append(leaf)
        elif linear and single:
            by_output.append(leaf)
        elif leaf.samples:
            by_entry.append(leaf)
    # Columns of curved entries serve all parameters below, but there may be very many.
    below = [leaf for leaf in clean if any(n in path.bent_above for n, _, _ in leaf.uses)]
    alone = [leaf for leaf in below if len(leaf.uses) == 1]
    if below and path.entries() > 3 * sum(map(_output_size, alone)) and len(alone) == len(below):
        clean = [leaf for leaf in clean if leaf not in below]
        by_output += below
        path.nonlinear.clear()
    if clean:
        yield from _columns(given, path, clean, summed)
    for leaf in by_output:
        yield from _output_hessian(given, leaf)
    for leaf in by_entry:
        passing = [GradientEdge(node, tap.place) for node, tap, _ in leaf.uses]
        entries = partial(_entries, passing=passing, chunk_size=given.chunk_size)
        yield _parameter_hessian(given, path, leaf, per_sample, entries)


def _output_size(leaf: Leaf) -> int:
    node, tap, _ = leaf.uses[0]
    return prod(node._input_metadata[tap.place].shape) // max(tap.batch.size, 1)


class CurvatureMap:
    """What lies between the starts and the taps.

    Attributes:
        losses: losses with a known Hessian, with their nodes.
        outputs: model outputs, with their sample axes.
        nonlinear: nodes that curve each entry by itself, with their sample axes.
        bent_above: nodes below such a node.
        curved_above: nodes below an operation that is curved in another way.
    """

    def __init__(
        self,
        starts: list[Node],
        outputs: Sequence[tuple[GradientEdge, SampleAxis]] = (),
        known: Mapping[Node, tuple[LossRecord, Any]] | None = None,
    ) -> None:
        self.known = known or {}
        self.losses: list[tuple[Node, LossRecord]] = []
        self.nonlinear: list[tuple[Node, SampleAxis]] = []
        self.bent_above: set[Node] = set()
        self.curved_above: set[Node] = set()
        order = self._order(starts)
        self.outputs = list(outputs)
        active: dict[Node, bool] = {}
        for node in reversed(order):
            children = self._children(node)
            active[node] = TAPS in notes(node) or any(active.get(c, False) for c in children)
        below_loss = {record.edge.node for _, record in self.losses}
        unknown_loss = not self.losses
        for node in order:
            if self._loss(node) is not None:
                curved = node in self.curved_above
                bent = False
            else:
                curved, bent = node in self.curved_above or unknown_loss, node in self.bent_above
                inputs = [c for c, _ in node.next_functions if c is not None and active.get(c)]
                if not curved and inputs:
                    kind = kind_of(node)
                    if NONLINEAR in notes(node) and len(inputs) == 1:
                        recording, axis = notes(node)[NONLINEAR]
                        self.nonlinear.append((node, recording.among_all(axis)))
                        bent = True
                    elif kind in PRODUCTS:
                        divides = kind == "Div" and node.next_functions[0][0] not in inputs
                        curved = len(inputs) > 1 or divides
                    elif kind in BATCH_NORMS:
                        curved = bool(getattr(node, "_saved_training", True))
                    elif kind not in LINEAR:
                        curved = True
            for child in self._children(node):
                if curved:
                    self.curved_above.add(child)
                if bent and child not in below_loss:
                    self.bent_above.add(child)

    def _loss(self, node: Node) -> LossRecord | None:
        """The loss that a node computes: noted there, or recognised."""
        return self.known[node][0] if node in self.known else loss_at(node)

    def _children(self, node: Node) -> list[Node]:
        record = self._loss(node)
        if record is not None:
            return [record.edge.node]
        return [child for child, _ in node.next_functions if child is not None]

    def _order(self, starts: list[Node]) -> list[Node]:
        """Nodes, each before those below it."""
        order = upwards(starts, self._children)[::-1]
        for node in order:
            record = self._loss(node)
            if record is not None:
                self.losses.append((node, record))
        return order

    def linear_in(self, leaf: Leaf) -> bool:
        """Whether a parameter enters linearly, and not on top of another use of it."""
        linear = all(s.linear and s.edge is None for _, _, s in leaf.uses)
        return linear and not (len(leaf.uses) > 1 and self.nested({node for node, _, _ in leaf.uses}))

    def nested(self, nodes: set[Node]) -> bool:
        """Whether one of the nodes lies below another."""
        return any(not nodes.isdisjoint(walk(children_of(node))) for node in nodes)

    def entries(self) -> int:
        """Curved entries per sample."""
        return sum(
            prod(node._input_metadata[0].shape) // max(batch.size, 1) for node, batch in self.nonlinear
        )


# --------------------------------------------------------------------------------------
# By columns


def _columns(
    given: Pass, path: CurvatureMap, leaves: Sequence[Leaf], summed: bool
) -> Iterator[Columns]:
    uses = {(node, tap.place): None for leaf in leaves for node, tap, _ in leaf.uses}
    targets = [GradientEdge(*place) for place in uses]
    about = {leaf.parameter for leaf in leaves}
    places = [GradientEdge(node, 0) for node, _ in path.losses]
    places += [GradientEdge(node, 0) for node, _ in path.nonlinear]
    grads = gradients(given.roots, places, create_graph=torch.is_grad_enabled())
    for (_, record), arriving in zip(path.losses, grads, strict=False):
        grad, rest = None if arriving is None else record.weight(arriving), about
        if summed and grad is not None:
            forms = forms_at_output(record.edge, record.hessian.blocks(grad, True), leaves)
            if forms:
                yield Columns([], [], forms=forms)
                rest = about - forms.keys()
        if not rest:
            continue
        for part, sign in ((grad, 1), (None if grad is None else -grad, -1)):
            if part is not None and shows((part > 0).any(), sign > 0):
                count = given.at_once([record.edge, *targets], part.device.type)
                for chunk in record.hessian.columns(part.clamp(min=0), count):
                    signs = part.new_full((len(chunk), record.hessian.batch.size), sign)
                    yield Columns([record.edge], [chunk], None if sign > 0 else signs, rest)
    for (node, batch), grad in zip(path.nonlinear, grads[len(path.losses) :], strict=True):
        if grad is None:
            continue
        found = second_derivative(node, grad)
        if found is None:
            continue
        below, residual = found
        beneath = set(walk([below.node]))
        rest = {leaf.parameter for leaf in leaves if any(n in beneath for n, _, _ in leaf.uses)}
        if summed:
            # An entry that a layer makes and the operation curves is one column of the layer's.
            forms = forms_at_output(below, HessianBlocks(residual), leaves)
            if forms:
                yield Columns([], [], forms=forms)
                rest -= forms.keys()
        if not rest:
            continue
        flat = batch.split(residual).flatten(1)
        count = given.at_once([below, *targets], flat.device.type)
        entries = torch.arange(flat.shape[1], device=flat.device)
        if has_values(flat):
            entries = flat.abs().amax(0).nonzero().flatten()
        for k in _chunks(entries, count):
            picked = torch.zeros(len(k), *flat.shape, dtype=flat.dtype, device=flat.device)
            rows = torch.arange(len(k), device=flat.device)
            picked[rows, :, k] = flat[:, k].T.abs().sqrt()
            columns = batch.join(picked.reshape(len(k), *batch.split(residual).shape), 1)
            yield Columns([below], [columns], flat[:, k].T.sign(), rest)


def _chunks(index: Tensor, count: int) -> Iterator[Tensor]:
    return (part for part in index.split(count) if len(part))


def refuse_mixing(given: Pass) -> None:
    """Check that the Hessian in outputs of which no rule knows does not couple samples."""
    joint, absorbed = given.graph.joint()
    if joint:
        outputs = [(edge, axis) for edge, axis in given.outputs if edge.node in joint]
        with cut(joint.keys() | given.graph.losses.keys() - absorbed):
            _refuse_coupled(given.roots, outputs)


def _refuse_coupled(starts: Starts, outputs: Sequence[tuple[GradientEdge, SampleAxis]]) -> None:
    """Samples apart contribute to their own rows only, whatever each is multiplied with."""
    edges = [edge for edge, _ in outputs]
    found = gradients(starts, edges, create_graph=True)
    if any(g is not None and g.is_complex() for g in found):
        raise NotImplementedError(
            "the model output is complex, for which the Hessian diagonal is not defined; return real "
            "numbers"
        )
    known = [(g, axis) for g, (_, axis) in zip(found, outputs, strict=True) if g is not None]
    known = [(g, axis) for g, axis in known if g.requires_grad and g.numel()]
    if not known:
        return
    flat = [g for g, _ in known]

    def along(axis: SampleAxis, like: Tensor) -> Tensor:
        ids = torch.cos(7 * axis.sample_ids(like.device).to(like) + 1)
        return ids.reshape([-1 if d == axis.dim else 1 for d in range(like.dim())])

    def product(columns: list[Tensor]) -> list[Tensor]:
        with differentiable_twice():
            rows = torch.autograd.grad(flat, edges, columns, retain_graph=True, allow_unused=True)
        return [columns[0].new_zeros(()) if row is None else row for row in rows]

    columns = [torch.cos(5 * torch.arange(g.numel()).to(g) + 2).reshape(g.shape) for g in flat]
    scales = [along(axis, g) for g, axis in known]
    scaled = product([c * scale for c, scale in zip(columns, scales, strict=True)])
    for (_, axis), once, after in zip(outputs, product(columns), scaled, strict=True):
        if once.dim():
            eps, apart = torch.finfo(once.dtype).eps, along(axis, once) * once - after
            if shows(apart.abs().amax() > 10 * (eps**0.5 * once.abs().amax() + eps)):
                raise NotImplementedError(
                    "the loss mixes the samples of a batch (its Hessian couples their outputs), so "
                    "that the Hessian diagonal is no sum over samples; use HMP"
                )


# --------------------------------------------------------------------------------------
# By the Hessian at the tap's output


def _output_hessian(given: Pass, leaf: Leaf) -> Iterator[Columns]:
    ((node, tap, _),) = leaf.uses
    edge, batch = GradientEdge(node, tap.place), tap.batch
    (gradient,) = gradients(given.roots, [edge], create_graph=True)
    if gradient is None or not gradient.requires_grad:
        return
    shape = batch.split(gradient).shape
    size, like = prod(shape[1:]), gradient.detach()
    # Unit columns, what becomes of them, and both once more as columns of twice the number.
    count = given.at_once(4 * [edge], like.device.type)
    for k in _chunks(torch.arange(size, device=like.device), count):
        basis = like.new_zeros(len(k), shape[0], size)
        basis[torch.arange(len(k), device=like.device), :, k] = 1
        basis = batch.join(basis.reshape(len(k), *shape), 1)
        (curved,) = carry(get_gradient_edge(gradient), [edge], basis)
        if curved is None:
            return
        pairs, sign = _polarised([(batch, basis, curved)])
        yield Columns([edge], pairs, sign, {leaf.parameter}, carried=True)


def _polarised(
    products: Sequence[tuple[SampleAxis, Tensor, Tensor]],
) -> tuple[list[Tensor], Tensor]:
    """Products of columns as signed squares: ``2 a b = ((a + b)^2 - (a - b)^2) / 2``.

    Args:
        products: sample axis and columns ``a``, ``b`` of every operation, ``[v, *output.shape]``.

    Returns:
        Columns ``[2 v, *output.shape]`` for each, and their signs ``[2 v, n]``.
    """

    def norms(which: int) -> Tensor:
        parts = [batch.split(ab[which], 1).flatten(2).square().sum(2) for batch, *ab in products]
        return sum(parts[1:], parts[0]).sqrt()

    # a and b of one size per sample: the difference of squares loses few digits
    a, b = norms(0), norms(1)
    ratio = torch.where((a > 0) & (b > 0), b, 1) / torch.where((a > 0) & (b > 0), a, 1)
    balance = ratio.sqrt() / 2**0.5
    columns = []
    for batch, left, right in products:
        shape = batch.split(left, 1).shape
        scale = balance.reshape(*shape[:2], *(1 for _ in shape[2:])).expand(shape)
        scale = batch.join(scale, 1)
        left, right = left * scale, right / (2 * scale)
        columns.append(torch.cat([left + right, left - right]))
    sign = torch.ones_like(balance)
    return columns, torch.cat([sign, -sign]) / 2


# --------------------------------------------------------------------------------------
# By random signs


def sampled(
    given: Pass, per_sample: bool, count: int, generator: torch.Generator | None
) -> Iterator[Columns]:
    """Signed columns whose squares sum to an unbiased estimate of the Hessian diagonal.

    ``u`` is drawn at the outputs of operations that are linear in a parameter, and at the parameter
    itself where one is not: ``E[(J^T u) (J^T H u)] = diag(J^T H J)``, with ``J^T`` linear.

    Args:
        given: the backward pass.
        per_sample: whether the diagonals of single samples are needed.
        count: number of draws.
        generator: source of randomness.
    """
    create = torch.is_grad_enabled()
    path = CurvatureMap([edge.node for edge, _ in given.roots], given.outputs, given.graph.losses)
    linear = [] if given.graph.within else given.leaves
    by_output = [leaf for leaf in linear if path.linear_in(leaf)]
    taps = {id(tap): (node, tap) for leaf in by_output for node, tap, _ in leaf.uses}
    edges = [GradientEdge(node, tap.place) for node, tap in taps.values()]
    found = gradients(given.roots, edges, create_graph=True)
    known = [g for g in found if g is not None and g.requires_grad]
    for _ in range(count if known else 0):
        signs = [None if g is None else _signs(g, generator) for g in found]
        drawn = [u for u, g in zip(signs, found, strict=True) if g is not None and g.requires_grad]
        with differentiable_twice():
            curved = torch.autograd.grad(
                known, edges, drawn, retain_graph=True, create_graph=create, allow_unused=True
            )
        at = {
            key: (u, torch.zeros_like(u) if c is None else c)
            for key, u, c in zip(taps, signs, curved, strict=True)
            if u is not None
        }
        for leaf in by_output:
            uses = [(node, tap) for node, tap, _ in leaf.uses if id(tap) in at]
            if uses:
                products = [
                    (tap.batch, *(each.unsqueeze(0) for each in at[id(tap)])) for _, tap in uses
                ]
                columns, sign = _polarised(products)  # type: ignore[arg-type]
                places = [GradientEdge(node, tap.place) for node, tap in uses]
                yield Columns(places, columns, sign / count, {leaf.parameter}, carried=True)
    for leaf in given.leaves:
        if leaf not in by_output and leaf.samples:
            draws = partial(_drawn_entries, count=count, generator=generator)
            yield _parameter_hessian(given, path, leaf, per_sample, draws)


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    bits = torch.randint(2, like.shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)


# --------------------------------------------------------------------------------------
# By entries of the parameter


def _parameter_hessian(
    given: Pass,
    path: CurvatureMap,
    leaf: Leaf,
    per_sample: bool,
    entries: Callable[[Tensor | None, Tensor, GradientEdge, bool, int | None], Tensor],
) -> Columns:
    parameter, create = leaf.parameter, torch.is_grad_enabled()
    place = get_gradient_edge(parameter)
    with hooks_suspended(parameter), torch.enable_grad():
        if per_sample:
            found = _sample_gradients(given.roots, path, leaf, place)
            rows = [entries(each, parameter, place, create, n) for n, each in enumerate(found)]
            diagonal = torch.stack(rows)
        else:
            (gradient,) = gradients(given.roots, [place], create_graph=True)
            diagonal = entries(gradient, parameter, place, create, None)
    parts = torch.stack([diagonal.clamp(min=0).sqrt(), (-diagonal).clamp(min=0).sqrt()])
    sign = torch.ones(2, leaf.samples, dtype=parts.dtype, device=parts.device)
    sign[1] = -1
    return Columns([place], [parts], sign, {parameter}, carried=True)


def _sample_gradients(
    starts: Starts, path: CurvatureMap, leaf: Leaf, place: GradientEdge
) -> Iterator[Tensor | None]:
    """Gradients of single samples, by masking the gradient at the model output."""
    if any(tap.above and not tap.within for _, tap, _ in leaf.uses):
        raise NotImplementedError(
            f"the Hessian diagonal of single samples of a parameter of shape "
            f"{tuple(leaf.parameter.shape)}, which is used above the model's output in a way that is "
            "not linear, is not known; use DiagHessian, or use the parameter inside an extended module"
        )
    if not path.outputs:
        raise NotImplementedError(
            "the Hessian diagonal of single samples of a parameter that is used several times needs to "
            "know the model output; call loss.backward(), or use DiagHessian"
        )
    edges, batches = zip(*path.outputs, strict=True)
    outputs = gradients(starts, edges, create_graph=True)
    for n in range(leaf.samples):
        masked = []
        for edge, gradient, batch in zip(edges, outputs, batches, strict=True):
            if gradient is None:
                continue
            mask = (batch.sample_ids(gradient.device) == n).to(gradient.dtype)
            mask = mask.reshape([-1 if d == batch.dim else 1 for d in range(gradient.dim())])
            masked.append((edge, gradient * mask))
        yield gradients(masked, [place], create_graph=True)[0]


def _entries(
    gradient: Tensor | None,
    parameter: Tensor,
    place: GradientEdge,
    create: bool,
    sample: int | None,
    passing: Sequence[GradientEdge],
    chunk_size: int | None,
) -> Tensor:
    if gradient is None or not gradient.requires_grad:
        return torch.zeros_like(parameter)
    edge, like, found = get_gradient_edge(gradient), gradient.detach(), []
    count = columns_at_once([place, place, *passing], like.device.type, chunk_size)
    with torch.set_grad_enabled(create):
        for k in _chunks(torch.arange(parameter.numel(), device=like.device), count):
            units = like.new_zeros(len(k), parameter.numel())
            units[torch.arange(len(k), device=like.device), k] = 1
            (rows,) = carry(edge, [place], units.reshape(len(k), *parameter.shape), passing, sample)
            if rows is None:
                return torch.zeros_like(parameter)
            # A copy: a view would hold all rows.
            found.append(rows.reshape(len(k), -1).gather(1, k.unsqueeze(1)).squeeze(1))
    return torch.cat(found).reshape(parameter.shape)


def _drawn_entries(
    gradient: Tensor | None,
    parameter: Tensor,
    place: GradientEdge,
    create: bool,
    sample: int | None,
    count: int,
    generator: torch.Generator | None,
) -> Tensor:
    diagonal = torch.zeros_like(parameter)
    if gradient is None or not gradient.requires_grad:
        return diagonal
    for _ in range(count):
        u = _signs(gradient, generator)
        with differentiable_twice():
            (product,) = torch.autograd.grad(
                *(gradient, [place], u), retain_graph=True, create_graph=create, allow_unused=True
            )
        diagonal = diagonal if product is None else diagonal + u * product / count
    return diagonal
