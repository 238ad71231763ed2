"""What is noted on the autograd graph: taps, and the forward pass that they belong to.

A tap lives in the ``metadata`` of its autograd node and nowhere else: it goes when the graph goes.
Nothing here may let a node's metadata or hooks reach that node or one above it (such cycles are never
collected): taps hold inputs, which lie below, and recordings hold taps weakly.
"""

from __future__ import annotations

import itertools
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from backpack._ambient import within
from backpack.forms.base import Form
from backpack.forms.complex_pairs import real_part
from backpack.forms.several import Part, among, of_one
from backpack.graph.retained import Made
from backpack.rules.analytic import conjugated
from backpack.rules.base import RULES, SEVERAL_OUTPUTS, ToForm
from backpack.rules.fallback import fallback
from backpack.rules.normalization import layer_norm
from backpack.samples.axis import SampleAxis

# Plain layers, one node of one output each: places of the input, the weight and the bias (if there is
# one) among their arguments.
LAYERS: dict[Any, tuple[int, int, int]] = {
    **dict.fromkeys((torch.nn.functional.linear, torch.conv1d, torch.conv2d, torch.conv3d), (0, 1, 2)),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d), (0, 1, 2)),
    torch.conv_transpose3d: (0, 1, 2),
    torch.nn.functional.layer_norm: (0, 2, 3),
    torch.addmm: (1, 2, 0),
}
# Layers that take one sample without an axis for it: the number of axes of that.
UNBATCHED = {
    torch.nn.functional.linear: 1,
    **{getattr(torch, f"conv{kind}{n}d"): n + 1 for n in (1, 2, 3) for kind in ("", "_transpose")},
}
# Keys of autograd nodes' metadata.
TAPS, LOSS, MODEL_OUTPUT = "backpack_taps", "backpack_loss", "backpack_border"
LIKELIHOOD = "backpack_likelihood"
MIXES, NONLINEAR = "backpack_mixes", "backpack_curved"
# Below the node of a result without sample axis: the arguments that had one.
ENDS = "backpack_ends"


def of_sample(form: ToForm, batch: SampleAxis) -> ToForm:
    """The form of all samples from that of the one that the axis is about."""
    sample, size = batch.solo, batch.size
    assert sample is not None
    return lambda g: Part(form(g), sample, size)


def notes(node: Node) -> dict[str, Any]:
    """What is kept on an autograd node (torch's stubs take this attribute for a method)."""
    return node.metadata  # type: ignore[return-value]


class Source(NamedTuple):
    """What a tap is taken with respect to: a parameter, or a tensor made from parameters only.

    Attributes:
        leaf: the parameter, or ``None`` for a derived tensor.
        edge: a derived tensor's place in the graph, or ``None`` for a parameter.
        to_form: columns at the tap's output -> form of the source.
        linear: whether the operation is known to be linear in the source.
    """

    leaf: Tensor | None
    edge: GradientEdge | None
    to_form: ToForm
    linear: bool

    def form(self, g: Tensor) -> Form:
        """The form for columns ``g``, in the precision of the source (autocast may have left it)."""
        if self.leaf is not None:
            dtype = self.leaf.dtype
        else:
            assert self.edge is not None
            dtype = self.edge.node._input_metadata[self.edge.output_nr].dtype
        if g.is_complex():
            form = self.to_form(g)
            return form if dtype.is_complex else of_one(form, real_part)
        return self.to_form(g if g.dtype == dtype or dtype.is_complex else g.to(dtype))


