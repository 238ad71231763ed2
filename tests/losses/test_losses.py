"""Every loss with a rule, custom losses, and the Monte-Carlo draws."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.losses.base import LOSSES, LossHessian
from backpack.samples.axis import SampleAxis
from backpack.testing.oracle import Oracle, check

QUANTITIES = [
    E.BatchGrad(),
    E.Variance(),
    E.DiagGGNExact(),
    E.DiagGGNMC(),
    E.BatchDiagGGNExact(),
    E.SqrtGGNExact(),
    E.DiagHessian(),
]


class Last(nn.Module):
    """A function, as the last layer; ``[N, T, 3] -> [N, 3, T]`` for classes of a sequence."""

    def __init__(self, function: Callable[[Tensor], Tensor], classes: bool) -> None:
        super().__init__()
        self.function, self.classes = function, classes

    def forward(self, a: Tensor) -> Tensor:
        return self.function(a.transpose(1, -1) if self.classes and a.dim() > 2 else a)


class With(nn.Module):
    """A function of output and targets, as an extended loss module."""

    def __init__(self, function: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, f: Tensor, y: Any) -> Tensor:
        return self.function(f, y)


class Row(NamedTuple):
    """A loss of PyTorch with its arguments, targets for an output, and the range of the output."""

    name: str
    kind: type[nn.Module] | Callable[..., Tensor]
    target: Callable[[Tensor], Any]
    arguments: dict[str, Any] = {}
    last: Callable[[Tensor], Tensor] = lambda f: f
    classes: bool = False
    deep: bool = True  # allows further axes
    flat: bool = False  # no curvature


def labels(f: Tensor) -> Tensor:
    return torch.randint(f.shape[1], (f.shape[0], *f.shape[2:]))


def signs(f: Tensor) -> Tensor:
    return torch.randint(2, f.shape).to(f.dtype) * 2 - 1


def counts(f: Tensor) -> Tensor:
    return torch.randint(5, f.shape).to(f.dtype)


def bits(f: Tensor) -> Tensor:
    return torch.randint(2, f.shape).to(f.dtype)


def soft(f: Tensor) -> Tensor:
    return torch.rand_like(f).softmax(1)


def ranking(f: Tensor, y: Tensor, margin: float, reduction: str) -> Tensor:
    other = torch.linspace(-1, 1, f.numel(), dtype=f.dtype).reshape(f.shape)
    return F.margin_ranking_loss(f, other, y, margin=margin, reduction=reduction)


def log_soft(f: Tensor) -> Tensor:
    return F.log_softmax(f, 1)


def near(f: Tensor) -> Tensor:
    return f + torch.randn_like(f)


W3 = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
ROWS = [
    Row("ce", nn.CrossEntropyLoss, labels, classes=True),
    Row("ce-weight", nn.CrossEntropyLoss, labels, {"weight": W3}, classes=True),
    Row("ce-ignore", nn.CrossEntropyLoss, labels, {"ignore_index": 1}, classes=True),
    Row(
        *("ce-smooth", nn.CrossEntropyLoss, labels),
        {"weight": W3, "ignore_index": 2, "label_smoothing": 0.3},
        classes=True,
    ),
    Row("ce-soft", nn.CrossEntropyLoss, soft, classes=True),
    Row(
        *("ce-soft-weight", nn.CrossEntropyLoss, soft),
        {"weight": W3, "label_smoothing": 0.2},
        classes=True,
    ),
    Row("mse", nn.MSELoss, near),
    Row("mse-broadcast", nn.MSELoss, lambda f: torch.randn(f.shape[-1])),
    Row("mse-weight", F.mse_loss, near, {"weight": torch.rand}),
    Row("bce-logits", nn.BCEWithLogitsLoss, bits),
    Row("bce-logits-soft", nn.BCEWithLogitsLoss, torch.rand_like, {"pos_weight": W3}),
    Row("bce-logits-weight", nn.BCEWithLogitsLoss, bits, {"weight": W3, "pos_weight": W3.flip(0)}),
    Row(
        *("bce-logits-rows", nn.BCEWithLogitsLoss, torch.rand_like),
        {"weight": torch.rand(4, 1, dtype=torch.float64), "pos_weight": W3[:1]},
        deep=False,
    ),
    Row("bce", nn.BCELoss, bits, last=torch.sigmoid),
    Row("bce-weight", nn.BCELoss, torch.rand_like, {"weight": W3}, last=torch.sigmoid),
    Row("poisson", nn.PoissonNLLLoss, counts),
    Row("poisson-full", nn.PoissonNLLLoss, counts, {"full": True}),
    Row("poisson-rate", nn.PoissonNLLLoss, counts, {"log_input": False, "eps": 0.1}, last=torch.exp),
    Row("gaussian", F.gaussian_nll_loss, near, {"var": lambda *s: torch.rand(s) + 0.1}),
    Row("gaussian-full", F.gaussian_nll_loss, near, {"var": 0.5, "full": True}),
    Row("gaussian-rows", F.gaussian_nll_loss, near, {"var": lambda *s: torch.rand(s[:-1]), "eps": 0.2}),
    Row("gaussian-one", F.gaussian_nll_loss, near, {"var": lambda *s: torch.rand(*s[:-1], 1) + 0.1}),
    Row("huber", nn.HuberLoss, near, {"delta": 0.8}),
    Row("huber-weight", F.huber_loss, near, {"weight": torch.rand}),
    Row("smooth-l1", nn.SmoothL1Loss, near, {"beta": 0.7}),
    Row("smooth-l1-sharp", nn.SmoothL1Loss, near, {"beta": 0.0}, flat=True),
    Row("soft-margin", nn.SoftMarginLoss, signs),
    Row("soft-margin-any", nn.SoftMarginLoss, torch.randn_like),
    Row("multilabel-soft-margin", nn.MultiLabelSoftMarginLoss, bits),
    Row("multilabel-soft-margin-weight", nn.MultiLabelSoftMarginLoss, torch.rand_like, {"weight": W3}),
    Row("l1", nn.L1Loss, near, flat=True),
    Row(
        *("nll", nn.NLLLoss, labels, {"weight": W3, "ignore_index": 0}, log_soft),
        classes=True,
        flat=True,
    ),
    Row("kl", nn.KLDivLoss, soft, last=log_soft, classes=True, flat=True),
    Row(
        *("kl-log", nn.KLDivLoss, lambda f: soft(f).log(), {"log_target": True}, log_soft),
        classes=True,
        flat=True,
    ),
    Row("hinge-embedding", nn.HingeEmbeddingLoss, signs, {"margin": 0.3}, flat=True),
    Row("margin-ranking", ranking, signs, {"margin": 0.2}, flat=True),
]
TABLE = [
    pytest.param(row, reduction, shape, id=f"{row.name}-{reduction}-{len(shape)}d")
    for row in ROWS
    for reduction in ("mean", "sum", "none", *(["batchmean"] if row.kind is nn.KLDivLoss else []))
    for shape in ([(4, 2), (2, 2, 2)] if row.deep else [(4, 2)])
    if reduction == "mean" or (len(shape) == 3) == (row.deep and reduction == "none")
]


def tiny(last: Callable[[Tensor], Tensor] = lambda f: f, classes: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), Last(last, classes)).double()


def setting(row: Row, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor, Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, X = tiny(row.last, row.classes), torch.randn(shape).double()
    f = model(X).detach()
    arguments = {k: v(*f.shape).to(f.dtype) if callable(v) else v for k, v in row.arguments.items()}
    return model, X, row.target(f), arguments


def agrees(model: nn.Module, loss: Any, X: Any, y: Any, quantities: Any = QUANTITIES) -> None:
    report = check(model, loss, X, y, quantities)
    assert report.ok, f"\n{report}"


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.parametrize("row, reduction, shape", TABLE)
def test_loss(row: Row, reduction: str, shape: tuple[int, ...]) -> None:
    model, X, y, arguments = setting(row, shape)
    if isinstance(row.kind, type):
        loss: Any = row.kind(**arguments, reduction=reduction)
    else:
        loss = With(lambda f, y: row.kind(f, y, **arguments, reduction=reduction))
    agrees(
        model, loss, X, y, [q for q in QUANTITIES if q.savefield != "sqrt_ggn_exact" or not row.flat]
    )
    assert rule_of(model, loss, X, y) is not None


def rule_of(model: nn.Module, loss: Any, X: Tensor, y: Any) -> LossHessian | None:
    """What the loss's rule gives."""
    value = extend(loss)(extend(model)(X), y)
    record = value.grad_fn.metadata.get("backpack_loss")
    return record and record.hessian


