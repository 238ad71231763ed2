"""Kronecker factors from their definition, with plain autograd, and where they are exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, disable, extend
from backpack.extensions import (
    EKFAC,
    EKFLR,
    KFAC,
    KFLR,
    KFRA,
    BatchGrad,
    EmpiricalKFAC,
    SumGradSquared,
)
from backpack.forms.products import spectrum
from backpack.testing.oracle import Oracle
from tests.cases import Apply, Case, P, flat, norm, seq, x

N = 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


LOSSES = [
    (nn.CrossEntropyLoss(), lambda f: torch.randint(f.shape[1], (len(f), *f.shape[2:]))),
    (nn.MSELoss(), torch.randn_like),
    (nn.MSELoss(reduction="sum"), torch.randn_like),
    (nn.BCEWithLogitsLoss(), torch.rand_like),
]


def factors(
    model: nn.Module, X: Tensor, kind: int = 0, quantity=KFLR
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """Kronecker factors and GGN blocks of every parameter."""
    model, X, lossfunc = model.double(), X.double(), LOSSES[kind][0]
    y = LOSSES[kind][1](model(X).detach())
    blocks = Oracle(model, lossfunc, X, y).ggn
    extend(model)
    ext = quantity()
    with backpack(ext):
        extend(lossfunc)(model(X), y).backward()
    found = {name: getattr(p, ext.savefield) for name, p in model.named_parameters()}
    return found, {name: block.detach() for name, block in blocks.items()}


# --------------------------------------------------------------------------------------
# Exact cases

ONE_POSITION = [
    Case("linear", lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), x(1, 3)),
    Case("linear-3d", lambda: seq(nn.Linear(3, 4), nn.Flatten(), nn.Linear(4, 2)), x(1, 1, 3)),
    Case("conv1d", lambda: seq(nn.Conv1d(2, 3, 4), nn.Flatten(), nn.Linear(3, 2)), x(1, 2, 4)),
    Case("conv2d", lambda: seq(nn.Conv2d(2, 3, (2, 3)), nn.Tanh(), nn.Flatten()), x(1, 2, 2, 3)),
    Case("conv2d-pad", lambda: seq(nn.Conv2d(2, 3, 3, 2, 1), nn.Flatten()), x(1, 2, 2, 2)),
    Case("conv3d", lambda: seq(nn.Conv3d(1, 3, 2), nn.Flatten()), x(1, 1, 2, 2, 2)),
    Case("matmul", lambda: Apply(lambda m, a: (a @ m.w).tanh() @ m.v, w=P(3, 4), v=P(4, 2)), x(1, 3)),
    Case("addmm", lambda: Apply(lambda m, a: torch.addmm(m.b, a, m.w), b=P(4), w=P(3, 4)), x(1, 3)),
    Case("left", lambda: Apply(lambda m, a: (m.w @ a.T).T.tanh(), w=P(4, 3)), x(1, 3)),
]  # fmt: skip


@pytest.mark.parametrize("kind", range(len(LOSSES)))
@pytest.mark.parametrize("case", ONE_POSITION, ids=lambda c: c.name)
def test_exact_for_one_sample_and_position(case: Case, kind: int) -> None:
    """In row-major order of the parameter, whichever its layout."""
    found, blocks = factors(case.model(), case.inputs(), kind)
    for name, matrices in found.items():
        assert len(matrices) == (2 if "weight" in name or name in ("w", "v") else 1)
        product = matrices[0] if len(matrices) == 1 else torch.kron(*matrices)
        close(product, blocks[name])


@pytest.mark.parametrize("ndim", [1, 2])
def test_transposed_convolution(ndim: int) -> None:
    """The pair stands for ``weight.transpose(0, 1)``; exact for one sample and one position."""
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d)[ndim - 1](2, 3, 3, padding=1)
    found, blocks = factors(
        nn.Sequential(layer, nn.Tanh(), nn.Flatten()), torch.randn(1, 2, *[1] * ndim)
    )
    weight = layer.weight
    place = torch.arange(weight.numel()).reshape(weight.shape).transpose(0, 1).flatten()
    B, A = found["0.weight"]
    assert (len(B), len(A)) == (3, 2 * 3**ndim)
    close(torch.kron(B, A), blocks["0.weight"][place][:, place])
    close(found["0.bias"][0], blocks["0.bias"])


@pytest.mark.parametrize("kind", range(len(LOSSES)))
@pytest.mark.parametrize(
    "case",
    [
        Case("linear", lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), x(N, 3)),
        Case("linear-3d", lambda: seq(nn.Linear(3, 2), nn.Tanh(), nn.Flatten()), x(N, 2, 3)),
        Case("conv", lambda: seq(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten()), x(N, 2, 3, 3)),
        Case("conv-transposed", lambda: seq(nn.ConvTranspose2d(2, 2, 2), nn.Flatten()), x(N, 2, 1, 2)),
        Case("layer-norm", lambda: seq(norm(nn.LayerNorm(3)), nn.Linear(3, 2)), x(N, 3)),
        Case("group-norm", lambda: seq(norm(nn.GroupNorm(2, 4)), nn.Flatten()), x(N, 4, 3)),
        Case("batch-norm", lambda: seq(norm(nn.BatchNorm2d(3)), nn.Flatten()), x(N, 3, 2, 2)),
    ],
    ids=lambda c: c.name,
)
def test_one_factor_is_the_exact_block(case: Case, kind: int) -> None:
    """Biases and norm weights, for any number of samples and positions."""
    found, blocks = factors(case.model(), case.inputs(), kind)
    single = {name: f[0] for name, f in found.items() if len(f) == 1}
    assert single
    for name, matrix in single.items():
        close(matrix, blocks[name])


# --------------------------------------------------------------------------------------
# Definitions


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2}, {"stride": 2, "padding": 2}]
)
def test_input_factor_of_a_convolution(options: dict[str, int]) -> None:
    layer, X = nn.Conv2d(2, 3, (2, 3), **options), torch.randn(N, 2, 6, 7)
    found, _ = factors(nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), X)
    a = F.unfold(X.double(), (2, 3), **options).mT  # [N, positions, c * kernel]
    close(found["0.weight"][1], torch.einsum("nsi,nsj->ij", a, a) / N)


def test_input_factor_of_a_linear_layer() -> None:
    X = torch.randn(N, 5, 3)
    found, _ = factors(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Flatten()), X)
    close(found["0.weight"][1], torch.einsum("nsi,nsj->ij", X.double(), X.double()) / N)


@pytest.mark.parametrize("positions", [(), (3,), (2, 2)])
def test_output_factor_is_the_bias_block(positions: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Flatten(), nn.LazyLinear(2))
    X = torch.randn(N, *positions, 3)
    model(X)
    found, blocks = factors(model, X)
    close(found["0.weight"][0], found["0.bias"][0])
    close(found["0.weight"][0], blocks["0.bias"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_exact_for_deep_linear_networks(depth: int, reduction: str) -> None:
    """Square loss and no nonlinearity (Eschenhagen et al., 2023; arXiv:2507.05127), any N.

    The block of a weight is ``sum_n (J^T H_n J) kron (a_n a_n^T)``. Here neither the Jacobian J of the
    layers above nor the loss Hessian depends on the sample: ``B = sum_n J^T H_n J = N J^T H J`` and
    ``A = 1/N sum_n a_n a_n^T`` give ``kron(B, A) = sum_n (J^T H J) kron (a_n a_n^T)``, the block.
    """
    sizes = [3, 4, 2, 3][: depth + 1]
    layers = [nn.Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False)]
    kind = 1 if reduction == "mean" else 2
    found, blocks = factors(nn.Sequential(*layers), torch.randn(N, 3), kind)
    for name, matrices in found.items():
        close(matrices[0] if len(matrices) == 1 else torch.kron(*matrices), blocks[name])


@pytest.mark.parametrize("kind", [0, 1, 3])
def test_kfac_approaches_kflr(kind: int) -> None:
    model, X = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(N, 3)
    exact, _ = factors(model, X, kind)
    errors = []
    for samples in (40, 4000):
        torch.manual_seed(0)
        drawn = factors(model, X, kind, lambda s=samples: KFAC(mc_samples=s))[0]
        torch.manual_seed(0)
        pairs = [(d, e) for name in exact for d, e in zip(drawn[name], exact[name], strict=True)]
        errors.append(max(float((d - e).norm() / e.norm()) for d, e in pairs))
    assert errors[1] < 0.05 and errors[1] < 0.5 * errors[0]
    for name, matrices in exact.items():  # inputs are no draws
        close(drawn[name][-1], matrices[-1]) if len(matrices) == 2 else None


def test_columns_layout_swaps_the_factors() -> None:
    """``x @ w`` with ``w [in, out]`` gives ``[A, B]`` of the linear layer with weight ``w^T``."""
    layer, X = nn.Linear(3, 2), torch.randn(N, 3)
    weight = nn.Parameter(layer.weight.detach().T.clone())
    other = Apply(lambda m, a: torch.addmm(m.b, a, m.w), w=weight, b=nn.Parameter(layer.bias.detach()))
    torch.manual_seed(1)
    B, A = factors(layer, X)[0]["weight"]
    torch.manual_seed(1)
    first, second = factors(other, X)[0]["w"]
    close(first, A)
    close(second, B)


# --------------------------------------------------------------------------------------
# Weight sharing, batch-averaged recursion, eigenvalue correction, empirical Fisher


def test_expand_is_exact_for_deep_linear_networks() -> None:
    """Square loss at every position, no nonlinearity: positions are as good as samples."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Flatten())
    found, blocks = factors(model, torch.randn(N, 5, 3), 1, lambda: KFLR(kfac_approx="expand"))
    for name in ("0.weight", "1.weight"):
        close(torch.kron(*found[name]), blocks[name])
    assert found["0.weight"][1].isfinite().all()


