"""The judge can say no: `check` fails for each way in which a value can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import extensions as E
from backpack.engine.run import Run
from backpack.testing.oracle import check
from backpack.testing.report import Report
from tests.cases import Apply


def report(*extensions: E.BackpropExtension, lossfunc: nn.Module | None = None) -> Report:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return check(model, lossfunc or nn.L1Loss(), torch.rand(5, 3), torch.zeros(5, 2), extensions)


def forget(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """A field that is never saved."""
    save = Run.save

    def forgetful(run: Run, leaf: Any, gradient: Tensor | None = None) -> None:
        save(run, leaf, gradient)
        leaf.parameter.__dict__.pop(field)

    monkeypatch.setattr(Run, "save", forgetful)


@pytest.mark.parametrize("ext", [E.DiagGGNExact, E.BatchDiagGGNExact, E.SqrtGGNExact, E.DiagHessian])
def test_a_missing_field_where_the_truth_is_zero(ext, monkeypatch) -> None:
    """The absolute value has no curvature; the field must be there all the same."""
    assert report(ext()).ok
    forget(monkeypatch, ext.savefield)
    found = report(ext())
    assert not found.ok and found.worst == float("inf")


def test_a_missing_field_where_it_is_not(monkeypatch) -> None:
    forget(monkeypatch, "grad_batch")
    assert not report(E.BatchGrad()).ok


def test_a_field_without_a_gradient(monkeypatch) -> None:
    """Fields appear for exactly the parameters whose gradient was computed."""
    model = nn.Sequential(nn.Linear(3, 2))
    model.register_parameter("unused", nn.Parameter(torch.rand(2)))
    args = (nn.MSELoss(), torch.rand(5, 3), torch.zeros(5, 2), [E.SumGradSquared()])
    assert check(model, *args).ok
    monkeypatch.setattr(nn.Parameter, "sum_grad_squared", torch.zeros(2), raising=False)
    assert not check(model, *args).ok


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value[:1],
        lambda value: value.sum(0, keepdim=True),
        lambda value: value.new_zeros(()),
        lambda value: value.unsqueeze(0),
        lambda value: value.flatten(0, 1).unsqueeze(1) if value.dim() > 1 else value[:-1],
        lambda value: value * float("nan"),
        lambda value: value + 1e-6,
        lambda value: None,
    ],
)
@pytest.mark.parametrize("ext", [E.BatchGrad, E.DiagGGNExact, E.BatchDiagGGNExact, E.SqrtGGNExact])
def test_a_wrong_value(ext, change: Callable[[Tensor], Any]) -> None:
    """Also one that would be broadcast, or is zero as it should be."""

    class Wrong(ext):
        def finish(self, state: Any, context: Any) -> Any:
            return change(super().finish(state, context))

        def zero(self, context: Any) -> Any:
            return change(super().zero(context))

    assert not report(Wrong(), lossfunc=nn.MSELoss()).ok
    if ext is not E.SqrtGGNExact:  # without curvature it has no columns, and nothing to be wrong
        assert not report(Wrong()).ok


def test_all_samples_are_compared() -> None:
    with pytest.raises(ValueError, match="subsampling"):
        report(E.BatchGrad(subsampling=[0, 2]))


def _halves(m: Any, x: Tensor) -> Tensor:
    """The second half of the samples comes first."""
    first, second = m.l(x).tanh().chunk(2)
    return torch.cat([m.o(second), m.p(first)])


X = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
LAYERS = {"l": lambda: nn.Linear(4, 4), "o": lambda: nn.Linear(4, 2), "p": lambda: nn.Linear(4, 2)}
ROWS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "halves": _halves,
    "tiles": lambda m, x: torch.cat([m.o(m.l(x)), m.p(m.l(x))]),
    "repeats": lambda m, x: torch.stack([m.o(m.l(x)), m.p(m.l(x))], 1).flatten(0, 1),
    "picked": lambda m, x: m.o(m.l(x).tanh())[[2, 0, 0, 3, 1]],
    "turned": lambda m, x: m.o(m.l(x).tanh()).t(),
}


def _of_rows(forward: Callable[[Any, Tensor], Tensor], **options: Any) -> Report:
    torch.manual_seed(0)
    model = Apply(forward, **{name: layer() for name, layer in LAYERS.items()})
    y = torch.rand(model(X).shape)
    return check(model, nn.MSELoss(), X, y, [E.BatchGrad(), E.BatchDiagGGNExact()], **options)


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_output_are_their_samples(name: str) -> None:
    found = _of_rows(ROWS[name], output_dim=1 if name == "turned" else 0)
    assert found.ok, found


def test_rows_that_must_be_said() -> None:
    """How many there are depends on the data."""
    picked = lambda m, x: m.o(m.l(x).tanh()[:, None].expand(-1, 4, -1)[x > 0.4])  # noqa: E731
    owners = (X > 0.4).nonzero()[:, 0]
    assert _of_rows(picked, sample_of_row=owners).ok
    assert not _of_rows(picked, sample_of_row=owners.flip(0)).ok
    with pytest.raises(ValueError, match="pass sample_of_row"):
        _of_rows(picked)
    with pytest.raises(ValueError, match=r"sample_of_row has shape \(99,\)"):
        _of_rows(picked, sample_of_row=range(99))


@dataclass
class Result:
    logits: Tensor
    state: dict[str, Tensor]
    steps: int = 3


class Returned:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": (lambda a, h: (a, h), lambda o: (o[0], o[1])),
    "penalty": (lambda a, h: [a, h, a.new_tensor(2.0)], lambda o: (o[0], o[1] + 0 * o[2])),
    "dictionary": (lambda a, h: {"a": a, "h": {"h": h}}, lambda o: (o["a"], o["h"]["h"])),
    "dataclass": (lambda a, h: Result(a, {"h": h}), lambda o: (o.logits, o.state["h"] * o.steps)),
    "object": (lambda a, h: Returned(a), lambda o: (o.logits, torch.zeros(1))),
    "of one more axis": (lambda a, h: (h.unsqueeze(1), a), lambda o: (o[1], o[0].squeeze(1))),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_are_no_tensor(name: str) -> None:
    made, parts = OUTPUTS[name]
    model = Apply(lambda m, x: made(m.o(m.l(x).tanh()), m.l(x)), l=nn.Linear(4, 3), o=nn.Linear(3, 2))

    def lossfunc(output: Any, y: Tensor) -> Tensor:
        a, h = parts(output)
        return nn.functional.cross_entropy(a, y) + (h**2).mean()

    y = torch.tensor([0, 1, 1, 0, 1])
    assert check(model, lossfunc, torch.rand(5, 4), y).ok


def test_an_output_without_rows() -> None:
    model = Apply(lambda m, x: [m.l(x).sum()], l=nn.Linear(4, 3))
    with pytest.raises(ValueError, match="is a list with tensors of shapes"):
        check(model, lambda o, y: o[0], torch.rand(5, 4), torch.zeros(5), E.BatchGrad())


class Pairs(nn.Module):
    """Users and items, each with each."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return self.user(users) @ self.item(items).T


