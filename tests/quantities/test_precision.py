"""Mixed precision and scaled losses: quantities as exact as the pass, scaled as the gradient is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backpack import backpack, extend
from backpack import extensions as E
from tests.cases import Apply, flat, mean, seq

MODELS = {
    "mlp": (lambda: seq(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (8, 6)),
    "sequence": (lambda: seq(nn.Linear(6, 4), nn.LayerNorm(4), flat(), nn.Linear(12, 3)), (8, 3, 6)),
    "conv": (lambda: mean(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)), (8, 2, 5, 5)),
    "gru": (lambda: seq(Last(nn.GRU(6, 4, batch_first=True)), nn.Linear(4, 3)), (8, 3, 6)),
    "attention": (lambda: seq(attention(), flat(), nn.Linear(18, 3)), (8, 3, 6)),
}  # fmt: skip
FIELDS = {
    "grad_batch": 1,
    "batch_l2": 2,
    "sum_grad_squared": 2,
    "variance": 2,
    "diag_ggn_exact": 1,
    "diag_ggn_exact_batch": 1,
    "diag_h": 1,
}


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)


class Last(nn.Module):
    """The last step of a sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, a: Tensor) -> Tensor:
        return self.layer(a)[0][:, -1]


def quantities() -> list[E.BackpropExtension]:
    return [
        *(E.BatchGrad(), E.BatchL2Grad(), E.SumGradSquared(), E.Variance()),
        *(E.DiagGGNExact(), E.BatchDiagGGNExact(), E.DiagHessian(), E.KFLR()),
    ]


def run(model: nn.Module, X: Tensor, y: Tensor, dtype: torch.dtype | None, scale: float = 1.0) -> dict:
    model.zero_grad()
    mixed = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    with mixed, sdpa_kernel(SDPBackend.MATH):
        loss = extend(nn.CrossEntropyLoss())(model(X), y)
    with backpack(*quantities()):
        (scale * loss).backward()
    found = {}
    for name, p in model.named_parameters():
        assert p.kflr[0].isfinite().all()
        for field in FIELDS:
            found[name, field] = getattr(p, field).clone()
        found[name, "grad"] = p.grad.clone()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Within the rounding of the precision; and the individual gradients sum to the gradient."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, X, y = extend(make()), torch.randn(shape), torch.randint(3, (shape[0],))
    factor = 1.0 if dtype == torch.bfloat16 else 2.0**6  # small gradients vanish without it
    exact, mixed = run(model, X, y, None, factor), run(model, X, y, dtype, factor)
    digits = torch.finfo(dtype).eps / torch.finfo(torch.bfloat16).eps  # beside bfloat16
    for (parameter, field), value in mixed.items():
        expected = exact[parameter, field]
        scale = max(
            float(expected.abs().max()),
            1e-2 * max(float(e.abs().max()) for (_, f), e in exact.items() if f == field),
        )
        assert float((value.float() - expected).abs().max()) < 0.08 * digits * scale, (parameter, field)
    for parameter, _ in model.named_parameters():
        total = mixed[parameter, "grad_batch"].float().sum(0)
        limit = 0.03 * digits * mixed[parameter, "grad_batch"].abs().sum(0).max() + 1e-6
        assert bool(((total - mixed[parameter, "grad"]).abs() < limit).all())


@pytest.mark.parametrize("name", MODELS)
def test_scaled_loss(name: str) -> None:
    """What a gradient scaler multiplies the loss with, quantities carry: once, or squared."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, X, y = extend(make().double()), torch.randn(shape).double(), torch.randint(3, (shape[0],))
    plain, scaled = run(model, X, y, None), run(model, X, y, None, 2.0**10)
    for (parameter, field), value in scaled.items():
        power = FIELDS.get(field, 1)
        torch.testing.assert_close(
            value, plain[parameter, field] * 2.0 ** (10 * power), rtol=1e-7, atol=1e-9
        )


class Tied(nn.Module):
    """A weight that is used twice, so that its Hessian is found entry by entry."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, a: Tensor) -> Tensor:
        return self.layer(self.norm(self.layer(a)).sigmoid())[:, :3]