class Average(nn.Module):
    """The mean over positions."""

    def forward(self, a: Tensor) -> Tensor:
        return a.mean(1)


def test_reduce_is_exact_for_deep_linear_networks() -> None:
    """Square loss of averaged positions, no nonlinearity."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), Average())
    found, blocks = factors(model, torch.randn(N, 5, 3), 1, lambda: KFLR(kfac_approx="reduce"))
    for name in ("0.weight", "1.weight"):
        close(torch.kron(*found[name]), blocks[name])


@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
def test_embedding_is_a_linear_layer_of_one_hot_vectors(approx) -> None:
    index = torch.randint(5, (N, 3))
    table, head = nn.Embedding(5, 4), nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    linear = nn.Linear(5, 4, bias=False)
    linear.weight.data = table.weight.data.T.clone()
    y, found = torch.randint(2, (N,)), []
    for layer, X in ((table, index), (linear, F.one_hot(index, 5).double())):
        model = extend(nn.Sequential(layer, *copy.deepcopy(head)).double())
        with backpack(KFLR(kfac_approx=approx)):
            extend(nn.CrossEntropyLoss())(model(X), y).backward()
        found.append(layer.weight.kflr)
    (A, B), (b, a) = found
    close(A, a)
    close(B, b)


def test_kfac_approx_is_checked() -> None:
    with pytest.raises(ValueError, match="kfac_approx"):
        KFAC(kfac_approx="expanded")


CHAINS = [
    Case("mlp", lambda: seq(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 3), nn.ReLU()), x(N, 3)),
    Case("conv", lambda: flat(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.MaxPool2d(2)), x(N, 1, 4, 3)),
    Case("sequence", lambda: flat(nn.Linear(3, 2), nn.Softmax(2), nn.Linear(2, 2)), x(N, 2, 3)),
    Case("norm", lambda: seq(nn.Linear(3, 4), norm(nn.LayerNorm(4)), nn.Linear(4, 2)), x(N, 3)),
]


@pytest.mark.parametrize("kind", range(len(LOSSES)))
@pytest.mark.parametrize("case", CHAINS, ids=lambda c: c.name)
def test_kfra_by_definition(case: Case, kind: int) -> None:
    """The recursion from layer to layer with Jacobians of single samples."""
    torch.manual_seed(0)
    model, X = case.model().double(), case.inputs().double()
    lossfunc, outputs = LOSSES[kind][0], [X]
    for layer in model:
        outputs.append(layer(outputs[-1]).detach())
    y = LOSSES[kind][1](outputs[-1])
    jacobian = torch.autograd.functional.jacobian
    hessian = torch.autograd.functional.hessian(lambda f: lossfunc(f, y), outputs[-1])
    size = outputs[-1][0].numel()
    averaged = torch.einsum("ncnd->cd", hessian.reshape(N, size, N, size))
    expected: dict[str, Tensor] = {}

    def pulled(function: Callable[[Tensor], Tensor], at: Tensor, matrix: Tensor) -> Tensor:
        J = jacobian(function, at).reshape(len(matrix), -1)
        return J.T @ matrix @ J / N

    for index in reversed(range(len(model))):
        layer, a = model[index], outputs[index].unsqueeze(1)
        if getattr(layer, "bias", None) is not None:
            for one in a:
                of = partial(with_bias, layer, one)
                more = pulled(of, layer.bias.detach(), averaged)
                expected[f"{index}.bias"] = expected.get(f"{index}.bias", 0) + more
        averaged = sum(pulled(layer, one, averaged) for one in a)
    extend(model)
    with backpack(KFRA(), KFLR()):
        extend(copy.deepcopy(lossfunc))(model(X), y).backward()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            close(p.kfra[1], p.kflr[1])
            close(p.kfra[0], expected[name.replace("weight", "bias")])
        elif "bias" in name:
            close(p.kfra[0], expected[name])


def test_kfra_of_a_loss_without_a_rule() -> None:
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double())
    X, y, known = torch.randn(N, 3).double(), torch.randint(3, (N,)), extend(nn.CrossEntropyLoss())
    found = []
    for lossfunc in (known, F.cross_entropy):
        with backpack(KFRA()):
            lossfunc(model(X), y).backward()
        found.append([p.kfra for p in model.parameters()])
    torch.testing.assert_close(*found)


def with_bias(layer: nn.Module, a: Tensor, bias: Tensor) -> Tensor:
    return torch.func.functional_call(layer, {"bias": bias}, (a,))


ORDER = [0, 2, 1, *range(3, N)]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Apply(lambda m, a: m.f(a) + m.g(a), f=nn.Linear(3, 2), g=nn.Linear(3, 2)), "joins branches"),
        (
            Apply(lambda m, a: m.g(m.f(a).T.sin().T), f=nn.Linear(3, 2), g=nn.Linear(2, 2)),
            "not in front",
        ),
        (Apply(lambda m, a: m.g(m.f(a).T.sin().T), f=nn.Linear(3, 8), g=nn.Linear(8, 2)), "moves the"),
        (
            Apply(
                lambda m, a: m.g(m.f(a)[[0, 2, 1, *range(3, N)]]), f=nn.Linear(3, 4), g=nn.Linear(4, 2)
            ),
            "not in the order of samples",
        ),
    ],
    ids=["branches", "transposed", "transposed-square", "another-order"],
)
def test_kfra_is_for_chains(model: nn.Module, why: str) -> None:
    model, lossfunc = extend(model), extend(nn.CrossEntropyLoss())
    loss = lossfunc(model(torch.randn(N, 3)), torch.randint(2, (N,)))
    with backpack(KFRA()), pytest.raises(NotImplementedError, match=why):
        loss.backward()
    assert not any(hasattr(p, "kfra") for p in model.parameters())


@pytest.mark.parametrize("last", ["view", "layer", "picked"])
@pytest.mark.parametrize("steps", [N - 1, N, 2 * N])
def test_kfra_where_other_rows_are_in_front(steps: int, last: str) -> None:
    """As many time steps as samples look like samples."""
    model = extend(seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), batch_dim=1)
    output = model(torch.randn(steps, N, 3))
    order = torch.arange(steps * N).flip(0)
    f = {"view": output.reshape(-1, 2), "layer": output, "picked": output.reshape(-1, 2)[order]}[last]
    with backpack(KFRA()), pytest.raises(NotImplementedError, match="not in front"):
        nn.functional.mse_loss(f, torch.randn(f.shape)).backward()
    assert not any(hasattr(p, "kfra") for p in model.parameters())


def test_kfra_refuses_huge_matrices() -> None:
    model, lossfunc = extend(nn.Sequential(nn.Linear(1, 10**4), nn.ReLU())), extend(nn.MSELoss())
    loss = lossfunc(model(torch.randn(N, 1)), torch.randn(N, 10**4))
    with backpack(KFRA()), pytest.raises((ValueError, NotImplementedError), match="kfra"):
        loss.backward()


EIGEN = [
    Case("mlp", lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), x(N, 3)),
    Case("conv", lambda: flat(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh()), x(N, 2, 3, 2)),
    Case("sequence", lambda: seq(nn.Linear(3, 2), nn.Tanh(), nn.Flatten()), x(N, 2, 3)),
    Case("matmul", lambda: Apply(lambda m, a: (a @ m.w).tanh() @ m.v, w=P(3, 4), v=P(4, 2)), x(N, 3)),
    Case("twice", lambda: Apply(lambda m, a: m.f(m.f(a).tanh()), f=nn.Linear(3, 3)), x(N, 3)),
]  # fmt: skip


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("kind", range(len(LOSSES)))
@pytest.mark.parametrize("case", EIGEN, ids=lambda c: c.name)
def test_corrected_eigenvalues(case: Case, kind: int, chunk_size: int | None) -> None:
    """The diagonal of the block in the factors' eigenbasis."""
    model, X, lossfunc = case.model().double(), case.inputs().double(), LOSSES[kind][0]
    y = LOSSES[kind][1](model(X).detach())
    blocks = Oracle(model, lossfunc, X, y).ggn
    extend(model)
    with backpack(EKFLR(), KFLR(), chunk_size=chunk_size):
        extend(lossfunc)(model(X), y).backward()
    for name, p in model.named_parameters():
        bases, values = p.ekflr
        for basis, factor in zip(bases, p.kflr, strict=True):
            rotated = basis.T @ factor @ basis
            close(rotated, torch.diag(rotated.diagonal()))
        basis = bases[0] if len(bases) == 1 else torch.kron(*bases)
        block = blocks[name].detach()
        torch.testing.assert_close(
            values.flatten(), (basis.T @ block @ basis).diagonal(), rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spectrum_of_low_rank(seed: int, dtype: torch.dtype) -> None:
    """Second moments of dead features: single precision alone gives up on some."""
    torch.manual_seed(seed)
    features = torch.randn(64, 512) * torch.logspace(0, -6, 512)
    features = features.relu() * (torch.rand(512) < 0.5)
    matrix = (features.T @ features / 64).to(dtype)
    values, vectors = spectrum(matrix)
    again = (vectors.double() * values.double()) @ vectors.double().T
    bound = 30 * torch.finfo(dtype).eps * matrix.double().norm()
    assert (again - matrix.double()).norm() < bound
    assert values.dtype == vectors.dtype == dtype


def test_ekfac_shares_its_draws() -> None:
    """With one sample and one draw the GGN estimate has rank one, and so have the eigenvalues."""
    model, X = extend(nn.Linear(3, 4).double()), torch.randn(1, 3).double()
    torch.manual_seed(3)
    with backpack(EKFAC(mc_samples=1)):
        extend(nn.CrossEntropyLoss())(model(X), torch.tensor([1])).backward()
    values = model.weight.ekfac.eigenvalues.flatten().sort().values
    assert values[-1] > 0
    close(values[:-1], torch.zeros_like(values[:-1]))


@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
def test_empirical_fisher(approx) -> None:
    """KFLR with the gradients for columns; not disturbed by quantities that write them out."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
    X, y = torch.randn(N, 2, 3).double(), torch.randint(2, (N,))
    extend(model)
    with disable():
        outputs = model[0](X)
        (g,) = torch.autograd.grad(nn.CrossEntropyLoss()(model[1:](outputs), y), outputs)
    with backpack(EmpiricalKFAC(kfac_approx=approx), BatchGrad(), SumGradSquared()):
        extend(nn.CrossEntropyLoss())(model(X), y).backward()
    rows = g.flatten(0, 1) if approx == "expand" else g.sum(1)
    a = X.mean(1) if approx == "reduce" else X.flatten(0, 1)
    B, A = model[0].weight.kfac_empirical
    close(B, rows.T @ rows)
    close(A, a.T @ a / (2 * N if approx == "expand" else N))
    bias = model[3].bias
    close(bias.kfac_empirical[0], bias.grad_batch.T @ bias.grad_batch)
    close(bias.kfac_empirical[0].diagonal(), bias.sum_grad_squared)


@pytest.mark.parametrize(
    "turned", [lambda w: w.T, lambda w: w.t(), lambda w: w.mT, lambda w: w.permute(1, 0)]
)
def test_transposed_weight_has_two_factors(turned: Callable[[Tensor], Tensor]) -> None:
    model = extend(Apply(lambda m, a: a @ turned(m.w), w=P(4, 6)))
    with backpack(KFLR()):
        extend(nn.CrossEntropyLoss())(model(torch.randn(3, 6)), torch.tensor([0, 3, 1])).backward()
    assert [len(factor) for factor in model.w.kflr] == [4, 6]


def test_corrected_eigenvalues_of_two_losses() -> None:
    """The diagonal of the block of both losses, in the eigenbasis of the factors of both."""
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 3)).double())
    X, y = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])

    def loss(output: Tensor, target: Tensor) -> Tensor:
        other = extend(nn.MSELoss())(output, torch.ones(5, 3).double())
        return extend(nn.CrossEntropyLoss())(output, target) + other

    with backpack(EKFLR()):
        loss(model(X), y).backward()
    blocks = Oracle(model, loss, X, y).ggn
    for name, p in model.named_parameters():
        vectors, values = p.ekflr
        basis = vectors[0] if len(vectors) == 1 else torch.kron(*vectors)
        torch.testing.assert_close(values.flatten(), (basis.T @ blocks[name] @ basis).diagonal())


@pytest.mark.parametrize("quantity", [EKFLR, EKFAC])
def test_corrected_eigenvalues_of_losses_one_after_the_other_are_refused(quantity) -> None:
    """Roots that were not seen: one loss is reached after the columns of the other were carried."""
    model = extend(nn.Sequential(nn.Linear(4, 3)))
    output, y = model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])
    loss = extend(nn.CrossEntropyLoss())(output, y) + extend(nn.MSELoss())(output, torch.ones(5, 3))
    with backpack(quantity()), pytest.raises((NotImplementedError, RuntimeError)):
        torch.autograd.backward(loss)
    assert not any(hasattr(p, quantity().savefield) for p in model.parameters())


# --------------------------------------------------------------------------------------
# Padding, rows that were picked, and samples one by one

APPROXIMATIONS = [None, "expand", "reduce"]


def _kflr(layer: nn.Module, model: nn.Module, X: Tensor, y: Tensor, approx) -> list[Tensor]:
    with backpack(KFLR(kfac_approx=approx)):
        extend(nn.CrossEntropyLoss())(extend(model.double())(X), y).backward()
    return layer.weight.kflr


@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_padding_of_an_embedding_is_a_vector_of_zeros(approx) -> None:
    """Where the table is not read the layer's input is zero; its output counts as any other."""
    index, y = torch.randint(5, (N, 3)), torch.randint(2, (N,))
    index[0] = 2
    table, head = (
        nn.Embedding(5, 4, padding_idx=2),
        nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)),
    )
    linear = nn.Linear(5, 4, bias=False)
    linear.weight.data = table.weight.data.T.clone()
    vectors = F.one_hot(index, 5).double() * (index != 2).unsqueeze(-1)
    A, B = _kflr(table, nn.Sequential(table, *copy.deepcopy(head)), index, y, approx)
    b, a = _kflr(linear, nn.Sequential(linear, *copy.deepcopy(head)), vectors, y, approx)
    close(A, a)
    close(B, b)


