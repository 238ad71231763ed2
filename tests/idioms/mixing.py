"""Losses that compare the samples of a batch, above the model's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import extend
from tests.idioms.compare import Comparison
from tests.idioms.idioms import SIZES, Sizes, expanded, made
from tests.idioms.losses import BY_NAME, uniform
from tests.idioms.reference import Truth

# How a loss module is called: as it is, extended, or its function.
Call = Callable[..., Tensor]
CE, MSE, BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss
_FUNCTIONS: dict[Any, Call] = {
    CE: F.cross_entropy,
    MSE: F.mse_loss,
    BCE: F.binary_cross_entropy_with_logits,
}


def _own(f: Tensor) -> Tensor:
    """Every row's label is its number."""
    return torch.arange(len(f))


def _targets(f: Tensor) -> Tensor:
    return uniform(f.shape)


def _batch_norm(f: Tensor) -> Tensor:
    return F.batch_norm(f, None, None, training=True, eps=0.1)


def _views(os: list[Tensor]) -> Tensor:
    a, b = (F.normalize(o, dim=1, eps=0.1) for o in os)
    return a @ b.T / 0.5


def _both(os: list[Tensor]) -> Tensor:
    """Similarities of all views of all samples with each other, but for themselves."""
    z = torch.cat(os)
    return (z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), -9.0)


@dataclass(frozen=True)
class Mixing:
    """A loss that mixes samples.

    Attributes:
        name: what it is called.
        apply: outputs of all forward passes, and the loss -> a scalar.
        loss: a loss module whose value is used, if there is one.
        forwards: forward passes.
        kind: layout of the outputs.
        convex: whether its joint Hessian has no negative eigenvalue.
    """

    name: str
    apply: Callable[[list[Tensor], Call], Tensor]
    loss: type[nn.Module] | None = None
    forwards: int = 1
    kind: str = "rows"
    convex: bool = True

    def called(self, way: str) -> Call:
        """The loss as a function, or as a module that may be extended."""
        if self.loss is None or way == "function":
            return _FUNCTIONS.get(self.loss, F.mse_loss)
        return extend(self.loss()) if way == "extended" else self.loss()

    def truth(self, sizes: Sizes = SIZES) -> Truth:
        """Brute force."""
        at = expanded(self.kind, self.forwards, "mse", sizes)
        return Truth(at, lambda os: self.apply(os, self.called("function")))

    def comparison(self, way: str, truth: Truth, sizes: Sizes = SIZES) -> Comparison:
        """The program, to be compared with brute force."""
        model, inputs, batch_dim = made(self.kind, self.forwards, BY_NAME["mse"], sizes)
        extend(model, batch_dim=batch_dim)

        def backward() -> None:
            value = self.apply([model(each) for each in inputs], self.called(way))
            assert abs(float(value.detach() - truth.loss)) < 1e-10
            value.backward()

        # Rows of two passes beside each other, or each with each, may be either.
        options = {"forwards": "same"} if "views" in self.name else {}
        return Comparison(truth, model, backward, options=options)


def _first(function: Callable[[Tensor, Call], Tensor]) -> Callable[[list[Tensor], Call], Tensor]:
    return lambda os, loss: function(os[0], loss)


MIXING = [
    Mixing("gram", _first(lambda f, loss: loss(f @ f.t(), _own(f))), CE, convex=False),
    Mixing("views", lambda os, loss: loss(_views(os), _own(os[0])), CE, 2, convex=False),
    Mixing(
        *("views-both-ways", lambda os, loss: loss(_views(os), _own(os[0])) + loss(_views(os).T, _own(os[0]))),
        *(CE, 2),
        convex=False,
    ),
    Mixing(
        *("all-views", lambda os, loss: loss(_both(os), _own(_both(os)).roll(len(os[0])))),
        *(CE, 2),
        convex=False,
    ),
    Mixing("centred", _first(lambda f, loss: loss(f - f.mean(0), _targets(f))), MSE),
    Mixing("standardised", _first(lambda f, loss: loss(_batch_norm(f), _targets(f))), MSE, convex=False),
    Mixing("batch-norm", _first(lambda f, loss: loss(_batch_norm(f), _own(f))), CE, convex=False),
    Mixing("centred-logits", _first(lambda f, loss: loss(f - f.mean(0), _own(f))), CE),
    Mixing("mean", _first(lambda f, loss: loss(f.mean(0), _targets(f[0]))), MSE),
    Mixing("moving-sum", _first(lambda f, loss: loss(f.cumsum(0), _targets(f))), MSE),
    Mixing("differences", _first(lambda f, loss: loss(f[1:] - f[:-1], _targets(f[1:]))), MSE),
    Mixing("neighbours", _first(lambda f, loss: loss(f + f.roll(1, 0), _own(f))), CE),
    Mixing("classes-of-samples", _first(lambda f, loss: loss(f.t(), torch.arange(f.shape[1]) % len(f))), CE),
    Mixing("smoothed", _first(lambda f, loss: loss(uniform((len(f), len(f))) @ f, _targets(f))), MSE),
    Mixing("pairs", _first(lambda f, loss: loss(f[:, None, 0] - f[None, :, 0], _bits(f))), BCE),
    Mixing("distances", _first(lambda f, loss: loss(_distances(f), 3 + _targets(_distances(f)))), MSE, convex=False),
    Mixing("ranking", _first(lambda f, loss: F.softplus(f[:, None, 0] - f[None, :, 0]).mean())),
    Mixing("triplet", _first(lambda f, loss: F.triplet_margin_loss(f[:1], f[1:2], f[2:], 5.0)), convex=False),
    Mixing("listwise", _first(lambda f, loss: -(f.log_softmax(0) * _targets(f).softmax(0)).sum())),
    Mixing("variance", _first(lambda f, loss: f.var(0).sum())),
    Mixing("log-of-mean", _first(lambda f, loss: f.square().mean().log()), convex=False),
    Mixing("scatter", _first(lambda f, loss: torch.logdet(f.t() @ f + torch.eye(f.shape[1]).to(f))), convex=False),
    Mixing("sorted-scores", _first(lambda f, loss: loss(f[:, 0].cumsum(0), _targets(f[:, 0]))), MSE),
    Mixing("attended", _first(lambda f, loss: loss((f @ f.t()).softmax(1) @ f, _targets(f))), MSE, convex=False),
    Mixing("times", _first(lambda f, loss: loss(f.flatten(0, 1) - f.mean((0, 1)), _targets(f.flatten(0, 1)))), MSE, kind="times"),
]  # fmt: skip


def _bits(f: Tensor) -> Tensor:
    return (torch.arange(len(f))[:, None] < torch.arange(len(f))).to(f)


def _distances(f: Tensor) -> Tensor:
    return (f[:, None] - f[None]).square().sum(2)
