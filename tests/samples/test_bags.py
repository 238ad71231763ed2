"""Bags of a table's rows, and the variance of tables: rows that nobody reads cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.forms.base import Dense
from backpack.forms.lookup import Lookup
from backpack.testing.oracle import check
from tests.cases import Apply, P
from tests.rows import compare, gradients

QUANTITIES = [
    *(E.BatchGrad(), E.BatchL2Grad(), E.SumGradSquared(), E.Variance()),
    *(E.DiagGGNExact(), E.BatchDiagGGNExact()),
]
IDS = torch.tensor([[1, 1, 2, 6], [0, 6, 3, 1], [5, 5, 5, 1]])
EVERY = torch.arange(0, 12, 4)
WEIGHTS = torch.rand(3, 4, dtype=torch.float64)


def bag(forward: Callable[[Any, Tensor], Tensor], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Apply(
        lambda m, x: m.o(forward(m, x).tanh()), bag=nn.EmbeddingBag(7, 3, **options), o=nn.Linear(3, 4)
    )


def ragged(m: Any, x: Tensor) -> Tensor:
    """Two bags for each sample, of one and of three rows."""
    starts = torch.tensor([0, 1, 4, 5, 8, 9])
    return m.bag(x.reshape(-1), starts).view(3, 2, 3).sum(1)


def some_empty(m: Any, x: Tensor) -> Tensor:
    return m.bag(x.flatten(), torch.tensor([0, 4, 4, 8, 8, 12])).view(3, 6)[:, :3].sigmoid()


BAGS = {
    "mean": bag(lambda m, x: m.bag(x)),
    "sum": bag(lambda m, x: m.bag(x), mode="sum"),
    "max": bag(lambda m, x: m.bag(x), mode="max"),
    "padding": bag(lambda m, x: m.bag(x), padding_idx=1),
    "padding in sums": bag(lambda m, x: m.bag(x), mode="sum", padding_idx=5),
    "weights": bag(lambda m, x: m.bag(x, per_sample_weights=WEIGHTS), mode="sum"),
    "offsets": bag(lambda m, x: m.bag(x.flatten(), EVERY)),
    "last offset": bag(
        lambda m, x: m.bag(x.flatten(), torch.arange(0, 13, 4)), include_last_offset=True
    ),
    "ragged": bag(ragged),
    "ragged sums": bag(ragged, mode="sum", padding_idx=6),
    "empty bags": bag(some_empty),
    "function": Apply(
        lambda m, x: F.embedding_bag(x, m.w.tanh(), mode="sum") @ m.v, w=P(7, 3), v=P(3, 4)
    ),
    "learned weights": Apply(
        lambda m, x: F.embedding_bag(x, m.w, per_sample_weights=m.s.expand(3, 4), mode="sum") @ m.v,
        **{"w": P(7, 3), "v": P(3, 4), "s": P(4)},
    ),
}


@pytest.mark.parametrize("name", BAGS)
def test_bags(name: str) -> None:
    report = check(BAGS[name], nn.CrossEntropyLoss(), IDS, torch.tensor([0, 3, 1]), QUANTITIES)
    assert report.ok, report


def test_bags_have_factors_of_lookups() -> None:
    """Bags of one row are lookups."""
    torch.manual_seed(0)
    table = nn.Embedding(7, 3)
    models = [nn.Sequential(table, nn.Flatten(), nn.Linear(3, 4)), None]
    models[1] = nn.Sequential(nn.EmbeddingBag.from_pretrained(table.weight.detach(), freeze=False))
    models[1].append(models[0][2])
    for model in models:
        extend(model)
        with backpack(E.KFLR(), E.EmpiricalKFAC()):
            F.cross_entropy(model(IDS[:, :1]), torch.tensor([0, 3, 1])).backward()
    for field in ("kflr", "kfac_empirical"):
        ours, theirs = (getattr(model[0].weight, field) for model in models)
        assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True)), field


def test_second_derivatives() -> None:
    """Torch has none of a bag; what is linear in the table needs none."""
    torch.manual_seed(0)
    table, head = nn.Embedding(7, 3), nn.Linear(3, 4)
    bags = nn.EmbeddingBag.from_pretrained(table.weight.detach(), freeze=False)
    found = []
    for model in (
        Apply(lambda m, x: m.o(m.t(x).mean(1).tanh()), t=table, o=head),
        Apply(lambda m, x: m.o(m.t(x).tanh()), t=bags, o=head),
    ):
        extend(model)
        with backpack(E.DiagHessian(), E.BatchDiagHessian()):
            F.cross_entropy(model(IDS), torch.tensor([0, 3, 1])).backward()
        found.append((model.t.weight.diag_h, model.t.weight.diag_h_batch))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other)


@pytest.mark.parametrize("offsets", [torch.tensor([0, 2, 6]), torch.tensor([0, 0, 5])])
def test_bags_across_samples_are_refused(offsets: Tensor) -> None:
    model = extend(bag(lambda m, x: m.bag(x.flatten(), offsets)))
    with pytest.raises(RuntimeError, match="embedding_bag"), backpack(E.BatchGrad()):
        F.cross_entropy(model(IDS), torch.tensor([0, 3, 1])).backward()


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_squares_about_a_centre(columns: int, padded: bool) -> None:
    """In single precision, with a mean that is large beside the deviations."""
    torch.manual_seed(0)
    g = 1000 + torch.rand(columns, 5, 4, 3, dtype=torch.float64)
    index, reads = torch.randint(3, (5, 4)), (torch.rand(5, 4) < 0.7) if padded else None
    form = Lookup(index, g.float(), torch.Size((6, 3)), reads)
    written = Dense(Lookup(index, g.float().double(), form.shape, reads).dense())
    centre, squares = form.centred_square_sum()
    rows = written.values - centre.double()
    assert torch.allclose(squares.double(), rows.square().sum((0, 1)), rtol=1e-5)
    assert torch.equal(centre, form.dense()[0, 0])


def test_no_samples() -> None:
    centre, squares = Lookup(
        torch.zeros(0, 4).long(), torch.rand(1, 0, 4, 3), torch.Size((6, 3))
    ).centred_square_sum()
    assert centre is None and torch.equal(squares, torch.zeros(6, 3))


@pytest.mark.parametrize(
    "table", [nn.Embedding(5, 3, padding_idx=1), nn.EmbeddingBag(5, 3, mode="sum", padding_idx=1)]
)
def test_padding_is_zero_where_derivatives_are_not_finite(table: nn.Module) -> None:
    """The norm of a padding row has no second derivative; nobody asks for it."""
    model = extend(Apply(lambda m, x: m.t(x).norm(dim=-1), t=table.double()))
    data = torch.tensor([[0], [1], [4]])
    with backpack(E.DiagHessian(), E.BatchGrad()):
        model(data).square().sum().backward()
    (weight,) = model.parameters()
    truth = torch.zeros_like(weight)
    truth[[0, 4]] = 2
    torch.testing.assert_close(weight.diag_h, truth)
    torch.testing.assert_close(weight.grad_batch.sum(0), weight.grad)


class Classifier(nn.Module):
    """Words of all texts one after the other, and where each begins."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 3, **options), nn.Linear(3, 4)

    def forward(self, text: Tensor, offsets: Tensor, **more: Tensor) -> Tensor:
        return self.head(self.bag(text, offsets, **more))


