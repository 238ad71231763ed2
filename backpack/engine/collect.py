"""What is collected for a parameter: forms of its uses, reduced to states of quantities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.engine.left_out import REFUSALS
from backpack.engine.state import Block, Nested
from backpack.forms.base import Dense, Form
from backpack.forms.complex_pairs import as_pairs, in_pairs
from backpack.forms.several import Part, Pullback, Scaled, Together, merge, of_one
from backpack.graph.carry import pull_back, pull_back_to_all
from backpack.graph.derived import entry_derivatives, mixed_leaves
from backpack.graph.taps import Source, Tap
from backpack.quantities.base import BackpropExtension

# A node and the number of one of its outputs.
Place = tuple[Node, int]
# Columns by places, ``None`` where none have arrived.
Arrived = Mapping[Place, Tensor | None]


class Leaf:
    """What is collected for one parameter.

    Attributes:
        parameter: the parameter.
        real: the same in real numbers, of the shape of its forms: of a complex one, pairs.
        samples: number of samples that it meets.
        places: where it meets data.
        uses: the same but for parameters without entries, which no column reaches.
        waiting: taps of which the gradient has not come yet.
        forms: first-order forms of those of which it has.
        alone: gradients of single samples' uses, with the samples, where autograd computes these.
        states: of quantities, by their fields.
        total: the gradient as the sum of the uses, if a quantity needs it.
        contracted: whether the first-order forms of all uses are reduced.
        arrived: whether a gradient has arrived at one of its taps.
        hooked: whether the user's hooks may change its gradient.
        without: reasons why it does not have quantities, by their fields.
        refuse: what happens when it cannot have one: an error, or it is left out.
    """

    __slots__ = (
        *("parameter", "real", "samples", "places", "uses", "waiting", "forms", "alone", "states"),
        *("total", "contracted", "arrived", "hooked", "without", "refuse"),
    )

    def __init__(
        self,
        parameter: Tensor,
        samples: int,
        refuse: Callable[[Leaf, BackpropExtension, Exception], None],
    ) -> None:
        self.parameter = parameter
        self.real = as_pairs(parameter.detach()) if parameter.is_complex() else parameter
        self.samples = samples
        self.places: list[tuple[Node, Tap, Source]] = []
        self.uses: list[tuple[Node, Tap, Source]] = []
        self.waiting: set[Tap] = set()
        self.forms: list[Form] = []
        self.alone: list[tuple[int, Tensor]] = []
        self.states: dict[str, Any] = {}
        self.total: Tensor | None = None
        self.contracted = False
        self.arrived = False
        self.without: dict[str, str] = {}
        self.refuse = refuse
        self.hooked = bool(getattr(parameter, "_backward_hooks", None))

    def let_go(self) -> None:
        """Let go of the inputs that its forms were made from, as autograd does once it has passed."""
        self.places = [
            (node, tap, Source(source.leaf, source.edge, _gone, source.linear))
            for node, tap, source in self.places
        ]
        self.uses = self.places if self.uses else []


def _gone(columns: Tensor) -> Form:
    raise AssertionError("a form of a parameter whose quantities are saved")


def form_of_source(block: Block, leaf: Leaf, tap: Tap, source: Source, columns: Tensor) -> Form:
    """The form of columns at a tap, for one of its parameters or what is computed from one."""
    form = _form_of_source(block, leaf, tap, source, columns)
    return in_pairs(form) if leaf.parameter.is_complex() else form


def _form_of_source(block: Block, leaf: Leaf, tap: Tap, source: Source, columns: Tensor) -> Form:
    form = tap.form(source, columns)
    if source.edge is None:
        return form
    with Nested(block):
        scale = entry_derivatives(source.edge, leaf.parameter)
    if scale is not None:
        return of_one(form, lambda each: Scaled(each, scale))
    vjp = partial(_pull_back, block, source.edge, leaf.parameter)
    return of_one(form, lambda each: Pullback(each, vjp, leaf.parameter.shape))


def forms_together(
    block: Block, tap: Tap, uses: Sequence[tuple[Leaf, Source]], columns: Tensor
) -> dict[tuple[Leaf, int], Form]:
    """Forms of parameters that one tensor is made from, carried on to all of them in one pass.

    By parameters and ids of sources, only for those whose forms are written out in any case: of other
    uses too, and of whose entries several are mixed.
    """
    groups: dict[int, tuple[Source, list[Leaf]]] = {}
    for leaf, source in uses:
        if source.edge is not None and len(leaf.uses) > 1 and not leaf.parameter.is_complex():
            groups.setdefault(id(source), (source, []))[1].append(leaf)
    found: dict[tuple[Leaf, int], Form] = {}
    for source, leaves in groups.values():
        edge = source.edge
        if (
            len(leaves) < 2
            or edge is None
            or edge.node._input_metadata[edge.output_nr].dtype.is_complex
        ):
            continue
        mixed = mixed_leaves(edge.node)
        leaves = [leaf for leaf in leaves if id(leaf.parameter) in mixed]
        if not leaves:
            continue
        form = tap.form(source, columns)
        part = form.form if isinstance(form, Part) else form
        with Nested(block):
            dense = part.dense()
            parameters = [leaf.parameter for leaf in leaves]
            results = pull_back_to_all(edge, parameters, dense.flatten(0, 1))
        for leaf, result in zip(leaves, results, strict=True):
            own = Dense(result.reshape(*dense.shape[:2], *leaf.parameter.shape))
            whole = Part(own, form.sample, form.samples) if isinstance(form, Part) else own
            found[leaf, id(source)] = whole
    return found


def _pull_back(block: Block, edge: GradientEdge, parameter: Tensor, columns: Tensor) -> Tensor:
    with Nested(block):
        return pull_back(edge, parameter, columns)


def form_of_uses(block: Block, leaf: Leaf, at: Arrived, absent: int) -> Form | None:
    """The form of all uses that columns have reached, or of all if ``absent`` columns stand in.

    Outputs of a reached node that get none are not in use (a recurrent layer's last states).
    """
    arrived = [at.get((node, tap.place)) for node, tap, _ in leaf.uses]
    reached = {node for (node, _, _), g in zip(leaf.uses, arrived, strict=True) if g is not None}
    if not reached:
        return None
    forms = []
    for (node, tap, source), g in zip(leaf.uses, arrived, strict=True):
        if g is None and absent and node not in reached:
            about = node._input_metadata[tap.place]
            g = torch.zeros(absent, *about.shape, dtype=about.dtype, device=about.device)
        if g is not None:
            forms.append(form_of_source(block, leaf, tap, source, g))
    return merge(forms)


def form_at_parameter(leaf: Leaf, at: Arrived) -> Form | None:
    """The form of columns at the parameter itself, if there are any."""
    own = at.get((get_gradient_edge(leaf.parameter).node, 0))
    if own is None:
        return None
    return Together(own, leaf.samples) if own.dim() == 1 + leaf.real.dim() else Dense(own)


def form_of_zeros(block: Block, leaf: Leaf) -> Form:
    """A column of zeros, in the form in which columns would reach a parameter."""
    zero, forms = leaf.real.detach().new_zeros(()), []
    with Nested(block):
        for node, tap, source in leaf.places:
            at = node._input_metadata[tap.place]
            if source.edge is None:
                form = tap.form(source, zero.to(at.dtype).expand(1, *at.shape))
                forms.append(in_pairs(form) if leaf.parameter.is_complex() else form)
            else:  # whose graph may be gone
                forms.append(Dense(zero.expand(1, leaf.samples, *leaf.real.shape)))
    return merge(forms)


def reduce(
    leaf: Leaf, exts: Iterable[BackpropExtension], form: Form, sign: Tensor | None = None
) -> None:
    """Add a form to the states of quantities."""
    states, parameter = leaf.states, leaf.real
    for ext in exts:
        field = ext.savefield
        if field in leaf.without:
            continue
        try:
            if field in states:
                states[field] = ext.update(states[field], form, sign)
            else:
                states[field] = ext.begin(parameter, form, sign)
        except REFUSALS as error:
            leaf.refuse(leaf, ext, error)
