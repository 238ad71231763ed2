"""Never silently wrong: what cannot be computed raises an error, and leaves no state behind."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import (
    KFAC,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
    Variance,
)
from tests.cases import Apply


class Clipped(torch.autograd.Function):
    """Its backward is not linear."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0).clamp(-1e-3, 1e-3)


class Net(nn.Module):
    """A model with one part that capture may not see."""

    def __init__(self, hidden) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.rand(3) + 1)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self, self.first(x).tanh()))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 3), torch.randint(3, (4,))


def works_afterwards(data: tuple[Tensor, Tensor]) -> None:
    """The next correct step gives the right numbers."""
    X, y = data
    model, lossfunc = extend(nn.Linear(3, 3)), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad(), DiagGGNExact()):
        lossfunc(model(X), y).backward()
    torch.testing.assert_close(model.weight.grad_batch.sum(0), model.weight.grad)
    assert model.weight.diag_ggn_exact.shape == model.weight.shape


@pytest.mark.parametrize("ext", [BatchGrad, DiagGGNExact])
def test_custom_function(data, ext) -> None:
    X, y = data
    model, lossfunc = Net(lambda m, a: Clipped.apply(a, m.scale)), extend(nn.CrossEntropyLoss())
    loss = lossfunc(extend(model)(X), y)
    with pytest.raises(RuntimeError, match="Clipped, .* is not linear"), backpack(ext()):
        loss.backward()
    assert not any(hasattr(p, ext().savefield) for p in model.parameters())
    works_afterwards(data)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hidden_part_added_to_data(data) -> None:
    """Below the hidden part there are taps: counting it as made from parameters would count twice."""
    X, y = data
    scripted = torch.jit.script(Scale())
    model = extend(Net(lambda m, a: a + scripted(a)))
    model.scripted = scripted
    loss = F.cross_entropy(model(X), y)
    with pytest.raises(RuntimeError, match="cannot see"), backpack(BatchGrad()):
        loss.backward()


def test_adversarial_input(data) -> None:
    X, y = data
    X = X.clone().requires_grad_()
    model = extend(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    with backpack(BatchGrad(), DiagGGNExact(), DiagHessian()):
        extend(nn.CrossEntropyLoss())(model(X), y).backward()
    assert X.grad is not None and not hasattr(X, "grad_batch")
    torch.testing.assert_close(model[0].weight.grad_batch.sum(0), model[0].weight.grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_submodule(data) -> None:
    X, y = data
    model = nn.Sequential(nn.Linear(3, 3), torch.jit.script(Scale()), nn.Linear(3, 3))
    extend(model)
    loss = F.cross_entropy(model(X), y)
    with pytest.raises(RuntimeError, match="'(1|2).(weight|bias)'.*scripted"), backpack(BatchGrad()):
        loss.backward()
    works_afterwards(data)


def test_parameter_through_data(data) -> None:
    X, y = data
    model = extend(Net(lambda m, a: a * m.scale.data))
    loss = F.cross_entropy(model(X), y)
    with pytest.raises(RuntimeError, match="'scale'.*'.data'"), backpack(BatchGrad()):
        loss.backward()
    works_afterwards(data)


def test_data_of_a_parameter_that_is_also_used(data) -> None:
    X, y = data
    model = extend(Net(lambda m, a: a * m.scale / m.scale.data.norm()))
    with backpack(BatchGrad()):
        F.cross_entropy(model(X), y).backward()
    torch.testing.assert_close(model.scale.grad_batch.sum(0), model.scale.grad)


def test_second_order_without_a_loss(data) -> None:
    X, y = data
    model = extend(nn.Linear(3, 3))
    loss = F.cross_entropy(model(X), y)
    with pytest.raises(RuntimeError, match="or extend the loss"), backpack(DiagGGNExact()):
        torch.autograd.backward(loss)
    with pytest.raises(ValueError, match="not convex"), backpack(SqrtGGNExact()):
        model(X).sin().sum().backward()
    works_afterwards(data)


def test_second_order_loss_too_large(data) -> None:
    model = extend(nn.Linear(3, 5000))
    with pytest.raises(ValueError, match="extend a loss"), backpack(DiagGGNExact()):
        (model(data[0]).sin() + 1).square().sum().backward()


def test_batch_norm_in_training_mode(data) -> None:
    X, y = data
    model, lossfunc = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), extend(nn.CrossEntropyLoss())
    extend(model)
    for ext in (BatchL2Grad(), Variance(), DiagGGNExact(), DiagHessian()):
        with pytest.raises(NotImplementedError, match="eval"), backpack(ext):
            lossfunc(model(X), y).backward()
    model.zero_grad()
    with pytest.warns(UserWarning, match="mixes the samples"), backpack(BatchGrad()):
        lossfunc(model(X), y).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)
    model.eval()
    with backpack(Variance(), DiagGGNExact()):
        lossfunc(model(X), y).backward()


