"""Derivatives of the model inside the loss: differential equations, Sobolev losses, penalties."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from backpack import backpack, extend
from backpack.extensions import (
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

# Torch's own, when forward-mode derivatives are first asked for.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

# Each sample's share of a loss, [N], of a model and its inputs.
Shares = Callable[[nn.Module, Tensor], Tensor]
# Residuals of a loss, [N, ...] each, whose squares it sums up, and what else it sums up, [N].
Parts = tuple[list[Tensor], Tensor | float]
Problem = Callable[[nn.Module, Tensor], Parts]


def grad(f: Tensor, x: Tensor) -> Tensor:
    """``df_n / dx_n`` of all samples."""
    return torch.autograd.grad(f.sum(), x, create_graph=True)[0]


def poisson(model: nn.Module, X: Tensor) -> Parts:
    X = X.clone().requires_grad_()
    du = grad(model(X), X)
    laplace = sum(grad(du[:, i], X)[:, i] for i in range(X.shape[1]))
    return [laplace + X.sin().prod(1)], 0.0


def heat(model: nn.Module, X: Tensor) -> Parts:
    """Coordinates apart, as in most programs; the coefficient is a parameter of the model."""
    x, t = (X[:, i : i + 1].clone().requires_grad_() for i in range(2))
    u = model(torch.cat([x, t], 1))
    (u_t,) = torch.autograd.grad(u, t, torch.ones_like(u), create_graph=True)
    (u_x,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x, x, torch.ones_like(u_x), create_graph=True)
    return [u_t - model.coefficient * u_xx], 0.0


def burgers(model: nn.Module, X: Tensor) -> Parts:
    X = X.clone().requires_grad_()
    u = model(X)
    du = grad(u, X)
    u_xx = grad(du[:, 0], X)[:, 0]
    return [du[:, 1] + u.squeeze(1) * du[:, 0] - 0.1 * u_xx], 0.0


def sobolev(model: nn.Module, X: Tensor) -> Parts:
    X = X.clone().requires_grad_()
    u = model(X)
    return [u - X.sum(1, keepdim=True).detach(), grad(u, X) - 1], 0.0


def penalty(model: nn.Module, X: Tensor) -> Parts:
    X = X.clone().requires_grad_()
    u = model(X)
    return [grad(u, X).flatten(1).norm(dim=1) - 1], u.flatten(1).sum(1)


def score(model: nn.Module, X: Tensor) -> Parts:
    """Exact score matching of a model that is the score."""
    X = X.clone().requires_grad_()
    s = model(X)
    trace = sum(grad(s[:, i], X)[:, i] for i in range(X.shape[1]))
    return [s / 2**0.5], trace


def sliced(model: nn.Module, X: Tensor) -> Parts:
    """Sliced score matching of an energy."""
    X = X.clone().requires_grad_()
    v = torch.linspace(-1, 1, X.shape[1])
    s = -grad(model(X), X)
    return [s @ v / 2**0.5], grad(s @ v, X) @ v


def third(model: nn.Module, X: Tensor) -> Parts:
    X = X.clone().requires_grad_()
    u = model(X)
    for _ in range(3):
        u = grad(u, X)[:, :1]
    return [u], 0.0


def by_jvp(model: nn.Module, X: Tensor) -> Parts:
    """The Laplacian, forwards, and the value beside it."""

    def slope(x: Tensor, v: Tensor) -> Tensor:
        return torch.func.jvp(model, (x,), (v,))[1]

    directions = [torch.eye(2)[i].expand_as(X) for i in range(2)]
    laplace = sum(torch.func.jvp(lambda x, v=v: slope(x, v), (X,), (v,))[1] for v in directions)
    return [laplace + model(X)], 0.0


def by_vmap(model: nn.Module, X: Tensor) -> Parts:
    """Gradients and Hessians of one sample, mapped over all, with the parameters as arguments."""
    parameters = dict(model.named_parameters())

    def u(x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).squeeze()

    slopes = torch.func.vmap(torch.func.grad(u))(X)
    hessians = torch.func.vmap(torch.func.hessian(u))(X)
    return [hessians.diagonal(dim1=1, dim2=2).sum(1) + slopes[:, 0]], 0.0


def by_jacrev(model: nn.Module, X: Tensor) -> Parts:
    return [torch.func.jacrev(lambda x: model(x).sum(0))(X)[0]], 0.0


def by_dual_numbers(model: nn.Module, X: Tensor) -> Parts:
    with forward_ad.dual_level():
        u, slope = forward_ad.unpack_dual(model(forward_ad.make_dual(X, torch.ones_like(X))))
    return [u - slope], 0.0


def by_functional(model: nn.Module, X: Tensor) -> Parts:
    jacobian, hvp = torch.autograd.functional.jacobian, torch.autograd.functional.hvp
    J = jacobian(lambda x: model(x).sum(0), X, create_graph=True)
    Hv = hvp(lambda x: model(x).sum(), X, torch.ones_like(X), create_graph=True)[1]
    return [J[0] + Hv], 0.0


def batched(model: nn.Module, X: Tensor) -> Parts:
    X = X.clone().requires_grad_()
    units = torch.eye(2).unsqueeze(1).expand(2, *X.shape)
    (H,) = torch.autograd.grad(grad(model(X), X), X, units, is_grads_batched=True, create_graph=True)
    return [H.diagonal(dim1=0, dim2=2).sum(1)], 0.0


class Inside(nn.Module):
    """A model whose output is the residual, of an input that is a leaf in forward."""

    def __init__(self, how: str = "residual") -> None:
        super().__init__()
        self.net, self.how = mlp(nn.Tanh())[:5], how
        self.head = nn.Linear(2, 1) if how == "head" else None

    def forward(self, X: Tensor) -> Any:
        if self.how == "vmap":
            return torch.func.vmap(torch.func.grad(lambda x: self.net(x).squeeze()))(X)
        if self.how == "jvp":
            return torch.func.jvp(self.net, (X,), (torch.ones_like(X),))[1]
        X = X if X.requires_grad else X.clone().requires_grad_()
        u = self.net(X)
        du = grad(u, X)
        if self.how == "force":
            return u, -du
        if self.how == "head":
            return self.head(du.tanh())
        return sum(grad(du[:, i], X)[:, i] for i in range(2)) + u.squeeze(1)


def of_outputs(model: nn.Module, X: Tensor) -> Parts:
    out = model(X)
    return list(out) if isinstance(out, tuple) else [out], 0.0


def of_outputs_at_a_leaf(model: nn.Module, X: Tensor) -> Parts:
    return of_outputs(model, X.clone().requires_grad_())


class Scales(nn.Module):
    """No product of matrices before the end."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.rand(2) + 1), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x * self.scale).tanh())


