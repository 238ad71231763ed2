"""Recurrent layers: gradients of all pre-activations by one recursion backwards.

Letters: ``v`` columns, ``n`` samples, ``t`` steps, ``h`` hidden units.

A layer's output is its hidden states, so one product over all steps recovers the pre-activations of
the fused forward kernel, and one recursion backwards, over all columns at once, gives the gradients
``d [v, n, t, gates * h]`` of all of them. Both weight matrices are then outer products of these with
the layer's inputs and with its shifted hidden states.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layer(NamedTuple):
    """Weights of one layer and direction; ``w_hr`` projects an LSTM's hidden state."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None

    @classmethod
    def of(cls, params: Sequence[Tensor], has_biases: bool) -> Layer:
        """From the flat list that torch passes around."""
        w_ih, w_hh, *rest = params
        b_ih, b_hh = (rest.pop(0), rest.pop(0)) if has_biases else (None, None)
        return cls(w_ih, w_hh, b_ih, b_hh, rest[0] if rest else None)


class Backward(NamedTuple):
    """What the recursion gives.

    Attributes:
        d_ih: gradients of the input-side pre-activations, ``[v, n, t, gates * h]``.
        d_hh: of the hidden-side ones (they differ for a GRU's candidate).
        d_h0: of the initial hidden state, ``[v, n, h]``.
        d_c0: of the initial cell state (LSTM).
        previous: hidden states before each step, ``[n, t, h]``.
        d_hr: of the projected hidden states, ``[v, n, t, p]`` (LSTM with projection).
        unprojected: hidden states before projection, ``[n, t, h]``.
    """

    d_ih: Tensor
    d_hh: Tensor
    d_h0: Tensor
    d_c0: Tensor | None
    previous: Tensor
    d_hr: Tensor | None = None
    unprojected: Tensor | None = None


def fused(kind: Any, has_biases: bool, data: Tensor, *rest: Any) -> Any:
    """One layer of several, by its fused kernel.

    On a GPU cuDNN copies weights that do not lie side by side, and says so. Those without biases it
    may mistake for others (seen on torch 2.11: wrong hidden states), so that these go without it.
    """
    if data.device.type == "cpu":
        return kind(data, *rest)
    if not has_biases and torch.backends.cudnn.enabled:
        with torch.backends.cudnn.flags(enabled=False):
            return kind(data, *rest)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        return kind(data, *rest)


def _previous(h0: Tensor, hidden: Tensor) -> Tensor:
    return torch.cat([h0.unsqueeze(1), hidden[:, :-1]], 1)


def _incoming(g: Tensor, place: int, steps: int) -> Tensor | None:
    """Gradient of the hidden states: of all of them (place 0) or the last (place 1)."""
    if place == 0:
        return g
    if place == 1:
        return F.pad(g.unsqueeze(2), (0, 0, steps - 1, 0))
    return None


def lstm(
    layer: Layer, x: Tensor, h0: Tensor, c0: Tensor, hidden: Tensor, g: Tensor, place: int
) -> Backward:
    """Columns ``g`` at the hidden states, the last hidden or the last cell state (place 0, 1, 2).

    For place 2 they may also be those of all cell states, ``[v, n, t, h]``.
    """
    steps = x.shape[1]
    previous = _previous(h0, hidden)
    gates = _lstm_gates if torch.is_grad_enabled() else _lstm_gates_in_place
    factors, forget, through_c, unprojected = gates(layer, x, previous, c0)
    arriving = _incoming(g, place, steps)
    dh = g.new_zeros(*g.shape[:2], h0.shape[-1])
    at_cells = g if place == 2 and g.dim() == 4 else None
    dc = g if place == 2 and at_cells is None else g.new_zeros(*g.shape[:2], c0.shape[-1])
    found, projected = _Steps(factors, len(g)), []
    for t in reversed(range(steps)):
        if arriving is not None:
            dh = dh + arriving[:, :, t]
        if layer.w_hr is not None:
            projected.append(dh)
        full = dh if layer.w_hr is None else dh @ layer.w_hr
        dc = dc + full * through_c[:, t]
        dc = dc if at_cells is None else dc + at_cells[:, :, t]
        d = found.take(t, torch.cat([dc, dc, dc, full], -1))
        dh, dc = d @ layer.w_hh, dc * forget[:, t]
    d = found.all()
    if layer.w_hr is None:
        return Backward(d, d, dh, dc, previous)
    return Backward(d, d, dh, dc, previous, torch.stack(projected[::-1], 2), unprojected)


