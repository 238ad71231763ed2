"""A Gaussian whose variance is an output too: no square root of its Hessian, but Fisher information."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend, optim
from backpack import extensions as E
from backpack.losses.likelihoods import gaussian
from backpack.vivit import LowRank

N, MANY = 5, 40_000
DATA = torch.Generator().manual_seed(0)
X, Y = (torch.randn(N, size, generator=DATA).double() for size in (3, 2))

# From outputs to means and variances: views, functions of several kinds, variances that means share.
HEADS: dict[str, tuple[int, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "slices": (4, lambda f: (f[:, :2], f[:, 2:].exp())),
    "chunks": (4, lambda f: (f.chunk(2, 1)[0], F.softplus(f.chunk(2, 1)[1]) + 1e-3)),
    "one variance": (3, lambda f: (f[:, :2], f[:, 2:].exp())),
    "one variance, no axis": (3, lambda f: (f[:, :2], f[:, 2].exp())),
    "coupled": (2, lambda f: (f, 0.1 + f.square())),
}


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mean": lambda m, v, y: F.gaussian_nll_loss(m, y, v),
    "extended": lambda m, v, y: extend(nn.GaussianNLLLoss(full=True))(m, y, v),
    "module": lambda m, v, y: nn.GaussianNLLLoss()(m, y, v),
    "sum": lambda m, v, y: F.gaussian_nll_loss(m, y, v, reduction="sum") / Y.numel(),
    "none": lambda m, v, y: F.gaussian_nll_loss(m, y, v, reduction="none").mean(),
}


def net(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def information(
    model: nn.Module,
    head: Callable[[Tensor], tuple[Tensor, Tensor]],
    weights: tuple[float, ...] = (1, 1),
) -> list[Tensor]:
    """``sum_i w_i ((dm_i)^2 / s_i + (ds_i)^2 / 2 s_i^2)`` of the mean, for each sample: ``[N, *p]``."""
    parameters = [*model.parameters()]
    found = [torch.zeros(N, *p.shape).to(p) for p in parameters]
    for n in range(N):
        m, s = head(model(X[n : n + 1]))
        s = s.reshape(1, -1).expand_as(m)
        for mean, variance, w in zip(m[0], s[0], weights, strict=True):
            for entry, curvature in ((mean, 1 / variance), (variance, 1 / (2 * variance**2))):
                gradients = torch.autograd.grad(entry, parameters, retain_graph=True)
                for total, g in zip(found, gradients, strict=True):
                    total[n] += w * curvature.detach() * g.square() / Y.numel()
    return found


def sampled(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    """Diagonals of single samples, from many draws."""
    torch.manual_seed(1)
    with backpack(E.DiagGGNMC(mc_samples=MANY), E.BatchDiagGGNMC(mc_samples=MANY)):
        loss().backward()
    for p in model.parameters():
        assert torch.allclose(p.diag_ggn_mc, p.diag_ggn_mc_batch.sum(0))
    return [p.diag_ggn_mc_batch for p in model.parameters()]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Up to five times the error that a mean of so many draws is expected to have."""
    for mine, right in zip(found, expected, strict=True):
        assert torch.allclose(mine, right, rtol=0.1, atol=0.01 * float(right.max()))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", HEADS)
def test_information(head: str, loss: str) -> None:
    outputs, split = HEADS[head]
    model = extend(net(outputs))
    found = sampled(model, lambda: LOSSES[loss](*split(model(X)), Y))
    assert_close(found, information(model, split))


def test_scores() -> None:
    """They are the gradients of the loss for drawn targets; a small variance counts as the bound."""
    m = torch.randn(3, 2, generator=DATA).double().requires_grad_()
    s = torch.tensor([[0.3, 2.0], [1e-9, 0.5], [1.0, 0.0]]).double().requires_grad_()
    torch.manual_seed(0)
    found = gaussian(m, m.detach(), s)
    assert found is not None and found.scale == 1 / 6
    scores = found.scores(4, None, torch.ones(()).double())
    torch.manual_seed(0)
    for draw, noise in enumerate(torch.randn(4, 3, 2, dtype=torch.float64)):
        y = m.detach() + noise * s.detach().clamp(min=1e-6).sqrt()
        expected = torch.autograd.grad(F.gaussian_nll_loss(m, y, s, reduction="sum"), (m, s))
        assert all(torch.allclose(mine[draw], e) for mine, e in zip(scores, expected, strict=True))


def test_several_terms() -> None:
    """Two likelihoods with weights, and a loss that has a rule beside them."""
    _, split = HEADS["slices"]
    model = extend(net(4))

    def loss() -> Tensor:
        f = model(X)
        m, v = split(f)
        parts = [F.gaussian_nll_loss(m[:, j], Y[:, j], v[:, j]) for j in range(2)]
        return 0.15 * parts[0] + 1.5 * parts[1] + 0.2 * extend(nn.MSELoss())(f, torch.zeros_like(f))

    with backpack(E.BatchDiagGGNExact()):
        (0.2 * extend(nn.MSELoss())(model(X), torch.zeros(N, 4).double())).backward()
    further = [p.diag_ggn_exact_batch for p in model.parameters()]
    right = information(model, split, (0.3, 3.0))
    assert_close(sampled(model, loss), [a + b for a, b in zip(right, further, strict=True)])


