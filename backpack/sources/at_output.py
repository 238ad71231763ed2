"""Layers that make the input of a loss: sums over all columns of its Hessian, without columns.

Between layer and loss entries may be moved and picked (flattened, shifted, masked), and no more.

Letters: ``o`` outputs of the layer, ``i`` its inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backpack._torch import leaf_of, shows
from backpack.forms.at_output import AtOutput
from backpack.forms.base import LARGEST_FACTOR, Dense, Form
from backpack.forms.outer import Outer
from backpack.graph.carry import carry
from backpack.graph.nodes import kind_of
from backpack.graph.taps import Source, Tap
from backpack.losses.blocks import HessianBlocks
from backpack.sources.columns import Leaf

# Operations whose results are entries of what they take, and addition (of what is no data).
_MOVES = frozenset(
    """View UnsafeView ReshapeAlias Reshape Transpose T Permute Movedim Squeeze Unsqueeze Alias Clone
    ToCopy Slice Select Narrow Index IndexSelect Gather Add""".split()
)
# Operations with a weight or a bias, and the axis of their outputs.
_AXES = {
    **dict.fromkeys((F.linear, torch.addmm, Tensor.addmm, torch.matmul, Tensor.matmul), -1),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.add, Tensor.add, Tensor.__radd__), -1),
    **{getattr(torch, f"conv{kind}{n}d"): 1 for n in (1, 2, 3) for kind in ("", "_transpose")},
}


def forms_at_output(
    start: GradientEdge, loss: HessianBlocks | None, leaves: Collection[Leaf]
) -> dict[Tensor, Form]:
    """Forms of all columns of a loss at once, of parameters that are used once, in such a layer.

    Args:
        start: the input of the loss.
        loss: the blocks of its Hessian, if they are known.
        leaves: the parameters that its columns are for.
    """
    found: dict[Tensor, Form] = {}
    single = [leaf for leaf in leaves if len(leaf.uses) == 1]
    if not single or loss is None or not loss.diagonal.numel():
        return found
    for place in _ways_down(start):
        for leaf in single:
            node, tap, source = leaf.uses[0]
            if (node, tap.place) == (place.node, place.output_nr) and source.edge is None:
                form = _form(tap, source, start, place, loss)
                if form is not None:
                    found[leaf.parameter] = form
    return found


def _ways_down(edge: GradientEdge) -> Iterator[GradientEdge]:
    """Places whose entries are those of the first one, moved or picked."""
    while True:
        yield edge
        below = [(n, nr) for n, nr in edge.node.next_functions if n is not None and leaf_of(n) is None]
        if len(below) != 1 or kind_of(edge.node) not in _MOVES:
            return
        edge = GradientEdge(*below[0])


def _form(
    tap: Tap, source: Source, start: GradientEdge, place: GradientEdge, loss: HessianBlocks
) -> AtOutput | None:
    """The form of a weight or a bias; ``None`` if it is none, or the classes are elsewhere.

    Or if the samples are some of those of several forward passes.
    """
    if tap.func not in _AXES or tap.recording.place is not None:
        return None
    layer = _Layer(start, place, loss, _AXES[tap.func])
    key = _kind(tap, source, layer)
    serves = _served.get(key)
    if serves is None:
        serves = layer.serves(source)
        if key is not None:
            if len(_served) >= _MOST_KINDS:
                _served.clear()
            _served[key] = serves
    form = source.form(layer.diagonal[None]) if serves else None
    return AtOutput(form, layer, source.form) if isinstance(form, (Outer, Dense)) else None


# Whether parameters of plain layers are weights or biases of their outputs, by all that decides it.
_served: dict[Any, bool] = {}
_MOST_KINDS = 2**12


def _kind(tap: Tap, source: Source, layer: _Layer) -> tuple[Any, ...] | None:
    """The same for layers and parameters alike; ``None`` where that is not plain."""
    if tap.args is None or layer.moved or tap.own.picked is not None or source.leaf is None:
        return None
    given = (tuple(a.shape) if isinstance(a, Tensor) else a for a in tap.args)
    loss, leaf = layer.loss, source.leaf
    key = (
        tap.func,
        tap.own,
        *given,
        layer.shape,
        loss.dim,
        loss.diagonal.shape,
        leaf.shape,
        leaf.dtype,
    )
    try:
        hash(key)
    except TypeError:  # a list, say
        return None
    return key


@dataclass(eq=False)
class _Layer:
    """A layer and a loss of its output; the sums that its forms ask for.

    Attributes:
        start: the input of the loss.
        place: the output of the layer.
        loss: the blocks of the loss.
        axis: the axis of the layer's outputs.
    """

    start: GradientEdge
    place: GradientEdge
    loss: HessianBlocks
    axis: int

    @property
    def shape(self) -> torch.Size:
        """Of the layer's output."""
        return torch.Size(self.place.node._input_metadata[self.place.output_nr].shape)

    @property
    def moved(self) -> bool:
        """Whether there are operations between the layer and the loss."""
        return (self.start.node, self.start.output_nr) != (self.place.node, self.place.output_nr)

    @cached_property
    def entries(self) -> Tensor | None:
        """The loss's entry that each of the layer's is, -1 where it is none.

        ``None`` if the loss's entries are not as many of the layer's.
        """
        f, place = self.loss.diagonal, self.place.node._input_metadata[self.place.output_nr]
        eps = max(torch.finfo(dtype).eps for dtype in (f.dtype, place.dtype))
        count, base = f.numel(), int(1 / eps)
        numbers, digits = torch.arange(1, count + 1, device=f.device), []
        while count:
            digits.append((numbers % base).to(f.dtype).reshape(f.shape))
            numbers, count = numbers // base, count // base
        with torch.no_grad():
            (found,) = carry([self.start], [self.place], [torch.stack(digits)])
        if found is None:
            return None
        total = torch.stack([digit.long() * base**j for j, digit in enumerate(found)]).sum(0)
        all_there = ((total > 0).sum() == f.numel()) & (total.amax() == f.numel())
        return total - 1 if shows(all_there, True) else None

    def at_layer(self, x: Tensor) -> Tensor:
        """Numbers at the loss's entries, at the layer's; zero at others."""
        if not self.moved:
            return x
        assert self.entries is not None
        return x.reshape(-1)[self.entries.clamp(min=0)] * (self.entries >= 0)

    @cached_property
    def diagonal(self) -> Tensor:
        """Of the Hessian at the layer's output."""
        return self.at_layer(self.loss.diagonal)

    def serves(self, source: Source) -> bool:
        """Whether a parameter is a weight or a bias of outputs that are the classes of the loss."""
        if not self._has_classes():
            return False
        size = self.shape[self.axis]
        assert source.leaf is not None
        dtype = torch.promote_types(source.leaf.dtype, torch.float32)
        numbers = torch.arange(1, size + 1, device=source.leaf.device, dtype=dtype)
        along = numbers.reshape(
            [-1 if d == self.axis % len(self.shape) else 1 for d in range(len(self.shape))]
        )
        form = source.to_form(along.expand(self.shape)[None])
        if isinstance(form, Outer):
            g = form.g
            return g.shape[2] == 1 and g.shape[-1] == size and shows((g == numbers).all(), True)
        if not isinstance(form, Dense) or form.shape != (size,):
            return False
        wanted = numbers * (self.shape.numel() // size)
        return shows(
            torch.isclose(form.values.sum((0, 1)).to(dtype), wanted, rtol=1e-3, atol=0).all(), True
        )

    def _has_classes(self) -> bool:
        """Whether the layer's outputs at a position are the classes at one of the loss's."""
        if self.moved and self.entries is None:
            return False
        if self.loss.dim is None:
            return True
        shape, classes = self.loss.diagonal.shape, self.loss.dim % self.loss.diagonal.dim()
        if self.shape[self.axis] != shape[classes]:
            return False
        if not self.moved:
            return self.axis % len(shape) == classes
        assert self.entries is not None
        entry, inner = self.entries.movedim(self.axis, -1), prod(shape[classes + 1 :])
        first = entry[..., :1]
        there = entry == first + inner * torch.arange(shape[classes], device=entry.device)
        there &= first // inner % shape[classes] == 0
        return shows((there & (first >= 0) | (entry < 0) & (first < 0)).all(), True)

    def summed(self) -> Tensor:
        """See :class:`~backpack.forms.at_output.BlockSums`."""
        if self.loss.dim is not None:
            return self.loss.summed()
        diagonal = self.diagonal.movedim(self.axis, -1).flatten(0, -2).sum(0)
        return diagonal if len(diagonal) > LARGEST_FACTOR else torch.diag(diagonal)

    def rotated(self, basis: Tensor) -> Tensor:
        """See :class:`~backpack.forms.at_output.BlockSums`."""
        basis = basis.to(self.diagonal.dtype)
        if self.loss.dim is not None:
            return self.at_layer(self.loss.rotated(basis))
        diagonal = self.diagonal.movedim(self.axis, -1)
        found = diagonal * basis.square() if basis.dim() == 1 else diagonal @ basis.square()
        return found.movedim(-1, self.axis)