NORMED = {
    "layer norms": lambda: seq(
        *(nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.GELU()),
        *(nn.LayerNorm(12), nn.Linear(12, 3)),
    ),
    "tied": Tied,
}


@pytest.mark.parametrize("factor", [2.0**6, 2.0**10, 2.0**16])
@pytest.mark.parametrize("name", NORMED)
def test_hessians_of_scaled_losses(name: str, factor: float) -> None:
    """In float16, with the factors of a gradient scaler, also where it begins."""
    torch.manual_seed(0)
    model, X, y = extend(NORMED[name]()), torch.randn(6, 6), torch.randint(3, (6,))
    found: dict[bool, dict[str, Tensor]] = {}
    for half in (True, False):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        exts = E.DiagHessian(), E.BatchDiagHessian(), E.DiagHessianMC(4, generators[0])
        exts = *exts, E.BatchDiagHessianMC(4, generators[1])
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = nn.functional.cross_entropy(model(X), y)
        with backpack(*exts):
            (factor * loss).backward()
        found[half] = {
            f"{name}.{ext.savefield}": getattr(p, ext.savefield) / factor
            for name, p in model.named_parameters()
            for ext in exts
        }
    for key, expected in found[False].items():
        size = max(float(expected.abs().max()), 1e-2)
        error = float((found[True][key] - expected).abs().max())
        assert error < 0.02 * size, (key, error, size)


def test_gradient_scaler() -> None:
    """Fields are those of the scaled loss; `unscale_` divides `grad` only."""
    model, X, y = extend(nn.Linear(4, 3)), torch.randn(8, 4), torch.randint(3, (8,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with backpack(E.BatchGrad()):
        scaler.scale(extend(nn.CrossEntropyLoss())(model(X), y)).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(model.weight.grad_batch.sum(0) / 64, model.weight.grad)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(4))
def test_products_under_autocast(seed: int, dtype: torch.dtype) -> None:
    """Also where the model's output is in single precision, as losses want it."""
    torch.manual_seed(seed)
    layers = seq(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), flat(), nn.Linear(40, 3))
    model = extend(Apply(lambda m, x: m.layers(x).float(), layers=layers))
    X, y = torch.randn(6, 5, 8), torch.randint(3, (6,))
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype, enabled=enabled):
            output = model(X)
        with backpack(E.GGNMP()):
            nn.functional.cross_entropy(output, y).backward()
        found.append([p.ggnmp(torch.eye(p.numel()).view(-1, *p.shape)) for p in model.parameters()])
    for half, full in zip(*found, strict=True):
        assert (half - full).abs().max() < 0.1 * full.abs().max()


class Masked(nn.Module):
    """Weights in another precision than the parameters, and entry by entry functions of these."""

    def __init__(self, to: torch.dtype) -> None:
        super().__init__()
        self.w, self.b, self.to = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3)), to

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.to), self.w.to(self.to) * 2, self.b.to(self.to)).double()


@pytest.mark.parametrize("to", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ext", [E.BatchL2Grad, E.Variance, E.DiagGGNExact, E.DiagHessian, E.KFLR])
def test_weights_in_another_precision(ext: type[E.BackpropExtension], to: torch.dtype) -> None:
    found, X = [], torch.randn(5, 4)
    for precision in (to, torch.float32):
        torch.manual_seed(0)
        model = extend(Masked(precision))
        with backpack(ext()):
            nn.functional.cross_entropy(model(X), torch.tensor([0, 1, 2, 1, 0])).backward()
        values = [getattr(p, ext.savefield) for p in model.parameters()]
        found.append([v[0] if isinstance(v, list) else v for v in values])
    for value, expected in zip(*found, strict=True):
        error = (value.double() - expected.double()).abs().max()
        assert error < (0.1 if to == torch.bfloat16 else 1e-5) * expected.abs().max()
