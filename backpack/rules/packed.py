"""Recurrent layers on packed sequences: one layer, one direction, several outputs.

The recursion runs on sequences that are padded with zeros; what is multiplied with its gradients are
the rows that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.forms.base import Dense, Form
from backpack.forms.layout import Layout
from backpack.rules import recursions
from backpack.rules.base import ParameterForms, ToForm, outer_form
from backpack.rules.elementwise import reduce_to
from backpack.rules.recurrent import Once
from backpack.samples.axis import SampleAxis, picked_axis
from backpack.samples.packing import Steps, axis_of_packed, axis_of_sequences

# Rules by the kernel, which also runs on padded batches.
PACKED: dict[Any, Callable[..., ParameterForms]] = {}


def packed_axes(
    data: Tensor, sizes: Tensor, states: Sequence[Tensor], marked: Sequence[tuple[Tensor, SampleAxis]]
) -> tuple[SampleAxis, SampleAxis, list[Tensor]]:
    """The sample axes of a layer's hidden states and last states, from those of what it takes.

    Args:
        data: packed data.
        sizes: how many sequences have so many steps.
        states: the states it begins with, which have sequences on their second axis.
        marked: the arguments that have a sample axis.

    Returns:
        The axes, and the arguments that are taken for constants after all.
    """
    chosen: SampleAxis | None = None
    demoted: list[Tensor] = []
    order = sorted(marked, key=lambda p: (p[1].tentative > 0, p[1].lost is None, p[0] is not data))
    for tensor, axis in order:
        if tensor is data or axis.lost:
            here = axis_of_sequences(axis, sizes, data.device)
        elif not any(tensor is state for state in states):
            here = axis.losing("a weight that depends on the data")
        elif axis.solo is not None:
            rows = torch.full((tensor.shape[1],), axis.solo, device=data.device)
            here = picked_axis(rows, axis.size, 1, axis.tentative)
        elif axis.dim == 1 or axis.size == 1:
            here = axis.moved(1) if axis.size > 1 else axis.placed(1, 1, tensor.shape[1])
        else:
            here = axis.losing("states of packed sequences along the sample axis")
        if chosen is None:
            chosen = here
        elif not chosen.lost and not chosen.agrees(here):
            if axis.tentative:
                demoted.append(tensor)
            else:
                chosen = chosen.losing("a recurrent layer whose states belong to other samples")
    assert chosen is not None
    return axis_of_packed(chosen, sizes, data.device), chosen, demoted


def layer_by_layer(
    kind: Any,
    data: Tensor,
    sizes: Tensor,
    hx: Any,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> Any:
    """Layers and directions one at a time, each with its fused kernel."""
    directions = 2 if bidirectional else 1
    if num_layers * directions == 1:
        return NotImplemented
    each = len(params) // (num_layers * directions)
    states = hx if kind is torch.lstm else (hx,)
    finals: list[list[Tensor]] = [[] for _ in states]
    turned = Steps.of(sizes, data.device).reversed() if bidirectional else None
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            at = layer * directions + direction
            rows = data.index_select(0, turned) if direction else data  # type: ignore[arg-type]
            start = tuple(state[at : at + 1] for state in states)
            output, *final = recursions.fused(
                kind,
                has_biases,
                rows,
                sizes,
                start if kind is torch.lstm else start[0],
                list(params[at * each : (at + 1) * each]),
                has_biases,
                1,
                0.0,
                train,
                False,
            )
            outputs.append(output.index_select(0, turned) if direction else output)
            for found, state in zip(finals, final, strict=True):
                found.append(state)
        data = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and train and layer < num_layers - 1:
            data = F.dropout(data, dropout, True)
    return (data, *(torch.cat(found, 0) for found in finals))


def _packed(name: str) -> Callable[..., ParameterForms]:
    def layer(
        batch: SampleAxis,
        place: int,
        output: Tensor,
        data: Tensor,
        sizes: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> ParameterForms:
        """``batch`` is the axis of packed hidden states, whichever the place.

        ``output`` is detached: it is the hidden states, and holding on to it must not be a cycle.
        It is the same tensor for all results of a call.
        """
        weights = recursions.Layer.of(params, has_biases)
        h0: Tensor = hx[0] if name == "lstm" else hx
        c0: Tensor | None = hx[1] if name == "lstm" else None
        steps = Steps.of(sizes, data.device)
        sequences = axis_of_sequences(batch, sizes, data.device)

        def backward(g: Tensor) -> recursions.Backward:
            x, hidden = steps.pad(data.to(g.dtype)), steps.pad(output.to(g.dtype))
            g = steps.at_ends(g.squeeze(1)) if place else steps.pad(g, 1)
            start, cell = h0[0].to(g.dtype), None if c0 is None else c0[0].to(g.dtype)
            if torch.is_grad_enabled():
                hidden = recursions.hidden_states(name, weights, x, start, cell)
            if cell is not None:
                return recursions.lstm(weights, x, start, cell, hidden, g, 2 if place == 2 else 0)
            if name == "gru":
                return recursions.gru(weights, x, start, hidden, g, 0)
            return recursions.rnn(weights, x, start, hidden, g, 0, name == "rnn_relu")

        shared = Once(backward)

        def matrix(weight: Tensor, rows: Callable[[recursions.Backward], Tensor], d: str) -> ToForm:
            def form(g: Tensor) -> Form:
                back = shared(g)
                columns = steps.pack(getattr(back, d), 1)
                return outer_form(batch, rows(back).to(g.dtype), columns, Layout(weight.shape), output)

            return form

        def unprojected(back: recursions.Backward) -> Tensor:
            assert back.unprojected is not None
            return steps.pack(back.unprojected)

        def bias(d: str) -> ToForm:
            return lambda g: Dense(batch.rows(steps.pack(getattr(shared(g), d), 1), 1).sum(2))

        def state(shape: torch.Size, d: str) -> ToForm:
            return lambda g: reduce_to(sequences, getattr(shared(g), d).unsqueeze(1), shape)

        def inputs(g: Tensor) -> Form:
            """The data, where it is made from parameters and only the first states are data."""
            return reduce_to(batch, steps.pack(shared(g).d_ih, 1) @ weights.w_ih, data.shape)

        pairs: ParameterForms = [
            (weights.w_ih, matrix(weights.w_ih, lambda back: data, "d_ih")),
            (weights.w_hh, matrix(weights.w_hh, lambda back: steps.pack(back.previous), "d_hh")),
            (weights.b_ih, bias("d_ih")),
            (weights.b_hh, bias("d_hh")),
            (h0, state(h0.shape, "d_h0")),
            (c0, state(h0.shape if c0 is None else c0.shape, "d_c0")),
            (data, inputs),
        ]
        if weights.w_hr is not None:
            pairs.append((weights.w_hr, matrix(weights.w_hr, unprojected, "d_hr")))
        return pairs

    return layer


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    PACKED[getattr(torch, _name)] = _packed(_name)