def _lstm_gates(
    layer: Layer, x: Tensor, previous: Tensor, c0: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives that do not depend on columns.

    Returns:
        Of cell and output by the pre-activations, ``[n, t, 4 h]``, of the cell by the one before and by
        the hidden state, ``[n, t, h]``, and hidden states before projection.
    """
    pre = F.linear(x, layer.w_ih, layer.b_ih) + F.linear(previous, layer.w_hh, layer.b_hh)
    i, f, n, o = pre.chunk(4, -1)
    i, f, n, o = i.sigmoid(), f.sigmoid(), n.tanh(), o.sigmoid()
    cells = [c0]
    for t in range(x.shape[1]):
        cells.append(f[:, t] * cells[-1] + i[:, t] * n[:, t])
    before, curved = torch.stack(cells[:-1], 1), torch.stack(cells[1:], 1).tanh()
    through_i, through_f, through_n = n * i * (1 - i), before * f * (1 - f), i * (1 - n * n)
    factors = torch.cat([through_i, through_f, through_n, curved * o * (1 - o)], -1)
    return factors, f, o * (1 - curved * curved), o * curved


def _lstm_gates_in_place(
    layer: Layer, x: Tensor, previous: Tensor, c0: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in the memory of the pre-activations, and of the cells."""
    pre = F.linear(x, layer.w_ih, layer.b_ih)
    pre += F.linear(previous, layer.w_hh, layer.b_hh)
    i, f, n, o = pre.chunk(4, -1)
    for gate in (i, f, o):
        gate.sigmoid_()
    n.tanh_()
    cells = pre.new_empty(len(pre), x.shape[1] + 1, c0.shape[-1])
    cells[:, 0] = c0
    for t in range(x.shape[1]):
        torch.mul(f[:, t], cells[:, t], out=cells[:, t + 1]).addcmul_(i[:, t], n[:, t])
    forget = f.clone()
    f.mul_(1 - forget).mul_(cells[:, :-1])
    through_n = torch.addcmul(i, i * n, n, value=-1)
    i.mul_(1 - i).mul_(n)
    n.copy_(through_n)
    curved = cells[:, 1:].tanh_()
    through_c = torch.addcmul(o, o * curved, curved, value=-1)
    unprojected = o * curved if layer.w_hr is not None else curved
    o.mul_(1 - o).mul_(curved)
    return pre, forget, through_c, unprojected


class _Steps:
    """Gradients of all steps, ``[v, n, t, k]``; of one column in the factors' memory, ``[n, t, k]``.

    Args:
        factors: what each step's gradients are multiplied with.
        columns: ``v``.
    """

    def __init__(self, factors: Tensor, columns: int) -> None:
        self.factors = factors
        self.found: list[Tensor] = []
        self.room: Tensor | None = None
        if not torch.is_grad_enabled():
            shape = columns, *factors.shape
            self.room = factors.unsqueeze(0) if columns == 1 else factors.new_empty(shape)

    def take(self, t: int, d: Tensor) -> Tensor:
        """Those of one step (the one before the last that was taken), multiplied with its factors."""
        d = d * self.factors[:, t]
        if self.room is None:
            self.found.append(d)
        else:
            self.room[:, :, t] = d
        return d

    def all(self) -> Tensor:
        """Those of all steps."""
        return torch.stack(self.found[::-1], 2) if self.room is None else self.room


def gru(layer: Layer, x: Tensor, h0: Tensor, hidden: Tensor, g: Tensor, place: int) -> Backward:
    """Columns ``g`` at the hidden states or at the last one (place 0, 1)."""
    steps = x.shape[1]
    previous = _previous(h0, hidden)
    r_i, z_i, n_i = F.linear(x, layer.w_ih, layer.b_ih).chunk(3, -1)
    r_h, z_h, n_h = F.linear(previous, layer.w_hh, layer.b_hh).chunk(3, -1)
    r, z = (r_i + r_h).sigmoid(), (z_i + z_h).sigmoid()
    n = (n_i + r * n_h).tanh()
    to_n = (1 - z) * (1 - n * n)
    to_r, to_z = to_n * n_h * r * (1 - r), (previous - n) * z * (1 - z)
    input_side = torch.cat([to_r, to_z, to_n], -1)
    hidden_side = torch.cat([to_r, to_z, to_n * r], -1)
    arriving = _incoming(g, place, steps)
    assert arriving is not None
    dh = g.new_zeros(*g.shape[:2], h0.shape[-1])
    found_i, found_h = [], []
    for t in reversed(range(steps)):
        dh = dh + arriving[:, :, t]
        thrice = dh.repeat(1, 1, 3)
        d = thrice * hidden_side[:, t]
        found_i.append(thrice * input_side[:, t])
        found_h.append(d)
        dh = d @ layer.w_hh + dh * z[:, t]
    stack = torch.stack
    return Backward(stack(found_i[::-1], 2), stack(found_h[::-1], 2), dh, None, previous)


def rnn(
    layer: Layer, x: Tensor, h0: Tensor, hidden: Tensor, g: Tensor, place: int, relu: bool
) -> Backward:
    """Columns ``g`` at the hidden states or at the last one (place 0, 1)."""
    steps = x.shape[1]
    slope = (hidden > 0).to(hidden.dtype) if relu else 1 - hidden * hidden
    arriving = _incoming(g, place, steps)
    assert arriving is not None
    dh = g.new_zeros(*g.shape[:2], h0.shape[-1])
    found = []
    for t in reversed(range(steps)):
        d = (dh + arriving[:, :, t]) * slope[:, t]
        found.append(d)
        dh = d @ layer.w_hh
    d = torch.stack(found[::-1], 2)
    return Backward(d, d, dh, None, _previous(h0, hidden))


# --------------------------------------------------------------------------------------
# Cells, as ordinary operations


def lstm_cell(
    x: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM."""
    h, c = hx
    i, f, n, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * n.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else F.linear(h, w_hr)), c


def gru_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU."""
    r_i, z_i, n_i = F.linear(x, w_ih, b_ih).chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, w_hh, b_hh).chunk(3, -1)
    z = (z_i + z_h).sigmoid()
    n = (n_i + (r_i + r_h).sigmoid() * n_h).tanh()
    return n + z * (h - n)


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(
        x: Tensor,
        h: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        """One step of a network with one nonlinearity."""
        return activation(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh))

    return cell


rnn_tanh_cell, rnn_relu_cell = _rnn_cell(torch.tanh), _rnn_cell(torch.relu)


def hidden_states(name: str, layer: Layer, x: Tensor, h0: Tensor, c0: Tensor | None) -> Tensor:
    """Hidden states by ordinary operations, which autograd can differentiate again."""
    cell = {"gru": gru_cell, "rnn_tanh": rnn_tanh_cell, "rnn_relu": rnn_relu_cell}.get(name)
    weights, h, found = layer[:4], h0, []
    for t in range(x.shape[1]):
        if cell is None:
            assert c0 is not None
            h, c0 = lstm_cell(x[:, t], (h, c0), *weights, layer.w_hr)
        else:
            h = cell(x[:, t], h, *weights)
        found.append(h)
    return torch.stack(found, 1)
