"""Operations that mix, permute or write rows along the sample axis: right, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import (
    KFLR,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    Variance,
)
from backpack.samples import separability as probe
from backpack.testing.oracle import Oracle, check
from tests.cases import Apply, P

FIRST = (BatchGrad(), BatchL2Grad(), Variance())
ALL = (*FIRST, DiagGGNExact(), BatchDiagGGNExact(), DiagHessian())
PERM = torch.tensor([2, 0, 3, 1])
PLACES = torch.tensor([1, 1, 0, 2])
COLUMNS = PLACES[:, None].expand(4, 3)


class Cumsum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.cumsum(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.flip(0).cumsum(0).flip(0)


def _ring() -> Tensor:
    return (torch.eye(4) + torch.eye(4).roll(1, 0)).double().to_sparse()


def _assign(h: Tensor, index: Any, rows: Any = slice(None)) -> Tensor:
    out = torch.zeros_like(h)
    out[index] = h[rows]
    return out


def _subtract(h: Tensor) -> Tensor:
    h -= h.mean(0)
    return h


def _zeros() -> Tensor:
    return torch.zeros(4, 3, dtype=torch.float64)


# Functions [4, 3] -> [4, 3] that mix samples.
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    # attention, graphs
    "attention": lambda h: F.scaled_dot_product_attention(h, h, h),
    "sparse-mm": lambda h: torch.sparse.mm(_ring(), h),
    "sparse-matmul": lambda h: _ring() @ h,
    "index_add": lambda h: _zeros().index_add(0, PLACES, h),
    "index_add_": lambda h: _zeros().index_add_(0, PLACES, h),
    "index_add-own": lambda h: h.index_add(0, PLACES, h),
    "scatter_add_": lambda h: _zeros().scatter_add_(0, COLUMNS, h),
    "scatter_reduce": lambda h: _zeros().scatter_reduce(0, COLUMNS, h, "sum"),
    "index_reduce": lambda h: _zeros().index_reduce(0, PLACES, h, "mean"),
    "masked_scatter": lambda h: _zeros().masked_scatter(h.detach() > 0, h),
    # in place
    "isub": _subtract,
    "sub_": lambda h: h.sub_(h.mean(0)),
    "add_-flip": lambda h: h.clone().add_(h.flip(0)),
    "cumsum_": lambda h: h.cumsum_(0),
    "renorm_": lambda h: h.renorm_(2, 1, 0.1),
    "assign-shifted": lambda h: _assign(h, slice(1, None), slice(-1)),
    # two arguments, one of them mixed
    "logaddexp": lambda h: torch.logaddexp(h, h.flip(0)),
    "hypot": lambda h: torch.hypot(h, h.mean(0)),
    "atan2": lambda h: torch.atan2(h, h.mean(0)),
    "xlogy": lambda h: torch.xlogy(h, h.mean(0) ** 2 + 1),
    "fmax": lambda h: torch.fmax(h, h.flip(0)),
    "float_power": lambda h: torch.float_power(h**2 + 1, h.mean(0)),
    "cosine-to-mean": lambda h: h * F.cosine_similarity(h, h.mean(0, keepdim=True))[:, None],
    # along the samples
    "roll": lambda h: torch.roll(h, 1),
    "msort": torch.msort,
    "sort": lambda h: h.T.sort()[0].T,
    "topk": lambda h: h.T.topk(4)[0].T,
    "cummax": lambda h: h.cummax(0)[0],
    "cummin": lambda h: h.cummin(0)[0],
    "renorm": lambda h: h.renorm(2, 1, 1.0),
    "diff": lambda h: torch.diff(h, dim=0, prepend=h[:1]),
    "fft": lambda h: torch.fft.fft(h, dim=0).real,
    "pad": lambda h: F.pad(h, (0, 0, 1, -1)),
    "qr": lambda h: torch.linalg.qr(h)[0],
    "layer_norm": lambda h: F.layer_norm(h, (4, 3)),
    "group_norm": lambda h: F.group_norm(h.T[None], 1)[0].T,
    "conv1d": lambda h: F.conv1d(h.T[None], torch.ones(3, 1, 3).double(), padding=1, groups=3)[0].T,
    "max_pool1d": lambda h: F.max_pool1d(h.T, 3, 1, 1).T,
    "einsum": lambda h: torch.einsum("nd,md->nm", h, h)[:, :3],
    "inner": lambda h: torch.inner(h, h)[:, :3],
    "tensordot": lambda h: torch.tensordot(h, h, ([1], [1]))[:, :3],
    "outer": lambda h: torch.outer(h[:, 0], h[:, 1])[:, :3],
    "cov": lambda h: torch.cov(h)[:, :3],
    "cosine-pairs": lambda h: F.cosine_similarity(h[:, None], h[None], dim=2)[:, :3],
    "norm": lambda h: h - torch.cat([h, h[:, :1]], 1).norm(2, 0).expand(4, 4)[:, :3],
    "kthvalue": lambda h: h - torch.cat([h, h[:, :1]], 1).kthvalue(1, 0)[0].expand(4, 4)[:, :3],
    "quantile": lambda h: h - torch.cat([h, h[:, :1]], 1).quantile(0.5, 0).expand(4, 4)[:, :3],
    "function": Cumsum.apply,
}


# Functions [4, 3] -> [4, 3] that change the samples' order, and that pick some more than once.
PERMUTING: dict[str, Callable[[Tensor], Tensor]] = {
    "assign-permuted": lambda h: _assign(h, PERM),
    "flip": lambda h: h.flip(1, 0),
    "flipud": torch.flipud,
    "rot90": lambda h: h.rot90(2),
    "gather": lambda h: h.gather(0, PERM[:, None].expand(4, 3)),
    "take_along_dim": lambda h: torch.take_along_dim(h, PERM[:, None], 0),
    "take": lambda h: h.take(torch.arange(12).flip(0).view(4, 3)),
    "list": lambda h: h[[2, 0, 3, 1]],
    "array": lambda h: h[PERM.numpy()],
    "tuple": lambda h: h[(2, 0, 3, 1), :],
    "range": lambda h: h[range(3, -1, -1)],
    "roll-rows": lambda h: h.roll(1, 0),
    "index_select": lambda h: h.index_select(0, PERM),
    "index-both": lambda h: h[PERM[:, None], torch.arange(3)],
    "split": lambda h: torch.cat(h.split([1, 2, 1])[::-1]),
    "unbind": lambda h: torch.stack(h.unbind()[::-1]),
    "iterate": lambda h: torch.stack([row * (n + 1) for n, row in enumerate(h)][::-1]),
    "copy_": lambda h: h.clone().copy_(h.flip(0)),
    "masks": lambda h: torch.cat([h[h[:, 0] > 0], h[h[:, 0] <= 0]]),
    "index_copy": lambda h: _zeros().index_copy(0, PERM, h),
    "scatter": lambda h: h.scatter(0, PERM[:, None].expand(4, 3), h * 2),
    "repeats": lambda h: h[[0, 2, 2, 0]],
    "repeats-apart": lambda h: torch.stack([h[3], h[1], h[3] * 2, h[0]]),
    "put": lambda h: _zeros().put(torch.arange(12).flip(0), h),
    "vstack": lambda h: torch.vstack([h[2:], h[:2]]),
}


def _between(f: Callable[[Tensor], Tensor]) -> nn.Module:
    return Apply(lambda m, a: m.o(f(m.l(a).tanh() * 1).tanh()), l=nn.Linear(3, 3), o=nn.Linear(3, 2))


@pytest.mark.filterwarnings("ignore:index_reduce\\(\\) is in beta:UserWarning")
@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_refused(name: str) -> None:
    torch.manual_seed(0)
    model = extend(_between(MIXING[name])).double()
    loss = F.mse_loss(model(torch.randn(4, 3).double()), torch.zeros(4, 2).double())
    with (
        pytest.raises(RuntimeError, match="cannot tell which axis .*'o.weight'"),
        backpack(BatchGrad()),
    ):
        loss.backward()
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", PERMUTING)
def test_rows_that_change_places_follow_their_sample(name: str, last: bool) -> None:
    """Fields are those of the input's sample, wherever its rows are in the output."""
    torch.manual_seed(0)
    f = PERMUTING[name]
    model = _between(f) if last else Apply(lambda m, a: f(m.l(a).tanh()), l=nn.Linear(3, 3))
    model, X = model.double(), torch.randn(4, 3).double()
    output = model(X)
    target = torch.randn_like(output)
    jacobian: Any = torch.autograd.functional.jacobian(model, X)
    owner = jacobian.abs().sum((1, 3)).argmax(1)
    losses = (output - target).square().sum(1)
    lossfunc = extend(nn.MSELoss(reduction="sum"))
    with backpack(BatchGrad(), Variance(), BatchDiagGGNExact(), DiagGGNExact(), DiagHessian()):
        lossfunc(extend(model)(X), target).backward()
    rows = [
        torch.autograd.grad(losses[owner == n].sum(), list(model.parameters()), retain_graph=True)
        for n in range(4)
    ]
    curvature = Oracle(model, nn.MSELoss(reduction="sum"), X, target, sample_of_row=owner)
    for (name, p), *expected in zip(model.named_parameters(), *rows, strict=True):
        gradients = torch.stack(expected)
        torch.testing.assert_close(p.grad_batch, gradients)
        torch.testing.assert_close(p.variance, gradients.var(0, unbiased=False))
        diagonals = curvature.diag_ggn_batch[name]
        torch.testing.assert_close(p.diag_ggn_exact_batch, diagonals)
        torch.testing.assert_close(p.diag_ggn_exact, diagonals.sum(0))
        torch.testing.assert_close(p.diag_h, curvature.diag_h_batch[name].sum(0))


