"""What capture says of the samples is tried out on the graph before anything is computed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.engine import certificate
from backpack.extensions import GGNMP, BatchGrad, BatchL2Grad, DiagGGNExact
from backpack.samples import propagate as propagation
from backpack.samples.axis import regular_axis
from tests.cases import Apply

N = 4


@pytest.fixture(autouse=True, params=[2**40, -1], ids=["gradients", "sums of rows"])
def _afresh(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gradients at taps are compared, or weighted sums of their rows first, as in large graphs."""
    monkeypatch.setattr(certificate, "SKETCHED_FROM", request.param)
    certificate.forget()
    yield
    certificate.forget()


@pytest.fixture
def credulous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations that mix samples, and are taken for functions of single entries."""
    names = ("cumsum", "cumprod", "roll", "flip")
    funcs = {getattr(space, name) for space in (torch, Tensor) for name in names}
    monkeypatch.setattr(propagation, "POINTWISE", propagation.POINTWISE | funcs)
    for func in funcs:
        monkeypatch.delitem(propagation.MOVERS, func, raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    real = certificate.certify

    def counted(*args: Any) -> Any:
        found.append(1)
        return real(*args)

    monkeypatch.setattr(certificate, "certify", counted)
    return found


def layers(between: Any) -> Apply:
    return extend(
        Apply(lambda m, x: m.o(between(m.l(x).tanh())), l=nn.Linear(2, 3), o=nn.Linear(3, 3)).double()
    )


def run(model: nn.Module, *exts: Any, loss: Any = F.cross_entropy, **options: Any) -> None:
    X, y = torch.randn(N, 2).double(), torch.randint(3, (N,))
    with backpack(*(exts or [BatchGrad()]), **options):
        loss(model(X), y).backward()


MIXING = {
    "CumsumBackward0": lambda h: h.cumsum(0),
    "RollBackward0": lambda h: h + h.roll(1, 0),
    "CumprodBackward0": lambda h: torch.cumprod(h, 0) + h,
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("ext", [BatchGrad(), BatchL2Grad(), DiagGGNExact()], ids=repr)
def test_mixed_samples(credulous: None, name: str, gradient: bool, ext: Any) -> None:
    model = layers(MIXING[name])
    with pytest.raises(RuntimeError, match=f"'l.weight', 'l.bias': .* mixed at {name}"):
        run(model, ext, gradient=gradient, certify="once")
    assert not hasattr(model.l.weight, ext.savefield) and not hasattr(model.o.weight, ext.savefield)
    run(layers(lambda h: h), ext)


@pytest.mark.parametrize("name", MIXING)
def test_a_second_try_fails_as_the_first(credulous: None, name: str) -> None:
    """What was refused is not remembered as right, whoever catches the error and goes on."""
    model = layers(MIXING[name])
    for ext in (BatchGrad(), BatchGrad(), DiagGGNExact()):
        with pytest.raises(RuntimeError, match=f"mixed at {name}"):
            run(model, ext, certify="once")
        with pytest.raises(RuntimeError, match=f"mixed at {name}"):
            run(model, ext)
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())


def test_permuted_rows(credulous: None) -> None:
    with pytest.raises(RuntimeError, match="rows of the output of linear belong to other samples"):
        run(layers(lambda h: h.flip(0)))


def test_a_loss_inside_the_model(credulous: None) -> None:
    """The output is a number: samples are last apart where the loss begins."""

    def loss(m: Any, x: Tensor) -> Tensor:
        return m.o(m.l(x).tanh().cumsum(0)).pow(2).mean()

    X = torch.randn(N, 2).double()
    model = extend(Apply(loss, l=nn.Linear(2, 3), o=nn.Linear(3, 3)).double())
    with pytest.raises(RuntimeError, match="mixed at CumsumBackward0"), backpack(BatchGrad()):
        model(X).backward()


def test_one_of_several_outputs(credulous: None) -> None:
    def outputs(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.l(x).tanh()
        return h, m.o(h.cumsum(0))

    X = torch.randn(N, 2).double()
    model = extend(Apply(outputs, l=nn.Linear(2, 3), o=nn.Linear(3, 3)).double())
    hidden, out = model(X)
    with backpack(BatchGrad()):
        hidden.pow(2).sum().backward(retain_graph=True)  # the other output has no part in it
    with pytest.raises(RuntimeError, match="mixed at CumsumBackward0"), backpack(BatchGrad()):
        (hidden.pow(2).sum() + out.pow(2).sum()).backward()


def test_once(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "AGAIN_AFTER", 3)
    model = layers(lambda h: h)
    for passes, expected in enumerate([1, 1, 1, 2, 2]):
        run(model, certify="once")
        assert len(calls) == expected, passes
    run(layers(lambda h: h), certify="once")  # another model
    assert len(calls) == 3
    with backpack(BatchGrad(), certify="once"):  # another number of samples
        model(torch.randn(3, 2).double()).sum().backward()
    assert len(calls) == 4


def test_a_gate_that_is_closed_at_first(calls: list[int]) -> None:
    """Zeros tell nothing: it is tried out again, soon, and less often if nothing but zeros comes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        h.register_hook(lambda g: g - g.mean(0))
        return m.last(x + m.gate * h)

    parts = {"first": nn.Linear(2, 2), "last": nn.Linear(2, 3), "gate": nn.Parameter(torch.zeros(()))}
    model = extend(Apply(forward, **parts)).double()
    for expected in (1, 2, 3, 3, 4, 4, 4, 4, 5):
        run(model, certify="once")
        assert len(calls) == expected
    nn.init.ones_(model.gate)
    with pytest.raises(RuntimeError, match="the samples of a batch are mixed"):
        for _ in range(8):
            run(model, certify="once")