def test_targets_out_of_range(data) -> None:
    X, _ = data
    model, lossfunc = extend(nn.Linear(3, 3)), extend(nn.CrossEntropyLoss())
    with pytest.raises(IndexError), backpack(BatchGrad()):
        lossfunc(model(X), torch.tensor([0, 1, 2, 3])).backward()
    works_afterwards(data)


def test_loss_that_is_not_finite(data) -> None:
    X, y = data
    model, lossfunc = extend(nn.Linear(3, 3)), extend(nn.CrossEntropyLoss())
    for ext in (BatchGrad(), DiagGGNExact()):
        with pytest.raises(ValueError, match="not finite"), backpack(ext):
            lossfunc(model(X * float("nan")), y).backward()
    assert not hasattr(model.weight, "grad_batch")
    works_afterwards(data)


def test_samples_cannot_be_told_apart(data) -> None:
    X, y = data

    class Mixes(nn.Module):
        def __init__(self, mix) -> None:
            super().__init__()
            self.k, self.l, self.mix = nn.Linear(3, 3), nn.Linear(3, 3), mix

        def forward(self, x: Tensor) -> Tensor:
            return self.l(self.mix(self.k(x)))

    for mix in (
        lambda x: x.mean(0, keepdim=True).expand(4, 3),
        lambda x: (x @ x.T) @ x,
        lambda x: x.softmax(0),
        lambda x: torch.cat([x[1:3], torch.zeros(2, 3)]),
    ):
        model = extend(Mixes(mix))
        loss = F.cross_entropy(model(X), y)
        message = "'l.weight'.*(axis|mixed)|axis.*'l.weight'"
        with pytest.raises(RuntimeError, match=message), backpack(BatchGrad()):
            loss.backward()
    works_afterwards(data)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(3, 2), (3,)),
        (nn.LayerNorm(3), (3,)),
        (nn.Conv2d(3, 2, 3), (3, 5, 5)),
        (nn.Sequential(nn.LSTM(3, 2), Apply(lambda _, out: out[0])), (7, 3)),
        (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), (7, 4)),
    ],
)
def test_one_sample_without_a_batch_axis(model: nn.Module, shape: tuple[int, ...]) -> None:
    message = rf"axis 0 of the input there are {shape[0]} samples.*x.unsqueeze\(0\)"
    with pytest.raises(RuntimeError, match=message), backpack(BatchGrad()):
        extend(model)(torch.randn(shape)).sum().backward()
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())


def test_different_batch_sizes(data) -> None:
    X, _ = data
    model = extend(nn.Linear(3, 3))
    loss = model(X).sum() + model(X[:2]).sum()
    with (
        pytest.raises(RuntimeError, match="of 4, 2 samples.*forwards='further'"),
        backpack(BatchGrad()),
    ):
        loss.backward(retain_graph=True)
    sizes = pytest.raises(RuntimeError, match="4 and of 2|2 and of 4")
    with sizes, backpack(BatchGrad(), forwards="same"):
        loss.backward()


