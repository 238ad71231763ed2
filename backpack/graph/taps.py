"""What is noted on the autograd graph: taps, model outputs, losses.

A tap lives in the ``metadata`` of its autograd node and nowhere else: it goes when the graph goes.
Nothing here may let a node's metadata or hooks reach that node or one above it (such cycles are never
collected): taps hold inputs, which lie below, and recordings hold taps weakly.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack._torch import leaf_of, without_autocast
from backpack.forms.base import Dense, Form
from backpack.forms.outer import Outer
from backpack.forms.several import Part, Pullback, among, of_one
from backpack.graph.nodes import IDENTITY, kind_of
from backpack.graph.retained import Made
from backpack.losses.base import LossHessian
from backpack.rules.base import RULES, SEVERAL_OUTPUTS, Pairs, ToForm
from backpack.rules.fallback import fallback
from backpack.samples.axis import SampleAxis, current_inputs, mark, regular_axis, solo_axis
from backpack.samples.movers import reshaped

# Operations that are linear in each argument, though they have no rule.
_LINEAR_FALLBACKS = frozenset(
    {torch.einsum, torch.nn.functional.bilinear, torch.bilinear, torch.cat, torch.stack, torch.bmm}
)
# Operations whose derivatives are constants.
_SUMS = frozenset({torch.add, Tensor.add, Tensor.__radd__, torch.sub, Tensor.sub})
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
MIXES, NONLINEAR = "backpack_mixes", "backpack_curved"
# Below the node of a result without sample axis: the arguments that had one.
ENDS = "backpack_ends"


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
        return self.to_form(g if g.dtype == dtype or g.is_complex() else g.to(dtype))


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
        read: other tensors that its forms are made from, with their versions at that time.
    """

    __slots__ = (
        *("func", "place", "own", "inputs", "recording", "released"),
        *("args", "input", "read", "above", "within", "_version", "_sources", "__weakref__"),
    )

    def __init__(
        self,
        func: Any,
        place: int,
        batch: SampleAxis,
        inputs: tuple[Node, ...],
        recording: Recording,
        sources: list[Source] | None = None,
        args: tuple | None = None,
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
        self.above = self.within = False

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
            before, current_inputs.axes = current_inputs.axes, {id(self.args[at]): self.own}
            try:
                pairs = RULES[self.func](self.own, *self.args)
                if pairs is None:
                    given = [self.args[j] for j in own if j < len(self.args)]
                    leaves = [t for t in given if t is not None and t.requires_grad]
                    pairs = fallback(self.own, 0, self.func, self.args, {}, leaves)  # type: ignore[assignment]
            finally:
                current_inputs.axes = before
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

    def form(self, source: Source, g: Tensor) -> Form:
        """The form of all samples for columns ``g``, for one of its sources."""
        form = source.form(g)
        place = None if self.above else self.recording.place
        return form if place is None else among(form, *place)

    def release(self) -> None:
        """Let go of the inputs, as autograd does once it has passed."""
        self._sources, self.args, self.released = [], None, True


@dataclass(slots=True, eq=False)
class Recording:
    """One forward pass of an outermost extended module.

    Attributes:
        module: that module.
        size: number of samples.
        batch_dim: sample axis of the inputs.
        arguments: all tensors passed in, while the pass runs.
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
        stated: whether the user has said which rows belong to which sample.
        rivals: ids of inputs that speak of another number of samples, while the pass runs.
        contest: how two inputs may both carry the batch, if they do.
        made: the tensors that were made, weakly: their gradients may be kept.
    """

    module: weakref.ref[nn.Module]
    size: int | None
    batch_dim: int = 0
    arguments: list[Tensor] = field(default_factory=list)
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
    stated: bool = False
    rivals: set[int] = field(default_factory=set)
    contest: str | None = None
    made: Made = field(default_factory=Made)
    number: int = field(default_factory=itertools.count().__next__)
    place: tuple[int, int] | None = None
    _among: dict[SampleAxis, SampleAxis] = field(default_factory=dict)

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


# --------------------------------------------------------------------------------------
# Making taps


class View(NamedTuple):
    """How a tensor that was written to in place looks at another, on which autograd notes that.

    Attributes:
        places: of its entries, in the other.
        axis: the other's sample axis.
    """

    places: Tensor
    axis: SampleAxis


def make_tap(
    recording: Recording,
    func: Any,
    args: tuple,
    kwargs: dict[str, Any],
    node: Node,
    output_nr: int,
    place: int,
    batch: SampleAxis,
    sources: list[Tensor],
    inputs: tuple[Node, ...],
    base: Tensor | None = None,
    whole: bool = False,
    view: View | None = None,
) -> None:
    """Note a tap.

    With ``whole`` the result belongs to one sample in a way that no rule expects: the operation is
    differentiated at once.
    """
    pairs: list[tuple[Tensor, ToForm]] = []
    missing = {id(s): s for s in sources}
    # Rules are written for real numbers.
    numbers = (*args, *kwargs.values(), *sources)
    complicated = any(isinstance(t, Tensor) and t.is_complex() for t in numbers)
    whole = whole or batch.bare
    rule = None if complicated else RULES.get(func)
    # What belongs to one sample is a batch of one.
    own = batch.single()
    if rule is not None and batch.lost is None:
        found = _unbatched(rule, func, args, kwargs) if own.size == 1 else None
        if found is None and not whole:
            found = rule(own, *args, **kwargs)
        for tensor, form in found or ():
            if tensor is not None and id(tensor) in missing:
                pairs.append((tensor, form))
        for tensor, _ in pairs:
            missing.pop(id(tensor), None)
    linear = not missing or func in _LINEAR_FALLBACKS
    if missing and batch.lost is not None:
        pairs += [(s, lost_form) for s in missing.values()]
    elif missing:
        at_once = whole or own is not batch
        pairs += fallback(own, place, func, args, kwargs, list(missing.values()), at_once)  # type: ignore[arg-type]
    if own is not batch:
        pairs = [(tensor, of_sample(form, batch)) for tensor, form in pairs]
    if view is not None and batch.lost is None:
        pairs = [(tensor, _looking(form, view.places)) for tensor, form in pairs]
        batch = view.axis
    if base is not None and base.grad_fn is not None and node.name() == "ViewBackward0":
        shape = node._input_metadata[0].shape
        below = batch if batch.lost is not None else reshaped(batch, shape, base.shape)
        if batch.solo is not None:
            below = solo_axis(batch.solo, batch.size, base.shape, base.device)
        if below.lost is None:
            node, output_nr, batch = base.grad_fn, base.output_nr, below
            pairs = [(t, _viewed(form, shape)) for t, form in pairs]
    read = [t for t in numbers if isinstance(t, Tensor) and not any(t is s for s in sources)]
    read = [] if func in _SUMS else read
    tap = store_tap(recording, func, node, output_nr, batch, pairs, inputs, linear, read)
    if args and isinstance(args[0], Tensor):
        tap.input = weakref.ref(args[0])


def _unbatched(rule: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Pairs | None:
    """The rule of a layer whose input is one sample without an axis for it, by an axis put in front."""
    axes = UNBATCHED.get(func)
    if axes is None or kwargs or args[0].dim() != axes:
        return None
    input = args[0].detach().unsqueeze(0)
    mark(input, regular_axis(1))
    pairs = rule(regular_axis(1), input, *args[1:])
    return pairs and [(tensor, _in_front(form)) for tensor, form in pairs]


def _in_front(form: ToForm) -> ToForm:
    return lambda g: form(g.unsqueeze(1))


def of_sample(form: ToForm, batch: SampleAxis) -> ToForm:
    """The form of all samples from that of the one that the axis is about."""
    sample, size = batch.solo, batch.size
    assert sample is not None
    return lambda g: Part(form(g), sample, size)


def _looking(form: ToForm, places: Tensor) -> ToForm:
    return lambda g: form(g.flatten(1)[:, places])


def _viewed(form: ToForm, shape: torch.Size) -> ToForm:
    return lambda g: form(g.reshape(len(g), *shape))


def lost_form(g: Tensor) -> Form:
    raise AssertionError("a tap without a sample axis is refused before it is used")


def store_tap(
    recording: Recording,
    func: Any,
    node: Node,
    output_nr: int,
    batch: SampleAxis,
    pairs: list[tuple[Tensor, ToForm]],
    inputs: tuple[Node, ...],
    linear: bool,
    read: Sequence[Tensor] = (),
) -> Tap:
    sources = [each for tensor, form in pairs for each in _sources(tensor, form, linear)]
    tap = Tap(func, output_nr, batch, inputs, recording, sources)
    tap.read = [(weakref.ref(t), t._version) for t in read]
    kept = notes(node)
    if TAPS in kept:
        kept[TAPS].append(tap)
    else:
        kept[TAPS] = [tap]
    recording.taps.append(weakref.ref(tap))
    return tap


def _sources(tensor: Tensor, form: ToForm, linear: bool) -> list[Source]:
    """The parameter that a tensor is, or what it is made from; of a sum its terms."""
    if tensor.grad_fn is None:
        return [Source(tensor, None, form, linear)]
    edge, terms = get_gradient_edge(tensor), None
    if not tensor._backward_hooks:  # which are part of the backward pass
        terms = _terms(edge.node, tensor.shape)
    if terms is None:
        return [source_at(edge, tensor.shape, form, linear)]
    return [source_at(term, tensor.shape, _times(factor, form), linear) for term, factor in terms]


def _terms(node: Node, shape: torch.Size) -> list[tuple[GradientEdge, float]] | None:
    """The terms of a sum, with their factors; ``None`` if it is none, or a term is broadcast."""
    name = node.name().rstrip("0123456789")
    if name not in ("AddBackward", "SubBackward"):
        return None
    alpha = node._saved_alpha  # type: ignore[attr-defined]
    found = []
    for (child, number), factor in zip(
        node.next_functions, (1, alpha if name == "AddBackward" else -alpha), strict=True
    ):
        if child is not None:
            leaf = leaf_of(child)
            size = child._input_metadata[number].shape if leaf is None else leaf.shape
            if torch.Size(size) != shape:
                return None
            found.append((GradientEdge(child, number), factor))
    return found


def _times(factor: float, form: ToForm) -> ToForm:
    return form if factor == 1 else lambda g: form(factor * g)


def source_at(edge: GradientEdge, shape: torch.Size, form: ToForm, linear: bool) -> Source:
    """The source at a place of the graph, a parameter or a tensor made from parameters."""
    leaf, flips = leaf_of(edge.node), 0
    while leaf is None and len(shape) == 2 and (_renames(edge.node) or _transposes(edge.node)):
        flips += not _renames(edge.node)
        below, number = edge.node.next_functions[0]
        assert below is not None
        edge, leaf = GradientEdge(below, number), leaf_of(below)
    if flips % 2:
        return Source(
            leaf, None if leaf is not None else edge, lambda g: of_one(form(g), _transposed), linear
        )
    return Source(leaf, None if leaf is not None else edge, form, linear)


def _renames(node: Any) -> bool:
    """Whether a tensor is the one below by another name."""
    return kind_of(node) in ("Alias", IDENTITY)


def _transposes(node: Any) -> bool:
    """Whether the axes of a matrix change places (and are not only named)."""
    name = node.name()
    # Axes may be counted from the end.
    if name == "PermuteBackward0":
        return bool(node._saved_dims[0] % 2)
    if name == "TransposeBackward0":
        return bool((node._saved_dim0 - node._saved_dim1) % 2)
    return bool(name == "TBackward0")


def _transposed(form: Form) -> Form:
    """The form of a matrix from the form of its transpose."""
    if isinstance(form, Outer):
        return Outer(form.inputs, form.g, form.layout.transposed(), form.counts)
    if isinstance(form, Dense):
        return Dense(form.values.mT)
    return Pullback(form, lambda m: m.mT, torch.Size(reversed(form.shape)))
