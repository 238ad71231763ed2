"""Einsums of data with a weight: a rule for any number of axes, in any order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.graph import making
from backpack.testing.oracle import check
from tests.cases import Apply, P

QUANTITIES = [
    *(E.BatchGrad(), E.BatchL2Grad(), E.SumGradSquared(), E.Variance()),
    *(E.DiagGGNExact(), E.BatchDiagGGNExact(), E.DiagHessian()),
]
SIZES = {"n": 3, "t": 2, "s": 4, "d": 3, "h": 2, "k": 3, "z": 4}
EQUATIONS = [
    "ntd,dhk->nthk",
    "ntd,hkd->nthk",
    "ntd,hdk->nhtk",
    "nthk,hkd->ntd",
    "nthk,dhk->ntd",
    "nthd,hdk->nthk",
    "nthd,hkd->nthk",
    "ntd,dh->nh",
    "ntd,d->nt",
    "nthk,hk->nthk",
    "tnd,dk->tnk",
    "ntd,zd",
    "...d,dh->...h",
    "ntd,...hd->nt...h",
    "dhk,ntd->nthk",
    "ntsd,stk->nkd",
    "nd,hk->ndhk",
]
# Three factors, a label twice, one that is summed in the weight alone.
WITHOUT_A_RULE = ["ntd,dh,hk->ntk", "ntd,ddh->nth", "ntd,dhk->nth"]


def model(equation: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    terms = equation.split("->")[0].split(",")
    data = next(j for j, t in enumerate(terms) if "n" in t or t.startswith("..."))
    terms = [t.replace("...", "nt" if j == data else "") for j, t in enumerate(terms)]
    tensors = [torch.randn(*(SIZES[c] for c in t)) for t in terms]
    parts = {f"w{j}": P(*t.shape) for j, t in enumerate(tensors) if j != data}

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        factors = [x if j == data else getattr(m, f"w{j}") for j in range(len(terms))]
        out = torch.einsum(equation, *factors)
        out = out.transpose(0, 1) if equation.startswith("tn") else out
        return out.flatten(1).tanh()

    x = tensors[data]
    return Apply(forward, **parts), x


@pytest.mark.parametrize("equation", [*EQUATIONS, *WITHOUT_A_RULE])
def test_equations(equation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if equation in EQUATIONS:
        monkeypatch.setattr(making, "fallback", None)
    net, x = model(equation)
    dim = 1 if equation.startswith("tn") else 0
    target = torch.randn(3, net(x).shape[1])
    report = check(net, nn.MSELoss(), x, target, QUANTITIES, batch_dim=dim, output_dim=0)
    assert report.ok, report


def test_ways() -> None:
    """Operands in a list, several rows of a sample, one sample alone."""
    torch.manual_seed(0)
    x, y = torch.randn(3, 2, 4), torch.tensor([0, 1, 1])
    for forward in (
        lambda m, x: torch.einsum("ntd,dhk->nhk", [x, m.w]).flatten(1),
        lambda m, x: torch.einsum("md,dhk->mhk", x.flatten(0, 1), m.w).view(3, 2, 6).sum(1),
        lambda m, x: torch.einsum("md,dhk->mhk", x.permute(1, 0, 2).flatten(0, 1), m.w)[:3].flatten(1),
        lambda m, x: torch.stack([torch.einsum("td,dhk->hk", each, m.w).flatten() for each in x]),
        lambda m, x: torch.einsum("md,dhk->mhk", x[:, 0], m.w * m.w).flatten(1),
    ):
        report = check(Apply(forward, w=P(4, 2, 3)), F.cross_entropy, x, y, QUANTITIES)
        assert report.ok, report


def test_factors() -> None:
    """Weights of three axes have the Kronecker factors of the matrices that they are."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 2, 6).double(), torch.tensor([0, 1, 1, 2, 0])
    q, o = torch.randn(6, 2, 3).double(), torch.randn(2, 3, 4).double()

    def cubes(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        heads = torch.einsum("ntd,dhk->nthk", x, m.q).tanh()
        return torch.einsum("nthk,hkd->ntd", heads, m.o).sum(1)

    three = extend(Apply(cubes, q=nn.Parameter(q), o=nn.Parameter(o)))
    two = extend(
        Apply(
            lambda m, x: ((x @ m.q).tanh() @ m.o).sum(1),
            q=nn.Parameter(q.flatten(1)),
            o=nn.Parameter(o.flatten(0, 1)),
        )
    )
    for net in (three, two):
        with backpack(E.KFLR(), E.EmpiricalKFAC("expand"), E.EKFLR()):
            F.cross_entropy(net(x), y).backward()
    for p, r in zip(three.parameters(), two.parameters(), strict=True):
        for field in ("kflr", "kfac_empirical"):
            pairs = zip(getattr(p, field), getattr(r, field), strict=True)
            assert all(torch.allclose(a, b) for a, b in pairs), field
        v = torch.randn(p.shape).double()
        for block, matrix in ((p.kflr, r.kflr), (p.ekflr, r.ekflr)):
            found, expected = block.solve(v, 0.1), matrix.solve(v.reshape(r.shape), 0.1)
            assert torch.allclose(found.reshape(r.shape), expected)