ROWS = torch.tensor([0, 1, 1, 3, 1, 3])


def _picks(m: nn.Module, a: Tensor) -> Tensor:
    """Some rows several times, some never; summed up for the sample they belong to."""
    found = m.l(a[ROWS]).sin()
    return m.o(torch.zeros(N, found.shape[1], dtype=found.dtype).index_add(0, ROWS, found))


@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_samples_with_different_numbers_of_positions(kind: str, approx) -> None:
    """By the definitions of arXiv:2311.00636, each sample with the positions it has."""
    layer = nn.Linear(5, 3, bias=False) if kind == "linear" else nn.Embedding(5, 3)
    model = Apply(_picks, l=layer, o=nn.Linear(3, 2)).double()
    index, y = torch.randint(1, 5, (N,)), torch.randint(2, (N,))
    vectors = F.one_hot(index, 5).double()
    factors = _kflr(layer, model, vectors if kind == "linear" else index, y, approx)
    B, A = factors if kind == "linear" else reversed(factors)
    # Columns at each row, from the loss Hessians.
    rows = layer(vectors if kind == "linear" else index).detach()[ROWS].requires_grad_()

    def head(rows: Tensor) -> Tensor:
        return model.o(torch.zeros(N, 3, dtype=rows.dtype).index_add(0, ROWS, rows.sin()))

    def loss(f: Tensor) -> Tensor:
        return F.cross_entropy(f, y)

    H: Tensor = torch.autograd.functional.hessian(loss, head(rows).detach())
    J: Tensor = torch.autograd.functional.jacobian(head, rows)
    a, count = vectors[ROWS], torch.bincount(ROWS, minlength=N)
    own = F.one_hot(ROWS, N).double()
    if approx == "expand":
        expected_a = a.T @ a / len(ROWS)
        expected_b = torch.einsum("ncri,ncmd,mdrj->ij", J, H, J)
    else:
        J = torch.einsum("ncri,rm->ncmi", J, own)
        expected_b = torch.einsum("ncri,ncmd,mdrj->ij", J, H, J)
        means = own.T @ a / count.clamp(min=1).unsqueeze(1)
        expected_a = (means.T @ means if approx == "reduce" else a.T @ a) / N
    close(A, expected_a)
    close(B, expected_b)


