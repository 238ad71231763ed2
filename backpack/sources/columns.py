"""Columns, and where they come from: every quantity is a function of columns that have arrived at taps.

Letters: ``v`` columns, ``n`` samples, ``p`` a parameter's shape.

A quantity names its *source*. The columns of a source are carried down the graph to all taps, turned
into forms there, and reduced, a chunk at a time; equal sources share that. A source of one's own is a
class with :meth:`ColumnSource.chunks`, and a value (a frozen dataclass), so that equal ones are found.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack._torch import shows
from backpack.forms.base import Form
from backpack.graph.carry import columns_at_once, differentiable_twice
from backpack.graph.nodes import children_of, walk
from backpack.graph.recognised import is_nonlinear
from backpack.graph.survey import Graph
from backpack.graph.taps import LIKELIHOOD, Source, Tap, notes
from backpack.graph.tracing import axis_at, cut
from backpack.losses.base import LossHessian
from backpack.losses.likelihoods import Fisher
from backpack.losses.twice import LARGEST_OUTPUT, Differentiated, differentiate_twice
from backpack.samples.axis import SampleAxis

# A loss that is differentiated twice is worth a notice if outputs have more numbers per sample.
NOTICE_FROM = 64
Starts = Sequence[tuple[GradientEdge, Tensor]]


class Columns(NamedTuple):
    """One chunk of columns.

    Attributes:
        starts: places of the graph.
        values: the columns at each, ``[v, *start.shape]``; the ``v``-th is that of all places together.
        sign: by which its square counts, ``[v, n]``; ``None``: all positive.
        about: the parameters that they are for; ``None``: for all that they reach.
        carried: whether they are where they belong: at taps, or at a parameter itself (``[v, *p]`` of
            all samples together, or ``[v, n, *p]``).
        forms: in place of columns, forms of all of them at once, of parameters to which none needs to
            be carried; only where :attr:`Wanted.summed`.
    """

    starts: Sequence[GradientEdge]
    values: Sequence[Tensor]
    sign: Tensor | None = None
    about: Collection[Tensor] | None = None
    carried: bool = False
    forms: Mapping[Tensor, Form] | None = None


class Leaf(Protocol):
    """What a source needs to know of a parameter.

    Attributes:
        parameter: the parameter.
        samples: number of samples that it meets.
        uses: the taps at which it meets data.
    """

    parameter: Tensor
    samples: int
    uses: list[tuple[Node, Tap, Source]]


class Wanted(NamedTuple):
    """What the quantities of a source ask of its columns.

    Attributes:
        per_sample: whether single samples are looked at.
        signed: whether columns may come with signs.
        every_column: whether as many columns are wanted as there are model outputs, not as few as do.
        summed: whether only sums over columns are wanted, so that there may be forms of all of them.
    """

    per_sample: bool = True
    signed: bool = False
    every_column: bool = False
    summed: bool = False


class LossPiece(NamedTuple):
    """A loss with its Hessian in model outputs (or in a linear function of them).

    Attributes:
        places: the model outputs.
        hessian: its Hessian there.
        gradient: the gradient that arrives at the loss.
        outputs: the model outputs below ``places``, if these are no outputs themselves.
        about: the parameters that it is for; ``None``: for all.
    """

    places: list[GradientEdge]
    hessian: LossHessian | Differentiated
    gradient: Tensor
    outputs: list[GradientEdge]
    about: Collection[Tensor] | None = None

    @property
    def joint(self) -> bool:
        """Whether it is the part that no rule gives."""
        return isinstance(self.hessian, Differentiated)


class LikelihoodPiece(NamedTuple):
    """A negative log-likelihood with its Fisher information.

    Attributes:
        places: its arguments, functions of model outputs.
        hessian: the Fisher information there.
        gradient: the gradient that arrives at it.
        about: the parameters that it is for; ``None``: for all.
    """

    places: list[GradientEdge]
    hessian: Fisher
    gradient: Tensor
    about: Collection[Tensor] | None = None


@dataclass
class Pass:
    """A backward pass, as sources see it.

    Attributes:
        roots: where it starts, with the gradients there.
        graph: what lies below.
        leaves: the parameters whose quantities are computed.
        names: names of parameters, for errors.
        chunk_size: number of columns at a time that the user asked for.
        hooked: whether hooks may change the gradients at the roots.
    """

    roots: Starts
    graph: Graph
    leaves: Sequence[Leaf]
    names: Callable[[Tensor], str]
    chunk_size: int | None = None
    hooked: bool = True

    def at_once(self, places: Sequence[GradientEdge], device: str) -> int:
        """How many columns are held at these places at a time."""
        return columns_at_once(places, device, self.chunk_size)

    @cached_property
    def taps(self) -> list[GradientEdge]:
        """The places of all taps."""
        return self.taps_of({leaf.parameter for leaf in self.leaves})

    def taps_of(self, parameters: Collection[Tensor]) -> list[GradientEdge]:
        """The places of the taps of some parameters."""
        leaves = [leaf for leaf in self.leaves if leaf.parameter in parameters]
        found = {(node, tap.place): None for leaf in leaves for node, tap, _ in leaf.uses}
        return [GradientEdge(node, place) for node, place in found]

    @cached_property
    def outputs(self) -> list[tuple[GradientEdge, SampleAxis]]:
        """Places whose cotangents make up all of the gradient, with their sample axes."""
        return list(self.graph.starts) if self.graph.within else cotangent_places(self.graph)

    @cached_property
    def model_outputs(self) -> list[tuple[GradientEdge, SampleAxis]]:
        """The outputs of the model, with their sample axes."""
        borders = self.graph.outputs | self.graph.flat
        for _, below in self.graph.losses.values():
            borders |= below
        return _placed(borders)

    @cached_property
    def losses(self) -> list[LossPiece]:
        """The losses, by a rule where there is one, else by differentiating twice in all outputs."""
        weights = self._weights
        joint, absorbed = self.graph.joint(self._concave(weights))
        found = self._differentiated(_placed(joint), absorbed) if joint else []
        found += self._by_rule({node: w for node, w in weights.items() if node not in absorbed})
        return self._with_upper(found) if self.graph.upper else found

    @cached_property
    def drawn_losses(self) -> Sequence[LossPiece | LikelihoodPiece]:
        """The same for columns that are drawn: of known likelihoods with their Fisher information."""
        likelihoods = self._likelihoods if self.graph.joint()[0] else []
        return [*likelihoods, *self._by_rule(self._weights)] if likelihoods else self.losses

    @cached_property
    def _weights(self) -> dict[Node, Tensor | None]:
        """What Hessians of losses with a rule are multiplied with."""
        losses = self.graph.losses
        arriving = self._arriving([GradientEdge(node, 0) for node in losses])
        return {
            node: None if gradient is None else record.weight(gradient)
            for (node, (record, _)), gradient in zip(losses.items(), arriving, strict=True)
        }

    def _by_rule(self, weights: Mapping[Node, Tensor | None]) -> list[LossPiece]:
        found = []
        for node, weight in weights.items():
            record, below = self.graph.losses[node]
            if weight is not None:
                outputs = [edge for edge, _ in _placed(below)]
                found.append(LossPiece([record.edge], record.hessian, weight, outputs))
        return found

    @cached_property
    def _likelihoods(self) -> list[LikelihoodPiece]:
        """All of the loss that no rule gives, if it consists of known likelihoods."""
        placed, known = _placed(self.graph.joint()[0]), self.graph.losses.keys()
        ends, calls = {edge.node for edge, _ in placed} | known, dict[Node, Any]()

        def below(node: Node) -> Sequence[Node]:
            if node in ends:
                return ()
            if LIKELIHOOD in notes(node):
                calls[node] = notes(node)[LIKELIHOOD]()
                return ()
            return children_of(node)

        above = [n for n in walk([edge.node for edge, _ in self.roots], below) if n not in ends]
        if not calls or any(is_nonlinear(node) for node in above if node not in calls):
            return []
        with cut(calls.keys() | known):
            others = gradients(self.roots, [edge for edge, _ in placed], False)
        if any(g is not None and shows((g != 0).any()) for g in others):
            return []  # there is more than likelihoods
        found = []
        arriving = self._arriving([GradientEdge(node, 0) for node in calls])
        for call, gradient in zip(calls.values(), arriving, strict=True):
            if call is None or gradient is None:
                return []
            likelihood, places = call
            axes = [axis for place in places if (axis := axis_at(place, placed)) is not None]
            if len(axes) < len(places):
                return []
            found.append(LikelihoodPiece(places, Fisher(likelihood, axes), gradient))
        return found

    def _with_upper(self, found: list[LossPiece]) -> list[LossPiece]:
        """Parameters above the outputs have the Hessian in the input of the loss, which has a rule."""
        above = {leaf.parameter for leaf in self.leaves if all(tap.above for _, tap, _ in leaf.uses)}
        others = {leaf.parameter for leaf in self.leaves} - above
        found = [piece._replace(about=others) if piece.joint else piece for piece in found]
        records = self.graph.upper if above else {}
        arriving = self._arriving([GradientEdge(node, 0) for node in records])
        for record, gradient in zip(records.values(), arriving, strict=True):
            if gradient is not None:
                weight = record.weight(gradient)
                found.append(LossPiece([record.edge], record.hessian, weight, [], above))
        return found

    def _concave(self, weights: dict[Node, Tensor | None]) -> list[Node]:
        """Terms of a loss that are not convex, where the sum with other terms may be."""
        found = []
        for node, (record, below) in self.graph.losses.items():
            weight, others = weights[node], self.graph.losses.keys() - {node}
            shared = any(not below.keys().isdisjoint(self.graph.losses[other][1]) for other in others)
            small = sum(_numbers(b.shape, b.batch) for borders in below.values() for b in borders)
            if record.weigh is None or weight is None or not shared or small > LARGEST_OUTPUT:
                continue
            if shows((weight < 0).any()):
                found.append(node)
        return found

    def _arriving(self, edges: list[GradientEdge]) -> list[Tensor | None]:
        """The gradients at losses."""
        if len(edges) == len(self.roots) == 1 and edges[0] == self.roots[0][0] and not self.hooked:
            return [self.roots[0][1]]  # the root is the loss
        return gradients(self.roots, edges, torch.is_grad_enabled())

    def _say_what_it_costs(self, found: Sequence[tuple[Tensor, GradientEdge, SampleAxis]]) -> None:
        size = sum(_numbers(g.shape, axis) for g, _, axis in found)
        if NOTICE_FROM < size <= LARGEST_OUTPUT:
            where = self.graph.bent_by
            why = f" (because of {where}, above the output)" if where else ""
            warnings.warn(
                f"the loss has no rule{why}: its Hessian in the {size} numbers of each sample's output "
                "is found by differentiating twice, in that many backward passes. Write it with a loss "
                "of torch.nn.functional, of the model's output or a linear function of it, or give it "
                "a rule (backpack.own.loss_rule)",
                stacklevel=2,
            )

    def _differentiated(
        self, outputs: list[tuple[GradientEdge, SampleAxis]], absorbed: set[Node]
    ) -> list[LossPiece]:
        create, known = torch.is_grad_enabled(), self.graph.losses.keys() - absorbed
        with torch.enable_grad(), cut({edge.node for edge, _ in outputs} | known):
            arriving = gradients(self.roots, [edge for edge, _ in outputs], create_graph=True)
            found = [
                (g, edge, axis)
                for g, (edge, axis) in zip(arriving, outputs, strict=True)
                if g is not None
            ]
            if not found:
                return []
            self._say_what_it_costs(found)
            hessian = differentiate_twice(found, create)
        edges = [edge for _, edge, _ in found]
        return [LossPiece(edges, hessian, hessian.f.new_ones(()).detach(), edges)]


def _numbers(shape: Sequence[int], axis: SampleAxis | None) -> int:
    """Numbers of one sample."""
    return prod(shape) // max(axis.size if axis is not None else 1, 1)


def cotangent_places(graph: Graph) -> list[tuple[GradientEdge, SampleAxis]]:
    """Places whose cotangents make up all of the gradient, with their sample axes.

    Those are model outputs, for one loss may take an output as it is and another a part of it: none of
    the places lies above another. A loss that depends on no output is one of the model's own.
    """
    joint, absorbed = graph.joint()
    found = _placed(joint | graph.flat)
    for node, (record, below) in graph.losses.items():
        if node not in absorbed:
            found += _placed(below) or [(record.edge, record.hessian.batch)]
    return list({(edge.node, edge.output_nr): (edge, axis) for edge, axis in found}.values())


def _placed(borders: dict[Node, list[Any]]) -> list[tuple[GradientEdge, SampleAxis]]:
    return [
        (GradientEdge(node, border.place), border.batch)
        for node, found in borders.items()
        for border in found
        if border.batch is not None
    ]


def gradients(
    starts: Starts, places: Sequence[GradientEdge], create_graph: bool
) -> list[Tensor | None]:
    """Gradients of ``sum weight * start`` at some places of the graph."""
    if not places or not starts:
        return [None] * len(places)
    with differentiable_twice():
        found = torch.autograd.grad(
            [edge for edge, _ in starts],
            list(places),
            [weight for _, weight in starts],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    return list(found)


class ColumnSource:
    """Where the columns of a quantity come from. Equal sources share one propagation.

    Attributes:
        random: whether the chunks of two calls differ.
        second_order: whether the Hessian of the loss takes part, or anything but its gradient.
    """

    random: ClassVar[bool] = False
    second_order: ClassVar[bool] = True

    def chunks(self, given: Pass, wanted: Wanted) -> Iterator[Columns]:
        """The columns, a chunk at a time; the one before is no longer held when the next is made."""
        raise NotImplementedError
