"""Every quantity on a device, against brute force and the same on the CPU in float64: ``make gpu``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend, optim
from backpack import extensions as E
from backpack.cockpit import watch
from backpack.forms import triton as kernels
from backpack.testing.oracle import check
from backpack.vivit import LowRank
from tests.cases import CASES, LOSSES, RECURRENT, Case, LossCase
from tests.forms.test_kernels import SIZES, outer, products
from tests.quantities.test_cases import QUANTITIES

pytestmark = pytest.mark.gpu
# Dropout draws other masks on another device.
HERE = [case for case in CASES if case.name != "lstm-stack"]
EACH = pytest.mark.parametrize("case", HERE, ids=lambda c: c.name)
# cuDNN's recurrent layers have no second derivative, which torch says.
ONCE = {case.name for case in RECURRENT if "cell" not in case.name}
SOME = pytest.mark.parametrize("case", HERE[::6], ids=lambda c: c.name)


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)),
    )


def data(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 3


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The same somewhere else."""
    if isinstance(value, tuple):
        return tuple(moved(each, device, dtype) for each in value)
    if isinstance(value, Tensor) and not value.is_floating_point():
        return value.to(device)
    return value.to(device, dtype)


def near(found: Any, truth: Any, tolerance: float, least: float = 0.0) -> None:
    """Tensors, or lists of them, up to a share of the largest entry."""
    if isinstance(truth, (list, tuple)):
        assert len(found) == len(truth)
        for pair in zip(found, truth, strict=True):
            near(*pair, tolerance, least)
        return
    assert found.shape == truth.shape
    scale = max(float(truth.abs().max()) if truth.numel() else 0.0, least)
    torch.testing.assert_close(
        found.cpu().double(), truth.cpu().double(), rtol=0, atol=tolerance * scale
    )


# --------------------------------------------------------------------------------------
# Quantities