# Models with samples as positions: their own parameters are behind what mixes.
POSITIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "attention": (
        lambda: Apply(
            lambda m, a: m.m(a, a, a, need_weights=False)[0].flatten(1), m=nn.MultiheadAttention(4, 2)
        ),
        lambda: torch.randn(3, 4, 4),
    ),
    "attention-set": (
        lambda: Apply(lambda m, a: m.m(a, a, a, need_weights=False)[0], m=nn.MultiheadAttention(4, 2)),
        lambda: torch.randn(4, 4),
    ),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 5, 0.0), lambda: torch.randn(3, 4, 4)),
    "conv": (
        lambda: Apply(lambda m, a: m.c(a.T[None])[0].T, c=nn.Conv1d(3, 2, 3, padding=1)),
        lambda: torch.randn(4, 3),
    ),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_samples_as_positions_are_refused(name: str) -> None:
    make, data = POSITIONS[name]
    model = extend(make())
    loss = model(data()).square().sum()
    with pytest.raises(RuntimeError, match="cannot tell which axis"), backpack(BatchGrad()):
        loss.backward()


@pytest.mark.parametrize("name", ["attention", "sparse-mm", "assign-shifted", "fft"])
def test_mixed_outputs_are_refused(name: str) -> None:
    """No parameter comes after what mixes."""
    model = extend(Apply(lambda m, a: MIXING[name](m.l(a)), l=nn.Linear(3, 3))).double()
    loss = F.mse_loss(model(torch.randn(4, 3).double()), torch.zeros(4, 3).double())
    with pytest.raises(RuntimeError, match="axis of the model's output"), backpack(BatchGrad()):
        loss.backward()


