"""The page on own operations, losses and quantities, run as it stands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from backpack import extensions as E
from backpack import own
from backpack.losses.base import LOSSES
from backpack.quantities.base import BackpropExtension
from backpack.rules.base import RULES
from backpack.testing.oracle import check

PAGE = Path(__file__).parents[2] / "docs" / "own.md"


@pytest.fixture
def page() -> Iterator[dict[str, Any]]:
    """Names that the page defines; its rules are forgotten afterwards."""
    torch.manual_seed(0)
    space: dict[str, Any] = {"__name__": __name__}
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    exec(compile(code, str(PAGE), "exec"), space)
    yield space
    RULES.pop(space["clipped_scale"])
    RULES.pop(space["cube"])
    LOSSES.pop(space["log_cosh"])


def test_tables() -> None:
    """Whatever a quantity may say of itself, every source and every contraction is on the page."""
    text = PAGE.read_text()
    said = [n for n in vars(BackpropExtension) if n in BackpropExtension.__annotations__]
    told = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert set(told) == set(said) - {"savefield", "of", "source", "subsampling"}
    for name in told:
        (default,) = re.findall(rf"^\| `{name}` \| `(.*?)` \|", text, re.MULTILINE)
        assert default.replace('"', "'") == repr(getattr(BackpropExtension, name)), name
    for name in own.__all__:
        each = getattr(own, name)
        if (
            isinstance(each, type)
            and issubclass(each, own.ColumnSource)
            and each is not own.LossGradient
        ):
            assert f"`{name}" in text or f"({name})" in text or each is own.ColumnSource, name
    kept = {"blocks", "written", "tiles", "rows", "take", "tallied", "centred_square_sum"}
    for name, each in vars(own.Form).items():
        if inspect.isfunction(each) and not name.startswith("_") and name not in kept:
            assert f"`{name}" in text, name


def test_batches(page: dict[str, Any]) -> None:
    """Fields that the page computed in batches are those of one batch."""
    found = [(p.grad_max, p.trace_ggn_batch, p.trace_h) for p in page["network"].parameters()]
    with page["backpack"].backpack(
        page["GradientMax"](), page["BatchTraceGGN"](), page["TraceHessian"]()
    ):
        page["lossfunc"](page["network"](page["X"]), page["y"]).backward()
    for p, values in zip(page["network"].parameters(), found, strict=True):
        for a, b in zip(values, (p.grad_max, p.trace_ggn_batch, p.trace_h), strict=True):
            torch.testing.assert_close(a, b)


def test_page(page: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    model, X, y = page["network"], page["X"], page["y"]
    quantities = [E.BatchGrad(), E.Variance(), E.DiagGGNExact(), E.BatchDiagGGNExact(), E.DiagHessian()]
    report = check(model, page["LogCosh"](), X, y, quantities)
    assert report.ok, f"\n{report}"
    with page["backpack"].backpack(
        *(page["GradientMax"](), page["BatchTraceGGN"](), page["TraceHessian"]()),
        *(E.BatchGrad(), E.BatchDiagGGNExact(), E.BatchDiagHessian()),
        debug=True,
    ):
        page["lossfunc"](model(X), y).backward()
    assert "tap clipped_scale: 'scale' (samples 8, axis 0), by its rule" in capsys.readouterr().out
    for p in model.parameters():
        torch.testing.assert_close(p.grad_max, p.grad_batch.flatten(1).abs().amax(1))
        torch.testing.assert_close(p.trace_ggn_batch, p.diag_ggn_exact_batch.flatten(1).sum(1))
        torch.testing.assert_close(p.trace_h, p.diag_h_batch.flatten(1).sum(1))
    _low_rank(page, model, X)


def _low_rank(page: dict[str, Any], model: torch.nn.Module, X: torch.Tensor) -> None:
    """The page's own source of columns, against Jacobians."""
    parameters, expected = list(model.parameters()), [0.0] * 6
    for n, output in enumerate(model(X)):
        rows = [torch.autograd.grad(f, parameters, retain_graph=True) for f in output]
        for j in range(len(parameters)):
            columns = torch.einsum(
                "rc,c...->r...", page["root"][:, n], torch.stack([r[j] for r in rows])
            )
            expected[j] = expected[j] + columns.square().sum(0)
    for p, diagonal in zip(parameters, expected, strict=False):
        torch.testing.assert_close(p.low_rank_diagonal, diagonal)


def test_custom_function(page: dict[str, Any]) -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
            self.weight = torch.nn.Parameter(torch.rand(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(page["cube"](self.before(x), self.weight))

    X, y = torch.randn(5, 4), torch.randn(5, 2)
    quantities = [E.BatchGrad(), E.Variance(), E.DiagGGNExact(), E.SqrtGGNExact()]
    report = check(Network(), torch.nn.MSELoss(), X, y, quantities)
    assert report.ok, f"\n{report}"
