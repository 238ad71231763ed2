"""Individual gradients by the rows of a model's output, whoever these rows belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import BatchDiagGGNExact, BatchGrad, DiagGGNExact


def gradients(model: nn.Module, inputs: Sequence[Any], y: Tensor) -> dict[str, Tensor]:
    """``[rows, *p]``: the gradient of each output row's share of the cross-entropy."""
    output = model(*inputs)
    parameters = dict(model.named_parameters())
    rows = []
    for n in range(len(y)):
        share = F.cross_entropy(output[n : n + 1], y[n : n + 1]) / len(y)
        grads = torch.autograd.grad(
            share, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        filled = (
            torch.zeros_like(p) if g is None else g
            for p, g in zip(parameters.values(), grads, strict=True)
        )
        rows.append(list(filled))
    stacked = (torch.stack(each) for each in zip(*rows, strict=True))
    return dict(zip(parameters, stacked, strict=True))


def compare(
    model: nn.Module,
    inputs: Sequence[Any],
    owners: Sequence[int] | None = None,
    samples: int | None = None,
    batch_dim: int = 0,
) -> None:
    """Compare with brute force.

    Args:
        model: a model whose output is ``[rows, 3]``.
        inputs: its inputs.
        owners: the sample that each row of the output belongs to; by default that of its number.
        samples: number of samples; by default that of rows.
        batch_dim: sample axis of the inputs.
    """
    model, inputs = model.double(), [_double(x) for x in inputs]
    rows = len(model(*inputs))
    y = torch.arange(rows) % 3
    truth = gradients(model, inputs, y)
    at = torch.arange(rows) if owners is None else torch.as_tensor(owners)
    truth = {
        name: torch.zeros(samples or rows, *g.shape[1:]).to(g).index_add(0, at, g)
        for name, g in truth.items()
    }
    extend(model, batch_dim=batch_dim)
    lossfunc = extend(nn.CrossEntropyLoss())
    model.zero_grad()
    with backpack(BatchGrad(), DiagGGNExact(), BatchDiagGGNExact()):
        lossfunc(model(*inputs), y).backward()
    for name, p in model.named_parameters():
        if not hasattr(p, "grad_batch"):
            assert not truth[name].any(), name
            continue
        torch.testing.assert_close(p.grad_batch, truth[name])
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)
        torch.testing.assert_close(p.diag_ggn_exact_batch.sum(0), p.diag_ggn_exact)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
