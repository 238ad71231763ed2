"""The user's forward pass goes on, whatever the capture does; texts that say where an axis was lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, check, extend
from backpack._ambient import ambient
from backpack.capture import in_place, tracker
from backpack.extensions import BatchGrad
from tests.cases import Apply


def _model(f: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return Apply(f, l=nn.Linear(3, 3), o=nn.Linear(3, 2))


STEPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "traced": lambda m, x: m.o(F.glu(torch.cat([m.l(x), x], 1))),
    "settled": lambda m, x: m.o(m.l(x) - m.l(x).mean(0)),
    "make_tap": lambda m, x: m.o(m.l(x) * m.o.weight[0]),
    "wrote": lambda m, x: m.o(m.l(x).clone().mul_(2)),
    "assigned": lambda m, x: m.o((h := m.l(x).clone(), h.__setitem__((0, 0), 1.0))[0]),
    "is_shared": lambda m, x: m.o(m.l(x).clone().add_(x)),
}


class Broken(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("name", STEPS)
def test_a_mistake_of_ours_loses_the_axis_at_most(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, X = _model(STEPS[name]), torch.randn(4, 3)
    wanted = model(X)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise Broken

    extend(model)
    with monkeypatch.context() as patch:
        for module in (tracker, in_place):
            if hasattr(module, name):
                patch.setattr(module, name, broken)
        found = model(X)
    torch.testing.assert_close(found, wanted)
    assert not ambient.axes and ambient.recorder is None
    with pytest.raises(RuntimeError), backpack(BatchGrad()):
        found.sum().backward()
    if name != "settled":
        with backpack(BatchGrad()):
            model(X).sum().backward()


def test_errors_of_the_user_are_his() -> None:
    for wrong in (
        lambda m, x: m.l(x) @ x,
        lambda m, x: m.l(x).add_(torch.zeros(7)),
        lambda m, x: torch.mul(x, x, out=torch.zeros(2, dtype=torch.long)),
        lambda m, x: nn.LSTM(3, 3)(m.l(x)[:, :2]),
    ):
        model, X = _model(wrong), torch.randn(4, 3)
        with pytest.raises(RuntimeError) as plain:
            model(X)
        with pytest.raises(RuntimeError) as extended:
            extend(model)(X)
        assert str(plain.value) == str(extended.value)


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "einsum": lambda h: torch.einsum("ab,ax->xa", h, torch.randn(4, 4)),
    "scatter": lambda h: torch.zeros(4, 3).scatter(1, torch.zeros(4, 1).long(), h),
    "scatter_add": lambda h: torch.zeros(4, 3).scatter_add(1, torch.zeros(4, 1).long(), h),
    "unfold": lambda h: F.unfold(h[None], (1, 2))[:3].t()[:4],
}


@pytest.mark.parametrize("name", CALLS)
def test_unusual_calls_do_not_stop_the_forward_pass(name: str) -> None:
    model, X = _model(lambda m, x: CALLS[name](m.l(x)).sum() * m.o(x)), torch.randn(4, 3)
    torch.manual_seed(0)
    wanted = model(X)
    torch.manual_seed(0)
    torch.testing.assert_close(extend(model)(X), wanted)


def test_the_text_says_where_the_axis_was_lost() -> None:
    """It is lost before any gradient flows, so that no tap is refused."""
    model = extend(_model(lambda m, x: m.o(m.l(x.mean(0)).tanh())))
    loss = model(torch.randn(4, 3)).sum()
    message = (
        r"'o.weight' takes part in the loss .* lost first at mean: a reduction over the sample axis"
    )
    with pytest.raises(RuntimeError, match=message), backpack(BatchGrad()):
        loss.backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_the_text_without_a_lost_axis() -> None:
    @torch.jit.script
    def cube(x: Tensor, w: Tensor) -> Tensor:
        return x**3 * w

    model = extend(_model(lambda m, x: cube(m.l(x), m.o.weight[0])))
    loss = model(torch.randn(4, 3)).sum()
    with pytest.raises(RuntimeError, match="'o.weight'.*cannot see"), backpack(BatchGrad()):
        loss.backward()


def _by_hook(model: nn.Module) -> nn.Module:
    """As trainers do for checkpoints above frozen layers."""
    model.first.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return model


def _setting(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    h.requires_grad = True
    return m.last(h.tanh())


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.last(m.first(x).requires_grad_().tanh()),
        lambda m, x: m.last(m.first(x).detach().requires_grad_(True).tanh()),
        lambda m, x: m.last(m.first(x.requires_grad_()).tanh()),
        _setting,
    ],
    ids=["method", "detached", "input", "attribute"],
)
@pytest.mark.parametrize("hook", [False, True])
def test_data_begins_to_require_a_gradient(forward: Callable[..., Tensor], hook: bool) -> None:
    """Below it the graph ends, and nothing there is an unseen parameter."""
    torch.manual_seed(0)
    model = Apply(forward, first=nn.Linear(4, 5).requires_grad_(False), last=nn.Linear(5, 3))
    if hook:
        model = _by_hook(model)
    report = check(model, nn.CrossEntropyLoss(), torch.rand(6, 4), torch.arange(6) % 3)
    assert report.ok and len({name for name, _ in report.errors}) == 2, report


class Attention(nn.Module):
    def __init__(self, weights: bool, **options: Any) -> None:
        super().__init__()
        self.m, self.weights = nn.MultiheadAttention(4, 2, **options), weights

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.m(x, x, x, need_weights=self.weights)


OPENED: dict[str, Callable[[bool], nn.Module]] = {
    "attention": lambda first: Attention(True, batch_first=first),
    "attention without weights": lambda first: Attention(False, batch_first=first),
    "encoder": lambda first: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=first),
    "rnn": lambda first: nn.RNN(4, 3, 2, batch_first=first),
    "lstm": lambda first: nn.LSTM(4, 3, bidirectional=True, batch_first=first),
    "lstm with projections": lambda first: nn.LSTM(4, 3, 2, proj_size=2, batch_first=first),
    "gru": lambda first: nn.GRU(4, 3, 2, bidirectional=True, batch_first=first),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", OPENED)
def test_results_lie_in_memory_as_without(name: str, first: bool) -> None:
    """Views that a program takes of them (``h.view(-1, d)``) are possible, or not, as ever."""
    model, x = OPENED[name](first), torch.randn(3, 5, 4)
    wanted = list(tracker.flatten(model(x)))
    found = list(tracker.flatten(extend(model, batch_dim=0 if first else 1)(x)))
    for one, other in zip(wanted, found, strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other)