@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize(
    "name", ["linear", "linear-2d", "conv", "conv-1", "embedding", "gru", "matmul"]
)
def test_samples_one_by_one_are_a_batch(name: str, approx) -> None:
    """A loop over the samples gives what the batch gives, factors of the same shapes included."""
    layers: dict[str, tuple[nn.Module, Tensor, Callable]] = {
        "linear": (nn.Linear(3, 2), torch.randn(N, 3), lambda m, a: m.l(a).tanh()),
        "linear-2d": (nn.Linear(3, 2), torch.randn(N, 4, 3), lambda m, a: m.l(a).tanh().sum(-2)),
        "conv": (nn.Conv1d(2, 2, 2), torch.randn(N, 2, 4), lambda m, a: m.l(a).tanh().sum(-1)),
        "conv-1": (nn.Conv1d(2, 2, 2), torch.randn(N, 2, 4), lambda m, a: m.l(a).tanh().sum(-1)),
        "embedding": (nn.Embedding(5, 2), torch.randint(5, (N, 3)), lambda m, a: m.l(a).tanh().sum(-2)),
        "gru": (nn.GRU(2, 2, batch_first=True), torch.randn(N, 3, 2), lambda m, a: m.l(a)[0].sum(-2)),
        "matmul": (
            nn.Linear(3, 2),
            torch.randn(N, 4, 3),
            lambda m, a: (a @ m.l.weight.T).tanh().sum(-2),
        ),
    }
    layer, X, f = layers[name]

    def loop(m: nn.Module, a: Tensor) -> Tensor:
        if name == "conv-1":
            return torch.cat([f(m, a[n : n + 1]) for n in range(N)])
        return torch.stack([f(m, each) for each in a])

    y, o = torch.randint(3, (N,)), nn.Linear(2, 3)
    X = X.double() if X.is_floating_point() else X
    results = []
    for each in (f, loop):
        model = extend(Apply(lambda m, a, each=each: m.o(each(m, a)), l=layer, o=o)).double()
        with backpack(KFLR(kfac_approx=approx), BatchGrad(), EKFLR()):
            extend(nn.CrossEntropyLoss())(model(X), y).backward()
        used = [p for p in model.parameters() if hasattr(p, "kflr")]
        results.append([t for p in used for t in (*p.kflr, p.grad_batch, p.ekflr[1])])
        for p in used:
            del p.kflr, p.grad_batch, p.ekflr
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        close(one, other)
