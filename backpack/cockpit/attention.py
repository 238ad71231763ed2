"""The largest attention logit, where attention is ``F.scaled_dot_product_attention``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack._torch import without_torch_function

# Logits that are written out at a time.
AT_ONCE = 2**24


class AttentionLogits:
    """Notes the largest scaled product of a query and a key that it may see, while it listens."""

    def __init__(self) -> None:
        self._largest: list[Tensor] = []
        self._original: Callable[..., Tensor] | None = None
        self._ours: Callable[..., Tensor] | None = None

    def listen(self, on: bool) -> None:
        """Stand before the function, or no longer."""
        if on and self._original is None:
            original = self._original = F.scaled_dot_product_attention

            def attention(*args: Any, **kwargs: Any) -> Tensor:
                if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                    self._note(*args, **kwargs)
                return original(*args, **kwargs)

            self._ours = F.scaled_dot_product_attention = attention
        elif not on and self._original is not None:
            if F.scaled_dot_product_attention is self._ours:
                F.scaled_dot_product_attention = self._original
            self._original = self._ours = None
            self._largest.clear()

    def _note(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        # Of no concern to those who follow the samples of the model's operations.
        with torch.no_grad(), without_torch_function():
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            if enable_gqa and key.shape[-3] != query.shape[-3]:
                key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            rows, columns = query.shape[-2], key.shape[-2]
            seen = None
            if is_causal:
                seen = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
            q, k = query.reshape(-1, *query.shape[-2:]), key.reshape(-1, *key.shape[-2:])
            mask = None if attn_mask is None else attn_mask.expand(*query.shape[:-1], columns)
            mask = None if mask is None else mask.reshape(-1, rows, columns)
            step = max(1, AT_ONCE // max(rows * columns, 1))
            for n in range(0, len(q), step):
                logits = (q[n : n + step] @ k[n : n + step].mT) * scale
                if seen is not None:
                    logits = logits.masked_fill(~seen, -torch.inf)
                if mask is not None:
                    part = mask[n : n + step]
                    logits = (
                        logits.masked_fill(~part, -torch.inf)
                        if part.dtype == torch.bool
                        else logits + part
                    )
                self._largest.append(logits.max().float())

    def take(self) -> float | None:
        """The largest since the last call; ``None`` if there was none."""
        if not self._largest:
            return None
        found = float(torch.stack(self._largest).max())
        self._largest.clear()
        return found