def test_loss_inside_that_compares_samples() -> None:
    def contrast(m: Any, a: Tensor) -> Tensor:
        h = F.normalize(m.l(a))
        return F.cross_entropy(h @ h.T, torch.arange(len(a)))

    model = extend(Apply(contrast, l=nn.Linear(3, 3)))
    with backpack(BatchGrad()):
        model(torch.randn(4, 3)).backward()
    torch.testing.assert_close(model.l.weight.grad_batch.sum(0), model.l.weight.grad)


def _route(m: Any, a: Tensor) -> Tensor:
    """Rows are sent to one of two layers by a mask made from data."""
    h = m.l(a).tanh()
    mask = h[:, 0] > 0
    out = torch.zeros_like(h)
    out[mask] = m.k(h[mask])
    out[~mask] = m.k(h[~mask] * 2).tanh()
    return out.tanh()


def _put(write: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Rows are picked, and put back where they were."""
    return lambda m, a: m.k(write(m.l(a[PERM])).tanh())


def _steps(m: Any, a: Tensor) -> Tensor:
    """Steps are stored on an axis before the samples'."""
    out = torch.empty(4, len(a), 3, dtype=a.dtype)
    for t in range(4):
        out[t] = m.l(a * (t + 1)).tanh()
    return m.k(out).tanh().sum(0)


def _layers(f: Callable[[Any, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Apply(f, l=nn.Linear(3, 3), k=nn.Linear(3, 3), b=P(3), bb=P(4, 3))


ROWS = PERM[:, None].expand(4, 3)
FIRST_ROW = torch.tensor([0])
APART: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "route": _route,
    "argsort": lambda m, a: m.k(m.l(a)[(i := a[:, 0].argsort())].tanh())[i.argsort()],
    "assign": lambda m, a: m.k(_assign(m.l(a), PERM, PERM).tanh()),
    "index_add": _put(lambda s: _zeros().to(s.dtype).index_add(0, PERM, s)),
    "index_copy": _put(lambda s: _zeros().to(s.dtype).index_copy(0, PERM, s)),
    "scatter": _put(lambda s: _zeros().to(s.dtype).scatter(0, ROWS, s)),
    "scatter_add_": _put(lambda s: _zeros().to(s.dtype).scatter_add_(0, ROWS, s)),
    "index_put": _put(lambda s: _zeros().to(s.dtype).index_put((PERM,), s)),
    "zeros_like": _put(lambda s: torch.zeros_like(s).index_add(0, PERM, s)),
    "steps": _steps,
    "t_": lambda m, a: m.k((m.l(a) * 1).t_().tanh().t()),
    "gather": lambda m, a: m.k(m.l(a).gather(1, a.argsort(1))),
    "gather-table": lambda m, a: m.k(m.bb.gather(0, (a > 0).long() * 2)) + m.l(a),
    "cumsum": lambda m, a: m.k(m.l(a).cumsum(1).flip(1)),
    "fft": lambda m, a: m.k(torch.fft.rfft(m.l(a), n=4).abs()),
    "renorm": lambda m, a: m.k(m.l(a).renorm(2, 0, 0.5)),
    "trapezoid": lambda m, a: m.k(torch.cumulative_trapezoid(F.pad(m.l(a), (1, 0)))),
    "dropout": lambda m, a: m.k(F.dropout(m.l(a), 0.5)),
    "norm": lambda m, a: m.k(m.l(a) / m.l(a).norm(2, 1, keepdim=True)),
    "put-index_add": lambda m, a: m.l(a).index_add(0, FIRST_ROW, m.b[None]).tanh(),
    "put-index_copy": lambda m, a: m.l(a).index_copy(0, FIRST_ROW + 2, m.b[None]).tanh(),
    "put-index_fill": lambda m, a: m.l(a).index_fill(0, FIRST_ROW, m.b[0]).tanh(),
    "put-scatter": lambda m, a: m.l(a).scatter(0, FIRST_ROW.expand(1, 3), m.b[None]).tanh(),
    "put-index_put": lambda m, a: m.l(a).index_put((FIRST_ROW,), m.b).tanh(),
    "put-select_scatter": lambda m, a: m.l(a).select_scatter(m.b, 0, 0).tanh(),
    "put-slice_scatter": lambda m, a: m.l(a).slice_scatter(m.b[None], 0, 0, 1).tanh(),
    "put-masked_scatter": lambda m, a: m.l(a).masked_scatter(a > 0, m.bb).tanh(),
}


def _written(write: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    """Parameters are written in place into part of what a layer has made."""

    def forward(m: Any, a: Tensor) -> Tensor:
        h = m.l(a).clone()
        return m.k((h if (found := write(m, h)) is None else found).tanh())

    return forward


def _iadd(h: Tensor, index: Any, value: Tensor) -> None:
    h[index] += value


def _imul(h: Tensor, index: Any, value: Tensor) -> None:
    h[index] *= value


def _set(h: Tensor, index: Any, value: Any) -> None:
    h[index] = value


def _added(out: Tensor, h: Tensor) -> Tensor:
    out += h
    return out


def _both(m: Any, h: Tensor) -> Tensor:
    v = h[:, 1:]
    v.mul_(m.b[:2])
    h[:, 0] = m.b[2]
    v.add_(m.b[0])
    return h + v.sum(1, keepdim=True)


def _buffer(m: Any, a: Tensor) -> Tensor:
    out = torch.zeros(4, 3, dtype=a.dtype)
    out[:] = m.b
    return m.k(out * m.l(a))


def _steps_of_buffer(m: Any, a: Tensor) -> Tensor:
    """The first step is a parameter's, the others are the data's."""
    out = torch.zeros(3, 4, 3, dtype=a.dtype)
    out[0] = m.b
    for t in (1, 2):
        out[t] = m.l(a * t).tanh()
    return m.k(out).tanh().sum(0)


def _made_set(m: Any, a: Tensor) -> Tensor:
    """Data is written into what parameters have made."""
    out = (m.b * m.bb).view(4, 3, 1).repeat(1, 1, 2)
    out[..., 1] = m.l(a)
    return m.k(out.sum(2))


def _square(h: Tensor) -> Tensor:
    return h[:, :1, None, None].expand(4, 4, 2, 2)


MASK = torch.tensor([True, False, True, True])
GRID = torch.arange(12).reshape(4, 3) % 3 > 0
APART |= {
    "iadd-column": _written(lambda m, h: _iadd(h, (slice(None), 0), m.b[0])),
    "iadd-row": _written(lambda m, h: _iadd(h, 2, m.b)),
    "iadd-rows": _written(lambda m, h: _iadd(h, slice(1, 3), m.bb[:2])),
    "iadd-mask": _written(lambda m, h: _iadd(h, MASK, m.b)),
    "imul-columns": _written(lambda m, h: _imul(h, (slice(None), slice(1, 3)), m.b[:2])),
    "set-column": _written(lambda m, h: _set(h, (slice(None), 1), m.bb[:, 0])),
    "set-row": _written(lambda m, h: _set(h, 1, m.b)),
    "set-mask": _written(lambda m, h: _set(h, MASK, m.b)),
    "set-mask-rows": _written(lambda m, h: _set(h, MASK, m.bb[1:])),
    "set-grid": _written(lambda m, h: _set(h, GRID, m.bb.reshape(-1)[:8])),
    "set-grid-number": _written(lambda m, h: _set(h, GRID, m.b[1])),
    "set-list": _written(lambda m, h: _set(h, [0, 3], m.b[None])),
    "set-entry": _written(lambda m, h: _set(h, (1, 2), m.b[0] * 2)),
    "set-view": _written(lambda m, h: _set(h.view(4, 1, 3), (slice(2), 0, 1), m.b[:2])),
    "view-add_": _written(lambda m, h: h[:, 0].add_(m.b[0]) is None or None),
    "view-t": _written(lambda m, h: h.t().mul_(m.bb.t()) is None or None),
    "view-diagonal": _written(lambda m, h: h.diagonal().add_(m.b) is None or None),
    "view-flat": _written(lambda m, h: h.view(-1)[2:5].mul_(m.b) is None or None),
    "view-returned": _written(lambda m, h: F.pad(h[:, 1:].mul_(m.b[0]), (1, 0)) + h),
    "view-both": _written(_both),
    "buffer": _buffer,
    "buffer-steps": _steps_of_buffer,
    # forms of indices
    "index-grid": lambda m, a: m.k(m.l(a)[GRID].view(4, 2).sum(1, keepdim=True) * m.b),
    "index-all": lambda m, a: m.k(m.l(a)[torch.arange(4)[:, None], torch.tensor([[0, 2, 1]])].tanh()),
    "index-table": lambda m, a: m.k(m.bb[torch.arange(4), None] + m.l(a)[:, None])[:, 0],
    "index-between": lambda m, a: m.k(m.l(a)[:, None, :, None].expand(4, 2, 3, 2)[:, 1, :, 0].tanh()),
    "masked_select": lambda m, a: m.k(m.l(a).masked_select(GRID).view(4, 2).sum(1, keepdim=True) * m.b),
    "cat-reshape": lambda m, a: m.k(torch.cat(m.l(a).split([1, 3])).view(4, 3, 1).squeeze(2)),
    "take": lambda m, a: m.k(m.l(a).take(torch.arange(12).view(4, 3).flip(1))),
    "flips": lambda m, a: m.k(m.l(a).flip(0, 1).tanh()).flip(0),
    "rot90": lambda m, a: m.k(m.l(a).rot90(1).rot90(-1)),
    "kron": lambda m, a: torch.kron(m.l(a), m.b[None, :2]).tanh(),
    "kron-rows": lambda m, a: m.k(torch.kron(m.b[:2, None], m.l(a)).view(2, 4, 3).sum(0)),
    "vstack": lambda m, a: m.k(torch.vstack([m.l(a[:1]), m.l(a[1:])])),
    "hstack": lambda m, a: torch.hstack([m.l(a), m.k(a).tanh()]),
    "pixel_shuffle": lambda m, a: F.pixel_shuffle(_square(m.l(a)) * m.b[0], 2),
    "made": lambda m, a: m.k(_added(m.b.exp().expand(4, 3).clone(), m.l(a))),
    "made-set": _made_set,
    "made-mul": lambda m, a: m.k((m.bb * 2).mul_(m.l(a))),
    "broadcast": lambda m, a: m.k(torch.mul(*torch.broadcast_tensors(m.l(a), m.b))),
    "broadcast-axis": lambda m, a: m.k(torch.broadcast_tensors(m.l(a), _zeros().to(a)[None])[0][0]),
    "diagonal": lambda m, a: m.k(m.l(a).diag_embed().diagonal(dim1=1, dim2=2)),
    "unfold": lambda m, a: F.unfold(m.l(a)[:, None, None], (1, 2)).flatten(1) @ m.bb,
    "einsum": lambda m, a: m.k(torch.einsum("...d,de", m.l(a), m.k.weight)),
    "einsum-implicit": lambda m, a: m.k(torch.einsum("zd,ed", m.l(a), m.k.weight).T),
    "einsum-sublists": lambda m, a: m.k(torch.einsum(m.l(a), [0, 1], m.k.weight, [1, 2], [0, 2])),
    "einsum-rows": lambda m, a: m.k(torch.einsum("ab,ax->xa", m.l(a), m.bb).T),
    "einsum-square": lambda m, a: torch.einsum("ab,ax->xa", m.l(a), m.bb.repeat(1, 2)[:, :4]).T,
    "loop": lambda m, a: torch.stack([m.k(m.l(x).tanh()) for x in a]),
    "loop-places": lambda m, a: torch.stack([m.k(m.l(a[n]).tanh()) * m.b for n in range(4)]),
    "loop-rows": lambda m, a: torch.cat([m.k(m.l(a[n : n + 1]).tanh()) for n in range(4)]),
    "loop-numbers": lambda m, a: torch.stack([m.l(x).sin().sum() * m.b[0] for x in a])[:, None] * m.b,
    "loop-pairs": lambda m, a: torch.stack([m.k(x * y) for x, y in zip(m.l(a), a, strict=True)]),
    "loop-splits": lambda m, a: torch.cat([m.k(m.l(x)).tanh() for x in a.split([1, 2, 1])]),
    "loop-buffer": lambda m, a: _filled(m, a),
}  # fmt: skip


def _filled(m: Any, a: Tensor) -> Tensor:
    out = torch.zeros(4, 3, dtype=a.dtype)
    for n in range(4):
        out[n] = m.k(m.l(a[n]).tanh())
    return out * m.b


@pytest.mark.parametrize("name", APART)
def test_samples_kept_apart_agree(name: str) -> None:
    torch.manual_seed(0)
    report = check(
        *(model := _layers(APART[name])(), nn.MSELoss(), X := torch.randn(4, 3)),
        *(torch.zeros_like(model(X.clone())).double(), ALL),
    )
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("ids", [[0, 2, 3, 0], [0, 2, 5, 0], [[0, 1], [5, 2], [3, 3], [1, 0]]])
def test_rows_of_a_table_by_index_select(ids: list) -> None:
    torch.manual_seed(0)
    model = Apply(lambda m, a: m.w.index_select(0, a.flatten()).view(4, -1).tanh(), w=P(6, 2))
    X = torch.tensor(ids)
    report = check(model, nn.MSELoss(), X, torch.zeros(4, 2 * X[0].numel()), ALL)
    assert report.ok, f"\n{report}"


# --------------------------------------------------------------------------------------
# The probe leaves no traces


def _probed(f: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Tensor]:
    probe._verdicts.clear()
    return extend(_between(f)), torch.randn(4, 3)


def test_probe_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    inner = probe._tried
    monkeypatch.setattr(probe, "_tried", lambda *a: tried.append(1) or inner(*a))
    model, X = _probed(lambda h: torch.fft.fft(h).real)
    for _ in range(3):
        model(X)
    assert len(tried) == 1
    model(X[:3])
    assert len(tried) == 2
    with torch.no_grad():
        model(X[:2])
    assert len(tried) == 2


def test_probe_leaves_random_numbers_and_hooks_alone() -> None:
    seen: list[Tensor] = []

    def f(h: Tensor) -> Tensor:
        h.register_hook(seen.append)
        return torch.fft.fft(h).real + torch.poisson(h.detach() ** 2)

    model, X = _probed(f)
    torch.manual_seed(0)
    first = model(X)
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.testing.assert_close(model(X), first)
    assert torch.equal(torch.rand(1), after)
    assert not seen and all(p.grad is None for p in model.parameters())
    first.sum().backward()
    assert len(seen) == 1


def test_probe_inside_a_block_and_a_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    def part(h: Tensor) -> Tensor:
        return torch.fft.fft(h).real

    model, X = _probed(lambda h: checkpoint(part, h, use_reentrant=False))
    with backpack(BatchGrad()), torch.autocast("cpu", dtype=torch.bfloat16):
        F.mse_loss(model(X).float(), torch.zeros(4, 2)).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad, rtol=1e-2, atol=1e-2)


def test_probe_of_columns_that_are_orthogonal_already() -> None:
    model, X = _probed(lambda h: torch.linalg.qr(h * 0 + torch.eye(4)[:, :3])[0])
    loss = model(X).sum()
    with pytest.raises(RuntimeError, match="linalg_qr mixes samples"), backpack(BatchGrad()):
        loss.backward()


# --------------------------------------------------------------------------------------
# Recurrent layers on rows that were picked, flattened or taken one by one


def _last_steps(m: Any, a: Tensor) -> Tensor:
    """Sort, run, undo: what packing sequences by length does."""
    order = a[:, 0, 0].argsort()
    return m.o(m.r(a[order])[0][order.argsort()][:, -1])


def _final(m: Any, a: Tensor, start: Any = None) -> Tensor:
    """The last hidden state of the last layer, ``[N, h]``."""
    found = m.r(a) if start is None else m.r(a, start)
    return (found[1][0] if isinstance(found[1], tuple) else found[1])[-1]


def _start(m: Any, h: Tensor) -> Any:
    return (h, h.tanh()) if isinstance(m.r, nn.LSTM) else h


def _made(m: Any, rows: Tensor) -> Any:
    """First states made from the first steps of rows."""
    return _start(m, m.l(rows[:, 0]).expand(m.h.shape[0], -1, -1))


def _ragged(m: Any, a: Tensor) -> Tensor:
    """Some samples are read more often than others."""
    found = torch.zeros(4, 2).to(a).index_add(0, PLACES, _final(m, a[PLACES]))
    return m.o(found) + m.o(_final(m, a))


def _characters(m: Any, a: Tensor) -> Tensor:
    """Words are flattened into the samples' axis, and each is read by itself."""
    words = a.unflatten(2, (3, 1)).flatten(0, 1)
    return m.o(_final(m, words).unflatten(0, a.shape[:2]).sum(1))


RECURRENT: dict[str, tuple[int, Callable[[Any, Tensor], Tensor]]] = {
    "sorted": (3, _last_steps),
    "sorted-states": (3, lambda m, a: m.o(_final(m, a[PERM])[PERM.argsort()])),
    "flipped": (3, lambda m, a: m.o(_final(m, a.flip(0)).flip(0))),
    "twice": (3, lambda m, a: m.o(_final(m, a.repeat_interleave(2, 0)).view(4, -1)[:, :2])),
    "ragged": (3, _ragged),
    "characters": (1, _characters),
    "outer": (1, lambda m, a: m.o(_final(m, torch.cat(a.split(1, 2))).view(3, 4, 2).sum(0))),
    "one-by-one": (3, lambda m, a: m.o(torch.stack([_final(m, x) for x in a]))),
    "slices": (3, lambda m, a: m.o(torch.cat([_final(m, x) for x in a.split([1, 3])]))),
    "start": (3, lambda m, a: m.o(_final(m, a, _start(m, m.h.expand(-1, 4, -1))))),
    "start-data": (3, lambda m, a: m.o(_final(m, a, _made(m, a)))),
    "start-picked": (3, lambda m, a: m.o(_final(m, (b := a[PERM]), _made(m, b)))[PERM.argsort()]),
    "start-rows": (3, lambda m, a: m.o(_final(m, a[PERM], _start(m, m.hh)))[PERM.argsort()]),
    "input": (3, lambda m, a: m.o(_final(m, m.x, _made(m, a)))),
    "input-picked": (3, lambda m, a: m.o(_final(m, m.x, _made(m, a[PERM])))[PERM.argsort()]),
}  # fmt: skip


def _recurrent(
    kind: Any, features: int, f: Callable[[Any, Tensor], Tensor], **options: Any
) -> nn.Module:
    options = {"batch_first": True, **options}
    layer = kind(features, 2, **options)
    if not options["batch_first"]:
        layer.register_forward_pre_hook(lambda _, args: (args[0].transpose(0, 1), *args[1:]))
        layer.register_forward_hook(lambda _, args, out: (out[0].transpose(0, 1), *out[1:]))
    states = layer.num_layers * (2 if layer.bidirectional else 1)
    size = layer.proj_size or 2
    return Apply(
        f,
        **{
            "r": layer,
            "o": nn.Linear(size * (2 if layer.bidirectional else 1), 3),
            "l": nn.Linear(3, 2),
        },
        **{"h": P(states, 1, 2), "hh": P(states, 4, 2), "x": P(4, 2, features)},
    )


RECURRENT_TRIALS: list[tuple[str, Any, dict[str, Any]]] = [
    (name, kind, {}) for name in RECURRENT for kind in (nn.LSTM, nn.GRU, nn.RNN)
]
RECURRENT_TRIALS += [
    (name, kind, options)
    for name, kind in (("sorted", nn.LSTM), ("characters", nn.GRU), ("start-rows", nn.RNN))
    for options in ({"num_layers": 2}, {"batch_first": False}, {"num_layers": 2, "batch_first": False})
]
RECURRENT_TRIALS += [("sorted", nn.LSTM, {"proj_size": 1}), ("sorted", nn.GRU, {"bidirectional": True})]


@pytest.mark.parametrize("name, kind, options", RECURRENT_TRIALS, ids=str)
def test_recurrent_layers_keep_the_axis(name: str, kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    features, f = RECURRENT[name]
    model = _recurrent(kind, features, f, **options)
    quantities = (
        (BatchGrad(), BatchDiagGGNExact())
        if options
        else (BatchGrad(), BatchDiagGGNExact(), DiagHessian())
    )
    X, y = torch.randn(4, 2, 3), torch.tensor([0, 2, 1, 2])
    report = check(model, nn.CrossEntropyLoss(), X, y, quantities)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
def test_kronecker_factors_of_sorted_rows(kind: Any) -> None:
    """The order of samples is nothing to them."""
    torch.manual_seed(0)
    model, X = _recurrent(kind, 3, _last_steps), torch.randn(4, 2, 3)
    found = []
    for function in (_last_steps, lambda m, a: m.o(m.r(a)[0][:, -1])):
        model.function = function
        with backpack(KFLR()):
            extend(nn.CrossEntropyLoss())(extend(model)(X), torch.tensor([0, 2, 1, 2])).backward()
        found.append([f for p in (*model.r.parameters(), *model.o.parameters()) for f in p.kflr])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=lambda kind: kind.__name__)
def test_states_of_other_samples_are_refused(kind: Any) -> None:
    model = extend(
        _recurrent(kind, 3, lambda m, a: m.o(_final(m, a, _start(m, m.l(a.flip(0)[:, 0])[None]))))
    )
    loss = model(torch.randn(4, 2, 3)).sum()
    with pytest.raises(RuntimeError, match="states belong to other samples"), backpack(BatchGrad()):
        loss.backward()


def test_samples_as_steps_are_refused() -> None:
    model = extend(_recurrent(nn.GRU, 3, lambda m, a: m.o(_final(m, a.transpose(0, 1)))))
    loss = model(torch.randn(4, 2, 3)).sum()
    with pytest.raises(RuntimeError, match="along the sample axis"), backpack(BatchGrad()):
        loss.backward()


class Bags(nn.Module):
    """Indices cannot be differentiated: which samples a result is made of shows when they change."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.bag, self.o, self.turned = nn.EmbeddingBag(5, 4), nn.Linear(4, 3), turned

    def forward(self, ids: Tensor) -> Tensor:
        return self.o(self.bag(ids.t() if self.turned else ids).tanh())


@pytest.mark.parametrize("ids", [torch.arange(16).reshape(4, 4) % 5, torch.zeros(4, 4).long()])
def test_bags_of_indices(ids: Tensor) -> None:
    loss = nn.CrossEntropyLoss()
    report = check(Bags(False).double(), loss, ids, torch.tensor([0, 1, 2, 0]), FIRST)
    assert report.ok, report
    model = extend(Bags(True).double())
    with pytest.raises(RuntimeError, match="embedding_bag mixes samples"), backpack(*FIRST):
        loss(model(ids), torch.tensor([0, 1, 2, 0])).backward()