class Nodes(nn.Module):
    """Rows of several samples, and one output for each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, owner: Tensor, pooled: bool) -> Tensor:
        h = self.layer(x).tanh()
        if pooled:
            h = torch.zeros(3, 3, dtype=h.dtype).index_add(0, owner, h)
        return self.head(h)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 3), nn.Linear(3, 2)

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bag(text, offsets))


OWNER = torch.tensor([0, 0, 2, 1, 2, 2])
TEXT, STARTS = torch.tensor([1, 5, 2, 6, 0, 6, 3, 1]), torch.tensor([0, 3, 4])


def owned(x: Tensor, owner: Tensor, pooled: bool) -> tuple[Tensor, Tensor]:
    return x, owner


# Torch does not differentiate bags twice.
NO_HESSIAN = [E.BatchGrad(), E.Variance(), E.BatchDiagGGNExact(), E.SqrtGGNExact()]
SAID: dict[str, tuple[nn.Module, tuple, tuple[int, ...], dict[str, Any]]] = {
    "by name": (Pairs(), (torch.rand(6, 4), torch.rand(4, 5)), (6, 4), {"samples": "users"}),
    "pooled": (Nodes(), (torch.rand(6, 4), OWNER, True), (3, 2), {"samples": owned}),
    "rows": (
        *(Nodes(), (torch.rand(6, 4), OWNER, False), (6, 2)),
        {"samples": owned, "sample_of_row": OWNER},
    ),
    "bags by offsets": (
        *(Bags(), (TEXT, STARTS), (3, 2)),
        {"samples": "offsets", "extensions": NO_HESSIAN},
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_what_the_user_says_of_samples(name: str) -> None:
    model, X, shape, said = SAID[name]
    torch.manual_seed(0)
    found = check(model, nn.MSELoss(), X, torch.rand(shape), **said)
    assert found.ok, found


def test_other_rows_than_were_said() -> None:
    model, X, shape, said = SAID["rows"]
    found = check(model, nn.MSELoss(), X, torch.rand(shape), **{**said, "sample_of_row": OWNER.flip(0)})
    wrong = {field for (_, field), error in found.errors.items() if error > found.tolerance}
    assert {"grad_batch", "batch_l2", "variance"} <= wrong and "diag_ggn_exact" not in wrong


class Penalised(nn.Module):
    """Beside its rows a number: of the weights, or of all samples."""

    def __init__(self, of_data: bool) -> None:
        super().__init__()
        self.first, self.last, self.of_data = nn.Linear(3, 4), nn.Linear(4, 2), of_data

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x).tanh()
        return self.last(h), h.square().mean() if self.of_data else self.first.weight.square().sum()


def test_numbers_beside_rows() -> None:
    """Of a number that all samples make, nobody can tell their shares: no verdict on it is given."""
    torch.manual_seed(0)
    X, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])

    def of_both(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(output[0], y) + 0.3 * output[1]

    def of_rows(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(output[0], y)

    with pytest.raises(ValueError, match="a number that the model has computed from all samples"):
        check(Penalised(True), of_both, X, y, E.BatchGrad())
    for model, lossfunc in ((Penalised(True), of_rows), (Penalised(False), of_both)):
        found = check(model, lossfunc, X, y, E.BatchGrad())
        assert found.ok, f"\n{found}"
