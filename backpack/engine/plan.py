"""What a pass would compute, before it does: forms of parameters, bytes, operations, refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from backpack.capture.extend import extend, unextend
from backpack.engine.block import backpack
from backpack.engine.collect import Leaf, form_of_source
from backpack.engine.costs import contraction, cost_of, described
from backpack.engine.left_out import REFUSALS
from backpack.engine.refusals import Names, check, parameters_of
from backpack.engine.state import Block, Nested
from backpack.forms.base import Form
from backpack.forms.several import merge
from backpack.graph.carry import bytes_at
from backpack.graph.survey import Graph, survey
from backpack.quantities.base import BackpropExtension, listed
from backpack.quantities.matrix_products import Product
from backpack.sources.at_output import forms_at_output
from backpack.sources.columns import Pass
from backpack.sources.table import (
    AveragedRoot,
    ExactRoot,
    HessianRoot,
    LeadingRoot,
    LossGradient,
    OutputBasis,
    RandomSigns,
    SampledRoot,
)


class Step(NamedTuple):
    """A quantity of a parameter.

    Attributes:
        parameter: the parameter's name.
        shape: its shape.
        savefield: the quantity's field.
        form: what the parameter's form is made of.
        bytes: what its value takes; ``None``: not known.
        operations: what it takes to compute it once columns have arrived; ``None``: not known.
        refused: why there will be none, if so.
    """

    parameter: str
    shape: tuple[int, ...]
    savefield: str
    form: str
    bytes: int | None = None
    operations: int | None = None
    refused: str | None = None


@dataclass
class Plan:
    """What :func:`plan` found; ``print`` shows a table.

    Attributes:
        steps: one for each parameter and quantity.
        columns: how many columns of second order each quantity has carried down the graph, by fields;
            ``None``: not known.
        column_bytes: what one of them takes at all layers' outputs.
        gradient: operations of the gradient alone.
        refused: why the whole pass is refused, if it is.
    """

    steps: list[Step] = field(default_factory=list)
    columns: dict[str, int | None] = field(default_factory=dict)
    column_bytes: int = 0
    gradient: int = 0
    refused: str | None = None

    @property
    def bytes(self) -> int:
        """What all values take, as far as it is known."""
        return sum(step.bytes or 0 for step in self.steps)

    @property
    def operations(self) -> int:
        """What all quantities take beside the gradient, as far as it is known."""
        carried = sum(count or 0 for count in self.columns.values()) * self.gradient // 3
        return carried + sum(step.operations or 0 for step in self.steps)

    def __str__(self) -> str:
        if self.refused is not None:
            return f"refused: {self.refused}"
        rows = [("parameter", "shape", "form", "quantity", "MB", "GFLOP")]
        reasons: dict[str, list[str]] = {}
        for s in self.steps:
            numbers = _scaled(s.bytes, 2**20), _scaled(s.operations, 1e9)
            if s.refused is not None:
                numbers = "refused", ""
                reasons.setdefault(s.refused, []).append(f"{s.savefield} of {s.parameter}")
            shape = "x".join(map(str, s.shape)) or "-"
            rows.append((s.parameter, shape, s.form, s.savefield, *numbers))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        ways = (str.ljust, str.ljust, str.ljust, str.ljust, str.rjust, str.rjust)
        lines = [
            "  ".join(way(*cell) for way, cell in zip(ways, zip(row, widths, strict=True), strict=True))
            for row in rows
        ]
        lines += [f"refused: {', '.join(who)}: {why}" for why, who in reasons.items()]
        for name, count in self.columns.items():
            size = _scaled(self.column_bytes, 2**20)
            lines.append(f"{name}: {'?' if count is None else count} columns carried, {size} MB each")
        share = self.operations / self.gradient if self.gradient else 0.0
        lines.append(
            f"values {_scaled(self.bytes, 2**20)} MB; operations {_scaled(self.operations, 1e9)} "
            f"GFLOP, {share:.2f} times the gradient's"
        )
        return "\n".join(line.rstrip() for line in lines)


def _scaled(number: int | None, unit: float) -> str:
    return "?" if number is None else f"{number / unit:.3g}"


def plan(
    model: nn.Module,
    X: Any,
    extensions: BackpropExtension | Sequence[BackpropExtension],
    lossfunc: Callable[[Any, Any], Tensor] | None = None,
    y: Any = None,
) -> Plan:
    """What a pass with these quantities would compute, and what of it would be refused.

    Runs one forward pass, and no backward pass through the model. Buffers and random numbers are as
    before; ``model`` need not be extended, and its parameters' fields stay what they are. Operations
    are those of products (``2 N s o i`` for a layer with ``o`` outputs, ``i`` inputs and ``s``
    positions of ``N`` samples), from which times follow for large layers only. Refusals are those that
    are known from the graph, and not what only the columns of a loss can tell (that it is not convex).

    Args:
        model: any module.
        X: the input, a tuple of inputs, or a dictionary of keyword arguments.
        extensions: the quantities, or one.
        lossfunc: a loss of output and ``y``. By default the model's own (an output that is a number, or
            has it as its attribute ``loss``); where there is none, a sum of squares stands in, of which
            each number of the output has a column of second order.
        y: targets.

    Returns:
        A plan; ``print(plan)`` shows a table, ``plan.steps`` holds its rows.

    Raises:
        ValueError: if ``extensions`` holds anything but instances of extensions.
        TypeError: if there is no loss, and the output holds no tensor to make one of.

    Example:
        >>> from backpack.extensions import KFAC, BatchGrad
        >>> found = plan(nn.Linear(4, 3), torch.rand(5, 4), [BatchGrad(), KFAC()])
        >>> found.bytes == 4 * (5 * (12 + 3) + 3**2 + 4**2 + 3**2), found.refused
        (True, None)
    """
    owner = backpack(*listed(extensions), certify="never")
    states = {name: buffer.clone() for name, buffer in model.named_buffers()}
    known = "_backpack_extend" in model.__dict__
    if not known:
        extend(model)
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            loss = _loss(model, X, lossfunc, y)
            return _planned(Block(owner), loss, owner.extensions)
    finally:
        if not known:
            unextend(model)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in states:
                    buffer.copy_(states[name])


def _loss(model: nn.Module, X: Any, lossfunc: Callable[[Any, Any], Tensor] | None, y: Any) -> Tensor:
    positional = X if isinstance(X, tuple) else (X,)
    output = model(**X) if isinstance(X, Mapping) else model(*positional)
    if lossfunc is not None:
        return lossfunc(output, y)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if isinstance(own, Tensor) and own.numel() == 1:
        return own
    values = output.values() if isinstance(output, Mapping) else output
    parts = [output] if isinstance(output, Tensor) else list(values)
    found = [t.square().sum() for t in parts if isinstance(t, Tensor) and t.requires_grad]
    if not found:
        raise TypeError(
            f"the model's output, {type(output).__name__}, holds no tensor to make a loss of; give "
            "plan a lossfunc and targets"
        )
    return sum(found[1:], found[0])


def _planned(block: Block, loss: Tensor, exts: Sequence[BackpropExtension]) -> Plan:
    found, refused = Plan(), dict[Tensor | None, dict[str, str]]()

    def refuse(
        error: Exception,
        parameters: Sequence[Tensor] | None = None,
        exts: Sequence[BackpropExtension] | None = None,
        foreign: bool = False,
    ) -> None:
        for p in [None] if parameters is None else parameters:
            for ext in block.owner.extensions if exts is None else exts:
                refused.setdefault(p, {}).setdefault(ext.savefield, str(error))

    root = get_gradient_edge(loss)
    try:
        with Nested(block):
            graph = survey([root.node], any(ext.source.second_order for ext in exts))
        names = Names(graph.recordings)
        check(graph, graph.taps, names, exts, True, refuse)
    except (RuntimeError, *REFUSALS) as error:
        return Plan(refused=str(error))
    if not graph.taps:
        return Plan(refused="no parameter of the model takes part in the loss")
    leaves = _leaves(graph, names, exts, refuse)
    given = Pass([(root, torch.ones_like(loss))], graph, list(leaves.values()), names)
    with torch.no_grad(), Nested(block):
        forms = {p: _form(block, leaf) for p, leaf in leaves.items() if leaf.uses}
        summed = {ext.source: all(e.summed for e in exts if e.source == ext.source) for ext in exts}
        at_output = _at_output(given, exts)
        found.gradient = 3 * sum(map(contraction, forms.values()))
        found.column_bytes = bytes_at(given.taps)
        counts = {ext: _columns(ext, given, exts) for ext in exts if not isinstance(ext, Product)}
    found.columns = {ext.savefield: n for ext, n in counts.items() if ext.source.second_order}
    for p in {**dict.fromkeys(forms), **dict.fromkeys(q for q in refused if q is not None)}:
        reasons = {**refused.get(None, {}), **refused.get(p, {})}
        for ext in exts:
            direct = isinstance(ext.source, ExactRoot) and summed[ext.source] and p in at_output
            form = forms.get(p)
            step = Step(names(p).strip("'"), tuple(p.shape), ext.savefield, "-")
            if form is not None:
                cost = cost_of(ext, form, 1 if direct else counts.get(ext))
                step = step._replace(form=described(form), **cost._asdict())
            why = reasons.get(ext.savefield)
            found.steps.append(
                step if why is None else step._replace(bytes=0, operations=0, refused=why)
            )
    return found


def _leaves(
    graph: Graph, names: Names, exts: Sequence[BackpropExtension], refuse: Any
) -> dict[Tensor, Leaf]:
    leaves: dict[Tensor, Leaf] = {}
    for node, tap in graph.taps:
        for source in [] if tap.batch.lost else tap.sources:
            for p in parameters_of(source):
                if p not in leaves and p.is_complex():
                    real_only = [ext for ext in exts if ext.of_complex is None]
                    if real_only:
                        refuse(names.complex(p, real_only[0]), [p], real_only)
                leaf = leaves.setdefault(p, Leaf(p, tap.batch.size, refuse))
                if leaf.samples != tap.batch.size:
                    refuse(names.sizes(p, leaf.samples, tap.batch.size), [p])
                elif p.numel():
                    leaf.uses.append((node, tap, source))
    return leaves


def _form(block: Block, leaf: Leaf) -> Form:
    """The form of a column of zeros."""
    forms = []
    for node, tap, source in leaf.uses:
        at = node._input_metadata[tap.place]
        zero = torch.zeros((), dtype=at.dtype, device=at.device)
        forms.append(form_of_source(block, leaf, tap, source, zero.expand(1, *at.shape)))
    return merge(forms)


def _at_output(given: Pass, exts: Sequence[BackpropExtension]) -> set[Tensor]:
    """Parameters to which no column of an exact root is carried."""
    if given.graph.joint()[0] or not any(isinstance(ext.source, ExactRoot) for ext in exts):
        return set()
    found: set[Tensor] = set()
    for piece in given.losses:
        blocks = piece.hessian.blocks(piece.gradient, True)  # type: ignore[union-attr]
        found |= forms_at_output(piece.places[0], blocks, given.leaves).keys()
    return found


def _columns(ext: BackpropExtension, given: Pass, exts: Sequence[BackpropExtension]) -> int | None:
    """How many columns a quantity's source has."""
    source = ext.source
    if isinstance(source, LossGradient):
        return 1
    if isinstance(source, SampledRoot):
        return source.draws
    if isinstance(source, RandomSigns):
        return 2 * source.draws
    if isinstance(source, LeadingRoot):
        return source.count
    if isinstance(source, OutputBasis):
        places = given.model_outputs
    elif isinstance(source, (ExactRoot, AveragedRoot, HessianRoot)):
        joint = given.graph.joint()[0]
        if not joint:
            every = any(each.every_column for each in exts if each.source == source)
            losses: Any = [piece.hessian for piece in given.losses]
            return sum((loss if every else loss.with_minimal_root()).count for loss in losses)
        places = given.outputs
    else:
        return None
    shapes = [(edge.node._input_metadata[edge.output_nr].shape, axis) for edge, axis in places]
    return sum(prod(shape) // max(axis.size, 1) for shape, axis in shapes)