def test_empty_batch() -> None:
    model, lossfunc = extend(nn.Linear(3, 3)), extend(nn.CrossEntropyLoss(reduction="sum"))
    X, y = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    with backpack(BatchGrad(), BatchL2Grad(), DiagGGNExact()):
        lossfunc(model(X), y).backward()
    assert model.weight.grad_batch.shape == (0, 3, 3)
    assert model.weight.batch_l2.shape == (0,)
    assert not model.weight.diag_ggn_exact.any()


def test_empty_batch_has_no_variance() -> None:
    model = extend(nn.Linear(3, 3))
    with backpack(Variance()):
        model(torch.zeros(0, 3)).sum().backward()
    assert model.weight.variance.isnan().all()


def test_weight_decay_in_the_loss_is_left_out(data) -> None:
    X, y = data
    model, lossfunc = extend(nn.Linear(3, 3)), extend(nn.CrossEntropyLoss())
    lossfunc(model(X), y).backward()
    plain = model.weight.grad.clone()
    decay = sum(p.square().sum() for p in model.parameters())
    with backpack(BatchGrad(), DiagGGNExact()):
        (lossfunc(model(X), y) + 0.1 * decay).backward()
    torch.testing.assert_close(model.weight.grad_batch.sum(0), plain)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_parameter_without_entries() -> None:
    model, lossfunc = (
        extend(nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2))),
        extend(nn.CrossEntropyLoss()),
    )
    with backpack(BatchGrad(), BatchL2Grad(), Variance(), DiagGGNExact(), DiagHessian()):
        lossfunc(model(torch.randn(4, 3)), torch.zeros(4, dtype=torch.long)).backward()
    assert model[0].weight.grad_batch.shape == (4, 0, 3) and model[1].weight.diag_h.shape == (2, 0)
    assert model[1].bias.diag_ggn_exact.all()


def test_exception_in_forward(data) -> None:
    X, y = data

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise KeyError(self.l(x).sum().item())

    with pytest.raises(KeyError):
        extend(Fails())(X)
    works_afterwards(data)


def test_interrupt_in_forward(data) -> None:
    """KeyboardInterrupt skips torch's forward hooks."""
    X, y = data

    class Stops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extend(Stops())(X)
    works_afterwards(data)
    with pytest.raises(KeyboardInterrupt), backpack(BatchGrad()):
        extend(Stops())(X)
    works_afterwards(data)


def test_exception_in_the_middle_of_backward(data) -> None:
    X, y = data
    model = extend(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))
    lossfunc = extend(nn.CrossEntropyLoss())

    def stop(grad: Tensor) -> None:
        raise KeyError("stop")

    hidden = model[0](X)
    hidden.register_hook(stop)
    loss = lossfunc(model[2](hidden.relu()), y)
    with pytest.raises(KeyError), backpack(BatchGrad(), DiagGGNExact()):
        loss.backward()
    assert not any(hasattr(p, f) for p in model.parameters() for f in ("grad_batch", "diag_ggn_exact"))
    del loss, hidden
    gc.collect()
    works_afterwards(data)


def test_exception_in_the_extension_hook(data) -> None:
    X, y = data
    model, lossfunc = extend(nn.Linear(3, 3)), extend(nn.CrossEntropyLoss())

    def hook(module: nn.Module) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError), backpack(BatchGrad(), extension_hook=hook):
        lossfunc(model(X), y).backward()
    assert not hasattr(model.weight, "grad_batch")
    works_afterwards(data)


def test_attention_kernel_that_cannot_be_differentiated_twice() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.l(x).unsqueeze(1)
            return F.scaled_dot_product_attention(x, x, x).squeeze(1).sum(1)

    model, lossfunc = extend(Attends()), extend(nn.MSELoss())
    X = torch.randn(2, 5, 4)
    with pytest.raises(NotImplementedError, match="MATH"), backpack(DiagHessian()):
        lossfunc(model(X), torch.zeros(2, 4)).backward()
    with backpack(BatchGrad(), DiagGGNExact()):
        lossfunc(model(X), torch.zeros(2, 4)).backward()


