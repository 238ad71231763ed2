"""Recurrent layers: one layer, one direction, several outputs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from backpack.forms.base import Dense, Form
from backpack.forms.layout import Layout
from backpack.rules import recursions
from backpack.rules.base import SEVERAL_OUTPUTS, ParameterForms, ToForm, outer_form
from backpack.rules.elementwise import reduce_to
from backpack.samples.axis import SampleAxis, solo_axis


def recurrent_axis(
    input: Tensor,
    states: Sequence[Tensor],
    marked: Sequence[tuple[Tensor, SampleAxis]],
    batch_first: bool,
) -> tuple[SampleAxis, list[Tensor]]:
    """The sample axis of a recurrent layer's hidden states, from its input's and its first states'.

    Args:
        input: the input.
        states: the states it begins with, which have samples on their second axis.
        marked: the arguments that have a sample axis.
        batch_first: whether samples come first in the input and the hidden states.

    Returns:
        The axis, and the arguments that are taken for constants after all: those whose tentative axis
        disagrees with a certain one.
    """
    dim = 0 if batch_first else 1
    chosen: SampleAxis | None = None
    demoted: list[Tensor] = []
    # A state of zeros may look like samples by its number of layers: the input speaks first.
    order = sorted(marked, key=lambda p: (p[1].tentative > 0, p[1].lost is None, p[0] is not input))
    for tensor, axis in order:
        place = dim if tensor is input else 1
        if axis.lost:
            here = axis
        elif tensor is not input and not any(tensor is state for state in states):
            here = axis.losing("a weight that depends on the data")
        elif axis.solo is not None or axis.size == 1:
            shape = (tensor.shape[place],) * 2
            here = solo_axis(axis.solo or 0, axis.size, shape, tensor.device, axis.tentative, dim)
        elif axis.dim == place:
            here = axis.moved(dim)
        else:
            here = axis.losing("a recurrent layer along the sample axis (see its batch_first)")
        if chosen is None:
            chosen = here
        elif not chosen.lost and not chosen.agrees(here):
            if axis.tentative:
                demoted.append(tensor)
            else:
                chosen = chosen.losing("a recurrent layer whose states belong to other samples")
    assert chosen is not None
    return chosen, demoted


def _recurrent(name: str) -> Callable[..., ParameterForms]:
    def layer(
        batch: SampleAxis,
        place: int,
        output: Tensor,
        input: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> ParameterForms:
        """``batch`` is the hidden states' axis, whichever the place.

        ``output`` is detached: it is the hidden states, and holding on to it must not be a cycle.
        It is the same tensor for all results of a call.
        """
        weights = recursions.Layer.of(params, has_biases)
        h0: Tensor = hx[0] if name == "lstm" else hx
        c0: Tensor | None = hx[1] if name == "lstm" else None
        first, state_axis = batch.moved(0), batch.moved(1)

        def backward(g: Tensor) -> tuple[Tensor, recursions.Backward]:
            x, hidden = input.to(g.dtype), output.to(g.dtype)
            if not batch_first:
                x, hidden = x.transpose(0, 1), hidden.transpose(0, 1)
            if place:
                g = g.squeeze(1)
            elif not batch_first:
                g = g.transpose(1, 2)
            start, cell = h0[0].to(g.dtype), None if c0 is None else c0[0].to(g.dtype)
            if torch.is_grad_enabled():
                hidden = recursions.hidden_states(name, weights, x, start, cell)
            if cell is not None:
                return x, recursions.lstm(weights, x, start, cell, hidden, g, place)
            if name == "gru":
                return x, recursions.gru(weights, x, start, hidden, g, place)
            return x, recursions.rnn(weights, x, start, hidden, g, place, name == "rnn_relu")

        shared = Once(backward)

        def input_weight(g: Tensor) -> Form:
            x, back = shared(g)
            return outer_form(first, x, back.d_ih, Layout(weights.w_ih.shape), output)

        def hidden_weight(g: Tensor) -> Form:
            back = shared(g)[1]
            return outer_form(first, back.previous, back.d_hh, Layout(weights.w_hh.shape), output)

        def projection(g: Tensor) -> Form:
            back = shared(g)[1]
            assert weights.w_hr is not None and back.unprojected is not None and back.d_hr is not None
            return outer_form(first, back.unprojected, back.d_hr, Layout(weights.w_hr.shape), output)

        def bias(which: str) -> ToForm:
            return lambda g: Dense(first.rows(getattr(shared(g)[1], which), 1).sum(2))

        def data(g: Tensor) -> Form:
            """The input, where it is made from parameters and only the first states are data."""
            found = shared(g)[1].d_ih @ weights.w_ih
            return reduce_to(batch, found if batch_first else found.transpose(1, 2), input.shape)

        def state(shape: torch.Size, which: str) -> ToForm:
            def form(g: Tensor) -> Form:
                return reduce_to(state_axis, getattr(shared(g)[1], which).unsqueeze(1), shape)

            return form

        return [
            (weights.w_ih, input_weight),
            (weights.w_hh, hidden_weight),
            (weights.b_ih, bias("d_ih")),
            (weights.b_hh, bias("d_hh")),
            (weights.w_hr, projection),
            (h0, state(h0.shape, "d_h0")),
            (c0, state(h0.shape if c0 is None else c0.shape, "d_c0")),
            (input, data),
        ]

    return layer


class Once:
    """Remember the last result, for as long as it is in use (several parameters ask for it)."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self.function = function
        self.key: weakref.ref[Tensor] | None = None
        self.result: Any = None

    def __call__(self, g: Tensor) -> Any:
        if self.key is None or self.key() is not g:
            self.result = self.function(g)
            self.key = weakref.ref(g, self._forget)
        return self.result

    def _forget(self, _: Any) -> None:
        self.key = self.result = None


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    SEVERAL_OUTPUTS[getattr(torch, _name)] = _recurrent(_name)