class Tap:
    """One operation in which parameters meet data.

    Attributes:
        func: the operation.
        place: which of its node's outputs.
        own: sample axis of the output, as seen in its forward pass.
        inputs: nodes of the data-dependent inputs, where the graph goes on downwards.
        recording: the forward pass it belongs to.
        released: whether autograd has passed and freed its buffers.
        args: arguments of the operation, if it is a plain layer.
        input: its first argument, as long as somebody else holds it.
        above: whether it is above the model's outputs.
        within: whether it is part of a derivative of a model, inside of the loss.
        by_node: whether its forms are made by its node, which must not be freed before.
        plain: whether what its node keeps is not packed (by a checkpoint, say), for a layer norm.
        read: other tensors that its forms are made from, with their versions at that time.
    """

    __slots__ = (
        *("func", "place", "own", "inputs", "recording", "released"),
        *("args", "input", "read", "above", "within", "by_node", "plain", "statistics"),
        *("_version", "_sources", "__weakref__"),
    )

    def __init__(
        self,
        func: Any,
        place: int,
        batch: SampleAxis,
        inputs: tuple[Node, ...],
        recording: Recording,
        sources: list[Source] | None = None,
        args: tuple[Any, ...] | None = None,
    ) -> None:
        self.func = func
        self.place = place
        self.own = batch
        self.inputs = inputs
        self.recording = recording
        self.released = False
        self._sources = sources
        # A plain layer: all else is known from its arguments, once it is asked for.
        self.args = args
        self._version: int = 0 if args is None else args[LAYERS[func][0]]._version
        self.input: weakref.ref[Tensor] | None = None
        self.read: list[tuple[weakref.ref[Tensor], int]] = []
        self.above = self.within = self.by_node = self.plain = False
        self.statistics: tuple[Tensor, Tensor] | None = None

    def take_statistics(self, node: Node) -> None:
        """Take from the node of a layer norm the mean and the inverse deviation of each row."""
        if self.plain and self.args is not None and self._sources is None:
            with suppress(RuntimeError):  # freed
                mean, inverse = (getattr(node, f"_saved_result{j}", None) for j in (1, 2))
                if mean is not None and inverse is not None and mean.dim() == self.args[0].dim():
                    self.statistics = mean, inverse

    @property
    def op(self) -> str:
        """Name of the operation."""
        return getattr(self.func, "__name__", str(self.func))

    @property
    def first(self) -> Tensor | None:
        """The input of a layer; the first argument of another operation, if somebody still holds it."""
        if self.args is not None:
            return self.args[LAYERS[self.func][0]]
        return self.input() if self.input is not None else None

    @property
    def changed(self) -> bool:
        """Whether what its forms are made from was changed in place since.

        Autograd finds that out by itself, but only in passes that compute the parameters' gradients.
        """
        if self.args is not None:
            at, weight, _ = LAYERS[self.func]
            return self.args[at]._version != self._version and self.args[weight].requires_grad
        tensors = ((ref(), version) for ref, version in self.read)
        return any(tensor is not None and tensor._version != version for tensor, version in tensors)

    @property
    def rule(self) -> str:
        """How its forms are found."""
        return "by its rule" if self.func in {**RULES, **SEVERAL_OUTPUTS} else "sample by sample"

    @property
    def sources(self) -> list[Source]:
        """What it is differentiated with respect to; empty once released."""
        if self._sources is None:
            assert self.args is not None
            # Its rule wants to know where the samples of the input are; no layer moves them.
            at, *own = LAYERS[self.func]
            # What belongs to one sample is a batch of one.
            batch = self.own.single()
            with within(axes={id(self.args[at]): batch}):
                rule, more = RULES[self.func], {}
                if self.statistics is not None and rule is layer_norm:
                    more = {"statistics": self.statistics}
                pairs = rule(batch, *self.args, **more)
                if pairs is not None and self.args[own[0]].is_complex():
                    pairs = conjugated(pairs)
                if pairs is None:
                    given = [self.args[j] for j in own if j < len(self.args)]
                    leaves = [t for t in given if t is not None and t.requires_grad]
                    at_once = batch is not self.own
                    pairs = fallback(batch, 0, self.func, self.args, {}, leaves, at_once)
            if batch is not self.own:
                pairs = [(tensor, of_sample(form, self.own)) for tensor, form in pairs]
            self._sources = [
                Source(tensor, None, form, True)
                for tensor, form in pairs
                if tensor is not None and tensor.requires_grad
            ]
        return self._sources

    @property
    def batch(self) -> SampleAxis:
        """The sample axis of the output, among the samples of all forward passes."""
        return self.own if self.above else self.recording.among_all(self.own)

    @property
    def samples(self) -> int:
        """The number of samples of all forward passes."""
        place = None if self.above else self.recording.place
        return self.own.size if place is None else place[1]

    def form(self, source: Source, g: Tensor) -> Form:
        """The form of all samples for columns ``g``, for one of its sources."""
        form = source.form(g)
        place = None if self.above else self.recording.place
        return form if place is None else among(form, *place)

    def release(self) -> None:
        """Let go of the inputs, as autograd does once it has passed."""
        self._sources, self.args, self.statistics, self.released = [], None, None, True


