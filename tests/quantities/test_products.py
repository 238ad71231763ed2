"""Products with curvature blocks, against dense blocks by plain autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backpack import backpack, disable, extend
from backpack.extensions import (
    GGNMP,
    HMP,
    KFLR,
    PCHMP,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    EmpiricalKFAC,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)
from backpack.testing.oracle import Oracle
from tests.cases import CASES

NAMES = (
    *("linear-3d", "sigmoid-relu", "reuse", "tied-transpose", "conv2d-groups", "layer-norm", "lstm"),
    *("weight-norm", "mha", "experts", "gru-cell", "embedding"),
)


def hessian_block(loss: Tensor, p: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, p, create_graph=True)
    rows = [
        torch.autograd.grad(e, p, retain_graph=True, allow_unused=True)[0] if e.requires_grad else None
        for e in gradient.flatten()
    ]
    return torch.stack([torch.zeros(p.numel()).to(p) if r is None else r.flatten() for r in rows])


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMES], ids=lambda c: c.name)
@pytest.mark.parametrize("lossfunc", [nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")])
def test_blocks(case, lossfunc) -> None:
    torch.manual_seed(0)
    model, X = case.model().double(), case.inputs()
    X = X.double() if X.is_floating_point() else X
    with torch.no_grad():
        f = model(X)
    y = torch.randint(f.shape[1], (len(f),)) if isinstance(lossfunc, nn.CrossEntropyLoss) else f.sin()
    oracle = Oracle(model, lossfunc, X, y)
    ggn = oracle.ggn
    blocks = {n: hessian_block(oracle.loss(oracle.output()), p) for n, p in oracle.parameters.items()}
    loss = extend(lossfunc)(extend(model)(X), y)
    with backpack(GGNMP(), HMP(), BatchGrad()):
        loss.backward()
        inside = {n: p.ggnmp(torch.ones_like(p)) for n, p in model.named_parameters()}
    scale = max(float(b.abs().max()) for b in ggn.values())
    for name, p in model.named_parameters():
        mat = torch.randn(3, *p.shape).double()
        for product, block in ((p.ggnmp, ggn[name]), (p.hmp, blocks[name])):
            expected = (mat.reshape(3, -1) @ block).reshape(mat.shape)
            torch.testing.assert_close(product(mat), expected, rtol=1e-8, atol=1e-10 * scale)
            torch.testing.assert_close(product(mat[0]), expected[0], rtol=1e-8, atol=1e-10 * scale)
        torch.testing.assert_close(inside[name], p.ggnmp(torch.ones_like(p)))
        assert p.grad_batch.shape[1:] == p.shape


def test_batch_norm_in_training_mode() -> None:
    """Samples are mixed, but products are those of the whole batch's loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    X, y = torch.randn(5, 3).double(), torch.randint(3, (5,))
    model, lossfunc = extend(net), extend(nn.CrossEntropyLoss())
    with backpack(GGNMP(), HMP()):
        lossfunc(model(X), y).backward()
    with disable():
        f = model(X)
        blocks = {p: hessian_block(lossfunc(f, y), p) for p in model.parameters()}
        jacobians = {
            p: [torch.autograd.grad(e, p, retain_graph=True)[0] for e in f.flatten()] for p in blocks
        }
    start = f.detach().requires_grad_()
    loss_hessian = hessian_block(lossfunc(start, y), start)
    for p, block in blocks.items():
        J = torch.stack(jacobians[p]).flatten(1)
        mat = torch.randn(2, *p.shape).double()
        torch.testing.assert_close(p.hmp(mat).flatten(1), mat.flatten(1) @ block)
        torch.testing.assert_close(p.ggnmp(mat).flatten(1), mat.flatten(1) @ J.T @ loss_hessian @ J)
    # Above the batch norm all is linear: positive curvature is the GGN. Below it is not defined.
    with backpack(PCHMP(), unsupported="skip") as block:
        lossfunc(model(X), y).backward()
    assert {p: p.pchmp(torch.ones_like(p)).tolist() for p in blocks if hasattr(p, "pchmp")} == {
        p: p.ggnmp(torch.ones_like(p)).tolist() for p in net[3].parameters()
    }
    assert len(block.left_out) == 4 and "batch norm in training mode" in str(block.left_out)


