"""Custom autograd.Functions without parameters: their backward is tried out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact
from backpack.samples import separability as probe
from backpack.testing.oracle import check
from tests.cases import Apply, P
from tests.rows import compare


class Centre(torch.autograd.Function):
    """Looks apart from outside: what is subtracted requires no grad inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g - g.mean(0)


class Hidden(torch.autograd.Function):
    """Rows turned around by something that cannot be seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy()[::-1].copy())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.flip(0)


class Renormalise(torch.autograd.Function):
    """What synchronised batch norms do, with statistics computed in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        std = x.std(0, keepdim=True)
        ctx.save_for_backward(x, std)
        return x / std

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, std = ctx.saved_tensors
        centred = (x - x.mean(0)) / (len(x) - 1)
        return g / std - centred * (g * x).sum(0) / std**3


class Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.sub_(x.mean(0))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g - g.mean(0)


class Two(torch.autograd.Function):
    """The first result keeps samples apart, the second does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x + y, y - y.mean(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * g, g + k - k.mean(0)


class Along(torch.autograd.Function):
    """What it does depends on a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        return x.cumsum(dim)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.flip(ctx.dim).cumsum(ctx.dim).flip(ctx.dim), None


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if not torch._C._current_autograd_node().metadata.get("ready"):
            raise ValueError("called at a time when it must not be")
        return 2 * g


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class Same(torch.autograd.Function):
    """Gradient reversal: the result is the argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.t().contiguous()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.t()


class Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class Doubled(torch.autograd.Function):
    """As a gather of several processes' batches, of which one's rows are taken afterwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.repeat(2, 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return sum(g.chunk(2))


_stored = Square.apply  # as programs keep them: found before any model was extended
Call = Callable[[Tensor], Tensor]
APART: dict[str, Call] = {
    "square": Square.apply,
    "stored": lambda h: _stored(h),
    "same": Same.apply,
    "transposed": lambda h: Transposed.apply(h).t(),
    "numpy": Numpy.apply,
    "twice": lambda h: Same.apply(Square.apply(h)),
    "two": lambda h: Two.apply(h, h.sin())[0],
    "along": lambda h: Along.apply(h, 1),
    "doubled": lambda h: Doubled.apply(h).view(2, -1, 4).sum(0),
    "in place": lambda h: Square.apply(h).mul_(2),
}
MIXING: dict[str, Call] = {
    "centre": Centre.apply,
    "hidden": Hidden.apply,
    "renormalise": Renormalise.apply,
    "changed": lambda h: Changed.apply(h * 1),
    "two": lambda h: Two.apply(h, h.sin())[1],
    "along": lambda h: Along.apply(h, 0),
    "twice": lambda h: Square.apply(Centre.apply(h)),
    "detour": lambda h: Centre.apply(h.view(-1, 2, 2)).flatten(1),
}


def _between(f: Call) -> nn.Module:
    return Apply(lambda m, x: m.o(f(m.l(x)).tanh()), l=nn.Linear(4, 4), o=nn.Linear(4, 3))


@pytest.mark.parametrize("n", [5, 4, 1])
@pytest.mark.parametrize("name", APART)
def test_functions_that_keep_samples_apart(name: str, n: int) -> None:
    compare(_between(APART[name]), [torch.randn(n, 4)])


@pytest.mark.parametrize("n", [5, 4])
@pytest.mark.parametrize("name", MIXING)
def test_functions_that_mix(name: str, n: int) -> None:
    model = extend(_between(MIXING[name])).double()
    loss = F.mse_loss(model(torch.randn(n, 4).double()), torch.zeros(n, 3).double())
    message = r"cannot tell which axis .*'o.weight'.*custom autograd\.Function, mixes samples"
    with pytest.raises(RuntimeError, match=message), backpack(BatchGrad()):
        loss.backward()


@pytest.mark.parametrize("name", ["centre", "two"])
def test_outputs_that_functions_mix(name: str) -> None:
    model = extend(Apply(lambda m, x: MIXING[name](m.l(x)), l=nn.Linear(4, 4)))
    loss = model(torch.randn(4, 4)).square().sum()
    with pytest.raises(RuntimeError, match="axis of the model's output"), backpack(BatchGrad()):
        loss.backward()


@pytest.mark.parametrize("name", ["centre", "renormalise", "square", "same", "transposed", "doubled"])
def test_functions_of_inputs(name: str) -> None:
    """Without grad nothing is mixed."""
    f = {**MIXING, **APART}[name]
    compare(Apply(lambda m, x: m.o(f(x).tanh()), o=nn.Linear(4, 3)), [torch.randn(5, 4)])


def test_one_that_cannot_be_tried_out() -> None:
    model = extend(_between(Raises.apply))
    output = model(torch.randn(4, 4))
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        node.metadata["ready"] = True
        stack += [child for child, _ in node.next_functions if child is not None]
    message = "'o.weight'.*Raises, a custom autograd.Function, whose backward cannot be tried out"
    with pytest.raises(RuntimeError, match=message), backpack(BatchGrad()):
        output.sum().backward()


def test_tried_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    inner = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or inner(*a, **k))
    probe._verdicts.clear()
    model = extend(_between(Square.apply))
    for _ in range(3):
        model(torch.randn(4, 4))
    assert len(calls) == 2