def shares_of(problem: Problem, model: nn.Module, X: Tensor) -> Tensor:
    """Each sample's share of the loss, ``[N]``."""
    residuals, rest = problem(model, X)
    return sum((r**2).reshape(len(X), -1).sum(1) for r in residuals) + rest


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Residual(nn.Module):
    """Skips, a weight used twice, a norm within samples, a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(2, width), nn.Linear(width, width)
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(width) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        for _ in range(2):
            h = h + self.inner(self.norm(h)).tanh() * self.scale
        return self.last(h)


class Copies(nn.Module):
    """A weight for each sample, copied before it is used, in forward and backward passes alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.rand(2, 4)), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.bmm(x.unsqueeze(1), self.first.expand(len(x), -1, -1))
        return self.last(h.squeeze(1).tanh())


def mlp(activation: nn.Module, width: int = 4, out: int = 1, inputs: int = 2) -> nn.Module:
    model = nn.Sequential(
        *(nn.Linear(inputs, width), activation, nn.Linear(width, width), activation),
        nn.Linear(width, out),
    )
    model.coefficient = nn.Parameter(torch.tensor(0.3))
    return model


def signals() -> nn.Module:
    return nn.Sequential(
        *(nn.ConvTranspose1d(2, 3, 3, stride=2), nn.Tanh(), nn.Conv1d(3, 4, 3, stride=2)),
        *(nn.Softplus(), nn.Flatten(), nn.LazyLinear(1)),
    )


def images(**options: Any) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, **options), nn.LeakyReLU(0.2), nn.Conv2d(4, 2, 2), nn.Softplus()),
        *(nn.Flatten(), nn.LazyLinear(1)),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Problem, tuple[int, ...]]] = {
    "poisson-tanh": (lambda: mlp(nn.Tanh()), poisson, (5, 2)),
    "poisson-gelu": (lambda: mlp(nn.GELU()), poisson, (5, 2)),
    "poisson-silu": (lambda: mlp(nn.SiLU()), poisson, (5, 2)),
    "poisson-sine": (lambda: mlp(Sine()), poisson, (5, 2)),
    "poisson-residual": (lambda: Residual(4), poisson, (5, 2)),
    "poisson-copies": (Copies, poisson, (5, 2)),
    "as many samples as features": (lambda: mlp(nn.Tanh()), poisson, (4, 2)),
    "as many samples as inputs": (lambda: mlp(nn.Tanh()), poisson, (2, 2)),
    "one sample": (lambda: mlp(nn.Tanh()), poisson, (1, 2)),
    "heat": (lambda: mlp(nn.Tanh()), heat, (5, 2)),
    "burgers": (lambda: mlp(nn.Tanh()), burgers, (6, 2)),
    "third": (lambda: mlp(nn.Tanh()), third, (3, 2)),
    "sobolev-tanh": (lambda: mlp(nn.Tanh()), sobolev, (5, 2)),
    "sobolev-relu": (lambda: mlp(nn.ReLU()), sobolev, (5, 2)),
    "penalty-softplus": (lambda: mlp(nn.Softplus()), penalty, (5, 2)),
    "penalty-points": (lambda: mlp(nn.Tanh()), penalty, (5, 3, 2)),
    "penalty-images": (lambda: images(stride=2, padding=1), penalty, (3, 2, 6, 6)),
    "penalty-images-dilated": (lambda: images(dilation=2), penalty, (3, 2, 7, 7)),
    "penalty-images-groups": (lambda: images(groups=2, stride=3), penalty, (3, 2, 8, 8)),
    "penalty-signals": (signals, penalty, (3, 2, 5)),
    "penalty-linear": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), penalty, (5, 2)),
    "sobolev-linear": (lambda: nn.Linear(2, 1), sobolev, (3, 2)),
    "score": (lambda: mlp(nn.Tanh(), out=2), score, (5, 2)),
    "sliced": (lambda: mlp(nn.Tanh()), sliced, (5, 2)),
    "jvp": (lambda: mlp(nn.Tanh()), by_jvp, (5, 2)),
    "jvp of scales": (Scales, by_jvp, (5, 2)),
    "vmap": (lambda: mlp(nn.Tanh()), by_vmap, (5, 2)),
    "jacrev": (lambda: mlp(nn.GELU()), by_jacrev, (5, 2)),
    "dual numbers": (lambda: mlp(nn.Tanh()), by_dual_numbers, (5, 2)),
    "functional": (lambda: mlp(nn.Tanh()), by_functional, (5, 2)),
    "inside": (Inside, of_outputs, (5, 2)),
    "inside, a force": (lambda: Inside("force"), of_outputs_at_a_leaf, (5, 2)),
    "inside, a head": (lambda: Inside("head"), of_outputs, (5, 2)),
    "inside, vmap": (lambda: Inside("vmap"), of_outputs, (5, 2)),
    "inside, jvp": (lambda: Inside("jvp"), of_outputs, (5, 2)),
    "batched": (lambda: mlp(nn.Tanh()), batched, (5, 2)),
}