@pytest.mark.parametrize("modify", ["clip", "abs"])
def test_positive_curvature(modify: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()
    X, y = torch.randn(5, 3).double(), torch.randint(2, (5,))
    lossfunc = nn.CrossEntropyLoss()
    weight = model[0].weight
    ggn = Oracle(model, lossfunc, X, y).ggn["0.weight"]
    z = model[0](X).detach().requires_grad_()
    s = z.sigmoid()
    (g,) = torch.autograd.grad(lossfunc(model[2](s), y), s)
    residual = g * s * (1 - s) * (1 - 2 * s)
    residual = residual.clamp(min=0) if modify == "clip" else residual.abs()
    # z[n, o] = W[o] x[n]
    extra = torch.einsum("no,ni,nj,op->oipj", residual, X, X, torch.eye(4).double())
    block = ggn + extra.reshape(12, 12).detach()
    with backpack(PCHMP(modify=modify), DiagGGNExact()):
        extend(lossfunc)(extend(model)(X), y).backward()
    mat = torch.randn(2, 4, 3).double()
    torch.testing.assert_close(weight.pchmp(mat), (mat.reshape(2, -1) @ block).reshape(mat.shape))


FIRST = [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), EmpiricalKFAC()]
SECOND = [DiagGGNExact(), BatchDiagHessian(), SqrtGGNExact(), KFLR(), GGNMP(), HMP()]


@pytest.mark.parametrize("gradient", [True, False])
def test_hooks_of_parameters_change_the_gradient_alone(gradient: bool) -> None:
    """Documented where ``BatchGrad`` is: quantities are those of the gradient before its hooks."""
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    X, y = torch.randn(5, 3).double(), torch.randint(2, (5,))
    lossfunc = extend(nn.CrossEntropyLoss())

    def values() -> list[list[Tensor]]:
        quantities = FIRST + (SECOND if gradient else SECOND[:-2])
        with backpack(*quantities, gradient=gradient):
            lossfunc(model(X), y).backward()
        found = []
        for p in model.parameters():
            fields = [getattr(p, each.savefield) for each in quantities]
            flat = [f(torch.ones_like(p)) if callable(f) else f for f in fields]
            found.append([t for f in flat for t in (f if isinstance(f, list) else [f])])
        return found

    expected = values()
    before = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
        p.register_hook(lambda g: g.clamp(-0.01, 0.01) / 2)
    for p, old, own, wanted in zip(model.parameters(), before, values(), expected, strict=True):
        torch.testing.assert_close(own, wanted)
        if gradient:
            torch.testing.assert_close(own[0].sum(0), old)
            torch.testing.assert_close(p.grad, old.clamp(-0.01, 0.01) / 2)


def test_tables_with_sparse_gradients() -> None:
    """As those of the same table without."""
    found, X = [], torch.tensor([[0, 1, 1], [3, 2, 1], [4, 4, 0]])
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 2, sparse=sparse), nn.Flatten(), nn.Linear(6, 3)).double()
        with backpack(GGNMP(), HMP()):
            nn.functional.cross_entropy(extend(model)(X), torch.tensor([0, 2, 1])).backward()
        table = model[0].weight
        found.append([f(torch.ones(1, 5, 2).double()) for f in (table.ggnmp, table.hmp)])
    torch.testing.assert_close(*found)


def test_errors() -> None:
    model = extend(nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 2)))
    lossfunc, X, y = extend(nn.CrossEntropyLoss()), torch.randn(5, 3), torch.randint(2, (5,))
    with pytest.raises(KeyError, match="clip"):
        PCHMP(modify="wrong")
    with backpack(HMP("product")):
        lossfunc(model(X), y).backward()
    weight = model[0].weight
    with pytest.raises(ValueError, match=r"\[K, 4, 3\]"):
        weight.product(torch.zeros(2, 3))
    assert weight.product(torch.zeros(0, 4, 3)).shape == (0, 4, 3)
    with pytest.raises(NotImplementedError, match="GGNMP"), backpack(PCHMP()):
        lossfunc(model(X), y).backward()
    with pytest.raises(RuntimeError, match=r"loss.backward\(\)"), backpack(GGNMP()):
        torch.autograd.backward(lossfunc(model(X), y))
    with disable():
        assert model(X).shape == (5, 2)
