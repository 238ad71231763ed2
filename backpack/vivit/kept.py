"""What a backward pass keeps: the forms of columns, by parameter, instead of a field."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backpack.own import (
    BackpropExtension,
    Columns,
    ColumnSource,
    Context,
    Form,
    LossGradient,
    Pass,
    Wanted,
)
from backpack.vivit.settled import settled, tensors_of

Versions = list[tuple[Tensor, int]]


class Piece(NamedTuple):
    """The form of one chunk of columns.

    Attributes:
        chunk: its number.
        form: the form.
        versions: the tensors that it refers to, and how often they had been changed in place.
    """

    chunk: int
    form: Form
    versions: Versions


class Kept(NamedTuple):
    """What is kept of a parameter.

    Attributes:
        samples: number of samples of the batch.
        pieces: forms of the samples that are kept.
    """

    samples: int
    pieces: list[Piece]


class Numbered(ColumnSource):
    """Columns of another source, with a number for each chunk; notes what it sees of the pass.

    Parameters that a chunk does not reach are not told of it: by their numbers, chunks of different
    parameters are matched.

    Attributes:
        source: the other source; ``None``: no columns.
        every_column: whether as many columns are wanted as there are model outputs, not as few as do.
        sizes: number of columns of each chunk so far.
        begun: number of the first chunk of the last call.
        order: the parameters, in the order of the models that hold them.
    """

    def __init__(self, source: ColumnSource | None, every_column: bool = False) -> None:
        self.source, self.every_column = source, every_column
        self.random = source is not None and source.random  # type: ignore[misc]
        self.second_order = source is not None and source.second_order  # type: ignore[misc]
        self.sizes: list[int] = []
        self.begun = 0
        self.order: dict[Tensor, None] = {}

    def restart(self) -> None:
        """Forget the pass before."""
        self.sizes, self.order = [], {}

    def chunks(self, given: Pass, wanted: Wanted) -> Iterator[Columns]:
        found = [leaf.parameter for leaf in given.leaves]
        owners = [recording.module() for recording in given.graph.recordings]
        known = [p for owner in owners if owner is not None for p in owner.parameters()]
        self.order |= dict.fromkeys([*(p for p in known if p in set(found)), *found])
        self.begun = len(self.sizes)
        if self.source is None:
            return
        wanted = wanted._replace(every_column=wanted.every_column or self.every_column)
        for columns in self.source.chunks(given, wanted):
            self.sizes.append(len(columns.values[0]))
            yield columns


class Keep(BackpropExtension):
    """Forms of all chunks of columns of a parameter, kept.

    Args:
        savefield: the parameter's attribute.
        source: the columns.
        subsampling: samples to keep; default all.
        deliver: is given the parameter and what is kept of it, in place of the attribute.
    """

    needs_gradient = False
    of_complex = None

    def __init__(
        self,
        savefield: str,
        source: Numbered | LossGradient,
        subsampling: Sequence[int] | None = None,
        deliver: Callable[[Tensor, Kept], None] | None = None,
    ) -> None:
        self.savefield, self.source, self.subsampling = savefield, source, subsampling
        self.deliver = deliver

    def reduce(self, form: Form, sign: Tensor | None = None) -> list[Piece]:
        number = len(self.source.sizes) - 1 if isinstance(self.source, Numbered) else 0
        if self.subsampling is not None:
            form = form.take(slice(None), _index(self.subsampling, form.samples))
        with torch.no_grad():
            form = settled(form)
        return [Piece(number, form, [(t, t._version) for t in tensors_of(form)])]

    def finish(self, state: list[Piece], context: Context) -> Any:
        kept = Kept(context.samples, state)
        return kept if self.deliver is None else self.deliver(context.parameter, kept)

    def zero(self, context: Context) -> Any:
        return self.finish([], context)

    def __repr__(self) -> str:
        return "what backpack.vivit keeps"


def _index(subsampling: Sequence[int], samples: int) -> Tensor:
    index = torch.as_tensor(list(subsampling), dtype=torch.long)
    if index.numel() and (int(index.max()) >= samples or int(index.min()) < -samples):
        raise IndexError(
            f"subsampling {list(subsampling)} is out of range for a batch of {samples} samples"
        )
    if len(set((index % max(samples, 1)).tolist())) < len(index):
        raise ValueError(f"subsampling {list(subsampling)} names a sample twice")
    return index % max(samples, 1)
