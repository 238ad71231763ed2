"""One step of an optimizer on a random program, against dense linear algebra."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backpack import backpack, extend, optim
from backpack import extensions as E
from tests.fuzz.draft import NoSuchProgram
from tests.fuzz.trial import ERRORS, Case, Verdict, draw, truths_of
from tests.idioms.reference import Truth
from tests.optim.problems import dense

LR, DAMPING, L2, LARGEST = 0.3, 0.6, 0.2, 120
Blocks = Callable[[Case, Truth, Any], dict[str, Tensor]]


def _diagonals(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.diag(v.flatten()) for n, v in values.items()}


def _damped(values: dict[str, Tensor], gamma: float) -> dict[str, Tensor]:
    return {n: b + gamma * torch.eye(len(b)).to(b) for n, b in values.items()}


def _saved(extension: E.BackpropExtension, gamma: float) -> Blocks:
    """Blocks from a Kronecker-factored quantity, which has a test of its own."""

    def blocks(case: Case, truth: Truth, backward: Callable[[], None]) -> dict[str, Tensor]:
        with backpack(extension):
            backward()
        found = {}
        for name, p in case.built.program.named_parameters():
            value = p.__dict__.pop(extension.savefield, None)
            p.grad = None
            if value is not None:
                found[name] = dense(value, gamma)
        return found

    return blocks


GAMMA = DAMPING + L2
OPTIMIZERS: dict[str, tuple[Callable[..., Any], Blocks]] = {
    "DiagGGNExact": (
        optim.DiagGGNExact,
        lambda c, t, b: _damped(_diagonals(t.value("diag_ggn_exact")), GAMMA),
    ),
    "DiagHessian": (
        optim.DiagHessian,
        lambda c, t, b: _damped({n: d.abs() for n, d in _diagonals(t.value("diag_h")).items()}, GAMMA),
    ),
    "SumGradSquared": (
        lambda *a, **k: optim.SumGradSquared(*a, reduction="sum", **k),
        lambda c, t, b: _damped(_diagonals(t.value("sum_grad_squared")), GAMMA),
    ),
    "CGNewton": (
        lambda *a, **k: optim.CGNewton(*a, tol=0, atol=1e-13, **k),
        lambda c, t, b: _damped(t.ggn, GAMMA),
    ),
    "KFLR": (optim.KFLR, _saved(E.KFLR(), GAMMA)),
    "EKFLR": (optim.EKFLR, _saved(E.EKFLR(), GAMMA)),
}


def trial(seed: int, length: tuple[int, int] = (1, 5), direct: bool = True) -> Verdict:
    """Draw a program, a loss and an optimizer, and compare one step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case, rng = draw(seed, length, direct)
            truth = truths_of(case)[0]
        except (NoSuchProgram, RuntimeError, ValueError, IndexError):
            return Verdict("no program")
        if (
            sum(p.numel() for p in truth.at.parameters.values()) > LARGEST
            or not truth.convex
            or case.built.reordered
        ):
            return Verdict("no program")
        name = rng.choice(list(OPTIMIZERS))
        return _judged(name, case, truth, f"{case} | {name}")


def _judged(name: str, case: Case, truth: Truth, what: str) -> Verdict:
    program, (make, blocks) = case.built.program, OPTIMIZERS[name]
    extend(program, batch_dim=case.built.batch_dim)

    def backward() -> None:
        case.above.loss(case.outputs()).backward()

    parameters = {n: p for n, p in program.named_parameters() if n in truth.at.parameters}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    gradients = {n: g.sum(0) for n, g in truth.grad_batch.items()}
    try:
        matrices = blocks(case, truth, backward)
        optimizer = make(program, LR, DAMPING, L2)
        with optimizer.backpack():
            backward()
        taking_part = {n for n, p in parameters.items() if p.grad is not None}
        optimizer.step()
    except ERRORS as error:
        return Verdict("refused apart" if case.built.apart else "refused mixing", str(error), what)
    for n, p in parameters.items():
        expected = before[n]
        if n in taking_part and not bool(matrices[n].isfinite().all()):
            continue  # a factor that is zero: no ratio of traces tells how to share the damping
        if n in taking_part:
            rhs = gradients[n] + L2 * before[n]
            step = torch.linalg.solve(matrices[n], rhs.flatten()).reshape(rhs.shape)
            expected = before[n] - LR * step
        if not torch.allclose(p, expected, rtol=1e-6, atol=1e-9):
            error = float((p - expected).abs().max())
            return Verdict("WRONG", f"{n} of shape {tuple(p.shape)} is off by {error:.1e}", what)
    return Verdict("agree", what=what)
