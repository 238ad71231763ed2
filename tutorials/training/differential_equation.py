"""
Curvature for a differential equation
=====================================

A network ``u(x)`` learns to solve Poisson's equation, ``-laplace(u) = f`` in a square and ``u = 0`` on
its border. The loss contains second derivatives of the network, and is badly conditioned: first-order
optimizers are slow. Here five optimizers get the same processor time: Adam, L-BFGS, and three that take
curvature from the backward pass, KFAC and EKFAC as `Dangel, Müller and Zeinhofer
<https://arxiv.org/abs/2405.15603>`_ apply them to such losses, and the exact Gauss-Newton matrix.
"""

import math
import time
from collections.abc import Callable, Iterator

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from backpack import backpack, extend, optim
from backpack.extensions import EKFLR, KFLR, DiagGGNExact

BUDGET = 5.0  # seconds of processor time for each
threads = torch.get_num_threads()
torch.set_num_threads(1)  # matrices are small

# %%
# The equation
# ------------
#
# The solution is known, so that errors can be told. Points are drawn once.

generator = torch.Generator().manual_seed(1)
inside = torch.rand(400, 2, generator=generator).double()
border = torch.rand(120, 2, generator=generator).double()
side = torch.arange(120) % 4
border[torch.arange(120), side % 2] = (side // 2).double()
grid = torch.cartesian_prod(torch.linspace(0, 1, 50), torch.linspace(0, 1, 50)).double()


def solution(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(-1)


def network() -> nn.Sequential:
    """The same parameters each time."""
    torch.manual_seed(0)
    layers = (nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    return nn.Sequential(*layers).double()


def second(u: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
    """The second derivative along an axis."""
    along = torch.zeros_like(x)
    along[:, axis] = 1

    def slope(x: Tensor) -> Tensor:
        return torch.func.jvp(u, (x,), (along,))[1]

    return torch.func.jvp(slope, (x,), (along,))[1]


def residuals(u: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """What should be zero: inside, and on the border."""
    laplace = second(u, inside, 0) + second(u, inside, 1)
    return laplace.squeeze(-1) + 2 * math.pi**2 * solution(inside), u(border).squeeze(-1)


def losses(u: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    first, second = residuals(u)
    return first.square().mean(), second.square().mean()


def backward_residuals(u: Callable[[Tensor], Tensor]) -> Tensor:
    """The same by ``torch.autograd.grad``, faster for gradients alone; scaled as in the loss."""
    x = inside.clone().requires_grad_()
    (du,) = torch.autograd.grad(u(x).sum(), x, create_graph=True)
    parts = [torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    first = parts[0] + parts[1] + 2 * math.pi**2 * solution(inside)
    return torch.cat([first / len(inside) ** 0.5, u(border).squeeze(-1) / len(border) ** 0.5])


def backward_loss(u: Callable[[Tensor], Tensor]) -> Tensor:
    return backward_residuals(u).square().sum()


# %%
# First-order optimizers
# ----------------------
#
# Each optimizer here is a generator that makes a step each time it is asked.


def adam(lr: float, decay: float = 1.0) -> Callable[[nn.Module], Iterator[None]]:
    """``decay``: by which the learning rate falls over the budget."""

    def optimizer(model: nn.Module) -> Iterator[None]:
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        start = time.process_time()
        while True:
            spent = (time.process_time() - start) / BUDGET
            optimizer.param_groups[0]["lr"] = lr * decay**spent
            optimizer.zero_grad()
            backward_loss(model).backward()
            optimizer.step()
            yield

    return optimizer


def lbfgs(model: nn.Module) -> Iterator[None]:
    optimizer = torch.optim.LBFGS(
        *(model.parameters(), 1.0, 10),
        history_size=100,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = backward_loss(model)
        loss.backward()
        return loss

    while True:
        optimizer.step(closure)
        yield


# %%
# Kronecker factors of both terms
# -------------------------------
#
#
# The Gauss-Newton matrix is a sum of two, that of the residuals inside and that of those on the
# border. Each has Kronecker factors, from a backward pass of its own; a layer maps values and
# derivatives alike (``kfac_approx="expand"``). The step in each parameter is that of the sum of both
# products, damped, which a few conjugate-gradient iterations solve: it costs no more than products of
# small matrices.

Blocks = dict[nn.Parameter, list]


def factors(model: nn.Module, quantity: KFLR | EKFLR) -> tuple[Tensor, Blocks]:
    """The loss, with gradients in ``p.grad``, and each term's curvature of each parameter."""
    found: Blocks = {p: [] for p in model.parameters()}
    total = torch.zeros((), dtype=torch.float64)
    for loss in losses(model):
        with backpack(quantity):
            loss.backward()
        total = total + loss.detach()
        for p in found:
            # The residuals inside do not depend on the last bias.
            if hasattr(p, quantity.savefield):
                found[p].append(getattr(p, quantity.savefield))
                delattr(p, quantity.savefield)
    return total, found


def solved(blocks: list, gradient: Tensor, damping: float) -> Tensor:
    """``(sum of blocks + damping I)^-1 gradient``, by conjugate gradients."""
    x, r = torch.zeros_like(gradient), gradient.clone()
    p, squared = r.clone(), r.square().sum()
    first = squared
    for _ in range(50):
        product = damping * p + sum(block.apply(p) for block in blocks)
        x = x + squared / (p * product).sum() * p
        r = r - squared / (p * product).sum() * product
        squared, before = r.square().sum(), squared
        if squared < 1e-12 * first:
            break
        p = r + squared / before * p
    return x


# %%
# How far to go
# -------------
#
# A direction ``d`` and the last step ``v`` make the next step, ``a d + b v``, at the minimum of the
# quadratic model with the exact Gauss-Newton matrix, ``2 J^T J``, of all parameters together. That
# takes the Jacobian's products with ``d`` and ``v``: no learning rate is left to choose.

Step = list[Tensor]


def jacobian_products(model: nn.Module, steps: list[Step]) -> Tensor:
    """Of all residuals, with each step: ``J^T w`` is linear in ``w``, and its derivative is ``J^T``."""
    residual = backward_residuals(model)
    w = torch.ones_like(residual, requires_grad=True)
    slopes = torch.autograd.grad(residual, list(model.parameters()), w, create_graph=True)
    return torch.stack([torch.autograd.grad(slopes, w, step, retain_graph=True)[0] for step in steps])


def inner(a: Step, b: Step) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def best_step(model: nn.Module, directions: list[Step], damping: float) -> Step:
    """The combination of directions at which the quadratic model is least."""
    gradient = [p.grad for p in model.parameters() if p.grad is not None]
    J = jacobian_products(model, directions)
    squares = torch.stack([torch.stack([inner(a, b) for b in directions]) for a in directions])
    slopes = torch.stack([inner(gradient, d) for d in directions])
    weights = -torch.linalg.pinv(2 * J @ J.T + damping * squares, hermitian=True) @ slopes
    return [
        sum(w * x for w, x in zip(weights, xs, strict=True)) for xs in zip(*directions, strict=True)
    ]


def kronecker(quantity: KFLR | EKFLR, damping: float, every: int = 1) -> Callable:
    """``every``: curvature is made anew in every so many steps."""

    def optimizer(model: nn.Module) -> Iterator[None]:
        extend(model)
        parameters, last, blocks = list(model.parameters()), list[Step](), Blocks()
        step = 0
        while True:
            model.zero_grad()
            if step % every == 0:
                _, blocks = factors(model, quantity)
            else:
                backward_loss(model).backward()
            direction = [solved(blocks[p], p.grad, damping) for p in parameters if p.grad is not None]
            move = best_step(model, [direction, *last], damping)
            with torch.no_grad():
                for p, x in zip(parameters, move, strict=True):
                    p.add_(x)
            last, step = [move], step + 1
            yield

    return optimizer


# %%
# The exact Gauss-Newton matrix
# -----------------------------
#
#
# There are fewer residuals than parameters, so that :class:`~backpack.optim.GramNewton` can solve
# with the whole matrix, by that of scalar products of residuals' gradients. How far to go is found by
# halving.


def gauss_newton(model: nn.Module) -> Iterator[None]:
    optimizer = optim.GramNewton(model, lr=1.0, damping=1e-6)
    parameters = list(model.parameters())
    while True:
        optimizer.zero_grad()
        before = [p.detach().clone() for p in parameters]
        with optimizer.backpack(forwards="further"):
            loss = sum(losses(model))
            loss.backward()
        optimizer.step()
        step = [p.detach() - x for p, x in zip(parameters, before, strict=True)]
        for halvings in range(12):
            with torch.no_grad():
                for p, x, d in zip(parameters, before, step, strict=True):
                    p.copy_(x + 0.5**halvings * d)
            if backward_loss(model) < loss:
                break
        yield


# %%
# What its diagonal is by plain autograd, for one weight:

model = network()
weight = model[2].weight
rows = torch.stack(
    [torch.autograd.grad(r, weight, retain_graph=True)[0].square() for r in backward_residuals(model)]
)
extend(model)
with backpack(DiagGGNExact(), forwards="further"):
    first, last = losses(model)
    (first + last).backward()
torch.testing.assert_close(weight.diag_ggn_exact, 2 * rows.sum(0))

# %%
# On the same budget
# ------------------
#
#
# Settings are the best of some that were tried with this budget, for each optimizer. Adam: learning
# rates 0.003, 0.01 and 0.03, constant or falling to a tenth. KFAC: damping 0.003, 0.01, 0.03, 0.1 and
# 0.3, EKFAC: 0.03, 0.1, 0.3 and 1, with curvature in every step or in every tenth. L-BFGS and
# Gauss-Newton: as they are.

OPTIMIZERS = {
    "Adam": adam(0.01),
    "L-BFGS": lbfgs,
    "KFAC": kronecker(KFLR(kfac_approx="expand"), 0.1, every=10),
    "EKFAC": kronecker(EKFLR(), 0.3, every=10),
    "Gauss-Newton": gauss_newton,
}


def train(name: str) -> list[tuple[float, float]]:
    """Seconds of processor time and errors, in the norm of the solution on a grid."""
    model, curve, spent = network(), list[tuple[float, float]](), 0.0
    steps = OPTIMIZERS[name](model)
    count, looked = 0, 0.0
    while spent < BUDGET:
        start = time.process_time()
        next(steps)
        spent += time.process_time() - start
        count += 1
        if spent > looked:
            looked = spent + BUDGET / 60
            with torch.no_grad():
                error = (model(grid).squeeze(-1) - solution(grid)).norm() / solution(grid).norm()
            curve.append((spent, float(error)))
    print(f"{name:12} {count:5} steps, error {curve[-1][1]:.1e}")
    return curve


figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
curves = {name: train(name) for name in OPTIMIZERS}
for name, curve in curves.items():
    axes.semilogy(*zip(*curve, strict=True), label=name)
axes.set(xlabel="seconds of processor time, one thread", ylabel="relative error of the solution")
axes.set_title(f"Poisson's equation, 520 points; torch {torch.__version__}", fontsize="medium")
axes.legend(ncols=2)
plt.show()
torch.set_num_threads(threads)
assert curves["Gauss-Newton"][-1][1] < curves["Adam"][-1][1]

# %%
# On one core of a server, beside other work (2026-11-27), five seconds made errors of 0.11 by Adam,
# 0.03 by KFAC and EKFAC, 0.005 by L-BFGS and 0.0003 by the exact Gauss-Newton matrix. So factors do
# better than Adam, and do not reach L-BFGS here: the network is small, so that new factors cost some
# twenty gradients, most of it not arithmetic; and a block for each parameter leaves out what
# parameters have to do with each other, which matters for this loss. Where there are few residuals,
# :class:`~backpack.optim.GramNewton` is the one to try first; factors are for networks and batches
# that are too large for it.
