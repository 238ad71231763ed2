"""How a tap is made: the rule of an operation, or how it is differentiated instead."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack.forms.base import Form
from backpack.graph.origins import sources_of
from backpack.graph.taps import TAPS, UNBATCHED, Recording, Tap, notes, of_sample
from backpack.rules.analytic import ANALYTIC, conjugated
from backpack.rules.base import RULES, ParameterForms, ToForm
from backpack.rules.fallback import fallback
from backpack.samples.axis import SampleAxis, mark, regular_axis, solo_axis
from backpack.samples.movers import reshaped

# Operations that are linear in each argument, though they have no rule.
_LINEAR_FALLBACKS = frozenset(
    {torch.einsum, torch.nn.functional.bilinear, torch.bilinear, torch.cat, torch.stack, torch.bmm}
)
# Operations whose derivatives are constants.
_SUMS = frozenset({torch.add, Tensor.add, Tensor.__radd__, torch.sub, Tensor.sub})


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
    args: tuple[Any, ...],
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
    numbers = (*args, *kwargs.values(), *sources)
    complicated = any(isinstance(t, Tensor) and t.is_complex() for t in numbers)
    whole = whole or batch.bare
    rule = RULES.get(func) if not complicated or func in ANALYTIC else None
    # What belongs to one sample is a batch of one.
    own = batch.single()
    if rule is not None and batch.lost is None:
        found = _unbatched(rule, func, args, kwargs) if own.size == 1 else None
        if found is None and not whole:
            found = rule(own, *args, **kwargs)
        if complicated and found is not None:
            found = conjugated(found)
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


def _unbatched(
    rule: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ParameterForms | None:
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
    sources = [each for tensor, form in pairs for each in sources_of(tensor, form, linear)]
    tap = Tap(func, output_nr, batch, inputs, recording, sources)
    tap.read = [(weakref.ref(t), t._version) for t in read]
    kept = notes(node)
    if TAPS in kept:
        kept[TAPS].append(tap)
    else:
        kept[TAPS] = [tap]
    recording.taps.append(weakref.ref(tap))
    return tap