def test_factors() -> None:
    """KFAC's of a linear model: the information of its outputs, and the inputs' mean square."""
    torch.manual_seed(0)
    model = extend(nn.Linear(3, 4, bias=False).double())
    torch.manual_seed(1)
    with backpack(E.KFAC(mc_samples=MANY)):
        m, v = HEADS["slices"][1](model(X))
        F.gaussian_nll_loss(m, Y, v).backward()
    B, A = model.weight.kfac
    # In logarithms of variances it is one half.
    expected = torch.cat([(1 / v).sum(0), torch.full((2,), N / 2).double()]).diag() / Y.numel()
    assert torch.allclose(A, X.T @ X / N)
    assert torch.allclose(B, expected.detach(), atol=0.02 * expected.max().item())


def test_exact_quantities_keep_the_hessian() -> None:
    """With signs; what needs a square root of it says what there is."""
    model = extend(net(4))
    for quantity in (E.KFLR(), E.SqrtGGNExact()):
        with pytest.raises(ValueError, match=r"\(KFAC.*Fisher information"), backpack(quantity):
            LOSSES["mean"](*HEADS["slices"][1](model(X)), Y).backward()
    far = Y + 100  # so far away that the loss is flat in the variances, or concave
    with backpack(E.DiagGGNExact(), E.DiagGGNMC(mc_samples=100)):
        LOSSES["mean"](*HEADS["slices"][1](model(X)), far).backward()
    bias = model[2].bias
    assert bias.diag_ggn_exact[2:].min() > 100 > 1 > bias.diag_ggn_mc.max()


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "curved": lambda m, v: F.gaussian_nll_loss(m, Y, v).exp(),
    "mixed": lambda m, v: F.gaussian_nll_loss(m - m.mean(0), Y, v),
    "more": lambda m, v: F.gaussian_nll_loss(m, Y, v) - (m * v).cos().mean(),
    "negative": lambda m, v: -F.gaussian_nll_loss(m, Y, v),
    "by hand": lambda m, v: (v.log() + (m - Y).square() / v).mean() / 2,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_likelihood(name: str) -> None:
    """Nothing is drawn for what is not the loss itself."""
    model = extend(net(4))
    with pytest.raises(ValueError, match="not convex|mixes"), backpack(E.KFAC()):
        OTHERS[name](
            *HEADS["slices"][1](model(X)),
        ).backward()
    assert not hasattr(model[0].weight, "kfac")


def test_many_outputs() -> None:
    """More than a loss is differentiated twice for."""
    model = extend(nn.Sequential(nn.Linear(3, 6000), nn.Unflatten(1, (2, 3000))).double())
    with backpack(E.DiagGGNMC()):
        m, s = model(X).unbind(1)
        F.gaussian_nll_loss(m, torch.zeros_like(m), s.exp()).backward()
    assert model[0].weight.diag_ggn_mc.isfinite().all()


def test_changed_in_place() -> None:
    model = extend(net(4))
    with pytest.raises(RuntimeError, match="gaussian_nll_loss was modified"), backpack(E.KFAC()):
        m, v = HEADS["slices"][1](model(X))
        targets = Y.clone()
        loss = F.gaussian_nll_loss(m, targets, v + 0)
        targets += 1
        loss.backward()


def test_differentiable() -> None:
    """Fields with ``create_graph``: their derivative in a parameter by differences."""
    model = extend(nn.Linear(3, 4).double())

    def value() -> Tensor:
        torch.manual_seed(0)
        with backpack(E.DiagGGNMC(mc_samples=3)):
            m, v = HEADS["slices"][1](model(X))
            F.gaussian_nll_loss(m, Y, v).backward(create_graph=True)
        return model.weight.diag_ggn_mc.sum()

    (g,) = torch.autograd.grad(value(), model.bias)
    for j, direction in enumerate(torch.eye(4).double()):
        ends = []
        for sign in (1, -1):
            model.bias.data += sign * 1e-5 * direction
            ends.append(value().item())
            model.bias.data -= sign * 1e-5 * direction
        assert float(g[j]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-6)


def test_uses() -> None:
    """What stands on sampled columns takes them: spectra, eigenvalue corrections, optimizers."""
    model = extend(net(4))
    with LowRank(columns="mc", mc_samples=2) as curvature:
        LOSSES["mean"](*HEADS["slices"][1](model(X)), Y).backward()
    assert float(curvature.eigvalsh()[0]) > 0
    optimizer: Any = optim.EKFAC(model, lr=0.05, damping=0.1)
    losses = []
    for _ in range(15):
        with optimizer.backpack():
            loss = LOSSES["mean"](*HEADS["slices"][1](model(X)), Y)
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