def make(name: str) -> tuple[nn.Module, Shares, Tensor]:
    torch.manual_seed(0)
    build, problem, shape = CASES[name]
    X = torch.rand(shape)
    model = build()
    model(X)  # lazy layers
    return model, partial(shares_of, problem), X


def by_loop(model: nn.Module, shares: Shares, X: Tensor) -> dict[str, Tensor]:
    """Individual gradients, one sample after the other."""
    rows = []
    parameters = dict(model.named_parameters())
    for n in range(len(X)):
        share = shares(model, X[n : n + 1]).sum()
        rows.append(torch.autograd.grad(share, parameters.values(), allow_unused=True))
    return {
        name: torch.stack([row[i] for row in rows])
        for i, name in enumerate(parameters)
        if rows[0][i] is not None
    }


def assert_first_order(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    """Fields of BatchGrad, BatchL2Grad, SumGradSquared and Variance, for exactly these parameters."""
    for name, p in model.named_parameters():
        assert hasattr(p, "grad_batch") == (name in wanted), name
        if name not in wanted:
            assert p.grad is None
            continue
        g = wanted[name]
        torch.testing.assert_close(p.grad_batch, g, msg=name)
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)
        torch.testing.assert_close(p.batch_l2, g.square().reshape(len(g), -1).sum(1))
        torch.testing.assert_close(p.sum_grad_squared, g.square().sum(0))
        torch.testing.assert_close(p.variance, g.var(0, unbiased=False))


def first_order() -> list:
    return [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance()]


@pytest.fixture(autouse=True)
def double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("name", "inside"),
    [(name, True) for name in CASES]
    + [(name, False) for name in ("poisson-tanh", "heat", "penalty-images", "jvp", "inside")],
)
def test_first_order(name: str, inside: bool) -> None:
    """The forward pass, and derivatives, inside of the block or before it."""
    model, shares, X = make(name)
    wanted = by_loop(model, shares, X)
    extend(model)
    if inside:
        with backpack(*first_order()):
            shares(model, X).sum().backward()
    else:
        loss = shares(model, X).sum()
        with backpack(*first_order()):
            loss.backward()
    assert_first_order(model, wanted)


@pytest.mark.parametrize("sizes", [(6, 3, 4), (6, 6, 6), (1, 3, 1), (2, 4, 1)])
def test_interior_and_boundary(sizes: tuple[int, ...]) -> None:
    """Each term has points of its own."""
    model, shares, _ = make("burgers")
    X, edge, start = (torch.rand(size, 2) for size in sizes)

    def boundary(model: nn.Module, X: Tensor) -> Tensor:
        return model(X).square().flatten()

    def initial(model: nn.Module, X: Tensor) -> Tensor:
        return shares_of(sobolev, model, X)

    terms = [(shares, X), (boundary, edge), (initial, start)]
    alone = [by_loop(model, share, points) for share, points in terms]
    names = [name for name, _ in model.named_parameters() if any(name in each for each in alone)]
    rows = {}
    for name in names:
        p = model.get_parameter(name)
        parts = [
            each.get(name, torch.zeros(len(points), *p.shape)) / len(points)
            for each, (_, points) in zip(alone, terms, strict=True)
        ]
        rows[name] = torch.cat(parts)
    extend(model)
    with backpack(*first_order(), forwards="further"):
        sum(share(model, points).mean() for share, points in terms).backward()
    assert_first_order(model, rows)
    if len(set(sizes)) > 1:
        with backpack(BatchGrad()), pytest.raises(RuntimeError, match="forwards='further'"):
            sum(share(model, points).mean() for share, points in terms).backward()


