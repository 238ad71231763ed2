"""The monitor's quantities on the case table: every operation, with several losses, by brute force."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backpack.cockpit import hess_trace, tic_diag, tic_trace, watch
from backpack.cockpit.histograms import symlog_edges
from backpack.testing.oracle import Oracle
from tests.cases import CASES, LOSSES, Case, LossCase
from tests.cockpit.test_quantities import close

pytestmark = pytest.mark.usefixtures("each_way")

FIRST = """loss grad_norm param_norm update_size norm_test inner_test ortho_test grad_noise grad_signal
mean_gsnr early_stopping alpha hard_samples grad_hist""".split()
RATE = 1e-3


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Truth:
    """A step by brute force."""

    def __init__(self, case: Case, loss: nn.Module, model: nn.Module, X: Any, y: Tensor) -> None:
        oracle = Oracle(model, loss, X, y, case.batch_dim, output_dim=case.output_dim)
        self.oracle, self.B = oracle, oracle.samples
        output = oracle.output()
        value = oracle.loss(output)
        grads = torch.autograd.grad(value, list(oracle.parameters.values()), allow_unused=True)
        # What takes no part has no entries.
        self.used = {n for n, g in zip(oracle.parameters, grads, strict=True) if g is not None}
        self.g_n = self.B * self.rows(oracle.grad_batch)
        output, self.loss = output.detach(), float(value.detach())
        every = type(loss)(reduction="none")(output, y)
        every = every * (self.loss / float(every.sum().detach()))
        # Class labels have no axis of classes.
        masks = [oracle._mask(output, n) for n in range(self.B)]
        masks = [m.squeeze(1) if m.dim() > every.dim() else m for m in masks]
        self.losses = self.B * torch.stack([(every * m).sum() for m in masks])

    def rows(self, values: dict[str, Tensor]) -> Tensor:
        """A row for each sample."""
        found = [g.reshape(self.B, -1) for name, g in values.items() if name in self.used]
        return torch.cat(found, 1).detach()

    def first(self) -> dict[str, Any]:
        """The formulas, written down."""
        g_n, B = self.g_n, self.B
        pairs = max(B * (B - 1), 1)
        g, second = g_n.mean(0), (g_n**2).mean(0)
        norms, dots, total = (g_n**2).sum(1), g_n @ g, float(g @ g)
        variance = g_n.var(0, correction=min(1, B - 1))
        noise = float(variance.sum())
        return {
            "loss": self.loss,
            "grad_norm": total**0.5,
            "norm_test": (((norms.sum() / total) - B) / pairs).sqrt(),
            "inner_test": ((((dots**2).sum() / total**2) - B) / pairs).sqrt(),
            "ortho_test": ((norms / total - dots**2 / total**2).sum().clamp(min=0) / pairs).sqrt(),
            "grad_noise": noise,
            "grad_signal": total - noise / B,
            "mean_gsnr": (g**2 / (second - g**2 + 1e-5)).mean(),
            "early_stopping": 1 - B * (g**2 / (variance + 1e-5)).mean(),
            "update_size": RATE * total**0.5,
        }

    def second(self) -> dict[str, float]:
        """Of the exact GGN and the Hessian's diagonal."""
        ggn = self.rows(self.oracle.diag_ggn_batch).sum(0)
        hessian = self.rows(self.oracle.diag_h_batch).sum(0)
        second = (self.g_n**2).mean(0)
        return {
            "hess_trace": float(ggn.sum()),
            "tic_trace": float(second.sum() / (ggn.sum() + 1e-7)),
            "tic_diag": float((second / (hessian + 1e-7)).sum()),
        }


def parabola(start: Truth, end: Truth, d: Tensor) -> float:
    """Alpha by the normal equations."""
    t = d.norm()
    slopes = [truth.g_n @ d / t for truth in (start, end)]
    y = torch.tensor([start.loss, end.loss, *(float(s.mean()) for s in slopes)])
    variances = [*(truth.losses.var() for truth in (start, end)), *(s.var() for s in slopes)]
    Phi = torch.tensor([[1, 1, 0, 0], [0, t, 1, 1], [0, t**2, 0, 2 * t]])
    inverse = torch.diag(1 / torch.stack(variances).detach())
    _, w1, w2 = torch.linalg.solve(Phi @ inverse @ Phi.T, Phi @ inverse @ y)
    return -1.0 if w2 < 0 else float(2 * t / (-w1 / w2) - 1)


def watched(case: Case, loss: LossCase, quantities: list[Any], steps: int) -> tuple[Any, list[Truth]]:
    """Some steps on one batch; the monitor, and each step by brute force."""
    torch.manual_seed(0)
    model, X = case.model().double(), case.inputs()
    X = tuple(each.double() if each.is_floating_point() else each for each in _tuple(X))
    with torch.no_grad():
        y, lossfunc = loss.target(model(*X)), loss.loss()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    options: dict[str, Any] = {"every": 1, "per": "model", "batch_dim": case.batch_dim}
    truths = []
    with watch(model, optimizer, quantities=quantities, **options) as monitor:
        for _ in range(steps):
            twin = copy.deepcopy({name: value.detach() for name, value in model.state_dict().items()})
            optimizer.zero_grad()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                lossfunc(model(*X), y).backward()
            optimizer.step()
            plain = case.model().double()
            plain.load_state_dict(twin)
            truths.append(Truth(case, lossfunc, plain, X, y))
    return monitor, truths


def _tuple(X: Any) -> tuple[Any, ...]:
    return X if isinstance(X, tuple) else (X,)


@pytest.mark.filterwarnings("ignore:cockpit")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_first_order(case: Case) -> None:
    loss = LOSSES[CASES.index(case) % len(LOSSES)]
    monitor, truths = watched(case, loss, FIRST, 2)
    values = monitor.history().at(0)
    unread = {"alpha", "hard_samples"} if case.output_dim and loss.name.startswith("ce") else set()
    if truths[0].B == 1:  # no variance
        unread = set(FIRST) - {"loss", "grad_norm", "param_norm", "update_size", "grad_hist"}
    assert set(monitor.left_out) <= unread, monitor.left_out
    for name, expected in truths[0].first().items():
        if name not in unread:
            close(values[name], expected, 1e-7)
    if "alpha" not in unread:
        d = -RATE * truths[0].g_n.mean(0)
        close(values["alpha"], parabola(truths[0], truths[1], d), 1e-4)
    edges = torch.tensor(symlog_edges())
    at = torch.bucketize(truths[0].g_n, edges, right=True) - 1
    counts = torch.bincount(at.flatten(), minlength=len(edges) - 1)
    found = torch.tensor(values["grad_hist"]["counts"])
    # Rounding moves entries that are zero up to it, and those at a bin's edge.
    assert int((found - counts).abs().sum()) <= 0.01 * int(counts.sum())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_curvature(case: Case) -> None:
    loss = LOSSES[(CASES.index(case) + 1) % len(LOSSES)]
    chosen = [hess_trace("ggn"), tic_trace("ggn"), tic_diag("hessian")]
    monitor, (truth,) = watched(case, loss, chosen, 1)
    assert monitor.left_out == {}
    for name, expected in truth.second().items():
        close(monitor.history().at(0)[name], expected, 1e-6)
