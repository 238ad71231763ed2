"""Several forward passes below one loss: the same samples, or further ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import (
    EKFLR,
    GGNMP,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

N = 6
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(N) % 2


def model() -> nn.Module:
    torch.manual_seed(0)
    return extend(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double())


def outputs(net: nn.Module, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    yield from ((net(x), y) for x, y in zip(X.split(sizes), Y.split(sizes), strict=True))


def joined(net: nn.Module, sizes: list[int]) -> Tensor:
    return F.cross_entropy(torch.cat([f for f, _ in outputs(net, sizes)]), Y)


def added(net: nn.Module, sizes: list[int]) -> Tensor:
    return sum(
        (F.cross_entropy(f, y, reduction="sum") / N for f, y in outputs(net, sizes)), torch.zeros(())
    )


def picked(net: nn.Module, sizes: list[int]) -> Tensor:
    """As policies are written: log-probabilities of what was chosen."""
    chosen = [f.log_softmax(1)[range(len(y)), y] for f, y in outputs(net, sizes)]
    return -torch.cat(chosen).mean()


def written(net: nn.Module, sizes: list[int]) -> Tensor:
    buffer, start = torch.zeros(N, 2).double(), 0
    for f, _ in outputs(net, sizes):
        buffer[start : start + len(f)] = f
        start += len(f)
    return F.cross_entropy(buffer, Y)


QUANTITIES = (BatchGrad(), Variance(), SumGradSquared(), BatchDiagGGNExact(), BatchDiagHessian())
LOSSES: dict[str, Callable[[nn.Module, list[int]], Tensor]] = {
    "cat": joined,
    "sum": added,
    "log-probabilities": picked,
    "written": written,
}


def values(net: nn.Module, *names: str) -> list[dict[str, Tensor]]:
    return [{name: getattr(p, name) for name in names} for p in net.parameters()]


FIELDS = ("grad_batch", "variance", "sum_grad_squared", "diag_ggn_exact_batch", "diag_h_batch")


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("sizes", [[1] * N, [1, 3, 2], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_further_samples_are_one_batch(name: str, sizes: list[int], gradient: bool) -> None:
    """In pieces or as one batch (which other tests compare with brute force): the same."""
    whole = model()
    with backpack(*QUANTITIES):
        F.cross_entropy(whole(X), Y).backward()
    net = model()
    with backpack(*QUANTITIES, forwards="further", gradient=gradient):
        LOSSES[name](net, sizes).backward()
    torch.testing.assert_close(values(net, *FIELDS), values(whole, *FIELDS))


@pytest.mark.parametrize("sizes", [[1] * N, [1, 3, 2]], ids=str)
def test_other_quantities_of_further_samples(sizes: list[int]) -> None:
    exts = (KFLR(), EKFLR(), SqrtGGNExact(), GGNMP(), DiagGGNExact(), DiagHessian())
    whole, net = model(), model()
    with backpack(*exts):
        F.cross_entropy(whole(X), Y).backward()
    with backpack(*exts, forwards="further"):
        joined(net, sizes).backward()
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(list(p.kflr), list(q.kflr))
        torch.testing.assert_close(p.ekflr[1], q.ekflr[1])
        torch.testing.assert_close(p.sqrt_ggn_exact.square(), q.sqrt_ggn_exact.square())
        torch.testing.assert_close(p.ggnmp(p.detach()[None]), q.ggnmp(q.detach()[None]))
        torch.testing.assert_close((p.diag_ggn_exact, p.diag_h), (q.diag_ggn_exact, q.diag_h))


@pytest.mark.parametrize("name, sizes", [(n, s) for n in LOSSES for s in ([1] * N, [3, 3])])
def test_the_user_is_asked(name: str, sizes: list[int]) -> None:
    net = model()
    loss = LOSSES[name](net, sizes)
    message = (
        rf"{len(sizes)} forward passes, of {sizes[0]}, [\s\S]*forwards='same'[\s\S]*forwards='further'"
    )
    with pytest.raises(RuntimeError, match=message), backpack(BatchGrad()):
        loss.backward(retain_graph=True)
    assert not any(hasattr(p, "grad_batch") for p in net.parameters())
    with backpack(DiagGGNExact()):  # which does not depend on it
        loss.backward(retain_graph=True)
    # The same graph may be looked at both ways.
    for forwards, samples in (("further", N), ("same", sizes[0]), ("further", N)):
        with backpack(BatchGrad(), forwards=forwards):
            loss.backward(retain_graph=True)
        for p in net.parameters():
            assert p.grad_batch.shape == (samples, *p.shape)
            net.zero_grad()


# Where rows meet, or do not depend on each other, nothing has to be said.
MEETING: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "distance": lambda m, a, b: (m(a) - m(b)).square().mean(),
    "product": lambda m, a, b: (m(a) * m(b)).sum(1).exp().mean(),
    "triplet": lambda m, a, b: F.triplet_margin_loss(m(a), m(b), m(a.roll(1, 1))),
    "side by side": lambda m, a, b: torch.cat([m(a), m(b)], 1).square().mean(),
    "stacked": lambda m, a, b: torch.stack([m(a), m(b)], 1).square().mean(),
    "pooled": lambda m, a, b: torch.stack([m(a), m(b)]).mean(0).square().mean(),
    "divergence": lambda m, a, b: F.kl_div(m(a).log_softmax(1), m(b).softmax(1), reduction="sum"),
}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", MEETING)
def test_rows_that_meet_are_the_same_samples(name: str, samples: int) -> None:
    net, a, b = model(), X[:samples], X[3 : 3 + samples]
    if name == "pooled" and samples == 1:
        return  # a stack of single rows
    with backpack(BatchGrad()):
        MEETING[name](net, a, b).backward()
    share = samples if name != "divergence" else 1
    shares = [MEETING[name](net, a[n : n + 1], b[n : n + 1]) / share for n in range(samples)]
    parameters = list(net.parameters())
    for n, value in enumerate(shares):
        for p, g in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            torch.testing.assert_close(p.grad_batch[n], g)


def test_models_that_depend_on_each_other_have_the_same_samples() -> None:
    """An encoder and a head, and a state that is handed on, for two batches."""
    torch.manual_seed(0)
    encoder, head = extend(nn.Linear(3, 3)).double(), extend(nn.Linear(3, 2)).double()
    parts = X.split([2, 4])
    with backpack(BatchGrad(), forwards="further"):
        F.cross_entropy(torch.cat([head(encoder(x).tanh()) for x in parts]), Y).backward()
    both = nn.Sequential(encoder, nn.Tanh(), head)
    found = {name: p.grad_batch for name, p in both.named_parameters()}
    with backpack(BatchGrad()):
        F.cross_entropy(both(X), Y).backward()
    torch.testing.assert_close(found, {name: p.grad_batch for name, p in both.named_parameters()})

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(5, 2)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.cell(torch.cat([x, h], 1)).tanh()

    step, h = extend(Step().double()), torch.zeros(1, 2).double()
    with backpack(BatchGrad()):  # one sample, whose steps are chained
        for n in range(3):
            h = step(X[n : n + 1], h)
        h.sum().backward()
    torch.testing.assert_close(step.cell.weight.grad_batch[0], step.cell.weight.grad)


def test_a_head_over_joined_rows_is_refused() -> None:
    encoder, head = extend(nn.Linear(3, 3)).double(), extend(nn.Linear(3, 2)).double()
    loss = F.cross_entropy(head(torch.cat([encoder(X[:2]), encoder(X[2:])])), Y)
    for forwards in (None, "further"):
        with pytest.raises(RuntimeError, match="forward"), backpack(BatchGrad(), forwards=forwards):
            loss.backward(retain_graph=True)


def test_other_batch_sizes_name_the_remedy() -> None:
    net = model()
    loss = net(X[:2]).sum() + net(X[2:]).sum()
    with pytest.raises(RuntimeError, match="forwards='further'"), backpack(BatchGrad()):
        loss.backward(retain_graph=True)
    with backpack(BatchGrad(), forwards="further"):
        loss.backward()
    assert net[0].weight.grad_batch.shape == (N, 3, 3)


def test_calls_that_are_not_seen() -> None:
    loss = joined(model(), [3, 3])
    block = backpack(BatchGrad(), forwards="further")
    with pytest.raises(RuntimeError, match=r"loss\.backward"), block:
        torch.autograd.backward(loss)


def test_parameters_above_the_outputs() -> None:
    """A temperature that all passes share."""
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    found = []
    for sizes in ([N], [1, 3, 2], [1] * N):
        net = model()
        with backpack(BatchGrad(), forwards="further"):
            logits = torch.cat([f for f, _ in outputs(net, sizes)]) / temperature
            F.cross_entropy(logits, Y).backward()
        found.append(temperature.grad_batch)
    torch.testing.assert_close(found[1:], [found[0]] * 2)


@pytest.mark.parametrize("forwards", ["other", 1])
def test_bad_choices(forwards: Any) -> None:
    with pytest.raises(ValueError, match="forwards must be one of"):
        backpack(BatchGrad(), forwards=forwards)