def test_residuals_joined() -> None:
    """All residuals in one vector, as for a least-squares solver."""
    model, shares, X = make("sobolev-tanh")
    edge = torch.rand(3, 2)
    wanted = by_loop(model, shares, torch.cat([X, edge]))
    extend(model)
    with backpack(*first_order(), forwards="further"):
        torch.cat([shares(model, X), shares(model, edge)]).sum().backward()
    assert_first_order(model, wanted)


def test_loop_over_samples() -> None:
    model, shares, X = make("poisson-tanh")
    wanted = by_loop(model, shares, X)
    extend(model)
    with backpack(*first_order(), forwards="further"):
        sum(shares(model, x.unsqueeze(0)).sum() for x in X).backward()
    assert_first_order(model, wanted)


@pytest.mark.parametrize("name", ["poisson-tanh", "penalty-linear", "jvp"])
def test_weight_decay_beside(name: str) -> None:
    """What meets no data is no sample's share."""
    model, shares, X = make(name)
    wanted = by_loop(model, shares, X)
    extend(model)
    with backpack(*first_order()):
        decay = sum(p.square().sum() for p in model.parameters())
        (shares(model, X).sum() + 0.1 * decay).backward()
    for name, g in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad_batch, g)
        torch.testing.assert_close(model.get_parameter(name).variance, g.var(0, unbiased=False))


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("by", ["grad", "jvp"])
def test_derivatives_that_are_constant(by: str, size: int) -> None:
    """A linear critic has the same slope everywhere: each sample has its share of what it costs."""
    model, X = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.rand(size, 2)

    def penalty(X: Tensor) -> Tensor:
        if by == "jvp":
            return torch.func.jvp(model, (X,), (torch.ones_like(X),))[1].square().sum(1)
        X = X.clone().requires_grad_()
        return (grad(model(X), X).norm(dim=1) - 1).square()

    wanted = by_loop(model, lambda model, X: penalty(X), X)
    extend(model)
    with backpack(*first_order()):
        penalty(X).sum().backward()
    assert_first_order(model, wanted)
    with backpack(BatchGrad()), pytest.warns(UserWarning, match="no extended model"):
        sum(p.square().sum() for p in model.parameters()).backward()


def test_single_precision() -> None:
    model, shares, X = make("poisson-tanh")
    model, X = model.float(), X.float()
    wanted = by_loop(model, shares, X)
    extend(model)
    with backpack(BatchGrad()):
        shares(model, X).sum().backward()
    for name, g in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad_batch, g, rtol=1e-4, atol=1e-5)


def test_two_models() -> None:
    """A generator below the critic whose gradient is penalized, and the critic's own parameters."""
    torch.manual_seed(0)
    generator, critic = mlp(nn.Tanh(), out=2), mlp(nn.SiLU())
    Z = torch.rand(5, 2)

    def shares(both: nn.Module, Z: Tensor) -> Tensor:
        x = both[0](Z)
        u = both[1](x)
        return (grad(u, x).norm(dim=1) - 1).square() + u.flatten()

    wanted = by_loop(nn.ModuleList([generator, critic]), shares, Z)
    both = nn.ModuleList([extend(generator), extend(critic)])
    with backpack(*first_order()):
        shares(both, Z).sum().backward()
    assert_first_order(both, wanted)


def test_without_the_gradient() -> None:
    model, shares, X = make("poisson-tanh")
    wanted = by_loop(model, shares, X)
    extend(model)
    loss = shares(model, X).sum()
    with backpack(BatchGrad(), gradient=False):
        loss.backward()
    for name, g in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad_batch, g)
        assert model.get_parameter(name).grad is None


def test_a_loss_that_mixes_samples() -> None:
    """As elsewhere each sample has its contribution, ``J_n^T dL/df_n``; they add up to the gradient."""
    model, shares, X = make("penalty-softplus")
    extend(model)
    with backpack(BatchGrad()):
        shares(model, X).mean().square().backward()
    factor = 2 * shares(model, X).mean().item() / len(X)
    for name, g in by_loop(model, shares, X).items():
        torch.testing.assert_close(model.get_parameter(name).grad_batch, factor * g)


@pytest.mark.parametrize("kind", ["permuted", "matrix", "index"])
def test_graphs_that_differ_in_values_only(kind: str) -> None:
    """What is remembered of a graph must not be taken for another one's."""
    N, model = 4, mlp(nn.Tanh())
    X = torch.rand((N, N, 2) if kind == "permuted" else (N, 2))
    weights = torch.arange(1.0, N + 1).unsqueeze(1)
    places = [torch.eye(N), torch.eye(N)[[2, 0, 3, 1]]]
    orders = [(1, 0, 2), (0, 1, 2)]

    def shares(model: nn.Module, turn: int) -> tuple[Tensor, Tensor]:
        """What is summed up, in whatever order, and the same by samples, ``[N]``."""
        x = X.clone().requires_grad_()
        du = grad(model(x), x)
        if kind == "permuted":
            moved = du.permute(orders[turn]).square()
            return moved * weights, (moved * weights).permute(orders[turn]).sum((1, 2))
        moved = places[turn] @ du if kind == "matrix" else du[places[turn].argmax(1)]
        return moved.square() * weights, places[turn].T @ (moved.square() * weights).sum(1)

    plain = copy.deepcopy(model)
    extend(model)
    for turn in (0, 1, 0):
        with backpack(BatchGrad()):
            shares(model, turn)[0].sum().backward()
        for n, share in enumerate(shares(plain, turn)[1]):
            (wanted,) = torch.autograd.grad(share, plain[2].weight, retain_graph=True)
            torch.testing.assert_close(model[2].weight.grad_batch[n], wanted)


