"""How the user says which rows are whose, and programs that do not tell without that."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend, mark, unextend
from backpack.extensions import BatchGrad, Variance
from tests.cases import Apply

D = 4


def towers(f: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(D, 3), nn.Linear(D, 3)

        def forward(self, a: Tensor, b: Tensor) -> Any:
            return f(self, a, b)

    return Towers().double()


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def everything(output: Any) -> Tensor:
    parts = output if isinstance(output, tuple) else (output,)
    return sum((part.square().sum() for part in parts), torch.zeros(()).double())


def scores(m: Any, a: Tensor, b: Tensor) -> Tensor:
    return m.f(a) @ m.g(b).T


def losses(m: Any, a: Tensor, b: Tensor) -> Tensor:
    return m.f(a).square().mean() + m.f(b).square().mean()


# Inputs of other lengths that parameters meet, and pairs of as many rows.
AMBIGUOUS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "users and items": (scores, 6, 5),
    "users and items, turned": (lambda m, a, b: scores(m, a, b).T, 6, 5),
    "users and items, other order": (lambda m, a, b: scores(m, b, a), 6, 5),
    "scores by item": (lambda m, a, b: scores(m, a, b).mean(0), 6, 5),
    "pairs within a batch": (scores, 6, 6),
    "pairs, turned": (lambda m, a, b: scores(m, a, b).T, 6, 6),
    "pairs, other order": (lambda m, a, b: scores(m, b, a), 6, 6),
    "pairs by broadcasting": (lambda m, a, b: (m.f(a)[:, None] * m.g(b)).sum(-1), 6, 6),
    "pairs by einsum": (lambda m, a, b: torch.einsum("id,jd->ij", m.f(a), m.g(b)), 6, 6),
    "boundary and interior": (losses, 1, 3),
    "interior and boundary": (losses, 3, 1),
    "two sets of points": (losses, 3, 2),
    "two outputs": (lambda m, a, b: (m.f(a), m.g(b)), 1, 3),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ambiguity_is_an_error(name: str) -> None:
    f, first, second = AMBIGUOUS[name]
    model, a, b = extend(towers(f)), x(first, D), x(second, D)
    output = everything(model(a, b))
    message = (
        rf"cannot tell which input carries the batch: of 'a' \({first}, 4\), 'b' \({second}, 4\)"
        r"[\s\S]*samples="
    )
    with pytest.raises(RuntimeError, match=message), backpack(BatchGrad()):
        output.backward()
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())
    unextend(model)
    everything(model(a, b)).backward()


# Not ambiguous: with rows of one input only in the output, or none that a parameter meets.
PLAIN: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...]]] = {
    "towers": (lambda m, a, b: m.f(a) * m.g(b), (5, D), (5, D)),
    "a state of all": (lambda m, a, b: m.f(a) + m.g(b), (5, D), (1, D)),
    "memory": (lambda m, a, b: (m.f(a) @ m.g(b).T).softmax(-1) @ m.g(b), (5, D), (3, D)),
    "memory, as many": (lambda m, a, b: (m.f(a) @ m.g(b).T).softmax(-1) @ m.g(b), (5, D), (7, D)),
    "prototypes": (
        lambda m, a, b: m.f(a) @ m.f(b).unflatten(0, (3, 2)).mean(1).T,
        *((5, D), (6, D)),
    ),
    "a table": (lambda m, a, b: m.f(a @ b.T @ b), (5, D), (7, D)),
    "a table, as many": (lambda m, a, b: m.f(a @ b.T @ b), (5, D), (5, D)),
}


def truth(model: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    """Individual gradients of losses."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [
        torch.autograd.grad(o, parameters, retain_graph=True, materialize_grads=True) for o in outputs
    ]
    return {name: torch.stack(each) for name, each in zip(names, zip(*rows, strict=True), strict=True)}