class WithFeatures(Classifier):
    """Other features beside the text, as many as texts, before and after."""

    def __init__(self, first: bool) -> None:
        super().__init__(mode="sum")
        self.first, self.dense = first, nn.Linear(2, 4)

    def forward(self, *inputs: Tensor) -> Tensor:
        dense, text, offsets = inputs if self.first else (inputs[2], *inputs[:2])
        return super().forward(text, offsets) + self.dense(dense)


TEXT = torch.tensor([1, 1, 2, 6, 0, 6, 3, 1, 5])
FEATURES = torch.randn(4, 2).double()
CLASSIFIERS: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "regular": (Classifier(), (TEXT[:8], torch.tensor([0, 2, 4, 6]))),
    "ragged": (Classifier(mode="sum"), (TEXT, torch.tensor([0, 1, 5, 7]))),
    "an empty text": (Classifier(), (TEXT, torch.tensor([0, 4, 4, 7]))),
    "one word each": (Classifier(), (TEXT[:4], torch.tensor([0, 1, 2, 3]))),
    "as many as words": (Classifier(), (TEXT[:4], torch.tensor([0, 0, 1, 3]))),
    "last offset": (Classifier(include_last_offset=True), (TEXT, torch.tensor([0, 2, 5, 7, 9]))),
    "padding": (Classifier(padding_idx=6), (TEXT, torch.tensor([0, 3, 4, 7]))),
    "maximum": (Classifier(mode="max"), (TEXT, torch.tensor([0, 3, 4, 7]))),
    "features first": (WithFeatures(True), (FEATURES, TEXT, torch.tensor([0, 1, 5, 7]))),
    "features last": (WithFeatures(False), (TEXT, torch.tensor([0, 1, 5, 7]), FEATURES)),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_texts_and_offsets_as_inputs(name: str) -> None:
    model, inputs = CLASSIFIERS[name]
    compare(model, inputs, samples=4)


def test_a_bag_is_the_model() -> None:
    model = nn.EmbeddingBag(7, 3)
    compare(model, (TEXT, torch.tensor([0, 4, 4, 7])), samples=4)


def test_bags_with_weights_as_inputs() -> None:
    model = Classifier(mode="sum").double()
    inputs, weights = (TEXT, torch.tensor([0, 1, 5, 7])), torch.rand(9, dtype=torch.float64)
    expected = gradients(
        Apply(lambda m, *a: m.model(*a, per_sample_weights=weights), model=model),
        inputs,
        torch.arange(4) % 3,
    )
    extend(model)
    with backpack(E.BatchGrad()):
        loss = F.cross_entropy(model(*inputs, per_sample_weights=weights), torch.arange(4) % 3)
        loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_batch, expected[f"model.{name}"])


def test_several_bags_for_each_row_of_another_input() -> None:
    model = Apply(
        lambda m, a, t, o: m.l(a) + m.bag(t, o).view(2, 2, 3).sum(1),
        l=nn.Linear(2, 3),
        bag=nn.EmbeddingBag(7, 3),
    )
    compare(model, (FEATURES[:2], TEXT, torch.tensor([0, 1, 5, 7])), samples=2)
