"""What is noted of model outputs and losses: where the samples of either are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from backpack._torch import without_autocast
from backpack.graph.taps import LOSS, Recording, notes
from backpack.losses.base import LossHessian
from backpack.samples.axis import SampleAxis


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """A model output: what a loss is a function of. Holds no tensor (that would be a cycle)."""

    recording: Recording
    place: int
    own: SampleAxis | None
    shape: torch.Size

    @property
    def batch(self) -> SampleAxis | None:
        """Its sample axis, among the samples of all forward passes."""
        return None if self.own is None else self.recording.among_all(self.own)

    @property
    def mixed(self) -> bool:
        """Whether it has rows, but samples are not apart."""
        return self.own is not None and self.own.lost is not None and self.has_rows

    @property
    def has_rows(self) -> bool:
        """Whether it may have rows for several samples."""
        size, dim = self.recording.size or 1, self.recording.batch_dim
        return size > 1 and (len(self.shape) > 1 or self.shape[dim:] == (size,))


@dataclass(eq=False)
class LossRecord:
    """A loss for which there is a rule.

    Attributes:
        rule: gives its Hessian for the sample axis of its input; asked only when a second-order
            quantity needs it.
        edge: the input of the loss: a model output, or a function of model outputs.
        module: the extended loss module that computed it, if one did.
        axis: where the samples of that input are, as far as capture knows; where model outputs lie
            below, it is found from them when backward starts (:meth:`locate`). ``None``: on no axis.
        device: kind of device it is on.
        weigh: what the Hessian is multiplied with, from the gradient that arrives at the loss; by
            default that gradient.
        recording: the forward pass that ``axis`` is about, if capture has noted the loss.
        inputs: what the extended loss module was called with, for the extension hook.
    """

    rule: Callable[[SampleAxis], LossHessian | None]
    edge: GradientEdge
    module: nn.Module | None
    axis: SampleAxis | None
    device: str = "cpu"
    weigh: Callable[[Tensor], Tensor] | None = None
    recording: Recording | None = None
    inputs: Callable[[], Sequence[Tensor]] | None = None
    _known: tuple[SampleAxis, LossHessian | None] | None = None

    def __post_init__(self) -> None:
        self._noted = self.axis

    def locate_as_noted(self) -> None:
        """Its samples are where capture saw them."""
        if self._noted is not None and self.recording is not None:
            self.locate(self.recording.among_all(self._noted))

    def locate(self, axis: SampleAxis | None) -> None:
        """Say where the samples are."""
        if axis is None or self._known is None or axis != self._known[0]:
            self.axis, self._known = axis, None

    @property
    def known(self) -> LossHessian | None:
        """The Hessian; ``None`` if the rule does not cover this call, or its samples are mixed."""
        if self.axis is None or self.axis.lost:
            return None
        if self._known is None:
            with without_autocast(self.device):
                self._known = self.axis, self.rule(self.axis)
        return self._known[1]

    def weight(self, gradient: Tensor) -> Tensor:
        """What the Hessian is multiplied with, for the gradient that arrives at the loss."""
        return gradient if self.weigh is None else self.weigh(gradient)

    @property
    def hessian(self) -> LossHessian:
        """The Hessian of a loss found by :func:`loss_at`."""
        assert self.known is not None
        return self.known


def loss_at(node: Node) -> LossRecord | None:
    """The loss with a known Hessian that a node computes."""
    record = notes(node).get(LOSS)
    return None if record is None or record.known is None else record
