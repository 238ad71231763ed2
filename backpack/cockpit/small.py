"""Parameters of few entries: their individual gradients, written out, side by side.

What takes a call of torch for each of many parameters elsewhere takes one for all of them here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backpack.cockpit.histograms import Entries, entries_of
from backpack.own import Dense, Form

if TYPE_CHECKING:
    from backpack.cockpit.collect import Piece, Wish

# Numbers that are written out for a parameter, at most.
SMALL = 2**12


def is_small(form: Form) -> bool:
    """Whether the individual gradients of a parameter are few numbers."""
    return form.columns == 1 and form.samples * form.shape.numel() <= SMALL


class Small:
    """The individual gradients of several parameters in one backward pass.

    Args:
        pieces: of each parameter, with as many samples and on the same device.

    Attributes:
        parameters: the parameters.
        sums: what was summed over each parameter's entries, ``[parameters, N]``: ``norms``,
            ``projections`` on the gradient, ``ends``; as in a piece.
        kept: whether there are more projections to come.
    """

    def __init__(self, pieces: Mapping[Tensor, Piece]) -> None:
        self.parameters = list(pieces)
        rows = [piece.rows for piece in pieces.values() if piece.rows is not None]
        self.columns = torch.cat([each.mT for each in rows]).double()
        self.sizes = tuple(each.shape[1] for each in rows)
        self.sums: dict[str, Tensor] = {}
        self.kept = False

    def look(self, pieces: Mapping[Tensor, Piece], wish: Wish) -> None:
        """Take what is wanted."""
        vectors: dict[str, Sequence[Tensor | None]] = {}
        self.kept = wish.keep
        if wish.projections and not wish.keep:
            vectors["projections"] = [pieces[p].gradient for p in self.parameters]
        if wish.ends is not None and not wish.keep:
            vectors["ends"] = [wish.ends.get(p) for p in self.parameters]
        norms = wish.norms and "norms" not in self.sums
        found = self.project(list(vectors.values()), norms)
        if norms:
            self.sums["norms"] = found[0]
        self.sums |= zip(vectors, found[int(norms) :], strict=True)
        if wish.squares:
            squares = self.columns.square().sum(1).split(self.sizes)
            for p, each in zip(self.parameters, squares, strict=True):
                pieces[p].squares = each.view(p.shape)

    def project(self, vectors: Sequence[Sequence[Tensor | None]], norms: bool = False) -> Tensor:
        """``G_n^T u`` of vectors, each given for every parameter, ``[k, parameters, N]``.

        Args:
            vectors: the vectors; ``None`` stands for zeros.
            norms: whether the squared norms are wanted too, before them.
        """
        columns, samples = self.columns, self.columns.shape[1]
        terms = [columns * columns] if norms else []
        for vector in vectors:
            flat = [
                columns.new_zeros(size) if u is None else u.reshape(-1)
                for u, size in zip(vector, self.sizes, strict=True)
            ]
            terms.append(columns * torch.cat(flat).double().unsqueeze(1))
        if not terms:
            return columns.new_zeros(0, len(self.sizes), samples)
        sums = columns.new_zeros(len(self.sizes), len(terms) * samples)
        sums.index_add_(0, _owners(self.sizes, columns.device), torch.cat(terms, 1))
        return sums.view(len(self.sizes), len(terms), samples).transpose(0, 1)

    def entries(self, most: int, joint: bool) -> Iterator[Entries]:
        """Entries for a histogram: all, or at most so many of each parameter."""
        if self.columns.numel() <= most * len(self.sizes):
            beside = None
            if joint:
                values = torch.cat([p.detach().reshape(-1) for p in self.parameters])
                beside = values.unsqueeze(1).expand(self.columns.shape).reshape(-1)
            yield Entries(self.columns.reshape(-1), beside, 1.0)
            return
        for p, each in zip(self.parameters, self.columns.split(self.sizes), strict=True):
            form = Dense(each.mT.reshape(1, -1, *p.shape))
            yield entries_of(form, p, most, joint)


@lru_cache(maxsize=16)
def _owners(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """The number of the parameter that each entry belongs to."""
    counts = torch.tensor(sizes, device=device)
    return torch.arange(len(sizes), device=device).repeat_interleave(counts, output_size=sum(sizes))


def put_together(pieces: Mapping[Tensor, Piece]) -> list[Small]:
    """Those that are small, in as few as there are numbers of samples and devices."""
    found: dict[tuple[int, torch.device], dict[Tensor, Piece]] = {}
    for p, piece in pieces.items():
        if piece.rows is not None:
            found.setdefault((piece.samples, piece.rows.device), {})[p] = piece
    together = [Small(each) for each in found.values()]
    for piece in pieces.values():
        piece.rows = None
    return together
