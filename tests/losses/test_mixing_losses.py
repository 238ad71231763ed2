"""Losses that compare samples: first-order quantities are contributions, totals of second order joint.

``grad_batch[n]`` is ``J_n^T dL/do_n``. Totals of second order belong to the Hessian in all outputs
together or are refused, those of single samples are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backpack import optim
from backpack.quantities.base import BackpropExtension
from tests.idioms.compare import SPLIT
from tests.idioms.idioms import Sizes, made
from tests.idioms.losses import BY_NAME
from tests.idioms.mixing import MIXING, Mixing

FIRST = ("first",)
TOTALS = ("DiagGGNExact", "DiagGGNMC", "KFLR", "ekflr", "kfra", "DiagHessian", "ggnmp", "hmp")
PER_SAMPLE = ("BatchDiagGGNExact", "BatchDiagGGNMC", "SqrtGGNExact", "BatchDiagHessian")
assert {*FIRST, *TOTALS, *PER_SAMPLE} == SPLIT.keys()
# Words of a refusal: samples are mixed, or that there is no root to be had.
MIXED = r"mix|not convex|kfra|ekflr has eigenvectors of one loss"


def quantities(names: tuple[str, ...]) -> dict[str, tuple[BackpropExtension, ...]]:
    return {name: SPLIT[name] for name in names}


@pytest.mark.parametrize(
    "mixing, way",
    [(m, way) for m in MIXING for way in ("extended", "function") if m.loss or way == "function"],
    ids=lambda each: getattr(each, "name", each),
)
def test_losses_that_mix(mixing: Mixing, way: str) -> None:
    truth = mixing.truth()
    assert truth.mixes and truth.convex == mixing.convex
    comparison = mixing.comparison(way, truth)
    found = comparison.outcome(quantities((*FIRST, *TOTALS))) | comparison.outcome(
        quantities(PER_SAMPLE)
    )
    faults = [
        f"{name}: {text or 'not refused'}" for name, text in found.items() if not _fine(name, text)
    ]
    assert not faults, "\n".join(faults)


def _fine(name: str, text: str) -> bool:
    refused = text.startswith("refused") and re.search(MIXED, text) is not None
    return not text if name in FIRST else refused or (name in TOTALS and not text)


# --------------------------------------------------------------------------------------
# Private training: a sample's own loss is its own, in its place

N = 3
Losses = Callable[[list[Tensor]], Tensor]


def _entropy(f: Tensor, *labels: int) -> Tensor:
    return F.cross_entropy(f, torch.tensor(labels or range(N)), reduction="none")


def _squares(f: Tensor) -> Tensor:
    return F.mse_loss(f, torch.ones_like(f), reduction="none").flatten(1).mean(1)


# Losses of [N] entries that depend on other samples too.
NOT_PRIVATE: dict[str, Losses] = {
    "gram": lambda os: _entropy(os[0] @ os[0].t()),
    "normalized-gram": lambda os: _entropy(F.normalize(os[0]) @ F.normalize(os[0]).t()),
    "centred": lambda os: _squares(os[0] - os[0].mean(0)),
    "batch-norm": lambda os: _entropy(F.batch_norm(os[0], None, None, training=True)),
    "neighbours": lambda os: _entropy(os[0] + os[0].roll(1, 0)),
    "ranking": lambda os: F.softplus(os[0][:, None, 0] - os[0][None, :, 0]).mean(1),
    "attended": lambda os: _squares((os[0] @ os[0].t()).softmax(1) @ os[0]),
    "smoothed": lambda os: _squares(torch.ones(N, N).to(os[0]) @ os[0]),
    "listwise": lambda os: -os[0].log_softmax(0)[:, 0],
    "cumulative": lambda os: _squares(os[0].cumsum(0)),
    "relative": lambda os: _entropy(os[0]) / _entropy(os[0]).mean(),
    "summed-values": lambda os: _entropy(os[0]).cumsum(0),
    "repeated-rows": lambda os: _entropy(os[0][torch.tensor([0, 0, 1])]),
    "regrouped": lambda os: _squares(os[0].reshape(2, N, 2).transpose(0, 1)),
}
# Every entry depends on one sample, but stands in the place of another.
OUT_OF_PLACE: dict[str, Losses] = {
    "sorted": lambda os: _entropy(os[0][torch.tensor([2, 0, 1])]),
    "flipped": lambda os: _entropy(os[0].flip(0)),
    "values-flipped": lambda os: _entropy(os[0]).flip(0),
    "values-sorted": lambda os: _entropy(os[0]).sort()[0],
    "picked": lambda os: _entropy(os[0].repeat(2, 1)[::2]),
}
PRIVATE: dict[str, Losses] = {
    "entropy": lambda os: _entropy(os[0]),
    "squares": lambda os: _squares(os[0]),
    "sum": lambda os: _entropy(os[0]) + 0.1 * os[0].square().sum(1),
    "weights": lambda os: _entropy(os[0]) * torch.tensor([0.5, 0.0, 2.0]).to(os[0]),
    "chosen": lambda os: os[0].gather(1, torch.tensor([[0], [1], [2]]))[:, 0].square(),
    "there-and-back": lambda os: _entropy(os[0].flip(0)).flip(0),
    "t": lambda os: F.mse_loss(os[0].t(), torch.ones(4, N).to(os[0]), reduction="none").sum(0),
    "two-views": lambda os: (os[0] - os[0].detach().roll(1, 0)).square().sum(1),
}


def _private(losses: Losses) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of clipped gradients that DPSGD takes for all samples, and those that it should."""
    model, inputs, _ = made("rows", 1, BY_NAME["mse"], Sizes(N, 1, 4))
    values = losses([model(inputs[0])])
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(v, parameters, retain_graph=True) for v in values]
    norms = [torch.cat([g.flatten() for g in each]).norm() for each in gradients]
    bound = 0.9 * float(torch.stack(norms).median())
    factors = [min(1.0, bound / max(float(norm), 1e-9)) for norm in norms]
    expected = [
        sum(f * g for f, g in zip(factors, c, strict=True)) for c in zip(*gradients, strict=True)
    ]
    optimizer = optim.DPSGD(
        model, 1.0, noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=1.0
    )
    before = [p.detach().clone() for p in parameters]
    optimizer.backward(losses([model(inputs[0])]))
    optimizer.step()
    return [b - p.detach() for b, p in zip(before, parameters, strict=True)], expected


@pytest.mark.parametrize("name", NOT_PRIVATE)
def test_private_training_refuses(name: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, ValueError), match="sample"):
        _private(NOT_PRIVATE[name])


@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_private_training_is_right_or_refuses(name: str) -> None:
    try:
        found, expected = _private(OUT_OF_PLACE[name])
    except (RuntimeError, NotImplementedError, ValueError) as error:
        assert "sample" in str(error)
        return
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PRIVATE)
def test_private_training_is_right(name: str) -> None:
    for ours, right in zip(*_private(PRIVATE[name]), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)