def test_a_derivative_that_mixes_samples() -> None:
    model, X = extend(mlp(nn.Tanh())), torch.rand(5, 2)
    X.requires_grad_()
    u = model(X)
    residual = grad(u * u.mean(), X).square().sum()
    with backpack(BatchGrad()), pytest.raises(RuntimeError, match="weight.*where samples are.*mixed"):
        residual.backward()
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())


def test_a_slope_in_another_order() -> None:
    """Where samples are in no regular order nobody knows whose rows are whose: nothing is guessed."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(2))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).sum(1)

    linear, model = Scaled(), mlp(nn.Tanh())
    X, order = torch.rand(5, 2), torch.tensor([2, 0, 4, 1, 3])

    def shares(X: Tensor, moved: Any, back: Any) -> Tensor:
        X = X.clone().requires_grad_()
        slope = grad(linear(X), X)
        terms = (slope[moved] * grad(model(X), X)[moved]).square().sum(1)
        return terms[back] + slope.square().sum(1)

    extend(linear), extend(model)
    with backpack(BatchGrad()), pytest.warns(UserWarning, match="at MulBackward0.*on no axis"):
        shares(X, order, order.argsort()).sum().backward()
    assert not hasattr(linear.scale, "grad_batch")


def test_a_parameter_where_samples_are_mixed() -> None:
    model, X = mlp(nn.Tanh()), torch.rand(5, 2)
    extend(model)
    with backpack(BatchGrad()), pytest.raises(RuntimeError, match="'coefficient'.*summed up or mixed"):
        (model.coefficient * shares_of(poisson, model, X).mean()).backward()


def jacobians(problem: Problem, model: nn.Module, X: Tensor) -> list[dict[str, Tensor]]:
    """Of each sample's residuals in the parameters, ``[r, *p]``."""
    parameters, found = dict(model.named_parameters()), []
    for n in range(len(X)):
        residuals, _ = problem(model, X[n : n + 1])
        entries = torch.cat([r.flatten() for r in residuals])
        rows = [
            torch.autograd.grad(e, parameters.values(), retain_graph=True, materialize_grads=True)
            for e in entries
        ]
        columns = zip(*rows, strict=True)
        found.append({name: torch.stack(c) for name, c in zip(parameters, columns, strict=True)})
    return found


@pytest.mark.parametrize("name", CASES)
def test_gauss_newton(name: str) -> None:
    """``J^T H J`` with the Jacobian of the residuals."""
    model, shares, X = make(name)
    J = jacobians(CASES[name][1], model, X)
    reached = by_loop(model, shares, X)
    extend(model)
    exts = [DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact(), KFLR(), DiagGGNMC(1000), GGNMP()]
    with backpack(*exts):
        shares(model, X).sum().backward()
    for key, p in model.named_parameters():
        if key not in reached:
            assert not any(hasattr(p, ext.savefield) for ext in exts)
            continue
        rows = torch.stack([2**0.5 * jacobian[key] for jacobian in J])
        diagonals = rows.square().sum(1)
        torch.testing.assert_close(p.diag_ggn_exact_batch, diagonals)
        torch.testing.assert_close(p.diag_ggn_exact, diagonals.sum(0))
        flat = rows.reshape(-1, p.numel())
        root = p.sqrt_ggn_exact.reshape(-1, p.numel())
        torch.testing.assert_close(root.T @ root, flat.T @ flat)
        v = torch.rand(2, *p.shape)
        wanted = v.reshape(2, -1) @ flat.T @ flat
        torch.testing.assert_close(p.ggnmp(v).reshape(2, -1), wanted)
        largest = diagonals.sum(0).max()
        torch.testing.assert_close(p.diag_ggn_mc, diagonals.sum(0), atol=0.3 * largest, rtol=0)