@pytest.mark.parametrize("row", [row for row in ROWS if row.flat], ids=lambda row: row.name)
def test_loss_without_curvature(row: Row) -> None:
    model, X, y, arguments = setting(row, (4, 2))
    loss = With(lambda f, y: row.kind(f, y, **arguments, reduction="sum"))
    if isinstance(row.kind, type):
        loss = row.kind(**arguments, reduction="sum")
    model, loss = extend(model), extend(loss)
    with backpack(E.DiagGGNMC(), E.BatchDiagGGNExact(), E.SqrtGGNExact(), E.SqrtGGNMC(2), E.KFLR()):
        (-loss(model(X), y)).backward()
    for p in model.parameters():
        assert p.grad.any()
        assert torch.equal(p.diag_ggn_mc, torch.zeros_like(p))
        assert torch.equal(p.diag_ggn_exact_batch, torch.zeros(4, *p.shape).double())
        assert torch.equal(p.sqrt_ggn_mc, torch.zeros(2, 4, *p.shape).double())
        assert p.sqrt_ggn_exact.shape[1:] == (4, *p.shape) and not p.sqrt_ggn_exact.any()
        assert [len(factor) for factor in p.kflr] == list(p.shape) and not p.kflr[0].any()


# --------------------------------------------------------------------------------------
# Losses that torch cannot differentiate twice, compared with the same in plain operations