class Taken(torch.autograd.Function):
    """Rows taken in a way that cannot be seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return torch.from_numpy(x.detach().numpy()[index.numpy()])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.rows, *g.shape[1:]).index_add(0, index, g), None


class Switched(torch.autograd.Function):
    centres = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(0) if Switched.centres else x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g - g.mean(0) if Switched.centres else g


def _enclosed() -> tuple[Call, Callable[[], None]]:
    centres = False

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x - x.mean(0) if centres else x * 1

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g - g.mean(0) if centres else g

    def change() -> None:
        nonlocal centres
        centres = True

    return Function.apply, change


@pytest.mark.parametrize("name", ["index", "class", "closure"])
def test_functions_that_do_something_else_the_next_time(name: str, monkeypatch: Any) -> None:
    """What was found out when they kept samples apart must not be believed any more."""
    order, (enclosed, change) = torch.arange(4), _enclosed()
    calls = {"index": lambda h: Taken.apply(h, order), "class": Switched.apply, "closure": enclosed}
    model = extend(_between(calls[name]))
    with backpack(BatchGrad()):
        model(torch.randn(4, 4)).sum().backward()
    order += torch.tensor([2, 0, -1, -1])
    change()
    monkeypatch.setattr(Switched, "centres", True)
    loss = model(torch.randn(4, 4)).sum()
    message = r"custom autograd\.Function, mixes samples"
    with pytest.raises(RuntimeError, match=message), backpack(BatchGrad()):
        loss.backward()


def test_gradients_and_hooks_are_left_alone() -> None:
    probe._verdicts.clear()
    seen: list[Tensor] = []

    def f(h: Tensor) -> Tensor:
        h.register_hook(seen.append)
        return Square.apply(h)

    model = extend(_between(f))
    with backpack(BatchGrad()):
        loss = model(torch.randn(4, 4)).sum()
        assert all(p.grad is None for p in model.parameters())
        count = len(seen)
        loss.backward()
    assert count == 0 and seen


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


# Of torch's nodes that something is known of.
NAMES = (
    "Abs Add Alias Clamp Clone Convolution Div Expand Mm Mul Permute Relu Sigmoid Sum T View".split()
)
PLACES: dict[str, Callable[[Call], nn.Module]] = {
    "inside": _between,
    "last": lambda f: Apply(lambda m, x: f(m.l(x)), l=nn.Linear(4, 3)),
    "weight": lambda f: Apply(lambda m, x: m.l(x) @ f(m.w), l=nn.Linear(4, 3), w=P(3, 3)),
    "above": lambda f: nn.Linear(4, 3),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_functions_named_as_operations_of_torch(name: str, place: str) -> None:
    torch.manual_seed(0)
    f = type(name, (Cube,), {}).apply

    def lossfunc(output: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(f(output) if place == "above" else output, y)

    report = check(PLACES[place](f), lossfunc, torch.randn(3, 4), torch.zeros(3, 3), tolerance=1e-7)
    assert report.ok, f"\n{report}"


def _kron(m: Any, a: Tensor, b: Tensor) -> Tensor:
    """What becomes of the samples of a second input is not known."""
    rows = m.l(torch.kron(m.p, b)).unflatten(0, (2, len(b)))
    return m.o(rows.transpose(0, 1).flatten(1).tanh())


@pytest.mark.parametrize("loss", [nn.HuberLoss, nn.L1Loss, nn.PoissonNLLLoss, nn.MSELoss])
def test_a_function_between_a_lost_output_and_a_loss(loss: type[nn.Module]) -> None:
    """It is the loss's input, and none of the loss's operations: its curvature counts."""
    model = extend(Apply(_kron, p=P(2, 1), l=nn.Linear(2, 3), o=nn.Linear(6, 1)))
    output = model(torch.randn(4, 3), torch.randn(4, 2))
    with (
        pytest.raises(RuntimeError, match="takes part in the loss .* lost first at kron"),
        backpack(DiagGGNExact()),
    ):
        extend(loss())(Cube.apply(output), torch.rand(4, 1)).backward()


def test_a_function_between_models() -> None:
    """What a later model takes is its data, whatever has made it."""
    first, second = extend(nn.Linear(4, 3)), extend(nn.Sequential(nn.Linear(3, 2), nn.Tanh()))
    x = torch.randn(5, 4)
    with backpack(BatchGrad()):
        second(Cube.apply(first(x))).square().sum().backward()
    parameters = [*first.parameters(), *second.parameters()]
    for n in range(5):
        truth = torch.autograd.grad(second(Cube.apply(first(x[n : n + 1]))).square().sum(), parameters)
        for p, g in zip(parameters, truth, strict=True):
            torch.testing.assert_close(p.grad_batch[n], g)
