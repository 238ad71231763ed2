"""Operations on one sample alone, whose gradients autograd computes, and their forms together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backpack import backpack, extend, extensions, mark
from backpack.engine import alone
from backpack.forms.base import Dense, Form
from backpack.forms.layout import Layout
from backpack.forms.outer import Outer
from backpack.forms.ragged import beside
from backpack.forms.several import Part


class Bags(nn.Module):
    """A loop over samples of several sizes, with a layer that is used twice."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(4, 5, bias=bias), nn.Linear(5, 5, bias=bias)
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 3, bias=bias)

    def forward(self, bags: list[Tensor]) -> Tensor:
        pooled = []
        for bag in bags:
            h = self.norm(self.mix(self.mix(self.embed(bag).tanh()).relu()))
            pooled.append((h.softmax(0) * h).sum(0))
        return self.head(torch.stack(pooled))


class Images(nn.Module):
    """Images of several sizes."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, bias=bias)
        self.second, self.head = nn.Conv2d(4, 3, 2, 2, groups=1, bias=bias), nn.Linear(3, 3, bias=bias)

    def forward(self, images: list[Tensor]) -> Tensor:
        pooled = [self.second(self.first(x[None]).sigmoid()).relu().mean((2, 3)) for x in images]
        return self.head(torch.cat(pooled))


class Tied(Bags):
    """A weight that is used turned as well, in layers whose gradients a hook has scaled."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__(bias)
        self.mix.register_full_backward_hook(lambda module, below, above: (3 * below[0],))

    def forward(self, bags: list[Tensor]) -> Tensor:
        hidden = [self.mix(self.embed(bag).tanh()) for bag in bags]
        again = [F.linear(F.linear(h, self.embed.weight.T), self.embed.weight) for h in hidden]
        return self.head(
            torch.stack([self.norm(x + h).sum(0) for x, h in zip(again, hidden, strict=True)])
        )


class Recomputed(Bags):
    """Each sample in a checkpoint of its own."""

    def one(self, bag: Tensor) -> Tensor:
        return self.norm(self.mix(self.embed(bag).tanh())).sum(0)

    def forward(self, bags: list[Tensor]) -> Tensor:
        found = [checkpoint(self.one, bag, use_reentrant=False) for bag in bags]
        return self.head(torch.stack(found))


