"""Losses that are called outside of an extended model and not extended: recognised on the graph.

None of them may be differentiated twice in the model's outputs, which takes a backward pass for each of
their numbers: the tests take that door away, so that what passes is bounded in time by construction.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.sources import columns
from backpack.testing.oracle import check

EXACT = [
    E.BatchGrad(),
    E.DiagGGNExact(),
    E.BatchDiagGGNExact(),
    E.SqrtGGNExact(),
    E.DiagHessian(),
    E.BatchDiagHessian(),
    E.DiagGGNMC(),
]
W3 = torch.tensor([0.4, 1.7, 0.2]).double()
LABELS = torch.tensor([0, 2, -100, 1])
REAL = torch.tensor([[0.3, 0.9, -0.4], [1.2, 0.0, 0.1], [0.2, -1.0, 0.8], [0.6, 0.6, 0.5]]).double()
SHARES = REAL.softmax(1)
REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture
def no_twice(monkeypatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the loss was differentiated twice in the model's outputs")

    monkeypatch.setattr(columns, "differentiate_twice", refuse)


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 2).double()


# A loss of torch, with targets and arguments; modules of the same name are what is extended.
LOSSES: dict[str, tuple[Callable[..., Tensor], type[nn.Module], Tensor, dict[str, Any]]] = {
    "cross-entropy": (F.cross_entropy, nn.CrossEntropyLoss, LABELS, {}),
    "weights": (F.cross_entropy, nn.CrossEntropyLoss, LABELS, {"weight": W3}),
    "ignore": (F.cross_entropy, nn.CrossEntropyLoss, LABELS.clamp(0), {"ignore_index": 2}),
    "smoothed": (
        *(F.cross_entropy, nn.CrossEntropyLoss, LABELS),
        {"weight": W3, "label_smoothing": 0.3},
    ),
    "soft": (F.cross_entropy, nn.CrossEntropyLoss, SHARES, {"weight": W3}),
    "mse": (F.mse_loss, nn.MSELoss, REAL, {}),
    "bce": (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss, SHARES, {}),
    "bce-weights": (
        *(F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss, SHARES),
        {"weight": W3, "pos_weight": 2 * W3},
    ),
    "huber": (F.huber_loss, nn.HuberLoss, REAL, {"delta": 0.6}),
    "smooth-l1": (F.smooth_l1_loss, nn.SmoothL1Loss, REAL, {"beta": 0.7}),
    "soft-margin": (F.soft_margin_loss, nn.SoftMarginLoss, 2 * REAL.sign().abs() - 1, {}),
    "poisson": (F.poisson_nll_loss, nn.PoissonNLLLoss, REAL.abs().round(), {}),
    "multilabel": (F.multilabel_soft_margin_loss, nn.MultiLabelSoftMarginLoss, SHARES.round(), {}),
    "l1": (F.l1_loss, nn.L1Loss, REAL, {}),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_has_the_numbers_that_it_has_extended(name: str, reduction: str, no_twice) -> None:
    function, kind, y, options = LOSSES[name]
    model, X = tiny(), inputs()

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return function(f, y, reduction=reduction, **options).sum()

    flat = name == "l1"  # nothing curved is left to recognise, and zeros cost little
    report = check(model, loss, X, y, EXACT if not flat else [E.BatchGrad()])
    assert report.ok, str(report)
    # Kronecker factors and draws are those of the extended module.
    found = []
    for lossfunc in (loss, extend(kind(reduction=reduction, **options))):
        each = extend(copy.deepcopy(model))
        value = lossfunc(each(X), y)
        torch.manual_seed(3)
        with backpack(E.KFLR(), E.KFAC(2), E.DiagGGNMC(2)) if not flat else backpack(E.BatchGrad()):
            value.sum().backward()
        fields = ("kflr", "kfac", "diag_ggn_mc") if not flat else ("grad_batch",)
        found.append([getattr(p, field) for p in each.parameters() for field in fields])
    # Of losses that torch writes in several operations the draws are others.
    drawn = name not in ("poisson", "multilabel")
    for ours, theirs in zip(*found, strict=True):
        if isinstance(ours, list):
            if drawn or ours is found[0][0]:
                assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
        elif drawn:
            assert torch.allclose(ours, theirs)


def words(f: Tensor) -> Tensor:
    """The loss of a language model: shifted, flattened, padded."""
    targets = torch.tensor([[0, 1, -100], [2, 2, 1], [1, -100, -100], [0, 0, 2]])
    logits = f.reshape(4, -1, 3)[:, :2].contiguous()
    return F.cross_entropy(logits.reshape(-1, 3), targets[:, 1:].reshape(-1))


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "by hand": lambda f: -(f.log_softmax(1) * SHARES).sum(1).mean(),
    "distilled": lambda f: F.kl_div((f / 2).log_softmax(1), SHARES, reduction="batchmean") * 4,
    "picked": lambda f: -F.log_softmax(f, dim=-1)[torch.arange(4), LABELS.clamp(0)].mean(),
    "partition": lambda f: (
        f.logsumexp(1) - f.gather(1, LABELS.clamp(0).unsqueeze(1)).squeeze(1)
    ).mean(),
    "partition kept": lambda f: (f.logsumexp(1, keepdim=True) - f).mean(),
    "square": lambda f: ((f - REAL) ** 2).sum() / 7,
    "quartic": lambda f: (f - REAL).pow(4).sum(1).mean(),
    "targets first": lambda f: F.mse_loss(REAL, f),
    "gaussian": lambda f: F.gaussian_nll_loss(f, REAL, 0.5 + SHARES),
    "softplus": lambda f: F.softplus(-f * REAL.sign()).mean(),
    "several": lambda f: F.cross_entropy(f, LABELS) + 0.1 * f.square().sum() + f.sum() / 3,
    "of a part": lambda f: (
        F.mse_loss(f[:, 1:], REAL[:, 1:]) + F.binary_cross_entropy_with_logits(f[:, 0], SHARES[:, 0])
    ),
    "scaled": lambda f: 128 * F.cross_entropy(0.3 * f + W3, LABELS, weight=W3) / 5,
    "accumulated": lambda f: torch.stack(
        [F.mse_loss(r, y) for r, y in zip(f, REAL, strict=True)]
    ).mean(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_spellings(name: str, no_twice) -> None:
    report = check(tiny(), lambda f, _: OTHERS[name](f), inputs(), None, EXACT)
    assert report.ok, str(report)


def test_words(no_twice) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 9)).double()
    report = check(model, lambda f, _: words(f), inputs(), None, EXACT)
    assert report.ok, str(report)


def test_negative_weights_have_signed_diagonals(no_twice) -> None:
    """A policy gradient: advantages of both signs."""
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.1]).double()

    def loss(f: Tensor, _: None) -> Tensor:
        picked = F.log_softmax(f, 1).gather(1, LABELS.clamp(0).unsqueeze(1)).squeeze(1)
        return -(advantages * picked).sum()

    diagonals = [E.DiagGGNExact(), E.BatchDiagGGNExact(), E.DiagHessian()]
    report = check(tiny(), loss, inputs(), None, diagonals)
    assert report.ok, str(report)
    model = extend(tiny())
    with pytest.raises(ValueError, match="not convex"), backpack(E.KFAC()):
        loss(model(inputs()), None).backward()


@pytest.mark.parametrize(
    "loss",
    [
        lambda f: F.cross_entropy(f.softmax(1), LABELS),  # bent before
        lambda f: (F.cross_entropy(f, LABELS, reduction="none") * f.square().sum(1)).sum(),
        lambda f: F.binary_cross_entropy(f.sigmoid(), SHARES),
        lambda f: F.mse_loss(f, f.flip(1)),
        lambda f: (f.unsqueeze(1) - torch.arange(60.0).double().reshape(20, 3)).square().mean(),
        lambda f: f.square().sum() - 0.5 * (f - REAL).square().sum(),  # convex as a whole only
    ],
)
def test_what_is_not_covered_is_differentiated_twice(loss: Callable[[Tensor], Tensor]) -> None:
    exact = [E.BatchGrad(), E.DiagGGNExact(), E.BatchDiagGGNExact(), E.BatchDiagHessian()]
    report = check(tiny(), lambda f, _: loss(f), inputs(), None, exact)
    assert report.ok, str(report)


def test_a_loss_of_mixed_samples_is_refused() -> None:
    model = extend(tiny())
    with pytest.raises((ValueError, RuntimeError), match="mix"), backpack(E.DiagGGNExact()):
        f = model(inputs())
        F.cross_entropy(f @ f.T, torch.arange(4)).backward()


def test_log_probabilities_of_the_model_are_its_output(no_twice) -> None:
    """All curvature is in the model then, and none in the loss: as with extend."""
    model = extend(nn.Sequential(tiny(), nn.LogSoftmax(1)))
    lossfunc = extend(nn.NLLLoss())
    with backpack(E.DiagGGNExact()):
        lossfunc(model(inputs()), LABELS.clamp(0)).backward()
    assert not any(p.diag_ggn_exact.any() for p in model.parameters())


def test_half_precision(no_twice) -> None:
    model, X = extend(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))), inputs().float()
    found = []
    for precise in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            loss = F.cross_entropy(model(X), LABELS) + F.mse_loss(model(X), REAL.float())
        with backpack(E.DiagGGNExact()):
            loss.backward()
        found.append(torch.cat([p.diag_ggn_exact.flatten() for p in model.parameters()]))
    assert torch.allclose(*found, rtol=0.05, atol=1e-3)


def test_create_graph(no_twice) -> None:
    """Quantities of a recognised loss can be differentiated."""
    model, X = extend(tiny()), inputs()

    def diagonal() -> Tensor:
        loss = F.cross_entropy(model(X), LABELS) + F.mse_loss(model(X), REAL) / 3
        with backpack(E.DiagGGNExact()):
            loss.backward(create_graph=True)
        return sum((p.diag_ggn_exact.sum() for p in model.parameters()), torch.zeros(()))

    weight = model[2].weight
    (slope,) = torch.autograd.grad(diagonal(), weight)
    with torch.no_grad():
        values = []
        for step in (1e-5, -2e-5):
            weight[1, 2] += step
            with torch.enable_grad():
                values.append(diagonal().detach())
        weight[1, 2] += 1e-5
    assert torch.allclose(slope[1, 2], (values[0] - values[1]) / 2e-5, rtol=1e-5)


def test_what_cannot_be_recognised_is_said() -> None:
    model, X = extend(nn.Linear(2, 100)), inputs().float()
    with pytest.warns(UserWarning, match="no rule.*Pow.*100 numbers"), backpack(E.DiagGGNExact()):
        (2 + model(X).sin()).square().sum().backward()


def test_nothing_outlives_the_pass() -> None:
    gc.collect()
    gc.disable()
    try:
        model = extend(tiny())
        out = model(inputs())
        loss = F.cross_entropy(out, LABELS) + F.mse_loss(out, REAL)
        ref = weakref.ref(out)
        with backpack(E.DiagGGNExact(), E.KFAC()):
            loss.backward()
        del out, loss
        assert ref() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight", [None, W3], ids=["plain", "weights"])
@pytest.mark.parametrize("extended", [True, False], ids=["extended", "plain-call"])
def test_probabilities_that_the_loss_makes(
    extended: bool, weight: Tensor | None, reduction: str, no_twice: None
) -> None:
    """Sigmoid and cross-entropy after the model are one loss, of its output."""
    bce: Any = nn.BCELoss(weight=weight, reduction=reduction)
    if extended:
        extend(bce)

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return bce(f.sigmoid(), y).sum()

    report = check(tiny(), loss, inputs(), SHARES, EXACT)
    assert report.ok, str(report)
    found = []
    for lossfunc in (loss, extend(nn.BCEWithLogitsLoss(weight=weight, reduction=reduction))):
        model = extend(tiny())
        torch.manual_seed(3)
        with backpack(E.KFLR(), E.DiagGGNMC(2)):
            lossfunc(model(inputs()), SHARES).sum().backward()
        found.append([t for p in model.parameters() for t in (*p.kflr, p.diag_ggn_mc)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_sigmoid_of_the_model_is_not_the_loss() -> None:
    """Then the output is the probability, and the curvature that of the loss in it."""
    model = nn.Sequential(*tiny(), nn.Sigmoid())
    report = check(model, F.binary_cross_entropy, inputs(), SHARES, EXACT)
    assert report.ok, str(report)
