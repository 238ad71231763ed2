"""Any other loss: differentiated twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from backpack._torch import shows
from backpack.forms.complex_pairs import as_pairs, from_pairs
from backpack.forms.products import spectrum
from backpack.losses.base import LossHessian, normal_draws
from backpack.samples.axis import SampleAxis


def signed_columns(
    loss: LossHessian | Differentiated, grad: Tensor, chunk: int, signed: bool
) -> Iterator[tuple[Sequence[Tensor], Tensor | None]]:
    """Exact columns at every model output, with the signs ``[v, n]`` that their squares count with.

    Args:
        loss: the Hessian, which may be indefinite if it was differentiated twice.
        grad: the gradient at the loss, which may be negative.
        chunk: number of columns at a time.
        signed: whether signs are wanted; without them an indefinite Hessian is an error.

    Yields:
        ``[<= chunk, *output.shape]`` for every output, and signs (``None``: all positive).
    """
    if isinstance(loss, Differentiated):
        signs = loss.signs.split(chunk) if loss.signs is not None and signed else None
        root = replace(loss, signs=None) if signed else loss
        for j, parts in enumerate(root.columns(grad, chunk)):
            yield parts, None if signs is None else signs[j]
    elif signed and shows((grad < 0).any()):
        for part, sign in ((grad, 1.0), (-grad, -1.0)):
            for columns in loss.columns(part.clamp(min=0), chunk):
                yield [columns], columns.new_full((len(columns), loss.batch.size), sign)
    else:
        yield from (([columns], None) for columns in loss.columns(grad, chunk))


LARGEST_OUTPUT = 4096


@dataclass(frozen=True, eq=False)
class Differentiated:
    """The Hessian of a loss without a rule, one block per sample, found by autograd.

    A block extends over all model outputs that the loss depends on, for they may be coupled. The
    gradient at the loss is already in it.

    Attributes:
        root: square roots, ``[r, N, outputs of a sample]``; of the absolute values where a Hessian has
            negative eigenvalues.
        outputs: shape and sample axis of every model output.
        pairs: which of them are complex, so that each of their entries is two numbers.
        signs: signs of the eigenvalues, ``[r, N]``; ``None``: none is negative.
    """

    root: Tensor
    outputs: Sequence[tuple[torch.Size, SampleAxis]]
    signs: Tensor | None = None
    pairs: Sequence[bool] = ()

    @property
    def f(self) -> Tensor:
        """A tensor with dtype and device of the model output."""
        return self.root

    @property
    def axes(self) -> list[SampleAxis]:
        """The sample axes of the model outputs."""
        return [axis for _, axis in self.outputs]

    def _parts(self, columns: Tensor) -> list[Tensor]:
        """``[v, N, outputs of a sample]`` -> ``[v, *output.shape]`` each."""
        pairs = self.pairs or [False] * len(self.outputs)
        shapes = [
            (batch.width, *(size for d, size in enumerate(shape) if d != batch.dim), *(2,) * two)
            for (shape, batch), two in zip(self.outputs, pairs, strict=True)
        ]
        parts = [
            part.reshape(len(part), part.shape[1], *shape)
            for part, shape in zip(columns.split([*map(prod, shapes)], 2), shapes, strict=True)
        ]
        return [
            batch.join(from_pairs(part) if two else part, 1)
            for part, two, (_, batch) in zip(parts, pairs, self.outputs, strict=True)
        ]

    def columns(self, grad: Tensor, chunk: int) -> Iterator[list[Tensor]]:
        """Exact columns, ``[<= chunk, *output.shape]`` at a time for every output."""
        self._refuse_negative()
        return (self._parts(part) for part in self.root.split(chunk) if len(part))

    def _refuse_negative(self) -> None:
        if self.signs is not None:
            raise ValueError(
                "the loss is not convex in the model output (its Hessian has negative eigenvalues): "
                "the generalized Gauss-Newton has no square root there; its diagonal (DiagGGNExact, "
                "BatchDiagGGNExact) and products with it (GGNMP) are defined. Sampled quantities "
                "(KFAC, DiagGGNMC) take the Fisher information of a likelihood that is known: a "
                "Gaussian's where torch.nn.functional.gaussian_nll_loss is called in the block"
            )

    def with_minimal_root(self) -> Differentiated:
        """As few columns as there are."""
        return self

    def sampled(self, grad: Tensor, count: int, generator: torch.Generator | None) -> list[Tensor]:
        """``count`` Monte-Carlo columns, ``[count, *output.shape]`` for every output."""
        self._refuse_negative()
        z = normal_draws((count, *self.root.shape[:2]), self.root, generator) / count**0.5
        return self._parts(torch.einsum("vrn,rno->vno", z, self.root))


def differentiate_twice(
    found: Sequence[tuple[Tensor, Any, SampleAxis]], create_graph: bool = False
) -> Differentiated:
    """Square roots of the per-sample Hessian blocks of a loss, from its gradient's graph.

    Args:
        found: for every model output the differentiable gradient there, its place in the graph, and
            its sample axis.
        create_graph: whether the result is to be differentiated (once).

    Raises:
        ValueError: if the outputs are too large for this, or the loss mixes samples.
        NotImplementedError: if torch cannot differentiate the loss twice.
    """
    sizes = {batch.size for _, _, batch in found}
    if len(sizes) > 1:
        raise ValueError(f"a loss of model outputs for {sorted(sizes)} samples each: cannot match them")
    # Complex outputs are pairs of real ones.
    pairs = [gradient.is_complex() for gradient, _, _ in found]
    flat = torch.cat([as_pairs(batch.split(gradient)).flatten(1) for gradient, _, batch in found], 1)
    edges = [edge for _, edge, _ in found]
    samples, size = flat.shape
    if size > LARGEST_OUTPUT:
        raise ValueError(
            f"this loss has no known Hessian, and differentiating it twice for model outputs of "
            f"{size} numbers per sample needs that many backward passes; extend a loss module that "
            "has a rule, or register one with loss_rule"
        )

    def row(entries: Tensor) -> Tensor:
        """``[N, size]``: derivative of the sum of ``entries`` in the model outputs."""
        rows: Sequence[Tensor | None] = [None] * len(found)
        if entries.requires_grad:
            try:
                rows = torch.autograd.grad(
                    entries.sum(),
                    edges,
                    retain_graph=True,
                    create_graph=create_graph,
                    allow_unused=True,
                )
            except RuntimeError as error:
                if "is not implemented" not in str(error):
                    raise
                raise NotImplementedError(
                    f"this loss has no known Hessian, and torch cannot differentiate it twice ({error})"
                ) from error
        parts = [
            as_pairs(batch.split(torch.zeros_like(gradient) if part is None else part)).flatten(1)
            for part, (gradient, _, batch) in zip(rows, found, strict=True)
        ]
        row = torch.cat(parts, 1)
        return row if create_graph else row.detach()

    outputs = [(gradient.shape, batch) for gradient, _, batch in found]
    hessian = torch.stack([row(flat[:, c]) for c in range(size)], 1) if size else flat.new_zeros(0)
    if not hessian.numel():
        return Differentiated(flat.new_zeros(0, samples, size), outputs, None, pairs)
    exact, eps = hessian.detach(), torch.finfo(hessian.dtype).eps
    # Samples that do not mix contribute to their own rows only, whatever they are multiplied with.
    n, o = (torch.arange(length).to(exact) for length in (samples, size))
    factors = torch.cos(7 * n + 1).unsqueeze(1) * torch.cos(5 * o + 2)
    apart = row(flat * factors).detach() - torch.einsum("nc,ncd->nd", factors, exact)
    if shows(apart.abs().amax() > 10 * (eps**0.5 * exact.abs().amax() + eps)):
        raise ValueError(
            "the loss mixes the samples of a batch (its Hessian couples their outputs), so that its "
            "generalized Gauss-Newton is no sum over samples"
        )
    values, vectors = spectrum((exact + exact.mT) / 2)
    noise = 1e3 * eps * values.abs().amax() + eps / samples
    signs = torch.where(values < -noise, -1.0, 1.0).to(values)
    scale = (values * signs).clamp(min=0).sqrt().unsqueeze(1)
    roots = vectors * scale
    if create_graph:
        # Of the square root's derivatives one that is right for the product and smooth.
        inverse = vectors * torch.where(values.abs().unsqueeze(1) > noise, 1 / scale, 0)
        change = (hessian - exact) @ (inverse * signs.unsqueeze(1))
        roots = roots + change - roots @ (inverse.mT @ change) / 2
    indefinite = shows((signs < 0).any())
    return Differentiated(roots.movedim(2, 0), outputs, signs.T if indefinite else None, pairs)
