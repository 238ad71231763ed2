"""Models that return rows of some samples only: the others have zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import extend, extensions
from tests.cases import Apply
from tests.idioms.compare import Comparison
from tests.idioms.reference import Expanded, Truth

N = 4
# Rows that are picked, before the parameters and after them.
ROWS: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    "first": (lambda a: a[:1], [0]),
    "last two": (lambda a: a[2:], [2, 3]),
    "one": (lambda a: a[1].unsqueeze(0), [1]),
    "some": (lambda a: a[torch.tensor([3, 1])], [3, 1]),
    "masked": (lambda a: a[torch.tensor([True, False, True, True])], [0, 2, 3]),
    "repeated": (lambda a: a[torch.tensor([2, 2, 0])], [2, 2, 0]),
}
LOSSES = (nn.CrossEntropyLoss, nn.MSELoss, nn.PoissonNLLLoss, nn.SoftMarginLoss)
FUNCTIONS = (F.cross_entropy, F.mse_loss, F.poisson_nll_loss, F.soft_margin_loss)


def model(pick: Callable[[Tensor], Tensor], before: bool) -> nn.Module:
    """Among the operations is one that has no rule, and no value at zero."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.b / (pick(x) if before else x)
        o = m.l(h.tanh())
        return o if before else pick(o)

    torch.manual_seed(0)
    return Apply(forward, b=nn.Parameter(torch.randn(3)), l=nn.Linear(3, 2)).double()


@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("loss, function", list(zip(LOSSES, FUNCTIONS, strict=True)))
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_some_rows(name: str, before: bool, loss: type, function: Callable, extended: bool) -> None:
    pick, owners = ROWS[name]
    net = model(pick, before)
    X = torch.randn(N, 3).double()
    y = torch.ones(len(owners), 2).double()
    if loss is nn.CrossEntropyLoss:
        y = torch.arange(len(owners)) % 2
    owner = torch.tensor(owners).repeat_interleave(2)
    at = Expanded(dict(net.named_parameters()), [net(X)], owner, N)
    truth = Truth(at, lambda os: function(os[0], y))
    extend(net)

    def backward() -> None:
        (extend(loss()) if extended else loss())(net(X), y).backward()

    groups = {
        "first": _of("BatchGrad", "Variance", "BatchL2Grad"),
        "ggn": _of("DiagGGNExact", "BatchDiagGGNExact", "SqrtGGNExact"),
        "hessian": _of("DiagHessian", "BatchDiagHessian"),
        "products": _of("GGNMP", "HMP"),
    }
    outcome = Comparison(truth, net, backward).outcome(groups)
    assert not any(outcome.values()), outcome


def _of(*names: str) -> tuple:
    return tuple(getattr(extensions, name)() for name in names)