@dataclass(slots=True, eq=False)
class Recording:
    """One forward pass of an outermost extended module.

    Attributes:
        module: that module.
        size: number of samples.
        batch_dim: sample axis of the inputs.
        arguments: all tensors passed in, while the pass runs.
        data: the same, as long as somebody else holds them, with their versions at that time.
        taps: the taps found.
        unseen: parameters that were read through ``.data``.
        entries: nodes of inputs that require grad: below them, the graph is not this module's.
        depth: number of calls of the module inside itself.
        lost: the first place where the sample axis was lost on the way to a parameter, and why.
        inputs: places or names of the inputs, and shapes, if it is not plain which carries the batch.
        sizes: numbers of samples according to others than the one that counts.
        doubted: whether that one may be a mask or positions.
        doubt: the shape of an output that speaks for another one.
        number: how many were begun before.
        place: its first sample among those of all forward passes, and their number, if these count as
            further samples.
        differentiated: whether forward takes derivatives, whose graphs use parameters again.
        hides: whether what these have made meets data, and may hold data itself.
        stated: whether the user has said which rows belong to which sample.
        rivals: ids of inputs that speak of another number of samples, while the pass runs.
        contest: how two inputs may both carry the batch, if they do.
        made: the tensors that were made, weakly: their gradients may be kept.
    """

    module: weakref.ref[nn.Module]
    size: int | None
    batch_dim: int = 0
    arguments: list[Tensor] = field(default_factory=list)
    data: list[tuple[weakref.ref[Tensor], int]] = field(default_factory=list)
    taps: list[weakref.ref[Tap]] = field(default_factory=list)
    unseen: list[weakref.ref[Tensor]] = field(default_factory=list)
    entries: set[Node] = field(default_factory=set)
    depth: int = 0
    lost: str | None = None
    inputs: list[tuple[int | str, torch.Size]] = field(default_factory=list)
    sizes: frozenset[int] = frozenset()
    doubted: bool = False
    doubt: torch.Size | None = None
    differentiated: bool = False
    hides: bool = False
    stated: bool = False
    rivals: set[int] = field(default_factory=set)
    contest: str | None = None
    made: Made = field(default_factory=Made)
    number: int = field(default_factory=itertools.count().__next__)
    place: tuple[int, int] | None = None
    _among: dict[SampleAxis, SampleAxis] = field(default_factory=dict)

    @property
    def of_model(self) -> bool:
        """Whether it is that of a model, with parameters, and not of a loss."""
        if self.taps:
            return True
        module = self.module()
        return module is not None and next(module.parameters(), None) is not None

    def same_data(self) -> tuple[int, ...]:
        """Ids of all tensors passed in; empty if one is gone, or was changed in place since."""
        tensors = [(ref(), version) for ref, version in self.data]
        if any(t is None or t._version != version for t, version in tensors):
            return ()
        return tuple(id(t) for t, _ in tensors)

    def put(self, place: tuple[int, int] | None) -> None:
        """Say where its samples are among those of all forward passes."""
        if place != self.place:
            self.place = place
            self._among.clear()

    def among_all(self, axis: SampleAxis) -> SampleAxis:
        """An axis of this forward pass as one of the samples of all."""
        if self.place is None:
            return axis
        if axis not in self._among:
            module = self.module()
            parameter = None if module is None else next(module.parameters(), None)
            device = torch.device("cpu") if parameter is None else parameter.device
            self._among[axis] = axis.among(*self.place, device)
        return self._among[axis]

    def release(self) -> None:
        """Release all taps that are still there."""
        for ref in self.taps:
            tap = ref()
            if tap is not None:
                tap.release()
