"""The Hessian's diagonal at the parameter itself: entry by entry, or with random signs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil, log2

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from backpack._torch import has_values
from backpack.forms.complex_pairs import as_pairs, from_pairs
from backpack.graph.carry import carry, columns_at_once, differentiable_twice, hooks_suspended
from backpack.graph.tracing import cut
from backpack.sources.columns import Columns, Leaf, Pass, Starts, gradients
from backpack.sources.curvature_map import CurvatureMap


def parameter_hessian(
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


def chunks_of(index: Tensor, count: int) -> Iterator[Tensor]:
    return (part for part in index.split(count) if len(part))


def random_signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random signs, of both parts of complex numbers."""
    pairs = as_pairs(like)
    bits = torch.randint(2, pairs.shape, generator=generator, device=like.device)
    signs = (2 * bits - 1).to(pairs.dtype)
    return from_pairs(signs) if like.is_complex() else signs


def column_length(gradients: Sequence[Tensor | None], edges: Sequence[GradientEdge]) -> float:
    """How long to make columns that are multiplied with a Hessian, so that half precision holds them.

    The Hessian is as large as the gradients are, and these are as large as float16 allows if the loss
    is scaled (by ``GradScaler``).

    Args:
        gradients: gradients that are differentiated.
        edges: places on the way, whose precision it is about.
    """
    if all(edge.node._input_metadata[edge.output_nr].dtype != torch.float16 for edge in edges):
        return 1.0
    there = [g.detach() for g in gradients if g is not None and g.numel() and has_values(g)]
    largest = max((float(g.abs().amax()) for g in there), default=1.0)
    return 2.0 ** -ceil(log2(largest)) if 1 < largest < float("inf") else 1.0


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
    with cut(edge.node for edge in edges):  # for one may be computed from another
        outputs = gradients(starts, edges, create_graph=True)
    for n in range(leaf.samples):
        masked = []
        for edge, gradient, batch in zip(edges, outputs, batches, strict=True):
            if gradient is None:
                continue
            mask = batch.sample_ids(gradient.device) == n
            mask = mask.reshape([-1 if d == batch.dim else 1 for d in range(gradient.dim())])
            masked.append((edge, gradient * mask))
        yield gradients(masked, [place], create_graph=True)[0]


def exact_entries(
    gradient: Tensor | None,
    parameter: Tensor,
    place: GradientEdge,
    create: bool,
    sample: int | None,
    passing: Sequence[GradientEdge],
    chunk_size: int | None,
) -> Tensor:
    real = as_pairs(parameter.detach())
    if gradient is None or not gradient.requires_grad:
        return torch.zeros_like(real)
    edge, like, found = get_gradient_edge(gradient), as_pairs(gradient.detach()), []
    unit = column_length([like], passing)
    count = columns_at_once([place, place, *passing], like.device.type, chunk_size)
    with torch.set_grad_enabled(create):
        for k in chunks_of(torch.arange(real.numel(), device=like.device), count):
            units = like.new_zeros(len(k), real.numel())
            units[torch.arange(len(k), device=like.device), k] = unit
            units = units.reshape(len(k), *real.shape)
            units = from_pairs(units) if parameter.is_complex() else units
            (rows,) = carry(edge, [place], units, passing, sample)
            if rows is None:
                return torch.zeros_like(real)
            # A copy: a view would hold all rows.
            rows = as_pairs(rows).reshape(len(k), -1)
            found.append(rows.gather(1, k.unsqueeze(1)).squeeze(1) / unit)
    return torch.cat(found).reshape(real.shape)


def drawn_entries(
    gradient: Tensor | None,
    parameter: Tensor,
    place: GradientEdge,
    create: bool,
    sample: int | None,
    passing: Sequence[GradientEdge],
    count: int,
    generator: torch.Generator | None,
) -> Tensor:
    diagonal = torch.zeros_like(as_pairs(parameter.detach()))
    if gradient is None or not gradient.requires_grad:
        return diagonal
    unit = column_length([gradient], passing)
    for _ in range(count):
        u = random_signs(gradient, generator)
        with differentiable_twice():
            (product,) = torch.autograd.grad(
                gradient,
                [place],
                unit * u,
                retain_graph=True,
                create_graph=create,
                allow_unused=True,
            )
        if product is not None:
            diagonal = diagonal + as_pairs(u) * as_pairs(product) / (count * unit)
    return diagonal