def test_complex_parameter() -> None:
    class Twiddle(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return (super().forward(input.to(torch.cfloat))).abs()

    model = extend(Twiddle(2, 3, dtype=torch.cfloat))
    loss = model(torch.ones(4, 2)).sum()
    wanted = "'weight' is complex, for which KFAC.* is not defined.*view_as_complex"
    with pytest.raises(NotImplementedError, match=wanted), backpack(KFAC(), BatchGrad()):
        loss.backward(retain_graph=True)
    assert not hasattr(model.weight, "grad_batch")
    with backpack(KFAC(), BatchGrad(), unsupported="skip"):
        loss.backward()
    assert not hasattr(model.weight, "kfac")
    torch.testing.assert_close(model.weight.grad_batch.sum(0), model.weight.grad)


# --------------------------------------------------------------------------------------
# What is changed in place between the forward pass and backward


def test_logits_changed_after_cross_entropy(data) -> None:
    """Autograd keeps the log-probabilities: gradient and curvature are those of before."""
    X, y = data
    model, lossfunc = extend(nn.Linear(3, 3)), extend(nn.CrossEntropyLoss())
    found = []
    for change in (lambda f: None, lambda f: f.mul_(3)):
        f = model(X)
        loss = lossfunc(f, y)
        with torch.no_grad():
            change(f)
        with backpack(DiagGGNExact(), DiagHessian()):
            loss.backward()
        found.append((model.weight.diag_ggn_exact, model.weight.diag_h))
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(before, after)


@pytest.mark.parametrize("change", [lambda f, y: f.mul_(3), lambda f, y: y.add_(1)])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.HuberLoss(), nn.PoissonNLLLoss()], ids=repr
)
def test_arguments_of_losses_changed(data, change, gradient: bool, loss: nn.Module) -> None:
    X, _ = data
    model = extend(nn.Linear(3, 3))
    y = torch.rand(len(X), 3)
    f = model(X)
    value = extend(loss)(f, y)
    with torch.no_grad():
        change(f, y)
    with (
        pytest.raises(RuntimeError, match="modified by an in"),
        backpack(DiagGGNExact(), gradient=gradient),
    ):
        value.backward()
    assert not hasattr(model.weight, "diag_ggn_exact")
    works_afterwards(data)


def _scaled(m: nn.Module, x: Tensor) -> Tensor:
    return x * m.scale


def _mixed(m: nn.Module, x: Tensor) -> Tensor:
    return torch.einsum("ni,io->no", x, m.w)


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Linear(3, 3),
        lambda: nn.LayerNorm(3),
        lambda: nn.Bilinear(3, 3, 3),
        lambda: Apply(_scaled, scale=nn.Parameter(torch.ones(3))),
        lambda: Apply(_mixed, w=nn.Parameter(torch.ones(3, 3))),
        lambda: Apply(lambda m, x: m.l(x[:, None])[0][:, 0], l=nn.GRU(3, 3, batch_first=True)),
    ],
)
@pytest.mark.parametrize("gradient", [True, False])
def test_inputs_changed(data, model, gradient: bool) -> None:
    """With and without the gradient."""
    X, y = data
    X, model = X.clone(), extend(model())
    f = model(X, X) if isinstance(model, nn.Bilinear) else model(X)
    loss = F.cross_entropy(f, y)
    X.mul_(2)
    with (
        pytest.raises(RuntimeError, match="modified by an in"),
        backpack(BatchGrad(), gradient=gradient),
    ):
        loss.backward()
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())
    works_afterwards(data)


def test_inputs_of_sums_may_change(data) -> None:
    X, y = data
    X = X.clone()
    model = extend(Apply(lambda m, x: x + m.shift, shift=nn.Parameter(torch.ones(3))))
    for gradient in (True, False):
        loss = F.cross_entropy(model(X), y)
        (expected,) = torch.autograd.grad(loss, model.shift, retain_graph=True)
        X.mul_(2)
        with backpack(BatchGrad(), gradient=gradient):
            loss.backward()
        torch.testing.assert_close(model.shift.grad_batch.sum(0), expected)