@pytest.mark.parametrize("name", ["poisson-gelu", "heat", "burgers", "sobolev-tanh", "score", "sliced"])
def test_hessian_diagonal(name: str) -> None:
    model, shares, X = make(name)
    parameters, wanted = dict(model.named_parameters()), dict[str, list[Tensor]]()
    for n in range(len(X)):
        share = shares(model, X[n : n + 1]).sum()
        found = torch.autograd.grad(share, parameters.values(), create_graph=True, allow_unused=True)
        for (key, p), g in zip(parameters.items(), found, strict=True):
            if g is not None:
                rows = [
                    torch.autograd.grad(e, p, retain_graph=True, materialize_grads=True)[0].flatten()[j]
                    if e.requires_grad
                    else torch.zeros(())
                    for j, e in enumerate(g.flatten())
                ]
                wanted.setdefault(key, []).append(torch.stack(rows).reshape(p.shape))
    extend(model)
    with backpack(DiagHessian(), BatchDiagHessian()):
        shares(model, X).sum().backward()
    for key, p in parameters.items():
        assert hasattr(p, "diag_h") == (key in wanted)
        if key in wanted:
            diagonals = torch.stack(wanted[key])
            torch.testing.assert_close(p.diag_h_batch, diagonals)
            torch.testing.assert_close(p.diag_h, diagonals.sum(0))


@pytest.mark.parametrize(
    "loss",
    [
        lambda r: (r**2).mean(),
        lambda r: r.square().sum(1).mean(),
        lambda r: (r * r).mean(),
        lambda r: torch.mean(torch.pow(r, 2)),
        lambda r: nn.functional.mse_loss(r, torch.zeros_like(r)),
        lambda r: nn.MSELoss()(torch.zeros_like(r), r),
        lambda r: extend(nn.MSELoss())(r, torch.zeros_like(r)),
        lambda r: 0.5 * 2 * (torch.full_like(r, 3) * r**2).mean() / 3,
        lambda r: nn.functional.mse_loss(r, torch.zeros_like(r), reduction="sum") / r.numel(),
    ],
)
def test_spellings_of_a_square(loss: Callable[[Tensor], Tensor]) -> None:
    model, _, X = make("poisson-tanh")
    J = jacobians(poisson, model, X)
    extend(model)
    with backpack(DiagGGNExact(), BatchGrad()):
        (residual,), _ = poisson(model, X)
        loss(residual.unsqueeze(1)).backward()
    for key, p in model.named_parameters():
        if p.grad is not None:
            wanted = sum(2 / len(X) * jacobian[key].square().sum(0) for jacobian in J)
            torch.testing.assert_close(p.diag_ggn_exact, wanted)


def test_interior_and_boundary_curvature() -> None:
    model, shares, X = make("burgers")
    edge = torch.rand(3, 2)
    J = jacobians(burgers, model, X)
    K = jacobians(lambda model, X: ([model(X)], 0.0), model, edge)
    extend(model)
    with backpack(DiagGGNExact(), BatchDiagGGNExact(), forwards="further"):
        (shares(model, X).mean() + nn.functional.mse_loss(model(edge), torch.zeros(3, 1))).backward()
    for key in dict(model[:4].named_parameters()):
        rows = [2 / len(Js) * each[key].square().sum(0) for Js in (J, K) for each in Js]
        p = model.get_parameter(key)
        torch.testing.assert_close(p.diag_ggn_exact_batch, torch.stack(rows))
        torch.testing.assert_close(p.diag_ggn_exact, sum(rows))


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "square": lambda r, s: torch.cat([r, s]).square().sum(),
    "weighted": lambda r, s: (torch.cat([s, 3 * r]).unsqueeze(1) - 0.3).pow(2).mean(),
    "stack": lambda r, s: torch.stack([*r.unbind(), *s.unbind()]).square().sum(),
    "huber": lambda r, s: nn.functional.huber_loss(torch.cat([r, s]).view(-1, 1), torch.ones(9, 1)),
    "extended": lambda r, s: extend(nn.MSELoss())(torch.cat([r, s]), torch.ones(9)),
    "softplus": lambda r, s: nn.functional.softplus(torch.cat([r, s])).mean(),
    "two squares": lambda r, s: torch.cat([r, s]).square().sum() + r.square().sum(),
}


