"""Every loss of ``torch.nn`` that takes an output and targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Loss:
    """A loss with its arguments and targets.

    Attributes:
        name: what it is called in the tables.
        kind: the module.
        function: the function of the same.
        targets: targets (and what else follows them) for what the loss is applied to.
        options: further arguments of both; a callable makes one from the loss's first argument.
        last: the model's last operation, of its output and the class axis.
        classes: whether the axis after the first holds classes.
        rows: whether it takes ``[N, C]`` only.
        plain: the same in operations that torch can differentiate twice, if its own cannot.
        reductions: the reductions it has.
        terms: how many functions of an output it is written with, where it is not extended.
    """

    name: str
    kind: type[nn.Module]
    function: Callable[..., Tensor]
    targets: Callable[[Tensor], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    last: Callable[[Tensor, int], Tensor] = lambda o, axis: o
    classes: bool = False
    rows: bool = False
    plain: Callable[..., Tensor] | None = None
    reductions: tuple[str, ...] = ("mean", "sum", "none")
    terms: int = 1

    def chosen(self, f: Tensor) -> dict[str, Any]:
        """The options for what the loss is applied to."""
        return {k: v(f) if callable(v) else v for k, v in self.options.items()}

    def scalar(self, value: Tensor) -> Tensor:
        """A weighted sum of values that are not reduced."""
        if value.dim() == 0:
            return value
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
        return (weights * value).sum()

    def truth(self, f: Tensor, reduction: str) -> Tensor:
        """The scalar that is differentiated, in plain operations."""
        function = self.plain or self.function
        return self.scalar(
            function(f, *self.targets(f.detach()), reduction=reduction, **self.chosen(f))
        )

    def module(self, f: Tensor, reduction: str) -> nn.Module:
        return self.kind(reduction=reduction, **self.chosen(f))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def uniform(shape: Any) -> Tensor:
    return torch.rand(shape, generator=_generator(), dtype=torch.float64)


def near(f: Tensor) -> tuple[Tensor]:
    return (2 * uniform(f.shape) - 0.7,)


def labels(f: Tensor) -> tuple[Tensor]:
    return (torch.randint(f.shape[1], (f.shape[0], *f.shape[2:]), generator=_generator()),)


def bits(f: Tensor) -> tuple[Tensor]:
    return (torch.randint(2, f.shape, generator=_generator()).to(f),)


def signs(f: Tensor) -> tuple[Tensor]:
    return (2 * bits(f)[0] - 1,)


def counts(f: Tensor) -> tuple[Tensor]:
    return (1 + torch.randint(4, f.shape, generator=_generator()).to(f),)


def probabilities(f: Tensor) -> tuple[Tensor]:
    return (uniform(f.shape),)


def soft(f: Tensor) -> tuple[Tensor]:
    return (uniform(f.shape).softmax(1),)


def sets(f: Tensor) -> tuple[Tensor]:
    """Classes of every row, closed by -1."""
    first = torch.randint(f.shape[1], (len(f), 1), generator=_generator())
    return (torch.cat([first, torch.full((len(f), f.shape[1] - 1), -1)], 1),)


def by_class(f: Tensor) -> Tensor:
    return 0.5 + uniform(f.shape[1])


def by_last(f: Tensor) -> Tensor:
    return 0.5 + uniform(f.shape[-1])


def by_entry(f: Tensor) -> Tensor:
    return 0.5 + uniform(f.shape)


def _reduced(values: Tensor, reduction: str) -> Tensor:
    return {"mean": values.mean(), "sum": values.sum(), "none": values}[reduction]


def multi_margin(
    f: Tensor,
    y: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    own = f.gather(1, y.unsqueeze(1))
    terms = (margin - own + f).relu() ** p * (1 - F.one_hot(y, f.shape[1]))
    if weight is not None:
        terms = terms * weight[y].unsqueeze(1)
    return _reduced(terms.sum(1) / f.shape[1], reduction)


def multilabel_margin(f: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """For rows with one class each, as :func:`sets` makes them."""
    return multi_margin(f, y[:, 0], reduction=reduction)


def log_soft(o: Tensor, axis: int) -> Tensor:
    return o.log_softmax(axis)


def sigmoid(o: Tensor, axis: int) -> Tensor:
    return o.sigmoid()


def positive(o: Tensor, axis: int) -> Tensor:
    return F.softplus(o) + 0.1


_CE, _BCE = (nn.CrossEntropyLoss, F.cross_entropy), (nn.BCELoss, F.binary_cross_entropy)
_LOGITS = (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits)
_POISSON = (nn.PoissonNLLLoss, F.poisson_nll_loss)
_GAUSS = (nn.GaussianNLLLoss, F.gaussian_nll_loss)
_MARGIN = (nn.MultiMarginLoss, F.multi_margin_loss)
_SOFT = (nn.MultiLabelSoftMarginLoss, F.multilabel_soft_margin_loss)
_KL, _NLL = (nn.KLDivLoss, F.kl_div), (nn.NLLLoss, F.nll_loss)
_BATCH = ("mean", "sum", "none", "batchmean")

LOSSES = [
    Loss("ce", *_CE, labels, classes=True),
    Loss("ce-weight", *_CE, labels, {"weight": by_class}, classes=True),
    Loss("ce-ignore", *_CE, labels, {"ignore_index": 1}, classes=True),
    Loss("ce-smooth", *_CE, labels, {"label_smoothing": 0.3, "ignore_index": 1}, classes=True),
    Loss(
        "ce-smooth-weight",
        *_CE,
        labels,
        {"weight": by_class, "label_smoothing": 0.2},
        classes=True,
    ),
    Loss("ce-soft", *_CE, soft, classes=True),
    Loss("ce-soft-weight", *_CE, soft, {"weight": by_class, "label_smoothing": 0.1}, classes=True),
    Loss("mse", nn.MSELoss, F.mse_loss, near),
    Loss("bce-logits", *_LOGITS, bits),
    Loss("bce-logits-weight", *_LOGITS, probabilities, {"weight": by_entry, "pos_weight": by_last}),
    Loss("bce", *_BCE, bits, last=sigmoid),
    Loss("bce-weight", *_BCE, probabilities, {"weight": by_entry}, last=sigmoid),
    Loss("poisson", *_POISSON, counts),
    Loss("poisson-rate", *_POISSON, counts, {"log_input": False}, last=positive),
    Loss("gaussian", *_GAUSS, lambda f: (*near(f), by_entry(f))),
    Loss("huber", nn.HuberLoss, F.huber_loss, near, {"delta": 0.4}),
    Loss("smooth-l1", nn.SmoothL1Loss, F.smooth_l1_loss, near, {"beta": 0.6}),
    Loss("soft-margin", nn.SoftMarginLoss, F.soft_margin_loss, signs),
    Loss("multilabel-soft-margin", *_SOFT, bits, {"weight": by_last}, terms=2),
    Loss("multi-margin-1", *_MARGIN, labels, classes=True, rows=True, plain=multi_margin),
    Loss("multi-margin-2", *_MARGIN, labels, {"p": 2}, classes=True, rows=True, plain=multi_margin),
    Loss(
        *("multilabel-margin", nn.MultiLabelMarginLoss, F.multilabel_margin_loss, sets),
        classes=True,
        rows=True,
        plain=multilabel_margin,
    ),
    Loss("l1", nn.L1Loss, F.l1_loss, near),
    Loss("nll", *_NLL, labels, {"weight": by_class, "ignore_index": 0}, log_soft, classes=True),
    Loss("kl", *_KL, soft, {}, log_soft, classes=True, reductions=_BATCH),
    Loss("hinge-embedding", nn.HingeEmbeddingLoss, F.hinge_embedding_loss, signs, {"margin": 0.3}),
]
BY_NAME = {loss.name: loss for loss in LOSSES}