class Transposed(nn.Module):
    """Grouped and transposed convolutions, with an axis of samples and without."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 4, 3, padding=1, groups=2, bias=bias)
        self.second = nn.ConvTranspose1d(4, 3, 2, bias=bias)

    def forward(self, bags: list[Tensor]) -> Tensor:
        wide = [self.second(self.first(bag.T[None]).sigmoid()).sum(2)[0] for bag in bags]
        return torch.stack(
            [x + self.first(bag.T).mean(1)[:3] for x, bag in zip(wide, bags, strict=True)]
        )


BAGS = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 1, 6, 2)]
IMAGES = [torch.randn(2, n, n + 1, dtype=torch.float64) for n in (5, 3, 6, 4)]
TARGETS = torch.tensor([0, 2, 1, 1])
KINDS: dict[str, tuple[Callable[[bool], nn.Module], list[Tensor]]] = {
    "bags": (Bags, BAGS),
    "images": (Images, IMAGES),
    "tied": (Tied, BAGS),
    "recomputed": (Recomputed, BAGS),
    "transposed": (Transposed, BAGS),
}


def by_loop(model: nn.Module, parts: list[Tensor]) -> list[Tensor]:
    """Every parameter's gradient of each sample, ``[N, *p]``."""
    parameters = list(model.parameters())
    rows = []
    for n in range(len(parts)):
        loss = F.cross_entropy(model(parts[n : n + 1]), TARGETS[n : n + 1]) / len(parts)
        rows.append(torch.autograd.grad(loss, parameters))
    return [torch.stack(each) for each in zip(*rows, strict=True)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many nodes were found to give what is wanted."""
    found = [0]
    original = alone.own_uses

    def counted(*args: Any) -> Any:
        uses = original(*args)
        found[0] += uses is not None
        return uses

    monkeypatch.setattr("backpack.engine.listening.own_uses", counted)
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", list(KINDS))
def test_first_order_of_a_loop(kind: str, bias: bool, calls: list[int]) -> None:
    """Gradients, norms, second moments and variances of a loop over samples."""
    make, parts = KINDS[kind]
    torch.manual_seed(0)
    model = make(bias).double()
    expected = by_loop(model, parts)
    extend(model, samples=0)
    names = ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance")
    for some in (names[:1], names[1:2], names[2:3], names[3:], names):
        with backpack(*(getattr(extensions, name)() for name in some)):
            F.cross_entropy(model(parts), TARGETS).backward()
        for p, g in zip(model.parameters(), expected, strict=True):
            values = {
                "grad_batch": g,
                "batch_l2": g.flatten(1).square().sum(1),
                "sum_grad_squared": g.square().sum(0),
                "variance": g.var(0, unbiased=False),
            }
            for field, value in values.items():
                if hasattr(p, field):
                    torch.testing.assert_close(getattr(p, field), value)
                    delattr(p, field)
            torch.testing.assert_close(p.grad, g.sum(0))
            p.grad = None
    assert calls[0] >= len(parts)  # a hook of a module hides its layer


def test_values_stay_when_gradients_are_changed(calls: list[int]) -> None:
    """Where one sample alone meets a parameter, ``p.grad`` is no view of its individual gradient."""
    torch.manual_seed(0)
    model = extend(Bags().double(), samples=0)
    with backpack(extensions.BatchGrad()):
        F.cross_entropy(model([BAGS[0], BAGS[1]]), TARGETS[:2]).backward()
    before = {name: p.grad_batch.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        assert p.grad is not None
        p.grad.fill_(7.0)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad_batch, before[name])


@pytest.mark.parametrize("some", [[1], [2, 0], [3, 3]])
def test_samples_that_reach_nothing(some: list[int]) -> None:
    """Samples without a use have zeros; of several uses the sum."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()

    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, parts: list[Tensor]) -> Tensor:
            return torch.stack([self.layer(parts[n]).sum(0) for n in some])

    model = extend(Some(), samples=0)
    with backpack(extensions.BatchGrad(), extensions.BatchL2Grad()):
        model(BAGS).square().sum().backward()
    expected = []
    for n in range(4):
        share = sum((layer(BAGS[n]).sum(0).square().sum() for m in some if m == n), torch.zeros(()))
        grads = torch.autograd.grad(share, [layer.weight]) if n in some else (torch.zeros(3, 4),)
        expected.append(grads[0].double())
    torch.testing.assert_close(layer.weight.grad_batch, torch.stack(expected))
    norms = torch.stack(expected).flatten(1).square().sum(1)
    torch.testing.assert_close(layer.weight.batch_l2, norms)


def test_forward_passes_of_one_sample(calls: list[int]) -> None:
    """Episodes: a forward pass for each, whose steps are rows of one sample."""
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double())
    actions = [torch.randint(3, (len(x),)) for x in BAGS]
    with backpack(extensions.BatchGrad(), extensions.Variance(), forwards="further"):
        logits = torch.cat([model(mark(x.clone(), 0)) for x in BAGS])
        F.cross_entropy(logits, torch.cat(actions), reduction="sum").backward()
    assert calls[0] == 8
    for p in model.parameters():
        rows = [
            torch.autograd.grad(F.cross_entropy(model(x), a, reduction="sum"), p)[0]
            for x, a in zip(BAGS, actions, strict=True)
        ]
        g = torch.stack(rows)
        torch.testing.assert_close(p.grad_batch, g)
        torch.testing.assert_close(p.variance, g.var(0, unbiased=False))


def test_some_parameters_and_kept_graphs(calls: list[int]) -> None:
    """``inputs=`` limits a pass; a kept graph gives the same twice."""
    torch.manual_seed(0)
    model = extend(Bags().double(), samples=0)
    expected = by_loop(model, BAGS)
    with backpack(extensions.BatchGrad()):
        loss = F.cross_entropy(model(BAGS), TARGETS)
        loss.backward(inputs=[model.embed.weight], retain_graph=True)
    torch.testing.assert_close(model.embed.weight.grad_batch, expected[0])
    assert not hasattr(model.head.weight, "grad_batch")
    with backpack(extensions.BatchGrad()):
        loss.backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad_batch, g)