@pytest.mark.parametrize("by", JOINS)
def test_curvature_of_residuals_joined(by: str) -> None:
    """Residuals of passes of different sizes in one vector: its Jacobian, and second derivatives."""
    model, _, X = make("poisson-tanh")
    edge, start = torch.rand(3, 2), torch.rand(2, 2)

    def parts() -> tuple[Tensor, Tensor]:
        return torch.cat([poisson(model, x)[0][0] for x in (X, start)]), model(edge).flatten()

    X = X[:4]
    parameters = dict(model[:4].named_parameters())
    r, s = parts()
    entries = torch.cat([r, s])
    J = [
        torch.autograd.grad(e, parameters.values(), retain_graph=True, allow_unused=True)
        for e in entries
    ]
    H = torch.autograd.functional.hessian(lambda v: JOINS[by](v[:6], v[6:]), entries.detach())
    wanted = {}
    for (key, p), column in zip(parameters.items(), zip(*J, strict=True), strict=True):
        rows = torch.stack([torch.zeros_like(p) if g is None else g for g in column]).flatten(1)
        wanted[key] = torch.einsum("ap,ab,bp->p", rows, H, rows).reshape(p.shape)
    slopes = torch.autograd.grad(JOINS[by](r, s), parameters.values(), create_graph=True)
    diagonals = {}
    for (key, p), g in zip(parameters.items(), slopes, strict=True):
        bends = [
            torch.autograd.grad(e, p, retain_graph=True, materialize_grads=True)[0].flatten()[j]
            for j, e in enumerate(g.flatten())
        ]
        diagonals[key] = torch.stack(bends).reshape(p.shape)
    extend(model)
    with backpack(
        DiagGGNExact(), SqrtGGNExact(), BatchGrad(), DiagHessian(), GGNMP(), forwards="further"
    ):
        JOINS[by](*parts()).backward()
    for key, p in parameters.items():
        torch.testing.assert_close(p.diag_ggn_exact, wanted[key])
        torch.testing.assert_close(p.sqrt_ggn_exact.square().sum((0, 1)), wanted[key])
        torch.testing.assert_close(p.diag_h, diagonals[key])
        assert len(p.grad_batch) == 9
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_penalty_of_the_gradient_of_a_loss(name: str) -> None:
    """Double backpropagation: the loss is a part of what is differentiated."""
    torch.manual_seed(0)
    first = {
        "linear": nn.Linear(3, 4),
        "conv": nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 3)),
    }
    model = nn.Sequential(first[name], nn.Flatten(), nn.Tanh(), nn.Linear(4, 3))
    X, y, lossfunc = torch.randn(4, 3), torch.tensor([0, 1, 2, 1]), extend(nn.CrossEntropyLoss())

    def parts(X: Tensor, y: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
        X = X.clone().requires_grad_()
        out = model(X)
        loss = factor * lossfunc(out, y)
        (gradient,) = torch.autograd.grad(loss, X, create_graph=True)
        return out, loss, gradient

    wanted, diagonals = {}, {}
    for key, p in model.named_parameters():
        rows, diagonal = [], torch.zeros_like(p)
        for n in range(4):
            out, loss, gradient = parts(X[n : n + 1], y[n : n + 1], 1 / 4)
            share = loss + gradient.square().sum()
            rows.append(torch.autograd.grad(share, p, retain_graph=True)[0])
            probs = out.softmax(1).flatten()
            H = (torch.diag(probs) - torch.outer(probs, probs)) / 4
            J, K = (
                torch.stack(
                    [torch.autograd.grad(e, p, retain_graph=True, materialize_grads=True)[0] for e in f]
                )
                for f in (out.flatten(), gradient.flatten())
            )
            diagonal = diagonal + torch.einsum("i...,ij,j...->...", J, H, J) + 2 * K.square().sum(0)
        wanted[key], diagonals[key] = torch.stack(rows), diagonal
    extend(model)
    with backpack(*first_order(), DiagGGNExact()):
        _, loss, gradient = parts(X, y, 1.0)
        (loss + gradient.square().sum()).backward()
    assert_first_order(model, wanted)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.diag_ggn_exact, diagonals[key])


@pytest.mark.parametrize("sizes", [(5, 3), (5, 5), (3, 5), (6, 3)])
@pytest.mark.parametrize("problem", [by_jvp, by_vmap, by_jacrev])
def test_transforms_and_further_samples(problem: Problem, sizes: tuple[int, int]) -> None:
    """Passes inside of transforms are counted, unless there are several that nothing tells apart."""
    model = mlp(nn.Tanh())
    X, edge = (torch.rand(size, 2) for size in sizes)

    def both(model: nn.Module, X: Tensor, edge: Tensor, second: Problem) -> Tensor:
        return shares_of(problem, model, X).mean() + shares_of(second, model, edge).mean()

    def value(model: nn.Module, X: Tensor) -> Parts:
        return [model(X)], 0.0

    def rows(problem: Problem, X: Tensor) -> Tensor:
        shares = shares_of(problem, model, X) / len(X)
        parameter = model[2].weight
        return torch.stack([torch.autograd.grad(s, parameter, retain_graph=True)[0] for s in shares])

    extended = extend(copy.deepcopy(model))
    for second in (value, problem):
        first, last = rows(problem, X), rows(second, edge)
        with backpack(BatchGrad(), forwards="further"):
            loss = both(extended, X, edge, second)
            if second is problem and problem is not by_jvp:  # which has an ordinary pass beside
                with pytest.raises(RuntimeError, match="torch.func"):
                    loss.backward()
            else:
                loss.backward()
                torch.testing.assert_close(extended[2].weight.grad_batch, torch.cat([first, last]))
        # Whose passes there are is seen where not all of them are inside of transforms.
        asked = sizes[0] != sizes[1] or (problem is by_jvp and second is value)
        if asked:
            with pytest.raises(RuntimeError, match="samples"), backpack(BatchGrad()):
                both(extended, X, edge, second).backward()
        if sizes[0] == sizes[1]:
            with backpack(BatchGrad(), forwards="same" if asked else None):
                both(extended, X, edge, second).backward()
            torch.testing.assert_close(extended[2].weight.grad_batch, first + last)


