"""Operations that are opened into others while an extended module runs.

Each function here computes what the operation of the same signature does, by operations in which taps
can be found. It may return ``NotImplemented`` to leave the operation closed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.rules import packed, recursions

OPENED: dict[Any, Callable[..., Any]] = {
    torch.lstm_cell: recursions.lstm_cell,
    torch.gru_cell: recursions.gru_cell,
    torch.rnn_tanh_cell: recursions.rnn_tanh_cell,
    torch.rnn_relu_cell: recursions.rnn_relu_cell,
}


def _opens(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for func in functions:
            OPENED[func] = function
        return function

    return register


def _layers(kind: Any) -> Callable[..., Any]:
    def layer_by_layer(
        input: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        """Layers and directions one at a time, each with its fused kernel."""
        if isinstance(has_biases, (list, tuple)):  # arguments of packed sequences
            rest = (num_layers, dropout, train, bidirectional, batch_first)
            return packed.layer_by_layer(kind, input, hx, params, has_biases, *rest)
        directions = 2 if bidirectional else 1
        if num_layers * directions == 1:
            return NotImplemented
        each = len(params) // (num_layers * directions)
        time, states = (1 if batch_first else 0), (hx if kind is torch.lstm else (hx,))
        finals: list[list[Tensor]] = [[] for _ in states]
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                at = layer * directions + direction
                x = input.flip(time) if direction else input
                start = tuple(state[at : at + 1] for state in states)
                output, *final = recursions.fused(
                    kind,
                    has_biases,
                    x,
                    start if kind is torch.lstm else start[0],
                    list(params[at * each : (at + 1) * each]),
                    has_biases,
                    1,
                    0.0,
                    train,
                    False,
                    batch_first,
                )
                outputs.append(output.flip(time) if direction else output)
                for found, state in zip(finals, final, strict=True):
                    found.append(state)
            input = outputs[0] if directions == 1 else _beside(outputs, batch_first)
            if dropout and train and layer < num_layers - 1:
                input = F.dropout(input, dropout, True)
        return (input, *(torch.cat(found, 0) for found in finals))

    return layer_by_layer


def _beside(outputs: list[Tensor], batch_first: bool) -> Tensor:
    """Both directions' features, in memory as torch's: time first in any case."""
    if not batch_first:
        return torch.cat(outputs, -1)
    return torch.cat([output.transpose(0, 1) for output in outputs], -1).transpose(0, 1)


for _kind in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
    OPENED[_kind] = _layers(_kind)


@_opens(F.multi_head_attention_forward)
def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Multi-head attention, ``query [t, n, e]``, by projections, products and a softmax."""
    if query.dim() != 3 or static_k is not None or static_v is not None:
        return NotImplemented
    same = key is value
    q, k, v = _project(
        query,
        key,
        value,
        in_proj_weight,
        in_proj_bias,
        *((q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else ()),
        packed=same and query is key,
    )
    # Samples first: [n, positions, features].
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    n, t, e = q.shape
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(n, 1, e)], 1)
        v = torch.cat([v, bias_v.expand(n, 1, e)], 1)
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    added = k.shape[1] - key.shape[0]
    bias = _attention_bias(q, k, attn_mask, key_padding_mask, is_causal, added, num_heads)
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    dropout = dropout_p if training else 0.0
    if need_weights:
        scores = (q / q.shape[-1] ** 0.5) @ k.transpose(-1, -2)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        mixed = weights @ v
    else:
        weights = None
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    # In memory as torch's: whoever takes a view of it finds what he expects.
    output = F.linear(mixed.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    return output, weights


def _project(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *separate: Tensor | None,
    packed: bool,
) -> tuple[Tensor, ...]:
    if separate:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        return tuple(
            F.linear(x, w, b)  # type: ignore[arg-type]
            for x, w, b in zip(inputs, separate, biases, strict=True)
        )
    assert weight is not None
    if packed:
        return F.linear(query, weight, bias).chunk(3, -1)
    weights, biases = weight.chunk(3), (None, None, None) if bias is None else bias.chunk(3)
    return tuple(
        F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )


def _attention_bias(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    added: int,
    num_heads: int,
) -> Tensor | None:
    """What is added to the scores ``[n, heads, t, s]``; masked places get minus infinity."""

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
        return F.pad(mask, (0, added)) if added else mask

    n, t = q.shape[:2]
    bias = None
    if is_causal and attn_mask is None:
        s = k.shape[1] - added
        attn_mask = torch.ones(t, s, dtype=torch.bool, device=q.device).triu(1)
    if attn_mask is not None:
        bias = additive(attn_mask)
        bias = bias.view(n, num_heads, t, -1) if bias.dim() == 3 else bias
    if key_padding_mask is not None:
        padding = additive(key_padding_mask).view(n, 1, 1, -1)
        bias = padding if bias is None else bias + padding
    return bias
