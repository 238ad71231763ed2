"""Layers of ``torch.nn``: convolutions, norms, pooling, attention, recurrent ones on sorted rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.fuzz.draft import Given, Operation


def _channels(t: Given) -> int:
    return t.x.shape[1]


def _conv(t: Given) -> nn.Module:
    rng = t.rng
    options = {"kernel_size": rng.choice([1, min(2, t.x.shape[-1])]), "padding": rng.choice([0, 1])}
    return nn.Conv1d(t.x.shape[-2], rng.choice([1, 2, 3]), **options)


def _padded(t: Given) -> nn.Module:
    mode = str(t.choose("circular", "reflect", "replicate"))
    return nn.Conv1d(_channels(t), 2, 2, padding=1, padding_mode=mode)


def _group_norm(t: Given) -> nn.Module:
    count = _channels(t)
    return nn.GroupNorm(t.rng.choice([g for g in range(1, count + 1) if count % g == 0]), count)


def _layer_norm(t: Given) -> nn.Module:
    return nn.LayerNorm(t.x.shape[-1] if t.seed % 3 or t.x.dim() < 2 else list(t.x.shape[-2:]))


_MODULES: dict[str, tuple[Callable[[Given], nn.Module], tuple[int, int]]] = {
    "conv1d": (_conv, (2, 3)),
    "conv1d groups": (lambda t: nn.Conv1d(_channels(t), 2 * _channels(t), 1, groups=_channels(t)), (3, 3)),
    "conv1d padded": (_padded, (3, 3)),
    "conv2d": (lambda t: nn.Conv2d(t.x.shape[-3], 2, 1, padding=t.seed % 2), (3, 4)),
    "conv transposed": (lambda t: nn.ConvTranspose1d(t.x.shape[-2], 2, 2, stride=1 + t.seed % 2), (2, 3)),
    "conv2d transposed": (lambda t: nn.ConvTranspose2d(_channels(t), 2, 1, stride=2, output_padding=1), (4, 4)),
    "group norm": (_group_norm, (2, 4)),
    "instance norm": (lambda t: nn.InstanceNorm1d(_channels(t), affine=True), (3, 3)),
    "batch norm": (lambda t: nn.BatchNorm1d(_channels(t)), (2, 3)),
    "layer norm": (_layer_norm, (1, 4)),
    "rms norm": (lambda t: nn.RMSNorm(t.x.shape[-1]), (1, 4)),
    "prelu": (lambda t: nn.PReLU(t.choose(1, _channels(t))), (2, 4)),
    "weight norm": (lambda t: parametrizations.weight_norm(nn.Linear(t.x.shape[-1], 2)), (1, 4)),
    "avg_pool1d": (lambda t: nn.AvgPool1d(min(2, t.x.shape[-1])), (2, 3)),
    "max_pool1d": (lambda t: nn.MaxPool1d(min(2, t.x.shape[-1])), (2, 3)),
    "avg_pool2d": (lambda t: nn.AvgPool2d(1), (3, 4)),
    "adaptive_avg_pool1d": (lambda t: nn.AdaptiveAvgPool1d(2), (2, 3)),
    "local_response_norm": (lambda t: nn.LocalResponseNorm(2), (3, 4)),
    "channel_shuffle": (lambda t: nn.ChannelShuffle(2), (3, 4)),
    "upsample": (lambda t: nn.Upsample(scale_factor=2, mode="nearest"), (3, 4)),
}  # fmt: skip
LAYERS = [
    Operation(name, lambda t: t.layer(t.x), layer=layer, dims=dims)
    for name, (layer, dims) in _MODULES.items()
]


def _attention(t: Given) -> nn.Module:
    return nn.MultiheadAttention(t.x.shape[-1], 1, batch_first=t.seed % 5 < 3)


def _scaled(t: Given) -> Tensor:
    own = {name: 1.5 * p for name, p in t.layer.named_parameters()}
    return torch.func.functional_call(t.layer, own, (t.x,))


LAYERS += [
    Operation("attention", lambda t: t.layer(t.x, t.x, t.x)[0], layer=_attention, dims=(2, 3)),
    Operation("dot-product attention", lambda t: F.scaled_dot_product_attention(t.x, t.x.tanh(), t.x), dims=(2, 4)),
    Operation("functional_call", _scaled, layer=lambda t: nn.Linear(t.x.shape[-1], 2)),
    Operation("linear twice", lambda t: t.layer(t.layer(t.x).tanh()), layer=lambda t: nn.Linear(t.x.shape[-1], t.x.shape[-1])),
]  # fmt: skip


# --------------------------------------------------------------------------------------
# Recurrent layers, on rows as they come, sorted, or picked


def _recurrent(t: Given) -> nn.Module:
    rng = t.rng
    kind = rng.choice([nn.LSTM, nn.GRU, nn.RNN])
    layers, both = rng.choice([1, 1, 2]), rng.random() < 0.2
    return kind(t.x.shape[-1], 2, layers, batch_first=rng.random() < 0.6, bidirectional=both)


def _hidden(found: Any, last: bool) -> Tensor:
    outputs, state = found
    if not last:
        return outputs
    return state[0] if isinstance(state, tuple) else state


def _order(t: Given) -> tuple[Tensor, int]:
    """An order of the rows of the layer's batch axis, and that axis."""
    axis = 0 if t.x.dim() < 3 or t.layer.batch_first else 1
    order = list(range(t.x.shape[axis]))
    t.rng.shuffle(order)
    return torch.tensor(order), axis


def _sort_run_unsort(t: Given) -> Tensor:
    order, axis = _order(t)
    outputs = t.layer(t.x.index_select(axis, order))[0]
    return outputs.index_select(axis, order.argsort())


def _sorted(t: Given) -> Tensor:
    order, axis = _order(t)
    return t.layer(t.x.index_select(axis, order))[0]


_CELLS: dict[str, Callable[[Given], Tensor]] = {
    "cell": lambda t: _hidden((t.layer(t.x), t.layer(t.x)), True),
    "cell on sorted rows": lambda t: _cell(t, t.x[t.order()])[t.order().argsort()],
    "cell on picked rows": lambda t: _cell(t, t.x[t.picks()]),
    "cell on flipped rows": lambda t: _cell(t, t.x.flip(0)).flip(0),
}


def _cell(t: Given, x: Tensor) -> Tensor:
    return _hidden((None, t.layer(x)), True)


def _make_cell(t: Given) -> nn.Module:
    kind = t.rng.choice([nn.LSTMCell, nn.GRUCell, nn.RNNCell])
    return kind(t.x.shape[-1], 2)


RECURRENT = [
    Operation("recurrent", lambda t: t.layer(t.x)[0], layer=_recurrent, dims=(2, 3)),
    Operation("recurrent state", lambda t: _hidden(t.layer(t.x), True), layer=_recurrent, dims=(2, 3)),
    Operation("recurrent sorted and back", _sort_run_unsort, layer=_recurrent, dims=(2, 3)),
    Operation("recurrent sorted", _sorted, layer=_recurrent, dims=(2, 3)),
]
RECURRENT += [Operation(name, run, layer=_make_cell, dims=(1, 2)) for name, run in _CELLS.items()]