def test_a_model_that_is_gone(calls: list[int]) -> None:
    """Of which nothing can be remembered: its loss is certified each time."""

    def step() -> Tensor:
        return extend(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))(torch.randn(N, 3)).sum()

    for _ in range(2):
        loss = step()
        gc.collect()
        with backpack(BatchGrad(), certify="once"):
            loss.backward()
    assert len(calls) == 2


def test_a_hook_in_a_model_that_is_gone() -> None:
    def step() -> Tensor:
        model = extend(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)))
        model[1].register_full_backward_hook(lambda m, below, above: (below[0] - below[0].mean(0),))
        return model(torch.randn(N, 3)).square().sum()

    loss = step()
    gc.collect()
    message = "the samples of a batch are mixed at"
    with pytest.raises(RuntimeError, match=message), backpack(BatchGrad(), certify="once"):
        loss.backward()


def test_always_and_never(calls: list[int]) -> None:
    model = layers(lambda h: h)
    for _ in range(2):
        run(model, certify="always")
    assert len(calls) == 2
    run(model, certify="never")
    run(model, GGNMP(), certify="always")  # a product of the whole batch
    assert len(calls) == 2


def test_every_time_where_rows_are_picked(calls: list[int]) -> None:
    model = layers(lambda h: h[torch.tensor([2, 0, 1, 3])])
    for _ in range(3):
        run(model, certify="once")
    assert len(calls) == 3


def test_a_loop_over_samples(calls: list[int]) -> None:
    """It is certified once; what picks by an index is tried out each time."""
    order, places = [0, 1, 2, 3], torch.tensor([1, 0])

    def looped(h: Tensor) -> Tensor:
        return torch.stack([h[n] * 2 for n in order])

    model = Apply(
        lambda m, x: m.o(torch.stack([m.l(row) for row in looped(x)])),
        l=nn.Linear(2, 3),
        o=nn.Linear(3, 3),
    )
    model = extend(model.double())
    for expected in (1, 1, 1):
        run(model, certify="once")
        assert len(calls) == expected
    order[:] = [3, 1, 0, 2]
    run(model, certify="once")
    run(model, certify="once")
    assert len(calls) == 3  # rows of the last layer are in another order than samples: each time
    picking = Apply(
        lambda m, x: m.o(torch.stack([m.l(row)[places] for row in x])),
        l=nn.Linear(2, 3),
        o=nn.Linear(2, 3),
    )
    extend(picking.double())
    for _ in range(2):
        run(picking, certify="once")
    assert len(calls) == 5


def test_one_sample_cannot_mix(calls: list[int]) -> None:
    with backpack(BatchGrad(), certify="always"):
        layers(lambda h: h)(torch.randn(1, 2).double()).sum().backward()
    assert not calls


@pytest.mark.parametrize("hook", [lambda g: g.clamp(-1e-2, 1e-2), lambda g: g.sign(), lambda g: 2 * g])
def test_hooks_that_keep_rows_apart(hook: Any) -> None:
    """They need not be linear."""

    def watched(h: Tensor) -> Tensor:
        h = h * 1
        h.register_hook(hook)
        return h

    run(layers(watched))


def test_hooks_that_mix() -> None:
    def watched(h: Tensor) -> Tensor:
        h = h * 1
        h.register_hook(lambda g: g - g.mean(0))
        return h

    with pytest.raises(RuntimeError, match="samples"):
        run(layers(watched))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_false_alarm_in_any_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network: list[nn.Module] = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.GroupNorm(2, 8)]
    for _ in range(4):
        network += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.GroupNorm(4, 8)]
    network += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 49, 10)]
    model, X = extend(nn.Sequential(*network).to(dtype)), torch.randn(40, 3, 16, 16, dtype=dtype)
    with backpack(BatchL2Grad(), certify="always"):
        F.cross_entropy(model(X), torch.arange(40) % 10).backward()


def test_other_words() -> None:
    with pytest.raises(ValueError, match="certify must be one of"):
        backpack(BatchGrad(), certify="sometimes")


def test_gradients_of_large_graphs_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """But at the last tap, unless sums of rows differ."""
    monkeypatch.setattr(certificate, "SKETCHED_FROM", -1)
    held: list[int] = []
    real = certificate.pulled

    def pulled(starts: Any, targets: Any, scale: Any) -> Any:
        held.append(len(targets))
        return real(starts, targets, scale)

    monkeypatch.setattr(certificate, "pulled", pulled)
    run(extend(nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)), nn.Linear(2, 3)).double()))
    assert held == [1, 1]
    held.clear()
    monkeypatch.setattr(certificate, "_sketch", lambda g, axis, scale: torch.rand(3))
    run(extend(nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)), nn.Linear(2, 3)).double()))
    assert held == [1, 1, 6, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_sums_of_rows_are_exact(dtype: torch.dtype) -> None:
    """Numbers of samples leave every digit as it is; one entry that is another's shows."""
    torch.manual_seed(0)
    g, axis = torch.randn(3, 6, 50, dtype=dtype), regular_axis(6, 1)
    factors = certificate.powers(torch.arange(6), g.real.dtype).reshape(1, -1, 1)
    one = certificate._sketch(g, axis, None)
    assert torch.equal(certificate._sketch(g * factors, axis, certificate.powers), one)
    mixed = g * factors
    mixed[0, 2, 7] = g[0, 2, 7] * factors[0, 3, 0]
    assert not torch.equal(certificate._sketch(mixed, axis, certificate.powers), one)