@EACH
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-8)], ids=str
)
def test_case(case: Case, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    agree(case, LOSSES[0], dtype, tolerance, device)


@SOME
@pytest.mark.parametrize("loss", LOSSES[1:], ids=lambda c: c.name)
def test_loss(case: Case, loss: LossCase, device: torch.device) -> None:
    agree(case, loss, torch.float64, 1e-8, device)


def agree(
    case: Case, loss: LossCase, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    model, inputs = case.model(), case.inputs()
    with torch.no_grad():
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    for fused in (True, False) if case.name in ONCE else (True,):
        once = fused and case.name in ONCE and device.type == "cuda"
        quantities = [q for q in QUANTITIES if not (once and "diag_h" in q.savefield)]
        with torch.backends.cudnn.flags(enabled=fused, allow_tf32=False):
            report = check(
                *(model, loss.loss(), inputs, loss.target(output), quantities),
                batch_dim=case.batch_dim,
                output_dim=case.output_dim,
                dtype=dtype,
                # torch's fused weight norm is less precise there.
                tolerance=max(tolerance, 1e-6) if case.name == "weight-norm" else tolerance,
                device=device,
            )
        assert report.ok, f"\n{report}"


def fields(
    case: Case, place: torch.device, dtype: torch.dtype, extension: E.BackpropExtension
) -> dict[str, Any] | str:
    """A quantity of every parameter, or why there is none."""
    torch.manual_seed(0)
    model, X = moved(case.model(), place, dtype), moved(case.inputs(), place, dtype)
    extend(model, batch_dim=case.batch_dim)
    try:
        f = model(*X) if isinstance(X, tuple) else model(X)
        with backpack(extension):
            F.mse_loss(f, torch.zeros_like(f)).backward()
    except Exception as error:
        return type(error).__name__
    return {n: getattr(p, extension.savefield, None) for n, p in model.named_parameters()}


@EACH
@pytest.mark.parametrize("quantity", [E.KFLR, E.EKFLR, E.KFRA, E.EmpiricalKFAC])
def test_kronecker(case: Case, quantity: Callable[[], Any], device: torch.device) -> None:
    truth = fields(case, torch.device("cpu"), torch.float64, quantity())
    fused = not (quantity is E.KFRA and case.name in ONCE)
    with torch.backends.cudnn.flags(enabled=fused, allow_tf32=False):
        found = fields(case, device, torch.float64, quantity())
    if isinstance(truth, str):
        # What is one operation here may be several there.
        assert found == truth or truth == "NotImplementedError"
        return
    assert isinstance(found, dict), found
    tolerance = 1e-6 if case.name == "weight-norm" else 1e-8
    for name, expected in truth.items():
        assert (expected is None) == (found[name] is None)
        if expected is None:
            continue
        if quantity is E.EKFLR:
            # Where eigenvalues of a factor coincide, its eigenvectors are any of their span.
            near(found[name].trace(), expected.trace(), tolerance, 1e-12)
            continue
        near(list(found[name]), list(expected), tolerance, 1e-12)


@SOME
def test_products(case: Case, device: torch.device) -> None:
    results = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model, X = moved(case.model(), place, torch.float64), moved(case.inputs(), place, torch.float64)
        extend(model, batch_dim=case.batch_dim)
        with torch.backends.cudnn.flags(enabled=False):
            f = model(*X) if isinstance(X, tuple) else model(X)
        with backpack(E.GGNMP(), E.HMP()):
            F.mse_loss(f, torch.zeros_like(f)).backward()
            ones = [
                (p, torch.ones(2, *p.shape, dtype=p.dtype, device=place)) for p in model.parameters()
            ]
            results.append([each(v) for p, v in ones for each in (p.ggnmp, p.hmp)])
    near(results[1], results[0], 1e-8, 1e-12)


@pytest.mark.parametrize("quantity", [E.DiagGGNMC, E.KFAC])
def test_draws(quantity: Callable[..., Any], device: torch.device) -> None:
    """Averages of many draws are the exact values."""
    model, (X, y) = extend(network().to(device)), data()
    exact = {E.DiagGGNMC: E.DiagGGNExact, E.KFAC: E.KFLR}[quantity]()
    with backpack(quantity(mc_samples=4000), exact):
        F.cross_entropy(model(X.to(device)), y.to(device)).backward()
    for p in model.parameters():
        found, truth = getattr(p, quantity().savefield), getattr(p, exact.savefield)
        near(found, truth, 0.15)


def test_the_same_seed_draws_the_same(device: torch.device) -> None:
    model, (X, y) = extend(network().to(device)), data()
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        with backpack(E.DiagGGNMC()):
            F.cross_entropy(model(X.to(device)), y.to(device)).backward()
        found.append([p.diag_ggn_mc.clone() for p in model.parameters()])
    near(found[0], found[1], 1e-6)


# --------------------------------------------------------------------------------------
# Idioms of devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    """Half precision with scaled losses: fields are those of single precision, up to rounding."""
    quantities = E.BatchGrad(), E.BatchL2Grad(), E.Variance(), E.DiagGGNExact(), E.KFLR()
    X, y = (each.to(device) for each in data())
    # Without kinks, which rounding may pass.
    layers = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 3)
    model = nn.Sequential(*layers).to(device)
    results = []
    for half in (False, True):
        each = extend(copy.deepcopy(model))
        with torch.autocast(device.type, dtype, enabled=half):
            loss = F.cross_entropy(each(X), y)
        with backpack(*quantities):
            loss.backward()
        results.append([getattr(p, q.savefield) for p in each.parameters() for q in quantities])
        assert all(torch.isfinite(p.grad_batch).all() for p in each.parameters())
    near(results[1], results[0], 0.1, 1e-2)


def test_channels_last(device: torch.device) -> None:
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model, (X, y) = network().to(device, torch.float64), data()
        X, y = X.to(device, torch.float64), y.to(device)
        extend(model.to(memory_format=layout))
        with backpack(E.BatchGrad(), E.SumGradSquared(), E.DiagGGNExact(), E.KFLR()):
            F.cross_entropy(model(X.contiguous(memory_format=layout)), y).backward()
        names = "grad_batch", "sum_grad_squared", "diag_ggn_exact", "kflr"
        results.append([getattr(p, name) for p in model.parameters() for name in names])
    near(results[1], results[0], 1e-9)


class OnTwoDevices(nn.Module):
    """The first layer here, the second on the CPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4).to(device), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh().to("cpu", non_blocking=False))


def test_parts_of_a_model_on_other_devices(device: torch.device) -> None:
    quantities = E.BatchGrad(), E.Variance(), E.DiagGGNExact(), E.DiagHessian(), E.KFLR()
    X, y = torch.randn(5, 3), torch.arange(5) % 3
    here = OnTwoDevices(torch.device("cpu")).double()
    there = copy.deepcopy(here)
    there.first.to(device)
    for model, place in ((here, "cpu"), (there, device)):
        extend(model)
        with backpack(*quantities):
            F.cross_entropy(model(X.double().to(place)), y).backward()
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        for each in quantities:
            value = getattr(q, each.savefield)
            tensors = list(value) if isinstance(value, (list, tuple)) else [value]
            assert all(tensor.device == q.device for tensor in tensors)
            near(value, getattr(p, each.savefield), 1e-9)


def test_a_compiled_part(device: torch.device) -> None:
    X, y = (each.to(device) for each in data())
    model = network().to(device)
    truth = extend(copy.deepcopy(model))
    compiled = torch.compile(nn.Sequential(nn.Tanh(), nn.MaxPool2d(2)), backend="eager")
    model = extend(nn.Sequential(*model[:2], compiled, *model[4:]))
    for each in (truth, model):
        with backpack(E.BatchGrad(), E.DiagGGNExact()):
            F.cross_entropy(each(X), y).backward()
    for p, q in zip(truth.parameters(), model.parameters(), strict=True):
        near([q.grad_batch, q.diag_ggn_exact], [p.grad_batch, p.diag_ggn_exact], 1e-4)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernel(sizes: tuple[int, ...], dtype: torch.dtype, signed: bool, device: torch.device) -> None:
    """The compiled kernel against products written out in double precision."""
    form = outer(sizes, dtype)
    form = type(form)(form.inputs.to(device), form.g.to(device), form.layout)
    sign = torch.randn(sizes[0], sizes[1], dtype=dtype, device=device).sign() if signed else None
    exact = products(form).double().square()
    total = exact if sign is None else exact * sign.double()[:, :, None, None, None]
    with torch.no_grad():
        if device.type != "cuda":
            assert kernels.square_sum(*form._windows, form.g, sign) is None
            return
        kernel, (windows, ndim) = kernels._kernel(), form._windows
        ours = kernels._contract(kernel, windows, ndim, form.g, sign, norms=False)
        norms = kernels._contract(kernel, windows, ndim, form.g, None, norms=True)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    near(ours, total.sum((0, 1)), tolerance, float(exact.sum()))
    near(norms, exact.sum((0, 2, 3, 4)), tolerance, float(exact.sum()))


def test_the_kernel_is_used(device: torch.device) -> None:
    """Where the constants choose it, without a warning."""
    form = outer((2, 3, 1, 9, 64, 64), torch.float32)
    form = type(form)(form.inputs.to(device), form.g.to(device), form.layout)
    with torch.no_grad():
        used = kernels.square_sum(*form._windows, form.g, None) is not None
    assert used == (device.type == "cuda") and not kernels._broken


# --------------------------------------------------------------------------------------
# What stands on the quantities


@pytest.mark.parametrize("name", ["DiagGGNExact", "DiagHessian", "SumGradSquared", "KFLR"])
def test_steps(name: str, device: torch.device) -> None:
    """Optimizers take the same steps as on the CPU."""
    results = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model, (X, y) = extend(network().to(place, torch.float64)), data()
        optimizer = getattr(optim, name)(model.parameters(), lr=0.1, damping=0.1)
        lossfunc = extend(nn.CrossEntropyLoss())
        for _ in range(3):
            optimizer.zero_grad()
            with optimizer.backpack():
                lossfunc(model(X.to(place, torch.float64)), y.to(place)).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    near(results[1], results[0], 1e-7)


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "EKFLR", "DiagGGNMC", "CGNewton"])
def test_training(name: str, device: torch.device) -> None:
    model, (X, y) = extend(network().to(device)), (each.to(device) for each in data())
    optimizer = getattr(optim, name)(model.parameters(), lr=0.2, damping=0.1)
    lossfunc, losses = extend(nn.CrossEntropyLoss()), []
    for _ in range(10):
        optimizer.zero_grad()
        loss = lossfunc(model(X), y)
        with optimizer.backpack():
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_low_rank(device: torch.device) -> None:
    results = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model, (X, y) = extend(network().to(place, torch.float64)), data()
        with LowRank() as low:
            F.cross_entropy(model(X.to(place, torch.float64)), y.to(place)).backward()
        pairs = low.eigh(k=3)
        slopes = low.derivatives(pairs)
        results.append([low.eigvalsh(), pairs.values, slopes.gammas.abs(), slopes.lambdas])
        results[-1] += low.newton(pairs, 0.1)
    near(results[1], results[0], 1e-7)


def test_monitor(device: torch.device) -> None:
    """Every number of the monitor's full configuration that does not depend on draws."""
    histories = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model, (X, y) = network().to(place, torch.float64), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = watch(model, optimizer, quantities="business", every=1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(X.to(place, torch.float64)), y.to(place)).backward()
            optimizer.step()
        assert monitor.left_out == {}
        histories.append(monitor.history())
        monitor.close()
    truth, found = histories
    assert found.steps == truth.steps and found.names() == truth.names()
    for name in truth.names():
        for expected, value in zip(truth.column(name)[1], found.column(name)[1], strict=True):
            if isinstance(expected, float) and not name.startswith(("time", "hess_trace", "tic")):
                assert math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-12), name
