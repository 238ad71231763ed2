"""The one loop: columns of a source are carried to all taps, made forms there, and reduced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from backpack.engine.collect import (
    Arrived,
    Leaf,
    form_at_parameter,
    form_of_uses,
    form_of_zeros,
    reduce,
)
from backpack.engine.debug import Stopwatch
from backpack.engine.left_out import REFUSALS
from backpack.engine.refusals import Refuse
from backpack.engine.state import Block, Nested
from backpack.forms.base import Dense, Form
from backpack.forms.products import products_kept
from backpack.graph.carry import carry
from backpack.quantities.base import BackpropExtension
from backpack.rules.convolution import patches_kept
from backpack.sources.columns import Columns, ColumnSource, Pass, Wanted

# Puts the states of quantities together with those of other processes.
Share = Callable[[Sequence[BackpropExtension]], None]


def carry_sources(
    block: Block,
    watch: Stopwatch,
    leaves: Sequence[Leaf],
    given: Pass,
    by_source: Mapping[ColumnSource, list[BackpropExtension]],
    refuse: Refuse,
    share: Share | None = None,
) -> None:
    """Carry the columns of all sources to the taps, and reduce them there.

    Before quantities look at columns again, ``share`` is called, if it is given.
    """
    with patches_kept(), Nested(block):
        for source, exts in by_source.items():
            try:
                _carry_source(block, watch, leaves, given, source, exts, share)
            except REFUSALS as error:
                refuse(error, None, exts)


def _carry_source(
    block: Block,
    watch: Stopwatch,
    leaves: Sequence[Leaf],
    given: Pass,
    source: ColumnSource,
    exts: list[BackpropExtension],
    share: Share | None,
) -> None:
    refined = [ext for ext in exts if ext.refines]
    _refuse_second_loss(refined, leaves)
    wanted = Wanted(
        any(ext.per_sample for ext in exts),
        all(ext.signed for ext in exts),
        any(ext.every_column for ext in exts),
        all(ext.summed for ext in exts),
    )
    chunks = source.chunks(given, wanted)
    kept = list(chunks) if refined and source.random else None
    _take_all(block, watch, leaves, kept or chunks, exts, given, False)
    if refined:
        if share is not None:
            share(refined)
        first = {(leaf, e): leaf.states.get(e.savefield) for leaf in leaves for e in refined}
        again = kept or source.chunks(given, wanted)
        _take_all(block, watch, leaves, again, refined, given, True)
        for (leaf, ext), state in first.items():
            # Columns of other processes reach it, but none of this one.
            if state is not None and leaf.states.get(ext.savefield) is state:
                leaf.states[ext.savefield] = ext.refine(state, form_of_zeros(block, leaf))


def _refuse_second_loss(refined: list[BackpropExtension], leaves: Sequence[Leaf]) -> None:
    for ext in refined:
        if any(ext.savefield in leaf.states for leaf in leaves):
            raise NotImplementedError(
                f"{ext.savefield} has eigenvectors of one loss's factors, but backward has reached "
                "another loss; call loss.backward() on their sum, or use KFLR or KFAC"
            )


def _take_all(
    block: Block,
    watch: Stopwatch,
    leaves: Sequence[Leaf],
    chunks: Iterable[Columns],
    exts: list[BackpropExtension],
    given: Pass,
    refining: bool,
) -> None:
    for columns in chunks:
        if columns.forms is not None:
            _take_forms(leaves, columns.forms, exts, refining)
            continue
        with watch("columns carried to all taps"):
            at = _carry(columns, given)
        about = leaves
        if columns.about is not None:
            about = [leaf for leaf in leaves if leaf.parameter in columns.about]
        with products_kept():
            for leaf in about:
                if watch.runs:
                    with watch(leaf.parameter):
                        _take(block, leaf, columns, at, exts, refining)
                else:
                    _take(block, leaf, columns, at, exts, refining)
        del at  # before the next columns are carried


def _carry(columns: Columns, given: Pass) -> Arrived:
    """Columns at taps, by places of the graph."""
    if columns.carried:
        places = [(edge.node, edge.output_nr) for edge in columns.starts]
        return dict(zip(places, columns.values, strict=True))
    targets = given.taps if columns.about is None else given.taps_of(columns.about)
    found = carry(columns.starts, targets, columns.values)
    return dict(zip(((edge.node, edge.output_nr) for edge in targets), found, strict=True))


def _take(
    block: Block,
    leaf: Leaf,
    columns: Columns,
    at: Arrived,
    exts: list[BackpropExtension],
    refining: bool,
) -> None:
    """Reduce columns that have arrived at the taps of a parameter, or at the parameter itself."""
    count = columns.values[0].shape[0]
    # Factors of inputs are those of all uses, also where these columns reach some of them only.
    absent = count if any(ext.every_use for ext in exts) else 0
    form = form_at_parameter(leaf, at) if columns.carried else None
    form = form_of_uses(block, leaf, at, absent) if form is None else form
    if form is None:
        shape = (count, leaf.samples, *leaf.real.shape)
        zeros = Dense(leaf.real.detach().new_zeros(()).expand(shape))
        reduce(leaf, [ext for ext in exts if ext.every_column], zeros)
    else:
        _reduce(leaf, exts, form, refining, columns.sign)


def _take_forms(
    leaves: Sequence[Leaf],
    forms: Mapping[Tensor, Form],
    exts: list[BackpropExtension],
    refining: bool,
) -> None:
    """Reduce forms of all columns at once."""
    with products_kept():
        for leaf in leaves:
            if leaf.parameter in forms:
                _reduce(leaf, exts, forms[leaf.parameter], refining)


def _reduce(
    leaf: Leaf,
    exts: list[BackpropExtension],
    form: Form,
    refining: bool,
    sign: Tensor | None = None,
) -> None:
    if refining:
        for ext in [ext for ext in exts if ext.savefield not in leaf.without]:
            leaf.states[ext.savefield] = ext.refine(leaf.states[ext.savefield], form)
    else:
        reduce(leaf, exts, form, sign)
