"""Nested tensors of jagged layout: against plain autograd on one component after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backpack import backpack, extend, extensions, mark
from tests.idioms.compare import Comparison
from tests.idioms.reference import Expanded, Truth
from tests.row_cases import data
from tests.samples.test_rows import GROUPS, targets

LENGTHS = [2, 4, 1]
PARTS = list(data(7, 3, seed=31).split(LENGTHS))
IDS = list(torch.tensor([1, 2, 0, 4, 3, 1, 0]).split(LENGTHS))
CONDITION = data(3, 3, seed=32)
pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")


def nested(parts: list[Tensor] | None = None) -> Tensor:
    return torch.nested.nested_tensor(PARTS if parts is None else parts, layout=torch.jagged)


def rows(x: Tensor) -> Tensor:
    return x.values() if x.is_nested else x.flatten(0, 1)


class Net(nn.Module):
    """Runs on a nested tensor, and on one component as a batch of one."""

    def __init__(self, body: Callable[..., Tensor], ids: bool = False, width: int = 3) -> None:
        super().__init__()
        self.body = body
        if ids:
            self.table = nn.Embedding(5, 3)
        self.first, self.norm, self.head = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(width, 2)
        self.wide, self.conv = nn.Linear(3, 6), nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.body(self, x, *more)


def attention(m: Net, x: Tensor, causal: bool = False) -> Tensor:
    q, k, v = (y.unflatten(-1, (3, 1)).transpose(1, 2) for y in (m.first(x), x * 0.5, m.norm(x)))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(-2)
    return m.head((x + out).mean(1))


def convolved(m: Net, x: Tensor) -> Tensor:
    """Padded, as long as the longest component."""
    x = m.first(x)
    padded = x.to_padded_tensor(0.0) if x.is_nested else F.pad(x, (0, 0, 0, 4 - x.shape[1]))
    return m.head(m.conv(padded.mT).tanh().sum(-1))


def anew(m: Net, x: Tensor) -> Tensor:
    """Rows are taken out, and made a nested tensor again."""
    y = m.first(rows(x)).tanh()
    y = torch.nested.nested_tensor_from_jagged(y, x.offsets()) if x.is_nested else y[None]
    return m.head((x + y).sum(dim=1))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (1, 3)).transpose(1, 2)


def joined(m: Net, x: Tensor) -> Tensor:
    parts = m.first(x).tanh().unbind()
    h = (
        torch.nested.as_nested_tensor(list(parts), layout=torch.jagged)
        if x.is_nested
        else parts[0][None]
    )
    return m.head(h.amax(1))


# Each makes [B, 2], or a row for each row.
CASES: dict[str, Callable[..., Tensor]] = {
    "mean": lambda m, x: m.head(m.first(x).tanh().mean(1)),
    "sum": lambda m, x: m.head(m.norm(m.first(x)).sum(dim=1)),
    "sum, kept": lambda m, x: m.head(m.first(x).sigmoid().sum(1, keepdim=True).squeeze(1)),
    "all sums": lambda m, x: m.head(m.first(x).tanh()).exp().unsqueeze(-1).sum((1, 3)),
    "largest": lambda m, x: m.head(m.first(x).amax(dim=1) - m.norm(x).amin(dim=1)),
    "rows": lambda m, x: m.head(rows(m.first(x).tanh())),
    "components": lambda m, x: m.head(torch.stack([h.sum(0) for h in m.first(x).tanh().unbind()])),
    "softmax": lambda m, x: m.head((m.first(x)[..., :1].softmax(1) * m.norm(x)).sum(1)),
    "last softmax": lambda m, x: m.head((m.first(x).softmax(-1) * x).sum(1)),
    "attention": attention,
    "causal attention": lambda m, x: attention(m, x, True),
    "convolved": convolved,
    "made anew": anew,
    "joined": joined,
    "gated": lambda m, x: m.head((F.glu(m.wide(x)) + m.wide(x).chunk(2, -1)[1]).mean(1)),
    "residuals": lambda m, x: m.head((2 - F.gelu(m.first(x + F.silu(m.first(x))) * x).square()).sum(1)),
    "side by side": lambda m, x: m.head(torch.cat([m.first(x), x], -1)[..., 1:4].tanh().sum(1)),
    "viewed": lambda m, x: m.head(
        m.wide(x).view(len(x.unbind()), -1, 2, 3).tanh().sum(2).select(-1, 0).unsqueeze(-1).sum(1)
        + m.first(x).mean((1, 2), keepdim=True).flatten(1) * torch.ones(3).to(CONDITION)
    ),
    "product": lambda m, x: m.head((x.tanh() @ m.first.weight.T + m.first.bias).mean(1)),
    "two nested": lambda m, x: m.head((m.first(x).transpose(1, 2) @ m.norm(x).tanh()).sum(1)),
    "two nested, heads": lambda m, x: m.head(
        heads(m.first(x)).mT.matmul(heads(m.norm(x))).sum(1)[:, 0]
    ),
    "a matrix for each": lambda m, x: m.head(
        (m.first(x) @ (m.norm(x).transpose(1, 2) @ m.first(x))).tanh().mean(1)
    ),
    "normalized": lambda m, x: m.head(F.normalize(m.first(x), dim=-1).cumsum(-1).sum(1)),
    "in place": lambda m, x: m.head(F.relu(m.first(x).add_(1.0), inplace=True).mean(1)),
}
OF_ROW = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))


def check(
    body: Callable[..., Tensor],
    parts: list[Tensor] = PARTS,
    ids: bool = False,
    condition: Tensor | None = None,
    owner: Tensor | None = None,
    groups: dict[str, tuple] = GROUPS,
    **options: Any,
) -> None:
    """Compare with plain autograd on each component alone."""
    torch.manual_seed(1)
    model = Net(body, ids).double()
    more = [] if condition is None else [condition]
    with sdpa_kernel(SDPBackend.MATH):
        alone = [model(part[None], *(c[n : n + 1] for c in more)) for n, part in enumerate(parts)]
    output = torch.cat(alone)
    whose = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(each) for each in alone]))
    whose = whose if owner is None else owner[whose]
    samples = int(whose.max()) + 1
    whole = dict(model.named_parameters())
    at = Expanded(whole, [output], whose.repeat_interleave(output.shape[1]), samples)
    truth = Truth(at, lambda outputs: F.cross_entropy(outputs[0], targets(len(outputs[0]))))
    extend(model, **options)
    lossfunc = extend(nn.CrossEntropyLoss())

    def backward() -> None:
        x = nested(parts)
        x = x if owner is None or options else mark(x, owner)
        with sdpa_kernel(SDPBackend.MATH):
            found = model(x, *more)
        found = found.values() if found.is_nested else found
        torch.testing.assert_close(found, output)
        lossfunc(found, targets(len(found))).backward()

    outcome = Comparison(truth, model, backward).outcome(groups)
    assert not any(outcome.values()), outcome
    with backpack(extensions.KFLR()):
        backward()
    B = truth.ggn["head.bias"]
    torch.testing.assert_close(model.head.weight.kflr[0], B)
    torch.testing.assert_close(model.head.bias.kflr[0], B)


@pytest.mark.parametrize("name", CASES)
def test_quantities(name: str) -> None:
    check(CASES[name])


def test_ids() -> None:
    check(lambda m, x: m.head(m.first(m.table(x)).tanh().sum(1)), IDS, ids=True)


def test_beside_a_row_for_each_component() -> None:
    def body(m: Net, x: Tensor, c: Tensor) -> Tensor:
        return m.head((m.first(x).tanh() * m.norm(c)[:, None] + c.unsqueeze(1)).sum(1))

    check(body, condition=CONDITION)


def test_an_empty_component() -> None:
    parts = [PARTS[0], PARTS[1][:0], PARTS[2]]
    for body in (CASES["sum"], CASES["rows"], CASES["softmax"]):
        check(body, parts)


def test_components_of_users() -> None:
    owner = torch.tensor([1, 0, 1])
    check(CASES["mean"], owner=owner)
    check(CASES["rows"], owner=owner, samples=lambda x: (x, owner))
    check(CASES["rows"], owner=None, samples="x")


def test_a_nested_output() -> None:
    """Its rows are taken above the model, where torch differentiates that once only."""

    def body(m: Net, x: Tensor) -> Tensor:
        return m.head(m.first(x).tanh()) if x.is_nested else m.head(m.first(x).tanh())[0]

    once = {name: GROUPS[name] for name in ("first", "ggn")}
    once["ggn"] = once["ggn"][:-1]
    check(body, groups=once)
    model = extend(Net(body).double())
    with backpack(extensions.GGNMP()):
        F.cross_entropy(model(nested()).values(), targets(7)).backward()
    with pytest.raises(NotImplementedError, match="return the rows"):
        p = model.head.weight
        p.ggnmp(torch.ones_like(p)[None])


def test_nothing_is_left_on_the_input() -> None:
    x = nested()
    before = set(x.__dict__)
    model = extend(Net(CASES["mean"]).double())
    with backpack(extensions.BatchGrad()):
        model(x).sum().backward()
    assert set(x.__dict__) == before


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.head(
            torch.nested.to_padded_tensor(torch.logcumsumexp(m.first(x), -1), 0.0).sum(1)
        ),
        lambda m, x: m.head(torch.logcumsumexp(m.first(x), -1).values()),
    ],
)
def test_refused_or_right(body: Callable[..., Tensor]) -> None:
    """What is not known is refused, and the error names the operation."""
    model = extend(Net(body).double())
    try:
        output = model(nested())
    except (RuntimeError, NotImplementedError, ValueError):
        return  # by torch
    with pytest.raises(RuntimeError, match="nested"), backpack(extensions.BatchGrad()):
        output.sum().backward()
