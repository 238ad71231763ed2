"""The table of rules: a function per operation, from its arguments to forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from backpack.forms.base import Dense, Form
from backpack.forms.layout import Layout
from backpack.forms.outer import Outer
from backpack.samples.axis import SampleAxis

ToForm = Callable[[Tensor], Form]
# What a rule gives: tensors an operation may have as parameters, each with the way to its form.
ParameterForms = list[tuple["Tensor | None", ToForm]]
OpRule = Callable[..., "ParameterForms | None"]


RULES: dict[Any, OpRule] = {}


def op_rule(*functions: Any) -> Callable[[OpRule], OpRule]:
    """Register a rule for operations (as the torch-function protocol reports them).

    Example:
        >>> def scale(input, weight):
        ...     if torch.overrides.has_torch_function((input, weight)):
        ...         return torch.overrides.handle_torch_function(scale, (input, weight), input, weight)
        ...     return input * weight
        >>> @op_rule(scale)
        ... def rule(batch, input, weight):
        ...     return [(weight, lambda g: reduce_to(batch, g * input, weight.shape))]
        >>> RULES.pop(scale) is rule  # forget it again
        True
    """

    def register(function: OpRule) -> OpRule:
        for func in functions:
            RULES[func] = function
        return function

    return register


def outer_form(
    batch: SampleAxis, a: Tensor, g: Tensor, layout: Layout, call: object | None = None
) -> Outer:
    """Ungrouped, from rows ``a`` and columns ``g`` at the rows of one result of a call."""
    a, g = batch.rows(a), batch.rows(g, 1)
    counts = positions(batch, g.shape[2])
    return Outer(a.unsqueeze(1), g.unsqueeze(2), layout, counts, call=call)


def positions(batch: SampleAxis, longest: int) -> Tensor | None:
    """How many positions each sample has, where they differ, if the one that has most has so many."""
    counts = batch.counts
    return None if counts is None else counts * (longest // max(batch.width, 1))


def position_sum(g: Tensor) -> Tensor:
    """``[v, n, s, o] -> [v, n, o]``."""
    return g.squeeze(2) if g.shape[2] == 1 else g.sum(2)


def channel_sum(batch: SampleAxis, g: Tensor) -> Dense:
    """Sum ``g [v, N k, c, *space]`` over all but columns, samples and channels."""
    g = g.flatten(3).sum(3) if g.dim() > 3 else g
    return Dense(g if batch.plain else batch.split(g, 1).sum(2))


SEVERAL_OUTPUTS: dict[Any, Callable[..., ParameterForms]] = {}