@pytest.mark.parametrize("by", ["jvp", "dual numbers"])
@pytest.mark.parametrize("approx", ["expand", None])
def test_kronecker_factors_of_the_augmented_network(approx: Any, by: str) -> None:
    """A layer is used for the value and for its derivative: shared positions of one weight."""
    model, X = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)), torch.rand(5, 2)
    v = torch.rand_like(X)
    inputs, outputs = [], []
    x, dx = X, v
    for layer, last in ((model[0], False), (model[2], True)):
        h, dh = layer(x), dx @ layer.weight.T
        inputs.append((x, dx))
        outputs.append((h, dh))
        x, dx = (h, dh) if last else (h.tanh(), (1 - h.tanh() ** 2) * dh)
    residual = x + dx
    factors = []
    for (a, da), (h, dh) in zip(inputs, outputs, strict=True):
        A = (a.T @ a + da.T @ da) / len(X) / (2 if approx == "expand" else 1)
        B = torch.zeros(h.shape[1], h.shape[1])
        for j in range(3):
            g, dg = torch.autograd.grad(residual[:, j].sum(), (h, dh), retain_graph=True)
            rows = torch.cat([g, dg]) if approx == "expand" else g + dg
            B = B + 2 * rows.T @ rows
        factors.append((B, A))
    extend(model)
    with backpack(KFLR(kfac_approx=approx)):
        if by == "jvp":
            u, du = torch.func.jvp(model, (X,), (v,))
        else:
            with forward_ad.dual_level():
                u, du = forward_ad.unpack_dual(model(forward_ad.make_dual(X, v)))
        (u + du).square().sum().backward()
    for layer, wanted in zip((model[0], model[2]), factors, strict=True):
        for found, expected in zip(layer.weight.kflr, wanted, strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("quantity", "loss"),
    [
        (KFRA, lambda r: r.square().mean()),
        (PCHMP, lambda r: r.square().mean()),
        (DiagGGNExact, lambda r: (r.square() / (1 + r.square())).mean()),
        (KFAC, lambda r: r.square().mean().sqrt()),
        (GGNMP, lambda r: r.square().mean().sqrt()),
        (DiagHessian, lambda r: r.square().mean().sqrt()),
        (BatchDiagHessian, lambda r: r.mean().square()),
    ],
)
def test_curvature_that_is_refused(quantity: Any, loss: Callable[[Tensor], Tensor]) -> None:
    model, _, X = make("poisson-tanh")
    extend(model)
    field = quantity().savefield
    value = loss(poisson(model, X)[0][0])
    with (
        backpack(quantity()),
        pytest.raises(NotImplementedError, match=f"{field}: .*derivatives of the model.*use "),
    ):
        value.backward(retain_graph=True)
    with backpack(BatchGrad(), quantity(), unsupported="skip") as block:
        value.backward()
    assert block.left_out
    for p in model.parameters():
        assert not hasattr(p, field)
        assert hasattr(p, "grad_batch") == (p.grad is not None)


@pytest.mark.parametrize("beside", [False, True])
def test_tasks_in_a_transform(beside: bool) -> None:
    """Each task takes a step of its own; the parameters of its second pass are made from the first."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    tasks = torch.rand(3, 5, 3)

    def loss(parameters: dict[str, Tensor], task: Tensor) -> Tensor:
        out = torch.func.functional_call(model, parameters, (task[:, :2],))
        return (out - task[:, 2:]).square().mean()

    def share(task: Tensor) -> Tensor:
        parameters = dict(model.named_parameters())
        slopes = torch.func.grad(loss)(parameters, task)
        return loss({key: p - 0.1 * slopes[key] for key, p in parameters.items()}, task)

    def total() -> Tensor:
        shares = torch.func.vmap(share)(tasks)
        return shares.sum() + (model(tasks[:, 0, :2]).square().sum() if beside else 0)

    rows = []
    for task in tasks:
        value = share(task) + (model(task[:1, :2]).square().sum() if beside else 0)
        rows.append(torch.autograd.grad(value, list(model.parameters())))
    extend(model)
    with backpack(*first_order()):
        total().backward()
    names = [name for name, _ in model.named_parameters()]
    wanted = {name: torch.stack(g) for name, g in zip(names, zip(*rows, strict=True), strict=True)}
    assert_first_order(model, wanted)


def test_page() -> None:
    text = (Path(__file__).parents[2] / "docs" / "derivatives.md").read_text()
    torch.set_default_dtype(torch.float32)
    names: dict[str, Any] = {}
    shapes = []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
        here = re.findall(r"^(\S+\.shape)  # (\[.*?\])", block, re.MULTILINE)
        shapes += [(str(list(eval(found, names))), shape) for found, shape in here]
        if "kfac" in block:
            assert [factor.shape for factor in names["model"][2].weight.kfac] == [(16, 16), (16, 16)]
    assert len(shapes) == 3 and all(found == shape for found, shape in shapes)


def test_hessian_products() -> None:
    model, shares, X = make("poisson-tanh")
    p = model[0].weight
    (gradient,) = torch.autograd.grad(shares(model, X).sum(), p, create_graph=True)
    v = torch.rand_like(p)
    (wanted,) = torch.autograd.grad(gradient, p, v)
    extend(model)
    with backpack(HMP()):
        shares(model, X).sum().backward()
    torch.testing.assert_close(p.hmp(v.unsqueeze(0))[0], wanted)
