"""Operations on one sample alone, whose gradients autograd computes anyway.

In a loop over samples, and where each has a forward pass of its own, a layer's node computes the
gradient of one sample's use. Nothing is left to do but to put these beside each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack._torch import leaf_of
from backpack.engine.collect import Leaf
from backpack.forms.base import Dense, Form
from backpack.forms.memory import fresh
from backpack.graph.taps import Source, Tap

# The most memory for gradients of all samples in one pass, where no quantity asks for these.
GRADIENT_BYTES = 2**27


class Budget:
    """Which parameters' gradients of all samples may be held until the last of them is there.

    Args:
        limited: whether only so many that they take little memory together.
    """

    def __init__(self, limited: bool) -> None:
        self.limited = limited
        self._left = GRADIENT_BYTES
        self._found: dict[Leaf, bool] = {}

    def has_room_for(self, leaf: Leaf) -> bool:
        """Whether those of a parameter may; always the same answer for one."""
        if leaf not in self._found:
            p = leaf.parameter
            size = leaf.samples * p.numel() * p.element_size()
            self._found[leaf] = not self.limited or size <= self._left
            self._left -= size if self._found[leaf] else 0
        return self._found[leaf]


class OwnUse(NamedTuple):
    """Where a layer's node gives the gradient of its use of a parameter.

    Attributes:
        leaf: what is collected for the parameter.
        place: which of the node's results it is.
        turned: whether it is that of the transposed parameter.
        sample: whose it is.
    """

    leaf: Leaf
    place: int
    turned: bool
    sample: int

    def take(self, gradient: Tensor) -> None:
        """Note the gradient of that sample's use, as the node has computed it."""
        gradient = gradient.mT if self.turned else gradient
        if gradient.shape != self.leaf.parameter.shape:  # autograd adds up broadcast ones later
            gradient = gradient.sum_to_size(self.leaf.parameter.shape)
        self.leaf.alone.append((self.sample, gradient))


def form_of_all(leaf: Leaf) -> Form:
    """The form of what single samples' nodes have computed for a parameter."""
    found, leaf.alone = sorted(leaf.alone, key=lambda pair: pair[0]), []
    (of, gradients), samples = zip(*found, strict=True), leaf.samples
    if of == tuple(range(samples)):
        room = fresh(gradients[0], (samples, *gradients[0].shape))
        return Dense(torch.stack(gradients, out=room).unsqueeze(0))
    at, stacked = torch.tensor(of, device=gradients[0].device), torch.stack(gradients)
    zeros = stacked.new_zeros(samples, *stacked.shape[1:])
    return Dense(zeros.index_add(0, at, stacked).unsqueeze(0))


def sample_of(tap: Tap) -> int | None:
    """The sample that a plain layer is about, if it is one of several."""
    axis, place = tap.own, tap.recording.place
    if tap.args is None or tap.above or tap.within:
        return None
    if axis.size == 1:
        return None if place is None or place[1] == 1 else place[0]
    if axis.solo is None or axis.lost:
        return None
    return axis.solo + (0 if place is None else place[0])


def own_uses(
    node: Node, tap: Tap, uses: Sequence[tuple[Leaf, Source]], budget: Budget
) -> list[OwnUse] | None:
    """Where a node gives the gradients of all uses of parameters in it; ``None``: it does not."""
    sample = sample_of(tap)
    if sample is None or not uses:
        return None
    leaves = {id(leaf.parameter): leaf for leaf, source in uses if source.leaf is leaf.parameter}
    found = []
    for place, (child, _) in enumerate(node.next_functions):
        if child is None:
            continue
        turned = type(child).__name__ == "TBackward0"
        leaf = leaves.pop(id(leaf_of(child.next_functions[0][0] if turned else child)), None)
        if leaf is None:
            continue
        p = leaf.parameter
        if p.is_complex() or p.dtype != node._input_metadata[0].dtype:
            return None
        if not budget.has_room_for(leaf):
            return None
        found.append(OwnUse(leaf, place, turned, sample))
    return found if len(found) == len(uses) else None
