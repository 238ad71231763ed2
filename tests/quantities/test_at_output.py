"""Layers that make the loss's input: sums over all columns, without columns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.forms import base, outer
from backpack.forms.base import Form
from backpack.graph.carry import carry
from backpack.losses import blocks
from backpack.sources import at_output
from backpack.testing.oracle import check
from tests.cases import Apply, P

Loss = Callable[[Tensor], Tensor]
T = torch.tensor([[0, 3, 1, 2], [2, 0, -100, 1], [4, 1, 2, 2]])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0])
ROWS = torch.tensor([5, 0, 7, 2])


def per_row(f: Tensor) -> Tensor:
    """Cross-entropy over the last axis, of a sequence ``[3, 4, 5]`` or the first word of each."""
    return F.cross_entropy(f.flatten(0, -2), (T if f.dim() == 3 else T[:, 0]).flatten())


def shifted(f: Tensor) -> Tensor:
    return F.cross_entropy(f[:, :-1].reshape(-1, 5), T[:, 1:].reshape(-1), reduction="sum")


def masked(f: Tensor) -> Tensor:
    return F.cross_entropy(f[T > 0], T[T > 0].clamp(max=2))


def transposed(f: Tensor) -> Tensor:
    return F.cross_entropy(f.transpose(1, 2), T, WEIGHTS.to(f), label_smoothing=0.2)


def spelled(f: Tensor) -> Tensor:
    return -(f.log_softmax(-1) * torch.linspace(0, 1, 5).to(f)).sum()


def none(f: Tensor) -> Tensor:
    return (
        F.cross_entropy(f.flatten(0, -2), T.flatten(), reduction="none") * torch.arange(12).to(f)
    ).sum()


def advantages(f: Tensor) -> Tensor:
    each = F.cross_entropy(f.flatten(0, -2), T.clamp(min=0).flatten(), reduction="none")
    return (each * torch.linspace(-1, 1, 12).to(f)).sum()


def picked_twice(f: Tensor) -> Tensor:
    rows = f.flatten(0, 1)[torch.tensor([0, 5, 0])]
    return F.cross_entropy(rows, torch.tensor([1, 2, 3]))


def picked(f: Tensor) -> Tensor:
    return F.cross_entropy(f.flatten(0, 1)[ROWS], T.flatten()[ROWS].clamp(min=0))


def split_classes(f: Tensor) -> Tensor:
    """Ten outputs are five classes twice: no axis of the layer's goes through classes alone."""
    return F.cross_entropy(f.reshape(-1, 5), torch.arange(f.numel() // 5) % 5)


def pixels(f: Tensor) -> Tensor:
    return F.cross_entropy(f, torch.arange(f.numel() // f.shape[1]).reshape(len(f), *f.shape[2:]) % 5)


def square(f: Tensor) -> Tensor:
    return F.mse_loss(f, torch.ones_like(f), reduction="sum")


def bits(f: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, torch.ones_like(f), pos_weight=WEIGHTS.to(f))


def two(f: Tensor) -> Tensor:
    return per_row(f) + 2 * square(f)


class Row(NamedTuple):
    """A last layer and a loss; ``without``: how many parameters need no column."""

    layer: Callable[[], nn.Module]
    loss: Loss
    without: int
    shape: tuple[int, ...] = (3, 4, 6)


def linear(outputs: int = 5) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(6, outputs)


def added() -> nn.Module:
    return Apply(lambda m, x: x @ m.w + m.b, w=P(6, 5), b=P(5))


def times() -> nn.Module:
    return Apply(
        lambda m, x: torch.addmm(m.b, x.flatten(0, -2), m.w).view(*x.shape[:-1], 5), w=P(6, 5), b=P(5)
    )


TABLE = {
    "linear": Row(linear(), per_row, 2, (3, 6)),
    "sequence": Row(linear(), per_row, 2),
    "shifted": Row(linear(), shifted, 2),
    "masked": Row(linear(), masked, 2),
    "transposed": Row(linear(), transposed, 2),
    "spelled": Row(linear(), spelled, 2),
    "each": Row(linear(), none, 2),
    "picked": Row(linear(), picked, 2),
    "picked twice": Row(linear(), picked_twice, 0),
    "two groups of classes": Row(linear(10), split_classes, 0),
    "matrix and sum": Row(added, transposed, 2),
    "addmm": Row(times, shifted, 2),
    "no weight": Row(lambda: Apply(lambda m, x: x[..., :5] + m.b, b=P(5)), per_row, 1),
    "bias twice": Row(
        lambda: Apply(lambda m, x: torch.add(x[..., :5], m.b, alpha=2), b=P(5)), per_row, 0
    ),
    "bias subtracted": Row(lambda: Apply(lambda m, x: x[..., :5] - m.b, b=P(5)), per_row, 0),
    "scaled": Row(lambda: Apply(lambda m, x: x[..., :5] * m.s, s=P(5)), per_row, 0),
    "each position its own": Row(lambda: Apply(lambda m, x: x[..., :5] + m.b, b=P(4, 5)), per_row, 0),
    "pixels": Row(lambda: nn.Conv2d(2, 5, 1), pixels, 2, (3, 2, 3, 2)),
    "patches": Row(lambda: nn.Conv2d(2, 5, 2, padding=1), pixels, 2, (3, 2, 3, 2)),
    "groups": Row(lambda: nn.Conv1d(4, 6, 2, groups=2), pixels, 1, (3, 4, 3)),
    "transposed convolution": Row(lambda: nn.ConvTranspose1d(2, 5, 2), pixels, 2, (3, 2, 3)),
    "matrix from the left": Row(lambda: Apply(lambda m, x: m.w @ x, w=P(4, 4)), per_row, 0, (3, 4, 5)),
    "square loss": Row(linear(), square, 2),
    "bits": Row(linear(), bits, 2),
    "pixels of regression": Row(lambda: nn.Conv2d(2, 5, 2), square, 2, (3, 2, 3, 2)),
    "two losses": Row(linear(), two, 2),
}
DIAGONALS = [E.DiagGGNExact(), E.BatchDiagGGNExact()]
HESSIANS = [E.DiagHessian(), E.BatchDiagHessian()]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Ids of parameters that had no columns."""
    found: set[int] = set()

    def note(*args: object) -> dict[Tensor, Form]:
        forms = at_output.forms_at_output(*args)
        found.update(id(p) for p in forms)
        return forms

    for name in ("table", "hessian"):
        monkeypatch.setattr(f"backpack.sources.{name}.forms_at_output", note)
    return found


def model_of(row: Row) -> nn.Module:
    torch.manual_seed(0)
    last = row.layer()
    below = nn.Linear(row.shape[-1], row.shape[-1])
    return nn.Sequential(below, nn.Sigmoid(), last)


@pytest.mark.parametrize("name", TABLE)
def test_diagonals(name: str, without: set[int]) -> None:
    """Against the oracle; the layer below has columns in the same pass."""
    row = TABLE[name]
    model, x = model_of(row), torch.randn(row.shape)
    for exts in (DIAGONALS, HESSIANS):
        without.clear()
        report = check(model, lambda f, _: row.loss(f), x, None, exts)
        assert report.ok, report
        # Right below the curved operation the other layer has none of its columns either.
        assert len(without) == row.without + 2 * (exts is HESSIANS)


@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
@pytest.mark.parametrize("name", [name for name in TABLE if name != "advantages"])
def test_kronecker_factors(name: str, approx: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from columns, also where the larger factors are diagonals."""
    row = TABLE[name]
    model, x = model_of(row), torch.randn(row.shape)
    for largest in (1000, 4):
        for room in (base, outer, blocks, at_output):
            monkeypatch.setattr(room, "LARGEST_FACTOR", largest)
        exts = [E.KFLR(approx), E.EKFLR(approx)]
        assert_same(
            computed(model, row.loss, x, exts), computed(model, row.loss, x, columns_only(exts))
        )


def test_indefinite() -> None:
    """Negative weights of samples: diagonals have signs, a square root does not exist."""
    row = Row(linear(), advantages, 2)
    model, x = model_of(row), torch.randn(row.shape)
    report = check(model, lambda f, _: advantages(f), x, None, DIAGONALS)
    assert report.ok, report
    with pytest.raises(ValueError, match="not convex"):
        computed(model, advantages, x, [E.KFLR()])


def test_nothing_cancels() -> None:
    """A confident network in single precision: one minus the largest probability is small."""
    model = nn.Linear(6, 5)
    x = torch.randn(8, 6)
    with torch.no_grad():
        model.bias[2] += 25
    y = torch.arange(8) % 5
    report = check(model, F.cross_entropy, x, y, DIAGONALS, dtype=torch.float32, tolerance=1e-5)
    assert report.ok, report
    exts = [E.KFLR(), E.EKFLR()]
    for p, q in zip(
        *(fitted(model, t, x, y, exts) for t in (torch.float32, torch.float64)), strict=True
    ):
        assert torch.allclose(p.kflr[0].double(), q.kflr[0], rtol=1e-4, atol=0)
        exact = p.ekflr.eigenvectors[0].double()
        assert (p.ekflr.eigenvalues >= 0).all()
        assert torch.allclose(p.ekflr.diagonal().sum().double(), q.ekflr.diagonal().sum(), rtol=1e-4)
        assert exact.isfinite().all()


def fitted(model: nn.Module, dtype: torch.dtype, x: Tensor, y: Tensor, exts: list) -> list:
    model = extend(copy.deepcopy(model).to(dtype))
    with backpack(*exts):
        F.cross_entropy(model(x.to(dtype)), y).backward()
    return list(model.parameters())


def test_other_precision_above() -> None:
    """Logits in half precision, the loss in single precision, as language models are trained."""
    found = []
    for exts in (DIAGONALS, columns_only(DIAGONALS)):
        torch.manual_seed(0)
        model, x = extend(nn.Linear(6, 5)), torch.randn(3, 4, 6)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        assert logits.dtype == torch.bfloat16
        with backpack(*exts):
            shifted(logits.float()).backward()
        found.append([p.diag_ggn_exact_batch for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=0.02, atol=1e-3 * float(other.max()))


def test_differentiable() -> None:
    """With ``create_graph`` the derivative of a diagonal and of a factor, by differences."""
    model = extend(nn.Linear(6, 5).double())
    x, eps = torch.randn(4, 6).double(), 1e-5
    y = torch.tensor([0, -100, 2, 4])

    def value() -> Tensor:
        with backpack(E.DiagGGNExact(), E.KFLR()):
            F.cross_entropy(model(x), y).backward(create_graph=True)
        w = model.weight
        return (w.diag_ggn_exact * x[0]).sum() + (w.kflr[0] * w.kflr[0]).sum()

    (slope,) = torch.autograd.grad(value(), [model.bias])
    for j in range(5):
        ends = []
        for step in (eps, -eps):
            with torch.no_grad():
                model.bias[j] += step
            ends.append(value().item())
            with torch.no_grad():
                model.bias[j] -= step
        assert slope[j].item() == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-5, abs=1e-9)


def test_other_quantities_have_columns() -> None:
    """A square root beside a diagonal is made of columns, and the diagonal is the same."""
    model, x = nn.Linear(6, 5), torch.randn(3, 6)
    report = check(model, lambda f, _: per_row(f), x, None, [E.DiagGGNExact(), E.SqrtGGNExact()])
    assert report.ok, report

    class Asks(E.BackpropExtension):
        savefield, source, summed = "asks", E.DiagGGNExact.source, True

        def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
            return form.dense()

    with pytest.raises(RuntimeError, match="summed = False"):
        computed(model, per_row, x, [Asks()])


def test_many_classes_cost_no_columns(without: set[int]) -> None:
    """Of 50,000 words no column is made, and of a wide regression none either."""
    model = extend(nn.Sequential(nn.Embedding(50000, 4), nn.Linear(4, 50000)))
    ids = torch.randint(50000, (2, 3))
    with backpack(E.KFLR(), E.DiagHessian(), parameters=model[1].parameters()):
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert len(without) == 2
    assert [f.shape for f in model[1].weight.kflr] == [(50000,), (4, 4)]
    assert torch.allclose(model[1].bias.diag_h, model[1].bias.kflr[0])


def shortcut() -> nn.Module:
    """A curved sum of two layers' outputs: each is right below; a third is not."""
    return Apply(
        lambda m, x: m.c((m.a(x) + m.b(x)).tanh() + x),
        **{name: nn.Linear(4, 4) for name in "abc"},
    )


def shared() -> nn.Module:
    """A layer that is used twice, and one above."""
    return Apply(lambda m, x: m.b(m.a(m.a(x).tanh()).tanh()), a=nn.Linear(4, 4), b=nn.Linear(4, 3))


def squares() -> nn.Module:
    """Matrices of one shape as the rows that are added and as the weight."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return torch.addmm(m.w, torch.addmm(m.w, x, m.v).sigmoid(), m.u)

    return Apply(forward, u=P(4, 4), v=P(4, 4), w=P(4))


def images(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3))


class Curved(NamedTuple):
    """A model, its input, and how many parameters have no columns of curved entries."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    free: int


CURVED = {
    "deep": Curved(
        lambda: nn.Sequential(
            *(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3, bias=False))
        ),
        (5, 4),
        4,
    ),
    "positions": Curved(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (2, 1)), nn.SiLU(), nn.Linear(3, 2)),
        (5, 2, 4),
        2,
    ),
    "convolutions": Curved(
        images(nn.Conv2d(2, 3, 2), nn.Softplus(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2, padding=1)),
        (3, 2, 4, 4),
        2,
    ),
    "strides": Curved(
        images(nn.Conv2d(2, 4, 3, 2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.GELU()),
        (3, 2, 4, 4),
        4,
    ),
    "groups": Curved(
        images(nn.Conv2d(2, 4, 2, 2, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 1, 2, 2), nn.ELU()),
        (3, 2, 4, 4),
        3,
    ),
    "shortcut": Curved(shortcut, (5, 4), 0),
    "shared": Curved(shared, (5, 4), 0),
    "squares": Curved(squares, (4, 4), 1),
}


@pytest.mark.parametrize("name", CURVED)
def test_right_below_curved_entries(name: str, without: set[int]) -> None:
    """Against the oracle, twice: the second pass knows such layers; and as from columns."""
    row = CURVED[name]
    torch.manual_seed(0)
    model, x = row.model(), torch.randn(row.shape)

    def loss(f: Tensor) -> Tensor:  # of which no layer makes the input
        return F.mse_loss(
            f.flatten(1).cumsum(1) @ torch.ones(f[0].numel(), 2).to(f),
            3 * x.to(f)[:, :2].flatten(1)[:, :2],
        )

    for _ in range(2):
        without.clear()
        report = check(model, lambda f, _: loss(f), x, None, HESSIANS)
        assert report.ok, report
        assert len(without) == row.free
    assert_same(computed(model, loss, x, HESSIANS), computed(model, loss, x, columns_only(HESSIANS)))


def test_shallow_networks_have_no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One curved operation above one layer: what there is to carry are the loss's columns."""
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)))
    carried: list[int] = []

    def count(starts: object, targets: object, columns: list[Tensor]) -> list[Tensor | None]:
        carried.append(len(columns[0]))
        return carry(starts, targets, columns)

    monkeypatch.setattr("backpack.engine.loop.carry", count)
    with backpack(E.DiagHessian()):
        F.cross_entropy(model(torch.randn(8, 6)), torch.arange(8) % 3).backward()
    assert sum(carried) <= 3


def columns_only(exts: list) -> list:
    """The same quantities from columns."""
    plain = copy.deepcopy(exts)
    for ext in plain:
        ext.summed = False
    return plain


def computed(model: nn.Module, loss: Loss, x: Tensor, exts: list) -> dict[str, list]:
    model = extend(copy.deepcopy(model).double())
    with backpack(*exts):
        loss(model(x.double())).backward()
    fields = [ext.savefield for ext in exts]
    return {f: [getattr(p, f) for p in model.parameters()] for f in fields}


def assert_same(values: dict[str, list], expected: dict[str, list]) -> None:
    for field, found in values.items():
        for one, other in zip(found, expected[field], strict=True):
            if field == "ekflr":  # eigenvectors of equal eigenvalues are arbitrary
                assert torch.allclose(one.diagonal().sum(), other.diagonal().sum()), field
                assert torch.allclose(
                    one.eigenvalues.square().sum(), other.eigenvalues.square().sum(), rtol=1e-6
                )
                continue
            for a, b in zip(one, other, strict=True):
                assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-12), field