def test_a_pass_holds_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many small layers together no more than the limit; the others are not written out."""
    torch.manual_seed(0)
    layers, parts = 6, 4
    stack = [each for _ in range(layers) for each in (nn.Linear(4, 4, bias=False), nn.Tanh())]
    model = nn.Sequential(*stack, nn.Linear(4, 3)).double()
    expected = by_loop(Each(model), BAGS)
    extend(whole := Each(model), samples=0)
    size = parts * 4 * 4 * 8
    monkeypatch.setattr(alone, "GRADIENT_BYTES", 3 * size)
    held: list[int] = []
    take = alone.OwnUse.take

    def taken(use: alone.OwnUse, gradient: Tensor) -> None:
        held.append(use.leaf.samples * gradient.numel() * gradient.element_size())
        take(use, gradient)

    monkeypatch.setattr(alone.OwnUse, "take", taken)
    with backpack(extensions.Variance()):
        F.cross_entropy(whole(BAGS), TARGETS).backward()
    assert 0 < sum(held) // parts <= 3 * size
    for p, g in zip(whole.parameters(), expected, strict=True):
        torch.testing.assert_close(p.variance, g.var(0, unbiased=False))


class Each(nn.Module):
    """A network for each sample, whose positions are averaged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, bags: list[Tensor]) -> Tensor:
        return torch.stack([self.model(bag).mean(0) for bag in bags])


@pytest.mark.parametrize("name", ["DiagGGNExact", "DiagHessian"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_second_order_beside_brute_force(kind: str, name: str) -> None:
    """Columns of samples of several sizes are put beside each other at once."""
    make, parts = KINDS[kind]
    torch.manual_seed(0)
    model = extend(make(True).double(), samples=0)
    with backpack(getattr(extensions, name)()):
        F.cross_entropy(model(parts), TARGETS).backward()
    for p in model.parameters():
        found = getattr(p, {"DiagGGNExact": "diag_ggn_exact", "DiagHessian": "diag_h"}[name])
        outputs = model(parts)
        if name == "DiagHessian":
            loss = F.cross_entropy(outputs, TARGETS)
            (g,) = torch.autograd.grad(loss, p, create_graph=True)
            rows = [
                torch.autograd.grad(e, p, retain_graph=True)[0].flatten()[k]
                for k, e in enumerate(g.flatten())
            ]
            torch.testing.assert_close(found.flatten(), torch.stack(rows))
            continue
        expected = torch.zeros_like(p)
        for f in outputs:
            prob = f.softmax(0).detach()
            root = (torch.diag(prob) - torch.outer(prob, prob)) / len(parts)
            j = torch.stack([torch.autograd.grad(e, p, retain_graph=True)[0].flatten() for e in f])
            expected += torch.einsum("ck,cd,dk->k", j, root, j).reshape(p.shape)
        torch.testing.assert_close(found, expected)


def _outer(rows: int) -> Outer:
    a, g = torch.randn(1, 1, rows, 4).double(), torch.randn(2, 1, 1, rows, 3).double()
    return Outer(a, g, Layout(torch.Size((3, 4))))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("samples", [[0, 1, 2], [2, 0, 1], [0, 2], [1, 1, 2], [0, 0, 1, 2, 2]])
@pytest.mark.parametrize("dense", [True, False])
def test_forms_beside_each_other(samples: list[int], dense: bool, grad: bool) -> None:
    """In any order, with samples that are missing, or have several."""
    torch.manual_seed(0)
    forms: list[tuple[int, Form]] = []
    for n, sample in enumerate(samples):
        form = _outer(1 + n)
        forms.append((sample, Dense(form.dense()) if dense else form))
    expected = sum(Part(form, sample, 3).dense() for sample, form in forms)
    with torch.set_grad_enabled(grad):
        found = beside(forms, 3)
    assert isinstance(found, Dense if dense else Outer)
    torch.testing.assert_close(found.dense(), expected)
    if isinstance(found, Outer):
        counts = [sum(form.positions for n, form in forms if n == k) for k in range(3)]
        each = found.counts if found.counts is not None else torch.full((3,), found.positions)
        assert each.tolist() == counts