def margins(f: Tensor, y: Tensor, p: int, margin: float, weight: Tensor, reduction: str) -> Tensor:
    own = f.gather(1, y.unsqueeze(1))
    terms = (margin - own + f).relu() ** p * (1 - F.one_hot(y, f.shape[1])) * weight[y].unsqueeze(1)
    return reduced(terms.sum(1) / f.shape[1], reduction)


def label_margins(f: Tensor, y: Tensor, reduction: str) -> Tensor:
    values = []
    for row, targets in zip(f, y, strict=True):
        own = targets[: (targets < 0).int().argmax()] if (targets < 0).any() else targets
        others = [c for c in range(len(row)) if c not in own]
        values.append((1 - row[own].unsqueeze(1) + row[others]).relu().sum() / len(row))
    return reduced(torch.stack(values), reduction)


def reduced(values: Tensor, reduction: str) -> Tensor:
    return {"mean": values.mean(), "sum": values.sum(), "none": values}[reduction]


LABELS = torch.tensor([[0, -1, -1], [2, 1, -1], [1, -1, 0], [0, 1, 2]])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["multi-1", "multi-2", "multi-2-weight", "multilabel"])
def test_margin_losses(kind: str, reduction: str) -> None:
    torch.manual_seed(0)
    model, X, y = tiny(), torch.randn(4, 2).double(), torch.randint(3, (4,))
    if kind == "multilabel":
        y = LABELS
        loss: Any = nn.MultiLabelMarginLoss(reduction=reduction)
        plain = With(lambda f, y: label_margins(f, y, reduction))
    else:
        power, weight = int(kind[6]), W3 if kind.endswith("weight") else torch.ones_like(W3)
        given = weight if kind.endswith("weight") else None
        loss = nn.MultiMarginLoss(power, 0.8, given, reduction=reduction)
        plain = With(lambda f, y: margins(f, y, power, 0.8, weight, reduction))
    oracle = Oracle(model, plain, X, y)
    model = extend(copy.deepcopy(model))
    value = extend(loss)(model(X), y)
    assert torch.allclose(value, plain(model(X), y))
    with backpack(*QUANTITIES):
        value.backward(torch.ones_like(value))
    for field in ("grad_batch", "diag_ggn_exact", "diag_ggn_exact_batch", "diag_h"):
        for name, expected in oracle.value(field).items():
            found = getattr(model.get_parameter(name), field)
            assert torch.allclose(found, expected, rtol=1e-8, atol=1e-12), (field, name)
            assert expected.any() or not field.startswith("diag_ggn") or "2" not in kind


# --------------------------------------------------------------------------------------
# Weights of samples, deprecated arguments, what rules leave to double differentiation


