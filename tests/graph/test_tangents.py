"""Jacobian times vector, of all kinds of operations, against rows of reverse mode in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import GGNMP
from backpack.graph import tangents
from backpack.hessianfree import R_op, ggn_vector_product
from backpack.testing.oracle import Oracle

SQUARE = (3, 3)
Function = Callable[..., Tensor]


def spd(x: Tensor) -> Tensor:
    return x @ x.mT + torch.eye(3, dtype=x.dtype)


def along_rows(f: Function) -> Function:
    return lambda x: f(x, 1)


def as_real(f: Function) -> Function:
    return lambda x: torch.view_as_real(f(x).resolve_conj())


def with_target(f: Function) -> Function:
    return lambda x: f(x, x.roll(1, 0).detach() ** 2, reduction="none")


# By name: a function of x [3, 4], or of a square matrix.
UNARY = {
    name: getattr(torch, name)
    for name in (
        "abs acos angle arctan asin asinh atan atanh ceil cos cosh deg2rad digamma erf erfc erfinv "
        "exp exp2 expm1 floor frac i0 lgamma log log10 log1p log2 logit neg positive rad2deg "
        "reciprocal relu round rsqrt sgn sigmoid sign sin sinc sinh sqrt square tan tanh trunc"
    ).split()
} | {
    f"special.{name}": getattr(torch.special, name)
    for name in "entr erfcx i0e i1 i1e log_ndtr ndtr ndtri".split()
}
ACTIVATIONS = {
    name: getattr(F, name)
    for name in (
        "celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu6 "
        "rrelu selu silu softplus softshrink softsign tanhshrink"
    ).split()
} | {"threshold": lambda x: F.threshold(x, 0.5, 0.1), "prelu": lambda x: F.prelu(x, x[0, :1])}
REDUCTIONS = {
    name: along_rows(getattr(torch, name))
    for name in "sum mean prod nansum amax amin logsumexp std var".split()
} | {
    "max": lambda x: x.max(1)[0],
    "min": lambda x: x.min(1)[0],
    "median": lambda x: x.median(1)[0],
    "mode": lambda x: x.mode(1)[0],
    "kthvalue": lambda x: x.kthvalue(2, 1)[0],
    "quantile": lambda x: x.quantile(0.3, 1),
    "std_mean": lambda x: torch.stack(torch.std_mean(x, 1)),
    "cov": torch.cov,
    "corrcoef": torch.corrcoef,
    "corrcoef of one": lambda x: torch.corrcoef(x[0, :2]),
    "trace": torch.trace,
    "prod with a zero": lambda x: (x * torch.tensor([1.0, 0, 1, 1])).prod(1),
}
CUMULATIVE = {
    "cumsum": lambda x: x.cumsum(1),
    "cumprod": lambda x: x.cumprod(1),
    "cumprod with a zero": lambda x: (x * torch.tensor([1.0, 0, 1, 1])).cumprod(1),
    "cummax": lambda x: x.cummax(1)[0],
    "cummin": lambda x: x.cummin(1)[0],
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "diff": torch.diff,
    "cumulative_trapezoid": torch.cumulative_trapezoid,
}
NORMS = {
    f"norm {p}": lambda x, p=p: torch.linalg.vector_norm(x, p, 1)
    for p in (0.5, 1, 2, 3, float("inf"), -float("inf"))
} | {
    "norm fro": lambda x: torch.linalg.matrix_norm(x, "fro"),
    "norm nuc": lambda x: torch.linalg.matrix_norm(x, "nuc"),
    "norm 2": lambda x: torch.linalg.matrix_norm(x, 2),
    "norm at zero": lambda x: (x * torch.tensor([[0.0], [1], [1]])).norm(dim=1),
    "squared norm at zero": lambda x: (0 * x).norm(dim=1) ** 2,
    "normalize": F.normalize,
    "normalize one": lambda x: F.normalize(x[:, :1]),
    "renorm": lambda x: x.renorm(2, 0, 1.0),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "instance_norm": lambda x: F.instance_norm(x[None]),
    "local_response_norm": lambda x: F.local_response_norm(x[None], 2),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.flip(0) + x[:1]),
    "pairwise_distance": lambda x: F.pairwise_distance(x, x.roll(1, 0)),
    "dist": lambda x: torch.dist(x[0], x[1]),
    "cdist": lambda x: torch.cdist(x, 2 * x),
    "cdist of itself": lambda x: torch.cdist(x, x),
    "pdist": torch.pdist,
}
SOFTMAX = {
    "softmax": lambda x: x.softmax(1),
    "softmax of one": lambda x: x[:, :1].softmax(1),
    "softmax with a mask": lambda x: x.masked_fill(x > x.mean(), -torch.inf).softmax(1).nan_to_num(),
    "softmin": lambda x: F.softmin(x, 1),
    "log_softmax": lambda x: x.log_softmax(1),
    "logaddexp": lambda x: torch.logaddexp(x, x.roll(1, 1)),
    "logaddexp2": lambda x: torch.logaddexp2(x, x.roll(1, 1)),
    "attention": lambda x: F.scaled_dot_product_attention(
        x.view(1, 1, 3, 4), *(x.view(1, 1, 3, 4),) * 2
    ),
}
ENTRIES = {
    "sort": lambda x: x.sort(1)[0],
    "msort": torch.msort,
    "topk": lambda x: x.topk(2, 1)[0],
    "gather": lambda x: x.gather(1, torch.tensor([[0, 0], [1, 2], [3, 3]])),
    "scatter_add": lambda x: torch.zeros(3, 2).scatter_add(1, torch.tensor([[0, 0, 1, 1]] * 3), x),
    "scatter_reduce": lambda x: torch.ones(3, 2).scatter_reduce(
        1, torch.tensor([[0, 0, 1, 1]] * 3), x, "prod"
    ),
    "index": lambda x: x[[0, 0, 2]],
    "index_add": lambda x: x.index_add(0, torch.tensor([0, 0]), x[:2] * x[1:]),
    "index_put": lambda x: x.index_put((torch.tensor([1]),), x[:1].exp()),
    "masked_fill": lambda x: x.masked_fill(x > 0.6, 2.0),
    "where": lambda x: torch.where(x > 0.6, x, x**2),
    "take_along_dim": lambda x: x.take_along_dim(x.argsort(1), 1),
    "clamp": lambda x: x.clamp(0.5, 0.8),
    "maximum": lambda x: torch.maximum(x, x.roll(1, 1)),
    "fmin": lambda x: torch.fmin(x, x.roll(1, 1)),
    "nan_to_num": torch.nan_to_num,
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "diag_embed": torch.diag_embed,
    "tril": torch.tril,
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.reshape(1, 4, 1, 3), 2),
    "pad": lambda x: F.pad(x[None], (1, 1), "reflect"),
    "kron": lambda x: torch.kron(x, x),
    "outer": lambda x: torch.outer(x[0], x[1]),
    "cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 1:]),
}
BINARY = {
    "mul": lambda x: x * x.roll(1, 1),
    "div": lambda x: x / x.roll(1, 1),
    "pow": lambda x: x ** x.roll(1, 1),
    "atan2": lambda x: torch.atan2(x, x.roll(1, 1)),
    "hypot": lambda x: torch.hypot(x, x.roll(1, 1)),
    "lerp": lambda x: torch.lerp(x, x.roll(1, 1), x**2),
    "addcdiv": lambda x: torch.addcdiv(x, x.roll(1, 1), x.roll(1, 0)),
    "xlogy": lambda x: torch.xlogy(x, x.roll(1, 1)),
    "xlog1py": lambda x: torch.special.xlog1py(x, x.roll(1, 1)),
    "fmod": lambda x: torch.fmod(x, 0.3),
    "remainder": lambda x: torch.remainder(x, x.roll(1, 1)),
    "copysign": lambda x: torch.copysign(x, -x.roll(1, 1)),
    "polar": lambda x: torch.view_as_real(torch.polar(x, x.roll(1, 1))),
    "float_power": lambda x: torch.float_power(x, 1.5),
    "mvlgamma": lambda x: torch.mvlgamma(x + 2, 2),
    "polygamma": lambda x: torch.polygamma(1, x),
    "acosh": lambda x: torch.acosh(x + 1),
}
MATRICES = {
    "matmul": lambda x: x @ x.mT,
    "einsum": lambda x: torch.einsum("ij,kj,kj->ik", x, x, x),
    "bilinear": lambda x: F.bilinear(x, x, x.mT[None] @ x),
    "addmm": lambda x: torch.addmm(x, x @ x.mT, x),
    "baddbmm": lambda x: torch.baddbmm(x[None], (x @ x.mT)[None], x[None]),
    "chain_matmul": lambda x: torch.linalg.multi_dot([x, x.mT, x]),
    "lu_factor": lambda x: torch.linalg.lu_factor(x[:, :3])[0],
    "qr": lambda x: torch.linalg.qr(x.mT)[1],
    "svdvals": torch.linalg.svdvals,
    "svd": lambda x: torch.linalg.svd(x, full_matrices=False)[0].abs(),
    "pinv": torch.linalg.pinv,
    "lstsq": lambda x: torch.linalg.lstsq(x.mT, x.mT[:, :1] ** 2)[0],
}
SQUARES = {
    "det": torch.det,
    "logdet": lambda x: torch.logdet(spd(x)),
    "slogdet": lambda x: torch.linalg.slogdet(x)[1],
    "inv": torch.linalg.inv,
    "solve": lambda x: torch.linalg.solve(x, x[:, :1] ** 2),
    "solve_triangular": lambda x: torch.linalg.solve_triangular(x.triu(), x[:, :1], upper=True),
    "cholesky": lambda x: torch.linalg.cholesky(spd(x)),
    "cholesky_solve": lambda x: torch.cholesky_solve(x, spd(x)),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(spd(x)),
    "eigh": lambda x: torch.linalg.eigh(spd(x))[1].abs(),
    "eigvals": lambda x: torch.linalg.eigvals(x).abs(),
    "matrix_exp": torch.linalg.matrix_exp,
    "matrix_power": lambda x: torch.linalg.matrix_power(x, 3),
    "cond": torch.linalg.cond,
    "householder_product": lambda x: torch.linalg.householder_product(x, x[0]),
}
FOURIER = {
    name: as_real(getattr(torch.fft, name)) for name in "fft ifft rfft fft2 rfft2 fftn ihfft".split()
} | {
    "irfft": lambda x: torch.fft.irfft(torch.complex(x, x.roll(1, 1))),
    "hfft": lambda x: torch.fft.hfft(torch.complex(x, x.roll(1, 1))),
    "complex abs": lambda x: torch.complex(x, x.roll(1, 1)).abs(),
    "complex angle": lambda x: torch.complex(x, x.roll(1, 1)).angle(),
    "complex exp": lambda x: torch.complex(x, x.roll(1, 1)).exp().imag,
    "stft": lambda x: torch.view_as_real(
        torch.stft(x.flatten(), 4, window=torch.ones(4), return_complex=True)
    ),
}
IMAGES = {
    "conv1d": lambda x: F.conv1d(x[None], x[None, :, :2]),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x[None], x[:, None, :2]),
    "max_pool1d": lambda x: F.max_pool1d(x[None], 2, 1),
    "max_pool2d": lambda x: F.max_pool2d(x[None], 2, 1),
    "avg_pool2d": lambda x: F.avg_pool2d(x[None], 2, 1),
    "lp_pool1d": lambda x: F.lp_pool1d(x[None], 3, 2),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x[None], 3),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x[None], 2),
    "interpolate": lambda x: F.interpolate(x[None, None], scale_factor=2.0, mode="bicubic"),
    "grid_sample": lambda x: F.grid_sample(
        x[None, None], x[:2].reshape(1, 2, 2, 2) - 0.5, align_corners=False
    ),
    "unfold2d": lambda x: F.unfold(x[None, None], 2),
    "fold": lambda x: F.fold(x.reshape(1, 4, 3)[..., :2], (2, 3), 2),
}
LOSSES = {
    name: with_target(getattr(F, name))
    for name in (
        "mse_loss l1_loss smooth_l1_loss huber_loss kl_div poisson_nll_loss soft_margin_loss "
        "binary_cross_entropy binary_cross_entropy_with_logits"
    ).split()
} | {
    "cross_entropy": lambda x: F.cross_entropy(x, torch.tensor([0, 3, 1]), label_smoothing=0.1),
    "nll_loss": lambda x: F.nll_loss(x, torch.tensor([0, 3, 1])),
    "gaussian_nll_loss": lambda x: F.gaussian_nll_loss(x, 2 * x.detach(), x.exp()),
    "multi_margin_loss": lambda x: F.multi_margin_loss(x, torch.tensor([0, 3, 1]), reduction="none"),
    "multilabel_margin_loss": lambda x: F.multilabel_margin_loss(x, torch.tensor([[0, 1, -1, 2]] * 3)),
    "multilabel_soft_margin_loss": lambda x: F.multilabel_soft_margin_loss(x, (x > 0.5).double()),
    "hinge_embedding_loss": lambda x: F.hinge_embedding_loss(x, (x > 0.5).double() * 2 - 1),
    "cosine_embedding_loss": lambda x: F.cosine_embedding_loss(x, x.flip(1), torch.tensor([1, -1, 1])),
    "margin_ranking_loss": lambda x: F.margin_ranking_loss(x[0], x[1], torch.ones(4)),
    "triplet_margin_loss": lambda x: F.triplet_margin_loss(x, x.flip(1), x.roll(1, 1)),
    "ctc_loss": lambda x: F.ctc_loss(
        x[:, None].log_softmax(2), torch.tensor([[1, 2]]), torch.tensor([3]), torch.tensor([2])
    ),
}
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **UNARY, **ACTIVATIONS, **REDUCTIONS, **CUMULATIVE, **NORMS, **SOFTMAX, **ENTRIES, **BINARY,
    **MATRICES, **SQUARES, **FOURIER, **IMAGES, **LOSSES,
}  # fmt: skip
# What comes after: cotangents without zeros, with zeros, of picked entries only, and none at all.
AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda y: y,
    "masked": lambda y: y * (torch.arange(y.numel()) % 2).reshape(y.shape),
    "last": lambda y: y.flatten()[-1:],
    "relu": lambda y: (y - y.detach().mean()).relu(),
    "zero": lambda y: y * 0.0,
}


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_rows(y: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """One gradient for each entry of the result."""
    rows = [
        torch.autograd.grad(e, x, retain_graph=True, allow_unused=True)[0] if e.requires_grad else None
        for e in y.flatten()
    ]
    return torch.stack([y.new_zeros(()) if r is None else (r * v).sum() for r in rows]).reshape(y.shape)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    """Whatever comes after the operation, and whichever way is taken."""
    x = (torch.rand(*(SQUARE if name in SQUARES else (3, 4))) * 0.6 + 0.3).requires_grad_()
    v = torch.randn_like(x)
    for after in AFTER.values():
        y = after(OPERATIONS[name](x))
        if not y.requires_grad:
            continue
        expected = by_rows(y, x, v).detach()
        close = {"rtol": 1e-8, "atol": 1e-10 * float(1 + expected.abs().max())}
        (found,) = R_op(y, x, v)
        torch.testing.assert_close(found, expected, **close)
        upwards, _ = tangents._tangents([y], [x], [v], False)
        found = upwards.get(tangents._key(y), torch.zeros_like(y))
        torch.testing.assert_close(found, expected, **close)


class _Broken(torch.autograd.Function):
    """A derivative that autograd sees as a constant, one that it refuses, one that is no derivative."""

    @staticmethod
    def forward(ctx, x: Tensor, how: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.how = how
        return x.sin()

    @staticmethod
    def backward(ctx, g: Tensor):
        (x,) = ctx.saved_tensors
        if ctx.how == "detached":
            return g.detach() * x.cos(), None
        return (g.clamp(-0.5, 0.5) if ctx.how == "clipped" else g * x.cos()), None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize(
    "function", [_Once.apply, lambda x: _Broken.apply(x, "detached"), lambda x: _Broken.apply(x, "")]
)
def test_functions_that_cannot_be_differentiated_twice(function) -> None:
    x = torch.randn(3, 4).requires_grad_()
    v = torch.randn_like(x)
    y = (function(x * x) @ torch.randn(4, 2)).exp() + x[:, :2]
    (found,) = R_op(y, x, v)
    torch.testing.assert_close(found, by_rows(y, x, v).detach())


def test_what_is_not_linear_is_refused() -> None:
    x = torch.randn(3, 4).requires_grad_()
    v = torch.randn_like(x)
    with pytest.raises(NotImplementedError, match="_BrokenBackward.*not linear"):
        R_op(2 * _Broken.apply(x, "clipped"), x, v)
    hidden = x.sin()
    hidden.register_hook(lambda g: g.clamp(-0.1, 0.1))
    with pytest.raises(NotImplementedError, match="hook"):
        R_op(hidden @ torch.randn(4, 2), x, v)
    large = torch.rand(70, 70).requires_grad_()
    with pytest.raises(NotImplementedError, match="HardsigmoidBackward0.*cannot be differentiated"):
        R_op(F.hardsigmoid(large), large, torch.ones_like(large))


def test_linear_hooks_count() -> None:
    x = torch.randn(3, 4).requires_grad_()
    hidden = x.sin()
    hidden.register_hook(lambda g: 3 * g)
    (found,) = R_op(hidden, x, torch.ones_like(x))
    torch.testing.assert_close(found, 3 * x.cos().detach())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_told(bad: float) -> None:
    x = torch.randn(3, 4).requires_grad_()
    y = torch.where(torch.eye(3, 4).bool(), bad, x).logcumsumexp(1)
    (found,) = R_op(y, x, torch.ones_like(x))
    assert not found.isfinite().all()
    v = torch.ones_like(x)
    v[0, 0] = bad
    (found,) = R_op(x.logcumsumexp(1), x, v)
    assert found.isnan().all()


def test_several_places_and_types() -> None:
    x, z = torch.randn(3).float().requires_grad_(), torch.randn(2).requires_grad_()
    ys = [x.logcumsumexp(0) * torch.tensor([0.0, 1, 1]), (x.sum() * z).to(torch.complex128) * 1j]
    vs = [torch.randn_like(x), torch.randn_like(z)]
    found = R_op(ys, [x, z], vs)
    torch.testing.assert_close(found[1], ((vs[0].sum() * z + x.sum() * vs[1]) * 1j).detach())
    rows = by_rows(ys[0], x, vs[0]).detach()
    torch.testing.assert_close(found[0], rows.to(found[0]), rtol=1e-5, atol=1e-6)
    # twice through one node, and an input above another
    y = x * x.exp()
    (found,) = R_op([y * y], [x], [vs[0]])
    torch.testing.assert_close(found, by_rows(y * y, x, vs[0]).detach())
    upwards, _ = tangents._tangents([y], [x, x], [vs[0], vs[0]], False)
    torch.testing.assert_close(upwards[y.grad_fn, 0], 2 * by_rows(y, x, vs[0]).detach())


def test_the_result_can_be_differentiated() -> None:
    x, v = torch.randn(4).requires_grad_(), torch.randn(4)
    y = x.tanh() * x.sum()
    (found,) = R_op(y, x, v, detach=False)
    upwards, _ = tangents._tangents([y], [x], [v], True)

    def product(x: Tensor) -> Tensor:
        return ((1 - x.tanh() ** 2) * x.sum() * v + x.tanh() * v.sum()).sum()

    expected = torch.autograd.functional.jacobian(product, x.detach())
    for each in (found, upwards[y.grad_fn, 0]):
        (again,) = torch.autograd.grad(each.sum(), x, retain_graph=True)
        torch.testing.assert_close(again, expected)


class _Between(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(3, 4), nn.Linear(4, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h.logcumsumexp(1),
        lambda h: (h.logcumsumexp(1) - 0.5).relu(),
        lambda h: h.logcumsumexp(1) * torch.tensor([0.0, 1, 0, 1]),
        lambda h: h.logcumsumexp(1)[:, -1:].expand(-1, 4),
        F.hardsigmoid,
        lambda h: torch.cdist(h, torch.eye(4)),
        lambda h: _Once.apply(h),
    ],
)
def test_curvature(between: Callable[[Tensor], Tensor]) -> None:
    model, X, y = _Between(between), torch.randn(5, 3), torch.randint(3, (5,))
    ggn = Oracle(model, nn.CrossEntropyLoss(), X, y).ggn
    extend(model)
    output = model(X)
    loss = extend(nn.CrossEntropyLoss())(output, y)
    with backpack(GGNMP()):
        loss.backward()
    for name, p in model.named_parameters():
        mat = torch.randn(2, *p.shape)
        torch.testing.assert_close(p.ggnmp(mat), (mat.reshape(2, -1) @ ggn[name]).reshape(mat.shape))
    vs = [torch.zeros_like(p) for p in model.parameters()]
    vs[0] = torch.randn_like(vs[0])
    found = ggn_vector_product(loss, output, model, vs)[0]
    torch.testing.assert_close(found.flatten(), ggn["first.weight"] @ vs[0].flatten())


def test_products_that_are_not_finite_are_refused() -> None:
    model = extend(_Between(lambda h: (h * 0).norm(dim=1, keepdim=True).sqrt().expand(-1, 4)))
    with backpack(GGNMP()):
        extend(nn.CrossEntropyLoss())(model(torch.randn(5, 3)), torch.randint(3, (5,))).backward()
    with pytest.raises(ValueError, match="ggnmp: the product is not finite"):
        model.first.weight.ggnmp(torch.ones(4, 3))
    assert model.second.weight.ggnmp(torch.full((3, 4), torch.nan)).isnan().all()
