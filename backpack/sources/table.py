"""The sources of columns: the gradient, square roots of the loss's Hessian, the Hessian, the Jacobian.

Letters: ``v`` columns, ``n`` samples, ``C`` numbers of a sample's model output.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backpack.forms.complex_pairs import as_pairs, from_pairs
from backpack.forms.products import spectrum
from backpack.graph.carry import carry
from backpack.losses.blocks import HessianBlocks
from backpack.losses.twice import signed_columns
from backpack.samples.axis import SampleAxis
from backpack.sources import hessian, kfra
from backpack.sources.at_output import forms_at_output
from backpack.sources.columns import Columns, ColumnSource, LossPiece, Pass, Wanted

# Draws of targets are replaced by fewer columns where a sample has no more outputs than this.
LARGEST_REDUCED = 256


@dataclass(frozen=True)
class LossGradient(ColumnSource):
    """One column, the gradient. In an ordinary pass autograd carries it, and hooks at taps see it."""

    second_order: ClassVar[bool] = False

    def chunks(self, given: Pass, wanted: Wanted) -> Iterator[Columns]:
        yield Columns([edge for edge, _ in given.roots], [weight[None] for _, weight in given.roots])


@dataclass(frozen=True)
class ExactRoot(ColumnSource):
    """All columns of a square root of the loss's Hessian: ``sum_v S_v S_v^T = H``."""

    def chunks(self, given: Pass, wanted: Wanted) -> Iterator[Columns]:
        for piece in given.losses:
            about = piece.about
            if wanted.summed and not piece.joint:
                blocks = piece.hessian.blocks(piece.gradient, wanted.signed)  # type: ignore[union-attr]
                about = yield from _at_output(given, piece, blocks)
            if about is not None and not about:
                continue
            taps = given.taps if about is None else given.taps_of(about)
            loss = piece.hessian if wanted.every_column else piece.hessian.with_minimal_root()
            count = given.at_once(taps, loss.f.device.type)
            for values, sign in signed_columns(loss, piece.gradient, count, wanted.signed):
                yield Columns(piece.places, values, sign, about)


def _at_output(
    given: Pass, piece: LossPiece, blocks: HessianBlocks | None
) -> Generator[Columns, None, Collection[Tensor] | None]:
    """Forms of parameters to which no column of a loss is carried; returns to which they are."""
    leaves = [leaf for leaf in given.leaves if piece.about is None or leaf.parameter in piece.about]
    forms = forms_at_output(piece.places[0], blocks, leaves)
    if not forms:
        return piece.about
    yield Columns([], [], forms=forms)
    return {leaf.parameter for leaf in leaves} - forms.keys()


@dataclass(frozen=True)
class SampledRoot(ColumnSource):
    """Random columns whose expected outer product is the loss's Hessian.

    Attributes:
        draws: their number.
        generator: source of randomness; ``None``: torch's own.
    """

    draws: int = 1
    generator: torch.Generator | None = None
    random: ClassVar[bool] = True

    def chunks(self, given: Pass, wanted: Wanted) -> Iterator[Columns]:
        for piece in given.drawn_losses:
            drawn = piece.hessian.sampled(piece.gradient, self.draws, self.generator)
            values: Sequence[Tensor] = [drawn] if isinstance(drawn, Tensor) else drawn
            if wanted.summed:
                values = _fewer(values, piece.hessian.axes)
            yield Columns(piece.places, values, None, piece.about)


def _fewer(columns: Sequence[Tensor], axes: Sequence[SampleAxis]) -> Sequence[Tensor]:
    """Columns with the same sum of outer products for each sample: no more than its outputs have."""
    sizes = (
        as_pairs(part[0]).numel() // max(axis.size, 1) for part, axis in zip(columns, axes, strict=True)
    )
    size = sum(sizes)
    if len(columns[0]) <= size or size > LARGEST_REDUCED or torch.is_grad_enabled():
        return columns
    flat = _flat(columns, axes)
    values, vectors = spectrum(torch.einsum("vnc,vnd->ncd", flat, flat))
    roots = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
    return _apart(roots.movedim(2, 0), columns, axes)


def _flat(columns: Sequence[Tensor], axes: Sequence[SampleAxis]) -> Tensor:
    """Columns at all outputs as one, ``[v, N, C]``; of complex outputs real and imaginary parts."""
    return torch.cat(
        [as_pairs(axis.split(part, 1)).flatten(2) for axis, part in zip(axes, columns, strict=True)], 2
    )


def _apart(flat: Tensor, like: Sequence[Tensor], axes: Sequence[SampleAxis]) -> list[Tensor]:
    """The inverse of :func:`_flat`, for outputs of the shapes of ``like``."""
    shapes = [
        as_pairs(axis.split(part[:1], 1)).shape[1:] for axis, part in zip(axes, like, strict=True)
    ]
    pieces = [
        piece.reshape(len(flat), *shape)
        for piece, shape in zip(flat.split([s[1:].numel() for s in shapes], 2), shapes, strict=True)
    ]
    return [
        axis.join(from_pairs(piece) if part.is_complex() else piece, 1)
        for axis, piece, part in zip(axes, pieces, like, strict=True)
    ]