@pytest.mark.parametrize(
    "loss",
    [
        lambda f, w: 2 * F.cross_entropy(f, torch.tensor([0, 2, 1, 1]), reduction="none") @ w,
        lambda f, w: F.multilabel_soft_margin_loss(f, (f > 0).to(f), reduction="none") @ w,
        lambda f, w: w @ F.poisson_nll_loss(f, torch.ones_like(f), reduction="none").sum(1),
        lambda f, w: (w.unsqueeze(1) * F.mse_loss(f, torch.ones_like(f), reduction="none")).mean(),
    ],
)
def test_weights_of_samples(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    weights = torch.tensor([0.3, 0.0, 2.0, 1.0]).double()
    agrees(tiny(), With(loss), torch.randn(4, 2).double(), weights)


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
@pytest.mark.parametrize("average, reduce", [(True, True), (False, None), (None, False)])
@pytest.mark.parametrize("kind", [nn.MSELoss, nn.SoftMarginLoss, nn.MultiLabelSoftMarginLoss])
def test_deprecated_reduction(kind: Any, average: bool | None, reduce: bool | None) -> None:
    torch.manual_seed(0)
    X, y = torch.randn(4, 2).double(), torch.randint(2, (4, 3)).double()
    loss = kind(size_average=average, reduce=reduce)
    agrees(tiny(), loss, X, y)
    function = getattr(
        F,
        {"MSELoss": "mse_loss", "SoftMarginLoss": "soft_margin_loss"}.get(
            kind.__name__, "multilabel_soft_margin_loss"
        ),
    )
    called = With(lambda f, y: function(f, y, size_average=average, reduce=reduce))
    agrees(tiny(), called, X, y)
    assert rule_of(tiny(), called, X, y) is not None


@pytest.mark.parametrize(
    "loss",
    [
        lambda f, y: F.mse_loss(f, f.roll(1, 1)),  # a target that depends on the model
        lambda f, y: F.binary_cross_entropy_with_logits(f[:, :1], f[:, 1:2].sigmoid().detach()),
        lambda f, y: F.mse_loss(f, y, weight=-torch.ones_like(f), reduction="sum") + 2 * f.pow(2).sum(),  # type: ignore[call-arg]
        lambda f, y: F.cosine_embedding_loss(f, y, torch.ones(4).to(f)) + f.pow(2).sum(),
        lambda f, y: F.triplet_margin_loss(f, y, y + 1, margin=5.0) + f.pow(2).sum(),
    ],
    ids=["target", "constant-target", "negative-weight", "cosine", "triplet"],
)
def test_left_to_double_differentiation(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    agrees(tiny(), loss, torch.randn(4, 2).double(), torch.randn(4, 3).double())


# --------------------------------------------------------------------------------------
# Losses of the user's own


def focal(f: Tensor, y: Tensor) -> Tensor:
    """Convex for logits that are not too confident."""
    log_p = F.log_softmax(f, 1).gather(1, y.unsqueeze(1))
    return (-((1 - log_p.exp()) ** 0.3) * log_p).mean() + 0.2 * f.pow(2).sum()


CUSTOM = {
    "log-cosh": lambda f, y: (f - y.unsqueeze(1)).cosh().log().mean(),
    "focal": focal,
    "ce-and-regulariser": lambda f, y: F.cross_entropy(f, y) + 0.1 * f.pow(4).mean(),
    "ce-and-mse": lambda f, y: F.cross_entropy(f, y) + F.mse_loss(f, F.one_hot(y, 3).to(f)),
    "ce-of-scaled": lambda f, y: F.cross_entropy(f / 0.7 + 1, y),
    "quantile": lambda f, y: torch.maximum(0.3 * (f - 1), 0.7 * (1 - f)).sum() + f.logsumexp(1).sum(),
    "coupled": lambda f, y: (f[:, 0] * f[:, 1] - f[:, 2]).pow(2).sum() + 9 * f.pow(2).sum(),
    "per-sample": lambda f, y: (f.logsumexp(1) - f.gather(1, y.unsqueeze(1)).squeeze(1)) / 7,
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_loss(name: str) -> None:
    torch.manual_seed(0)
    X, y = torch.randn(4, 2).double(), torch.randint(3, (4,))
    agrees(tiny(), CUSTOM[name], X, y)


@pytest.mark.parametrize("name", [n for n in CUSTOM if n != "per-sample"])
def test_custom_loss_module(name: str) -> None:
    torch.manual_seed(0)
    X, y = torch.randn(4, 2).double(), torch.randint(3, (4,))
    agrees(tiny(), With(CUSTOM[name]), X, y)


def test_custom_loss_of_a_sequence() -> None:
    torch.manual_seed(0)
    X, y = torch.randn(3, 2, 2).double(), torch.randn(3, 2, 3).double()
    agrees(tiny(), lambda f, y: (f - y).cosh().log().mean() + f.sum(1).pow(2).sum(), X, y)


# --------------------------------------------------------------------------------------
# Monte-Carlo columns


def gram(columns: Tensor) -> Tensor:
    """``[v, N, ...] -> [v, N, o, o]``: outer products of every column of every sample."""
    flat = columns.flatten(2)
    return torch.einsum("vni,vnj->vnij", flat, flat)


DRAWS = {
    "ce": (F.cross_entropy, (3, 3), labels, {"weight": W3, "label_smoothing": 0.1}),
    "ce-sequence": (F.cross_entropy, (2, 3, 2), labels, {"ignore_index": 0}),
    "mse": (F.mse_loss, (2, 3), near, {}),
    "bce": (F.binary_cross_entropy_with_logits, (2, 3), torch.rand_like, {"pos_weight": W3}),
    "soft-margin": (F.soft_margin_loss, (2, 3), torch.randn_like, {}),
    "multilabel": (F.multilabel_soft_margin_loss, (2, 3), bits, {"weight": W3}),
    "poisson": (F.poisson_nll_loss, (2, 3), counts, {}),
    "poisson-rate": (F.poisson_nll_loss, (2, 3), counts, {"log_input": False}),
    "gaussian": (F.gaussian_nll_loss, (2, 3), near, {"var": W3.expand(2, 3)}),
    "probabilities": (F.binary_cross_entropy, (2, 3), bits, {}),
    "huber": (F.huber_loss, (2, 3), near, {}),
    "squared-margins": (F.multi_margin_loss, (3, 3), labels, {"p": 2, "weight": W3}),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_unbiased(name: str, reduction: str) -> None:
    """The mean of outer products is the Hessian, up to five standard errors."""
    function, shape, target, arguments = DRAWS[name]
    torch.manual_seed(0)
    f = torch.randn(shape).double()
    f = f.sigmoid() if name in ("poisson-rate", "probabilities") else f
    hessian = LOSSES[function](SampleAxis(len(f)), f, target(f), **arguments, reduction=reduction)
    assert hessian is not None
    value = function(f, target(f), **arguments, reduction=reduction)
    grad = 0.5 + torch.rand_like(value)
    exact = gram(torch.cat(list(hessian.columns(grad, 2)))).sum(0)
    count = 8_000
    samples = gram(hessian.sampled(grad, count, torch.Generator().manual_seed(1)) * count**0.5)
    error = (samples.mean(0) - exact).abs()
    assert exact.any()
    assert bool((error <= 5 * samples.std(0) / count**0.5 + 1e-12).all()), error


def test_draws_are_those_of_the_likelihood() -> None:
    torch.manual_seed(0)
    f = torch.randn(2, 3).double()
    kwargs = {"reduction": "sum"}
    for function, y, support in (
        (F.poisson_nll_loss, counts(f), f.exp()),
        (F.binary_cross_entropy_with_logits, bits(f), f.sigmoid()),
        (F.cross_entropy, labels(f), f.softmax(1)),
    ):
        hessian = LOSSES[function](SampleAxis(2), f, y, **kwargs)
        assert hessian is not None
        targets = support - hessian.draw(50, None)
        assert torch.allclose(targets, targets.round()) and targets.min() >= -1e-12


def test_generator_decides() -> None:
    model, loss = extend(tiny()), extend(nn.PoissonNLLLoss())
    X, y = torch.randn(4, 2).double(), torch.ones(4, 3).double()
    found = []
    for _ in range(2):
        with backpack(E.DiagGGNMC(generator=torch.Generator().manual_seed(3))):
            loss(model(X), y).backward()
        found.append(model[0].weight.diag_ggn_mc)
    assert torch.equal(*found)


# --------------------------------------------------------------------------------------
# Errors


def backward(loss: Any, y: Any, last: Any = lambda f: f, *quantities: Any) -> nn.Module:
    torch.manual_seed(0)
    model = extend(tiny(last))
    value = loss(model(torch.randn(4, 2).double()), y)
    with backpack(*(quantities or [E.DiagGGNExact()])):
        value.backward(torch.ones_like(value))
    return model


def test_targets_out_of_range_are_torch_errors() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        backward(extend(nn.CrossEntropyLoss()), torch.tensor([0, 1, 2, 3]))
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        backward(extend(nn.BCELoss()), torch.ones(4, 3).double(), lambda f: f + 2)
    with pytest.raises(ValueError, match="negative entry"):
        extend(nn.GaussianNLLLoss())(tiny()(torch.randn(4, 2).double()), torch.ones(4, 3), -W3)


NOT_CONVEX = {
    "custom": lambda f, y: f.sigmoid().sum(),
    "cubic": lambda f, y: (f - 1).pow(3).mean(),
    "weight": lambda f, y: F.mse_loss(f, y, weight=-torch.ones_like(f), reduction="sum"),  # type: ignore[call-arg]
    "poisson": lambda f, y: F.poisson_nll_loss(f, -y, log_input=False),
    "soft labels": lambda f, y: F.cross_entropy(f, -torch.ones_like(f)),
    "pos_weight": lambda f, y: F.binary_cross_entropy_with_logits(f, f * 0 + 1, pos_weight=-W3),
}


@pytest.mark.parametrize("quantity", [E.SqrtGGNExact(), E.DiagGGNMC(), E.KFLR()], ids=repr)
@pytest.mark.parametrize("name", NOT_CONVEX)
def test_loss_that_is_not_convex(name: str, quantity: Any) -> None:
    with pytest.raises(ValueError, match="not convex"):
        backward(extend(With(NOT_CONVEX[name])), torch.ones(4, 3).double(), torch.exp, quantity)


@pytest.mark.parametrize("name", ["custom", "cubic", "weight", "pos_weight"])
def test_diagonals_of_a_loss_that_is_not_convex(name: str) -> None:
    torch.manual_seed(0)
    X, y = torch.randn(4, 2).double(), torch.ones(4, 3).double()
    diagonals = [E.DiagGGNExact(), E.BatchDiagGGNExact(), E.DiagHessian()]
    agrees(tiny(), NOT_CONVEX[name], X, y, [E.BatchGrad(), *diagonals])


@pytest.mark.parametrize(
    "lossfunc", [nn.MSELoss(), nn.CrossEntropyLoss(), nn.MSELoss(reduction="none")]
)
def test_negative_losses(lossfunc: nn.Module) -> None:
    """Diagonals of a loss times negative numbers; a square root does not exist."""
    torch.manual_seed(0)
    X, y = torch.randn(4, 2).double(), torch.rand(4, 3).double()
    weights = torch.tensor([1.0, -2.0, 0.5, -0.1]).double()

    class Weighted(nn.Module):
        def forward(self, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            loss = lossfunc(f, y)
            return -loss if loss.dim() == 0 else (weights.unsqueeze(1) * loss).sum()

    diagonals = [E.DiagGGNExact(), E.BatchDiagGGNExact(), E.DiagHessian()]
    agrees(tiny(), Weighted(), X, y, diagonals)
    with pytest.raises(ValueError, match="no square root"):
        backward(extend(Weighted()), y, torch.exp, E.SqrtGGNExact())


@pytest.mark.parametrize(
    "quantity",
    [E.DiagGGNExact(), E.DiagGGNMC(), E.DiagHessian(), E.BatchDiagHessian(), E.DiagHessianMC()],
    ids=lambda e: type(e).__name__,
)
def test_loss_that_mixes_samples(quantity: Any) -> None:
    for loss in (lambda f, y: (f @ f.T).logsumexp(1).mean(), lambda f, y: f.var(0).sum()):
        with pytest.raises((ValueError, NotImplementedError), match="mixes the samples"):
            backward(loss, None, lambda f: f, quantity)


@pytest.mark.parametrize(
    "quantity", [E.DiagGGNExact(), E.DiagHessian()], ids=lambda e: type(e).__name__
)
def test_complex_model_output(quantity: Any) -> None:
    """That of the same numbers as pairs of real ones."""

    def pairs(f: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.fft(f))

    def loss(f: Tensor, y: Any) -> Tensor:
        return (f if f.is_complex() else torch.view_as_complex(f)).abs().sum()

    found = backward(loss, None, torch.fft.fft, quantity)
    wanted = backward(loss, None, pairs, quantity)
    for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(getattr(p, quantity.savefield), getattr(q, quantity.savefield))
        assert getattr(p, quantity.savefield).abs().sum() > 0


def focal_mean(f: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(f, y, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


def squared(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="none").square().sum()


def root(f: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(f, torch.eye(3).to(f)[y], reduction="none").mean(1).sqrt().sum()


@pytest.mark.parametrize("loss", [focal_mean, squared, root])
@pytest.mark.parametrize("module", [True, False])
def test_known_loss_that_is_bent_afterwards(loss: Any, module: bool) -> None:
    """The curvature of what comes after a loss with a rule counts too."""
    torch.manual_seed(0)
    X, y = 2 * torch.randn(4, 2).double(), torch.tensor([0, 2, 1, 1])
    agrees(tiny(), With(loss) if module else loss, X, y, [E.DiagGGNExact(), E.DiagHessian()])


def test_known_loss_that_is_bent_outside() -> None:
    torch.manual_seed(0)
    X, y = 2 * torch.randn(4, 2).double(), torch.tensor([0, 2, 1, 1])
    model, lossfunc = tiny(), extend(nn.CrossEntropyLoss(reduction="none"))
    expected = Oracle(model, squared, X, y).value("diag_ggn_exact")
    extend(model)
    with backpack(E.DiagGGNExact()):
        lossfunc(model(X), y).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.diag_ggn_exact, expected[name])


@pytest.mark.parametrize("learned", [True, False])
def test_product_with_what_does_not_depend_on_the_model(learned: bool) -> None:
    """It leaves a known loss known: targets are drawn as without it."""
    model, lossfunc = extend(tiny()), extend(nn.CrossEntropyLoss())
    weight = torch.tensor(0.3).double().requires_grad_(learned)
    X, y = torch.randn(4, 2).double(), torch.tensor([0, 2, 1, 1])
    values = []
    for factor in (weight, torch.ones(())):
        with backpack(E.DiagGGNMC(generator=torch.Generator().manual_seed(0)), E.DiagGGNExact()):
            (lossfunc(model(X), y) * factor + 1).backward(inputs=list(model.parameters()))
        values.append([(p.diag_ggn_mc, p.diag_ggn_exact) for p in model.parameters()])
    for ours, plain in zip(*values, strict=True):
        torch.testing.assert_close(ours, tuple(0.3 * each for each in plain))


def test_loss_that_torch_cannot_differentiate_twice() -> None:
    lengths = torch.ones(4, dtype=torch.long)
    loss = lambda f, y: F.ctc_loss(F.log_softmax(f, 1).unsqueeze(0), y, lengths, lengths)
    with pytest.raises(NotImplementedError, match="cannot differentiate it twice"):
        backward(loss, torch.ones(4, 1, dtype=torch.long))


def test_vanishing_weights_can_be_differentiated() -> None:
    """A square root's slope at zero is infinite; weights and curvature that vanish must not matter."""
    weight = torch.tensor([0.0, 1.0, 1.0]).double()
    losses = [
        (nn.CrossEntropyLoss(weight=weight), torch.tensor([0, 0, 1, 2])),
        (nn.BCEWithLogitsLoss(weight=weight), torch.ones(4, 3).double()),
        (nn.HuberLoss(delta=0.3), torch.zeros(4, 3).double()),
    ]
    for loss, y in losses:
        model = extend(tiny())
        value = extend(loss)(model(torch.randn(4, 2).double()), y)
        with backpack(E.DiagGGNExact()):
            grads = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        assert len(grads) == 4
        for p in model.parameters():
            if not p.diag_ggn_exact.requires_grad:
                continue
            (slope,) = torch.autograd.grad(
                p.diag_ggn_exact.sum(), [model[0].weight], retain_graph=True, allow_unused=True
            )
            assert slope is None or bool(slope.isfinite().all())


def test_saturated_outputs_are_accurate() -> None:
    """``p (1 - p)`` cancels in single precision from f = 17 on."""
    f = torch.tensor([[30.0, -30.0, 0.0]])
    hessian = LOSSES[F.binary_cross_entropy_with_logits](SampleAxis(1), f, f, reduction="sum")
    assert hessian is not None
    expected = (-f.double().abs()).exp() / (1 + (-f.double().abs()).exp()) ** 2
    assert torch.allclose(hessian.root()[0].double() ** 2, expected, rtol=1e-5, atol=0)