def check(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        assert hasattr(p, "grad_batch") or not expected[name].any(), name
        if hasattr(p, "grad_batch"):
            torch.testing.assert_close(p.grad_batch, expected[name])


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_not_ambiguous(name: str) -> None:
    f, first, second = PLAIN[name]
    model, a, b = towers(f), x(*first), x(*second)
    expected = truth(model, [row.square().sum() for row in model(a, b)])
    extend(model)
    with backpack(BatchGrad()):
        everything(model(a, b)).backward()
    check(model, expected)


@pytest.mark.parametrize("samples", ["a", "b", 0, 1, -1, lambda a, b: a, lambda a, b: b])
@pytest.mark.parametrize("size", [5, 6])
@pytest.mark.parametrize("turned", [False, True])
def test_the_user_decides(samples: Any, size: int, turned: bool) -> None:
    f = (lambda m, a, b: scores(m, a, b).T) if turned else scores
    model, a, b = towers(f), x(6, D), x(size, D) + 1
    first = samples in ("a", 0) or (callable(samples) and samples(a, b) is a)
    rows = f(model, a, b) if first != turned else f(model, a, b).T
    expected = truth(model, [row.square().sum() for row in rows])
    extend(model, samples=samples)
    for call in (lambda: model(a, b), lambda: model(b=b, a=a)):
        with backpack(BatchGrad()):
            everything(call()).backward()
        check(model, expected)


def test_two_sets_of_points() -> None:
    """Of a sum of two means the samples are those of one; the others are constants of all."""
    model, a, b = towers(losses), x(3, D), x(2, D)
    extend(model, samples="a")
    with pytest.raises(RuntimeError, match="'f.weight'"), backpack(BatchGrad()):
        model(a, b).backward()


def test_said_once_and_kept() -> None:
    model, a, b = extend(towers(scores), samples="b"), x(6, D), x(5, D)
    for again in (extend(model), copy.deepcopy(model)):
        with backpack(BatchGrad()):
            everything(again(a, b)).backward()
        assert again.f.weight.grad_batch.shape == (5, 3, D)
    model = extend(unextend(model))
    with pytest.raises(RuntimeError, match="cannot tell"), backpack(BatchGrad()):
        everything(model(a, b)).backward()


def test_parts_of_inputs() -> None:
    model = Apply(lambda m, data: m.l(data["x"]), l=nn.Linear(D, 2)).double()
    rows = torch.tensor([1, 0, 1])
    expected = [[1], [0, 2]]
    for samples in (
        lambda data: (data["x"], rows),
        lambda data: [(data["x"], rows.tolist(), 2)],
    ):
        extend(model, samples=samples)
        with backpack(BatchGrad()):
            everything(model({"x": x(3, D)})).backward()
        weights = [everything(model({"x": x(3, D)})[at]) for at in expected]
        check(model, truth(model, weights))

    class Named(nn.Linear):
        def forward(self, data: Any) -> Tensor:
            return super().forward(data.x)

    named = extend(Named(D, 2), samples="data.x")
    with backpack(BatchGrad()):
        named(SimpleNamespace(x=torch.randn(3, D), mask=torch.ones(7, D))).sum().backward()
    assert named.weight.grad_batch.shape == (3, 2, D)


@pytest.mark.parametrize(
    "samples, message",
    [
        ("c", "no input of that name; it has a, b"),
        (2, "given 2 inputs"),
        ("a.left", "no 'left'"),
        (lambda a, b: a.shape, "tensors of a list"),
        (lambda a, b: (a,), "a pair"),
        (lambda a, b: (a, [0, 0]), r"has shape \(2,\)"),
        (lambda a, b: [(a, [0, 0, 7]), b], "5 samples, and of 8"),
        (lambda a, b: [(a, [0, 0, 1], 2), b], "2 samples, and of 5"),
        (lambda a, b: a.sum(), "without an axis 0"),
    ],
)
def test_bad_choices(samples: Any, message: str) -> None:
    model = extend(towers(scores), samples=samples)
    with pytest.raises(ValueError, match=message):
        model(x(3, D), x(5, D))
    extend(model, samples="a")
    with backpack(BatchGrad()):  # nothing is left behind
        everything(model(x(3, D), x(5, D))).backward()
    assert model.f.weight.grad_batch.shape == (3, 3, D)


@pytest.mark.parametrize("samples", [1.5, True, ["a"]])
def test_bad_kinds_of_choices(samples: Any) -> None:
    with pytest.raises(TypeError, match="samples is the name"):
        extend(nn.Linear(2, 2), samples=samples)


@pytest.mark.parametrize(
    "rows, samples, message",
    [
        ([0, 1], None, "one number for each row, of which there are 3"),
        ([0, 1, 4], 4, "from 0 to 3, but got 0 to 4"),
        ([0, -1, 1], None, "from 0"),
        (torch.tensor([0.0, 1, 2]), None, "whole ones"),
        (torch.tensor([True, False, True]), None, "whole ones"),
        (5, 2, "from 0 to 1"),
        (torch.arange(6).reshape(3, 2), None, "more than one axis"),
    ],
)
def test_bad_marks(rows: Any, samples: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mark(torch.randn(3, 2), rows, samples)
    with pytest.raises(ValueError, match="expects a tensor"):
        mark([1.0, 2.0], [0, 1])


def test_marks_of_several_axes_and_of_other_axes() -> None:
    for shape, rows, dim in (
        ((3, 2, D), torch.tensor([[0, 0], [1, 1], [0, 0]]), 0),
        ((2, 3, D), torch.tensor([0, 1, 0]), 1),
        ((2, 3, D), torch.tensor([0, 1, 0]), -2),
    ):
        model, data = nn.Linear(D, 2).double(), x(*shape)
        by_row = model(data) if shape[0] == 3 else model(data).transpose(0, 1)
        expected = truth(model, [everything(by_row[[0, 2]]), everything(by_row[1])])
        extend(model)
        with backpack(BatchGrad()):
            everything(model(mark(data, rows, dim=dim))).backward()
        check(model, expected)


def test_samples_without_rows() -> None:
    model = nn.Linear(D, 2).double()
    expected = truth(model, [everything(model(x(3, D)[:2])), everything(model(x(3, D)[2:]))])
    extend(model)
    with backpack(BatchGrad(), Variance()):
        everything(model(mark(x(3, D), [1, 1, 3], samples=5))).backward()
    found = model.weight.grad_batch
    assert found.shape == (5, 2, D)
    torch.testing.assert_close(found[[1, 3]], expected["weight"])
    assert not found[[0, 2, 4]].any()
    torch.testing.assert_close(model.weight.variance, found.var(0, unbiased=False))


def test_marks_inside_of_forward() -> None:
    rows = torch.tensor([0, 1, 0])
    inner = nn.Linear(D, 2).double()
    expected = truth(inner, [everything(inner(x(3, D)[[0, 2]])), everything(inner(x(3, D)[1]))])
    model = extend(Apply(lambda m, a: m.l(mark(2 * a / 2, rows)), l=inner))
    data = x(3, D)
    for _ in range(2):
        with backpack(BatchGrad()):
            everything(model(data)).backward()
        check(inner, expected)
    assert not vars(data)  # nothing is left on inputs
    model = extend(Apply(lambda m, a: m.o(mark(m.l(a), rows)), l=nn.Linear(D, 2), o=nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match="before any parameter meets them"):
        model(torch.randn(3, D))
    extend(inner)
    with backpack(BatchGrad()):  # no state is left behind
        everything(inner(data)).backward()
    assert inner.weight.grad_batch.shape == (3, 2, D)


def test_a_mark_is_taken_back() -> None:
    model, data = extend(nn.Linear(D, 2)), torch.randn(3, D)
    for rows, size in (([0, 0, 1], 2), (None, 3), ([2, 1, 0], 3), (torch.zeros(3).int(), 1)):
        with backpack(BatchGrad()):
            model(mark(data, rows)).sum().backward()
        assert model.weight.grad_batch.shape == (size, 2, D)


def test_rows_that_are_lost_name_the_remedy() -> None:
    """Nodes are summed to graphs, and nobody said so."""
    f = lambda m, a: m.o(torch.zeros(2, 2).index_add(0, torch.tensor([0, 0, 1]), m.l(a)))  # noqa: E731
    model = extend(Apply(f, l=nn.Linear(D, 2), o=nn.Linear(2, 2)))
    loss = F.cross_entropy(model(torch.randn(3, D)), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match=r"backpack\.mark"), backpack(BatchGrad()):
        loss.backward()


@pytest.mark.parametrize(
    "pool",
    [
        lambda h: torch.zeros(2, 2).index_add(0, torch.tensor([0, 0, 1]), h),
        lambda h: h.mean(0, keepdim=True),
    ],
)
def test_readout_at_the_end(pool: Callable[[Tensor], Tensor]) -> None:
    model = extend(Apply(lambda m, a: pool(m.l(a)), l=nn.Linear(D, 2)))
    loss = model(torch.randn(3, D)).square().mean()
    with pytest.raises(RuntimeError, match=r"backpack\.mark"), backpack(BatchGrad()):
        loss.backward()


def test_debug_says_whose_rows(capsys: pytest.CaptureFixture[str]) -> None:
    model = extend(Apply(lambda m, a: m.l(a)[[0, 2, 0]], l=nn.Linear(D, 2)))
    with backpack(BatchGrad(), debug=True):
        model(torch.randn(3, D)).sum().backward()
    text = capsys.readouterr().out
    assert "output (3, 2) of Apply: samples 3, axis 0, rows of samples 0, 2, 0" in text
    assert "tap linear: 'l.weight', 'l.bias' (samples 3, axis 0)" in text


def test_page() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rows.md").read_text()
    names: dict[str, Any] = {}
    shapes = []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
        here = re.findall(r"^(\S+\.shape)  # (\[.*?\])", block, re.MULTILINE)
        shapes += [(str(list(eval(found, names))), shape) for found, shape in here]
    assert len(shapes) >= 3
    assert all(found == shape for found, shape in shapes)
