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
* *parameter Hessian*: entry by entry, by differentiating the gradient, in
  :mod:`backpack.sources.at_parameter`.

And one by chance, :func:`sampled`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from backpack._torch import has_values, shows
from backpack.forms.complex_pairs import as_pairs, from_pairs
from backpack.graph.carry import carry, differentiable_twice
from backpack.graph.nodes import walk
from backpack.graph.recognised import second_derivative
from backpack.graph.tracing import cut
from backpack.losses.blocks import HessianBlocks
from backpack.samples.axis import SampleAxis
from backpack.sources.at_output import forms_at_output
from backpack.sources.at_parameter import (
    chunks_of,
    column_length,
    drawn_entries,
    exact_entries,
    parameter_hessian,
    random_signs,
)
from backpack.sources.columns import Columns, Leaf, Pass, Starts, gradients
from backpack.sources.curvature_map import CurvatureMap


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
        entries = partial(exact_entries, passing=passing, chunk_size=given.chunk_size)
        yield parameter_hessian(given, path, leaf, per_sample, entries)


def _output_size(leaf: Leaf) -> int:
    node, tap, _ = leaf.uses[0]
    return prod(node._input_metadata[tap.place].shape) // max(tap.batch.size, 1)


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
        for k in chunks_of(entries, count):
            picked = torch.zeros(len(k), *flat.shape, dtype=flat.dtype, device=flat.device)
            rows = torch.arange(len(k), device=flat.device)
            picked[rows, :, k] = flat[:, k].T.abs().sqrt()
            columns = batch.join(picked.reshape(len(k), *batch.split(residual).shape), 1)
            yield Columns([below], [columns], flat[:, k].T.sign(), rest)


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
    known = [(g, axis) for g, (_, axis) in zip(found, outputs, strict=True) if g is not None]
    known = [(g, axis) for g, axis in known if g.requires_grad and g.numel()]
    if not known:
        return
    flat = [g for g, _ in known]

    def along(axis: SampleAxis, like: Tensor) -> Tensor:
        real = like.real if like.is_complex() else like
        ids = torch.cos(7 * axis.sample_ids(like.device).to(real) + 1)
        return ids.reshape([-1 if d == axis.dim else 1 for d in range(like.dim())])

    def product(columns: list[Tensor]) -> list[Tensor]:
        with differentiable_twice():
            rows = torch.autograd.grad(flat, edges, columns, retain_graph=True, allow_unused=True)
        return [columns[0].new_zeros(()) if row is None else row for row in rows]

    columns = [_arbitrary(g) for g in flat]
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


def _arbitrary(like: Tensor) -> Tensor:
    pairs = as_pairs(like)
    numbers = torch.cos(5 * torch.arange(pairs.numel()).to(pairs) + 2).reshape(pairs.shape)
    return from_pairs(numbers) if like.is_complex() else numbers


# --------------------------------------------------------------------------------------
# By the Hessian at the tap's output


def _output_hessian(given: Pass, leaf: Leaf) -> Iterator[Columns]:
    ((node, tap, _),) = leaf.uses
    edge, batch = GradientEdge(node, tap.place), tap.batch
    (gradient,) = gradients(given.roots, [edge], create_graph=True)
    if gradient is None or not gradient.requires_grad:
        return
    like = as_pairs(gradient.detach())
    shape = as_pairs(batch.split(gradient.detach())).shape
    size = prod(shape[1:])
    unit = column_length([like], [edge])
    # Unit columns, what becomes of them, and both once more as columns of twice the number.
    count = given.at_once(4 * [edge], like.device.type)
    for k in chunks_of(torch.arange(size, device=like.device), count):
        basis = like.new_zeros(len(k), shape[0], size)
        basis[torch.arange(len(k), device=like.device), :, k] = unit
        basis = basis.reshape(len(k), *shape)
        basis = batch.join(from_pairs(basis) if gradient.is_complex() else basis, 1)
        (curved,) = carry(get_gradient_edge(gradient), [edge], basis)
        if curved is None:
            return
        pairs, sign = _polarised([(batch, basis, curved)], unit)
        yield Columns([edge], pairs, sign, {leaf.parameter}, carried=True)


def _full(columns: Tensor, unit: float) -> Tensor:
    """Columns of length one in at least single precision, in which squares do not overflow."""
    columns = columns.to(torch.promote_types(columns.dtype, torch.float32))
    return columns if unit == 1 else columns / unit


def _polarised(
    products: Sequence[tuple[SampleAxis, Tensor, Tensor]], unit: float
) -> tuple[list[Tensor], Tensor]:
    """Products of columns as signed squares: ``2 a b = ((a + b)^2 - (a - b)^2) / 2``.

    Args:
        products: sample axis and columns ``a``, ``b`` of every operation, ``[v, *output.shape]``.
        unit: what both were multiplied with.

    Returns:
        Columns ``[2 v, *output.shape]`` for each, and their signs ``[2 v, n]``.
    """
    given, products = products, [(batch, _full(a, unit), _full(b, unit)) for batch, a, b in products]

    def norms(which: int) -> Tensor:
        parts = [
            as_pairs(batch.split(ab[which], 1)).flatten(2).square().sum(2) for batch, *ab in products
        ]
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
    columns = [each.to(left.dtype) for each, (_, left, _) in zip(columns, given, strict=True)]
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
    unit = column_length(found, edges)
    for _ in range(count if known else 0):
        signs = [None if g is None else unit * random_signs(g, generator) for g in found]
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
                columns, sign = _polarised(products, unit)  # type: ignore[arg-type]
                places = [GradientEdge(node, tap.place) for node, tap in uses]
                yield Columns(places, columns, sign / count, {leaf.parameter}, carried=True)
    for leaf in given.leaves:
        if leaf not in by_output and leaf.samples:
            passing = [GradientEdge(node, tap.place) for node, tap, _ in leaf.uses]
            draws = partial(drawn_entries, passing=passing, count=count, generator=generator)
            yield parameter_hessian(given, path, leaf, per_sample, draws)