@dataclass(frozen=True)
class LeadingRoot(ColumnSource):
    """Columns of the leading eigenpairs of each sample's Hessian of the loss.

    The best approximation of ``H_n`` by ``count`` columns: ``sqrt(lambda_v) e_v``, largest first. Signs
    of eigenvectors are arbitrary.

    Attributes:
        count: how many.
    """

    count: int = 1

    def chunks(self, given: Pass, wanted: Wanted) -> Iterator[Columns]:
        for piece in given.losses:
            yield Columns(piece.places, self._leading(piece), None, piece.about)

    def _leading(self, piece: LossPiece) -> list[Tensor]:
        """Singular vectors of each sample's root, ``[v, C]``, of all outputs together."""
        whole = [
            [part] if isinstance(part, Tensor) else part
            for part in piece.hessian.columns(piece.gradient, 2**30)
        ]
        axes, parts = piece.hessian.axes, [torch.cat(part) for part in zip(*whole, strict=True)]
        flat = _flat(parts, axes).transpose(0, 1)
        _, values, vectors = torch.linalg.svd(flat, full_matrices=False)
        top = (values.unsqueeze(2) * vectors)[:, : self.count].transpose(0, 1)
        return _apart(top, parts, axes)


@dataclass(frozen=True)
class AveragedRoot(ColumnSource):
    """Columns of matrices that are averaged over the batch on their way down a chain (KFRA)."""

    def chunks(self, given: Pass, wanted: Wanted) -> Iterator[Columns]:
        for leaf in given.leaves:
            if len(leaf.uses) > 1:
                raise NotImplementedError(
                    f"kfra: its recursion is defined for chains of operations only, but parameter "
                    f"{given.names(leaf.parameter)} is used several times; use KFLR or KFAC"
                )
        for piece in given.losses:
            columns = self._averaged(given, piece)
            if columns.starts:
                yield columns

    def _averaged(self, given: Pass, piece: LossPiece) -> Columns:
        if len(piece.outputs or piece.places) > 1:
            raise NotImplementedError("kfra needs one model output; use KFLR or KFAC")
        start = (piece.outputs or piece.places)[0]
        loss = piece.hessian.with_minimal_root()
        axes = dict(given.model_outputs)
        kfra.in_front(axes.get(start) or piece.hessian.axes[0], start)
        count = given.at_once(piece.places, loss.f.device.type)
        columns = (parts for parts, _ in signed_columns(loss, piece.gradient, count, False))
        # The average is one over the rows of the model's output.
        below = (carry(piece.places, [start], parts)[0] for parts in columns)
        taps = {id(tap): (node, tap) for leaf in given.leaves for node, tap, _ in leaf.uses}
        wanted = [tap for _, tap in taps.values()]
        found = kfra.averaged(
            start, given.leaves[0].samples, (c for c in below if c is not None), wanted
        )
        places = [GradientEdge(taps[key][0], taps[key][1].place) for key in found]
        return Columns(places, list(found.values()), carried=True)


@dataclass(frozen=True)
class OutputBasis(ColumnSource):
    """Unit columns, one for each number of a sample's model output: forms are the Jacobian.

    Several model outputs come one after the other, each with columns of its own.
    """

    def chunks(self, given: Pass, wanted: Wanted) -> Iterator[Columns]:
        for edge, axis in given.model_outputs:
            about = edge.node._input_metadata[edge.output_nr]
            like = torch.empty(0, dtype=about.dtype, device=about.device)
            count = given.at_once([edge, *given.taps], about.device.type)
            for columns in _units(torch.Size(about.shape), axis, like, count):
                yield Columns([edge], [columns])


def _units(shape: torch.Size, axis: SampleAxis, like: Tensor, count: int) -> Iterator[Tensor]:
    split = as_pairs(axis.split(like.new_zeros(()).expand(shape))).shape
    size = prod(split[1:])
    for k in torch.arange(size, device=like.device).split(count):
        basis = as_pairs(like).new_zeros(len(k), split[0], size)
        basis[torch.arange(len(k), device=like.device), :, k] = 1
        basis = basis.reshape(len(k), *split)
        yield axis.join(from_pairs(basis) if like.is_complex() else basis, 1)


@dataclass(frozen=True)
class HessianRoot(ColumnSource):
    """Signed columns whose squares sum to the Hessian diagonal: the loss's, and of operations below."""

    def chunks(self, given: Pass, wanted: Wanted) -> Iterator[Columns]:
        hessian.refuse_mixing(given)
        return hessian.diagonal(given, wanted.per_sample, wanted.summed)


@dataclass(frozen=True)
class RandomSigns(ColumnSource):
    """Products of the Hessian with random signs, an unbiased estimate of its diagonal (Hutchinson).

    Attributes:
        draws: their number.
        generator: source of randomness; ``None``: torch's own.
    """

    draws: int = 1
    generator: torch.Generator | None = None
    random: ClassVar[bool] = True

    def chunks(self, given: Pass, wanted: Wanted) -> Iterator[Columns]:
        hessian.refuse_mixing(given)
        return hessian.sampled(given, wanted.per_sample, self.draws, self.generator)


@dataclass(frozen=True)
class NoColumns(ColumnSource):
    """Of products, which are functions."""

    def chunks(self, given: Pass, wanted: Wanted) -> Iterator[Columns]:
        yield from ()
