"""Kronecker factors as objects: every function of theirs against dense matrices in float64."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.kronecker.block import KroneckerBlock
from backpack.kronecker.eigen import KroneckerEigen
from backpack.kronecker.factored import KroneckerFactored
from backpack.kronecker.matrices import pi_damping
from tests.cases import Apply, P

N = 6


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(a: Tensor, b: Tensor, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def head(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def right() -> nn.Module:
    return Apply(lambda m, a: torch.tanh(a @ m.w) @ m.v, w=P(4, 5), v=P(5, 3))


# A model whose first parameter has the layout, its input, and the order of the entries that the
# Kronecker product of its factors numbers.
Order = Callable[[nn.Parameter], Tensor]


def stored(p: nn.Parameter) -> Tensor:
    return torch.arange(p.numel())


def transposed(groups: int) -> Order:
    def order(p: nn.Parameter) -> Tensor:
        inputs, outputs = p.shape[0] // groups, p.shape[1]
        split = stored(p).reshape(groups, inputs, outputs, -1)
        return split.transpose(1, 2).flatten()

    return order


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str, Order]] = {
    "linear": (lambda: head(nn.Linear(4, 5)), lambda: randn(N, 4), "out_in", stored),
    "sequence": (lambda: head(nn.Linear(4, 5)), lambda: randn(N, 3, 4), "out_in", stored),
    "right": (right, lambda: randn(N, 4), "in_out", stored),
    "convolution": (lambda: head(nn.Conv2d(2, 3, 2)), lambda: randn(N, 2, 3, 3), "out_in", stored),
    "groups": (lambda: head(nn.Conv2d(4, 2, 2, groups=2)), lambda: randn(N, 4, 3, 3), "out_in", stored),
    "transposed": (
        lambda: head(nn.ConvTranspose2d(2, 3, 2)),
        lambda: randn(N, 2, 2, 2),
        "convt",
        transposed(1),
    ),
    "transposed groups": (
        lambda: head(nn.ConvTranspose1d(4, 6, 2, groups=2)),
        lambda: randn(N, 4, 3),
        "convt",
        transposed(2),
    ),
    "table": (
        lambda: head(nn.Embedding(5, 3)),
        lambda: torch.randint(5, (N, 2)),
        "in_out",
        stored,
    ),
    "norm": (lambda: head(nn.LayerNorm(4)), lambda: randn(N, 4), "out_in", stored),
    "derived": (
        lambda: head(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))),
        lambda: randn(N, 3),
        "out_in",
        stored,
    ),
}
QUANTITIES = {
    "KFLR": E.KFLR,
    "KFAC": lambda: E.KFAC(mc_samples=3),
    "empirical": E.EmpiricalKFAC,
    "EKFLR": E.EKFLR,
    "EKFAC": lambda: E.EKFAC(mc_samples=3),
}


def computed(layout: str, quantity: str) -> tuple[Any, nn.Parameter, Tensor]:
    """A quantity of the first parameter, the parameter, and the block by dense matrices."""
    make, data, _, order = LAYOUTS[layout]
    model, X, ext = make().double(), data(), QUANTITIES[quantity]()
    model(X)
    with backpack(ext):
        loss = extend(nn.CrossEntropyLoss())(extend(model)(X), torch.arange(N) % 3)
        loss.backward()
    p = next(iter(model.parameters()))
    value = getattr(p, ext.savefield)
    return value, p, written_out(value, order(p))


def written_out(value: Any, order: Tensor) -> Tensor:
    if isinstance(value, tuple):
        vectors, eigenvalues = value
        Q = torch.kron(*vectors) if len(vectors) == 2 else vectors[0]
        matrix = Q @ torch.diag(eigenvalues.flatten()) @ Q.T
    else:
        matrix = torch.kron(*value) if len(value) == 2 else value[0]
    dense = torch.zeros_like(matrix)
    dense[order.unsqueeze(1), order] = matrix
    return dense


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_dense_matrices(layout: str, quantity: str) -> None:
    block, p, dense = computed(layout, quantity)
    assert isinstance(block, KroneckerBlock)
    assert (block.shape, block.layout) == (p.shape, LAYOUTS[layout][2])
    size, eye = p.numel(), torch.eye(p.numel(), dtype=torch.float64)
    vectors = torch.randn(2, 3, *p.shape, dtype=torch.float64)
    columns = vectors.reshape(6, size).T

    def product(matrix: Tensor) -> Tensor:
        return (matrix @ columns).T.reshape(vectors.shape)

    close(block.to_dense(), dense)
    close(block.apply(vectors), product(dense))
    close(block.apply(vectors[0]), product(dense)[0])
    close(block.apply(vectors[0, 0]), product(dense)[0, 0])
    close(block.trace(), dense.trace())
    close(block.diagonal(), dense.diagonal().reshape(p.shape))
    close(block.sqrt().to_dense() @ block.sqrt().to_dense(), dense)
    close(block.sqrt().to_dense(), block.sqrt().to_dense().T)
    damped = dense + 0.3 * eye
    close(block.solve(vectors, 0.3), product(torch.linalg.inv(damped)))
    close(block.inverse(0.3).to_dense(), torch.linalg.inv(damped))
    close(block.logdet(0.3), torch.logdet(damped))
    close(block.scale(2.5).to_dense(), 2.5 * dense)
    eigen = block.eig()
    close(eigen.to_dense(), dense)
    close(eigen.rotate(vectors).flatten(2).norm(dim=2), vectors.flatten(2).norm(dim=2))
    close(eigen.eigenvalues.flatten().sort().values, torch.linalg.eigvalsh(dense))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pseudo_inverse(layout: str) -> None:
    """Without damping, of factors of which some have no full rank."""
    block, p, dense = computed(layout, "KFLR")
    expected = torch.linalg.pinv(dense, hermitian=True, rtol=1e-11)
    close(block.inverse().to_dense(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert isinstance(block.inverse(), KroneckerFactored)
    close(block.eig().inverse().to_dense(), expected, 1e-6, 1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damping_of_factors(layout: str) -> None:
    block, p, _ = computed(layout, "KFLR")
    shifts = pi_damping(block, 0.2)
    shifted = [f + s * torch.eye(len(f), dtype=f.dtype) for f, s in zip(block, shifts, strict=True)]
    damped = written_out(shifted, LAYOUTS[layout][3](p))
    close(block.inverse(0.2, pi=True).to_dense(), torch.linalg.inv(damped))
    vector = torch.randn(p.shape, dtype=torch.float64)
    expected = torch.linalg.solve(damped, vector.flatten()).reshape(p.shape)
    close(block.solve(vector, 0.2, pi=True), expected)


def covariance(draws: Tensor) -> Tensor:
    flat = draws.flatten(1)
    return flat.T @ flat / len(flat)


@pytest.mark.parametrize("quantity", ["KFLR", "EKFLR"])
@pytest.mark.parametrize("layout", ["linear", "transposed groups", "table", "norm"])
def test_samples(layout: str, quantity: str) -> None:
    block, p, dense = computed(layout, quantity)
    dense, block = dense / dense.trace(), block.scale(1 / float(dense.trace()))
    eye = torch.eye(len(dense), dtype=dense.dtype)
    for matrix, draw in (
        (dense, block.sample),
        (torch.linalg.inv(dense + 0.5 * eye), lambda n=None, **k: block.sample_inverse(n, 0.5, **k)),
    ):
        draws = draw(20000, generator=torch.Generator().manual_seed(0))
        assert draws.shape == (20000, *p.shape)
        assert float((covariance(draws) - matrix).abs().max()) < 0.05 * float(matrix.abs().max())
        assert draw(generator=torch.Generator().manual_seed(0)).shape == p.shape
        again = draw(20000, generator=torch.Generator().manual_seed(0))
        assert torch.equal(draws, again)


def test_samples_of_a_singular_matrix() -> None:
    block = KroneckerFactored([torch.diag(torch.tensor([1.0, 0.0]))], (2,))
    with pytest.raises(ValueError, match="singular .*use damping"):
        block.sample_inverse()
    assert block.sample(5)[:, 1].abs().max() == 0
    assert float(block.logdet()) == -float("inf")
    assert block.sample_inverse(3, 0.1).shape == (3, 2)
    tiny = KroneckerFactored([torch.diag(torch.tensor([1e8, -1e-3]))], (2,))
    close(tiny.solve(torch.ones(2), 0.5), torch.tensor([1e-8, 2.0]), 1e-5)


def test_matrices_that_are_not_positive() -> None:
    block = KroneckerFactored([torch.diag(torch.tensor([1.0, -0.5]))], (2,))
    for function in (block.sqrt, block.inverse, block.logdet, block.sample_inverse, block.sample):
        with pytest.raises(ValueError, match="not positive: its smallest eigenvalue is -5.0e-01"):
            function()
    with pytest.raises(ValueError, match="use more damping"):
        block.solve(torch.ones(2), 0.4)
    close(block.solve(torch.ones(2), 1.0), torch.tensor([0.5, 2.0]))


# --------------------------------------------------------------------------------------
# Still the lists of the original


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists(layout: str) -> None:
    block, _, _ = computed(layout, "KFAC")
    assert isinstance(block, list)
    assert len(block) == (1 if layout in ("norm", "derived") else 2)
    first, *rest = block
    assert first is block[0] and len(rest) == len(block) - 1
    assert [f.shape for f in block] == [block[i].shape for i in range(len(block))]
    assert type(block[:1]) is list and type(block + block) is list
    assert not any(f.requires_grad for f in block)
    block[0] = 2 * first  # programs write to it
    close(block.to_dense(), 2 * KroneckerFactored([first, *rest], block.shape, block.layout).to_dense())


def test_pairs() -> None:
    block, _, _ = computed("linear", "EKFLR")
    vectors, values = block
    assert vectors is block.eigenvectors and values is block.eigenvalues
    assert isinstance(block, tuple) and len(block) == 2
    assert block._fields == ("eigenvectors", "eigenvalues")


def test_made_of_their_entries_again() -> None:
    """As programs do that map functions over lists and tuples, whatever their class."""
    block, _, dense = computed("linear", "KFLR")
    again = type(block)(2 * factor for factor in block)
    close(again.to_dense(), 4 * dense)
    eigen = computed("convolution", "EKFLR")[0]
    close(type(eigen)(*eigen).eigenvalues, eigen.eigenvalues)
    assert eigen._make(eigen).shape == eigen.eigenvalues.shape
    assert eigen._replace(eigenvalues=2 * eigen.eigenvalues).shape == eigen.shape
    assert computed("transposed", "EKFLR")[0]._replace().layout == "convt"


def test_differentiable() -> None:
    model, lossfunc = extend(nn.Linear(2, 2).double()), extend(nn.MSELoss())
    X = randn(3, 2).requires_grad_()
    with backpack(E.KFLR(), E.EKFLR()):
        lossfunc(model(X), randn(3, 2)).backward(create_graph=True)
    assert model.weight.kflr[1].requires_grad
    assert not model.weight.kflr.detach()[1].requires_grad
    (gradient,) = torch.autograd.grad(model.weight.kflr.trace(), X)
    close(gradient, model.weight.kflr[0].trace() * 2 * X / 3)


# --------------------------------------------------------------------------------------
# Adding, saving


@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_add(layout: str, approx: Any) -> None:
    """Of a sum loss: the factors of parts of a batch, of unequal sizes, make those of the batch."""
    make, data, _, _ = LAYOUTS[layout]
    model, X, y = make().double(), data(), torch.arange(N) % 3
    model(X)
    extend(model)
    p, lossfunc = next(iter(model.parameters())), extend(nn.CrossEntropyLoss(reduction="sum"))

    def factors(rows: slice) -> KroneckerFactored:
        with backpack(E.KFLR(kfac_approx=approx)):
            lossfunc(model(X[rows]), y[rows]).backward()
        return p.kflr

    whole = factors(slice(None))
    parts = [factors(slice(0, 3)), factors(slice(3, 5)), factors(slice(5, 6))]
    added = parts[0].add(parts[1]).add(parts[2])
    for a, b in zip(added, whole, strict=True):
        close(a, b)
    assert added.averaged_over == whole.averaged_over


def test_add_of_eigenvalues() -> None:
    block, p, dense = computed("linear", "EKFLR")
    close(block.add(block.scale(2.0)).to_dense(), 3 * dense)
    other = computed("linear", "EKFLR")[0]
    with pytest.raises(ValueError, match="different bases do not add up"):
        block.add(other)


def test_add_of_other_parameters() -> None:
    block, transposed = computed("linear", "KFLR")[0], computed("transposed", "KFLR")[0]
    for other in (transposed, block.eig()):
        with pytest.raises(ValueError, match="not of the same parameter"):
            block.add(other)


@pytest.mark.parametrize("quantity", ["KFLR", "EKFLR"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_and_loaded(layout: str, quantity: str) -> None:
    block, _, _ = computed(layout, quantity)
    file = io.BytesIO()
    torch.save({"whole": block, "state": block.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    copies = [
        loaded["whole"],
        type(block).from_state_dict(loaded["state"]),
        pickle.loads(pickle.dumps(block)),
        copy.deepcopy(block),
    ]
    for each in copies:
        assert type(each) is type(block)
        assert (each.shape, each.layout) == (block.shape, block.layout)
        assert torch.equal(each.to_dense(), block.to_dense())
        if isinstance(block, KroneckerFactored):
            assert each.averaged_over == block.averaged_over > 1
    assert block.to(torch.float32).to_dense().dtype == torch.float32
    assert type(block.to("cpu")) is type(block)


def test_errors() -> None:
    block = KroneckerFactored([torch.eye(2), torch.eye(3)], (2, 3))
    with pytest.raises(ValueError, match=r"parameter's shape \(2, 3\), or several.*\(3, 2\)"):
        block.apply(torch.ones(3, 2))
    with pytest.raises(ValueError, match="do not fit a parameter of shape"):
        KroneckerFactored([torch.eye(2)], (3,))
    with pytest.raises(ValueError, match="one or two square matrices"):
        KroneckerFactored([torch.ones(2, 3)], (2, 3))
    with pytest.raises(ValueError, match="layout must be one of"):
        KroneckerFactored([torch.eye(2)], (2,), "diagonal")
    with pytest.raises(ValueError, match="do not fit"):
        KroneckerEigen([torch.eye(2)], torch.ones(2), (3,))
    assert KroneckerFactored([torch.zeros(0, 0)], (0,)).logdet() == 0
