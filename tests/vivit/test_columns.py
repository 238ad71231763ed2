"""Other columns, several losses, subsets of samples, several passes, precision; what is refused."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.own import ExactRoot
from backpack.vivit import LowRank
from tests.vivit.dense import Brute, flat, near

N, C = 6, 3
X, Y = torch.rand(N, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])


def network() -> nn.Module:
    torch.manual_seed(1)
    convolution = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*convolution, nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, C)).double()


def brute(lossfunc: nn.Module | None = None, X: Tensor = X, y: Tensor = Y) -> Brute:
    return Brute(network(), lossfunc or nn.CrossEntropyLoss(), X, y)


def root(model: nn.Module, ext: Any, loss: Any) -> Tensor:
    """Rows of a square root of the GGN, ``[C, N, D]``."""
    with backpack(ext):
        loss().backward()
    parameters = list(model.parameters())
    return flat([getattr(p, ext.savefield) for p in parameters], 2)


@pytest.mark.parametrize("draws", [1, 3])
def test_sampled(draws: int) -> None:
    """The same draws as in a square root that is written out."""
    case = brute()
    generator = torch.Generator().manual_seed(3)
    V = root(case.model, E.SqrtGGNMC(draws, generator=generator), case.loss)
    with LowRank("mc", mc_samples=draws, generator=generator.manual_seed(3)) as curvature:
        case.loss().backward()
    near(curvature.gram(), V.flatten(0, 1) @ V.flatten(0, 1).T)
    pairs = curvature.eigh(4)
    vectors = flat(pairs.vectors, 1)
    near(curvature.derivatives(pairs).lambdas, N * (V @ vectors.T).square().sum(0))
    G = torch.einsum("vnp,vnq->pq", V, V)
    eye = torch.eye(len(G), dtype=torch.float64)
    g = case.gradients.sum(0)
    near(flat(curvature.solve(1e-2)), torch.linalg.solve(G + 1e-2 * eye, g))


def test_sampled_estimate_the_exact() -> None:
    case = brute()
    with LowRank("mc", mc_samples=4000, generator=torch.Generator().manual_seed(0)) as curvature:
        case.loss().backward()
    exact = case.ggns.sum(0)
    assert abs(curvature.trace() - exact.trace()) < 0.05 * exact.trace()


def test_jacobian() -> None:
    case = brute()
    with LowRank("jacobian") as curvature:
        case.loss().backward()
    J = case.jacobian.transpose(0, 1).flatten(0, 1)
    near(curvature.gram(), J @ J.T)


def test_leading() -> None:
    """Of all ranks it is exact; of rank one it has the leading eigenvalue of each sample's block."""
    case = brute()
    with LowRank("top", top=C) as curvature:
        case.loss().backward()
    near(curvature.eigvalsh()[:8], torch.linalg.eigvalsh(case.ggns.sum(0)).flip(0)[:8])
    p = nn.functional.softmax(case.model(X), 1).detach()
    hessians = (torch.diag_embed(p) - p.unsqueeze(1) * p.unsqueeze(2)) / N
    values, vectors = torch.linalg.eigh(hessians)
    rows = torch.einsum("nc,ncp->np", vectors[:, :, -1], case.jacobian) * values[:, -1:].sqrt()
    with LowRank("top") as curvature:
        case.loss().backward()
    near(curvature.gram().abs(), (rows @ rows.T).abs())


def test_source_of_ones_own() -> None:
    case = brute()
    with LowRank(ExactRoot()) as curvature, torch.enable_grad():
        case.loss().backward()
    near(curvature.trace(), case.ggns.sum(0).trace())


def test_several_losses() -> None:
    """Losses of one output, and of parts of a model; columns of one do not reach all parameters."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.body(x).tanh()
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    model, x, y, z = (
        Heads().double(),
        torch.rand(5, 4).double(),
        torch.tensor([0, 1, 2, 1, 0]),
        torch.rand(5, 2).double(),
    )
    expected, gradients = [], []
    for head, lossfunc, target in (("a", nn.CrossEntropyLoss(), y), ("b", nn.MSELoss(), z)):
        single = nn.Sequential(model.body, nn.Tanh(), getattr(model, head))
        case = Brute(single, lossfunc, x, target)
        full = dict(model.named_parameters())
        at, first = {}, 0
        for p in full.values():
            at[p] = torch.arange(first, first + p.numel())
            first += p.numel()
        places = torch.cat([at[p] for p in single.parameters()])
        G, g = torch.zeros(5, first, first).double(), torch.zeros(5, first).double()
        G[:, places.unsqueeze(1), places] = case.ggns
        g[:, places] = case.gradients
        expected.append(G)
        gradients.append(g)
    G, g = sum(expected), sum(gradients)
    extend(model)
    first, second = extend(nn.CrossEntropyLoss()), extend(nn.MSELoss())
    with LowRank() as curvature:
        f, h = model(x)
        (first(f, y) + second(h, z)).backward()
    assert curvature.parameters == list(model.parameters())
    near(curvature.eigvalsh()[:10], torch.linalg.eigvalsh(G.sum(0)).flip(0)[:10])
    pairs = curvature.eigh(6)
    vectors = flat(pairs.vectors, 1)
    near(vectors @ G.sum(0), vectors * pairs.values.unsqueeze(1))
    found = curvature.derivatives(pairs)
    near(found.gammas, 5 * g @ vectors.T)
    near(found.lambdas, 5 * torch.einsum("kp,npq,kq->nk", vectors, G, vectors))
    with LowRank() as torches:
        f, h = model(x)
        torch.autograd.backward(first(f, y) + second(h, z))
    near(torches.eigvalsh(), curvature.eigvalsh())


def test_subsets() -> None:
    """Curvature of some samples stands for that of all; gradients of others."""
    case = brute()
    some, others = [4, 0, 1], [5, -4]
    with LowRank(subsampling=some, subsampling_grad=others) as curvature:
        case.loss().backward()
    G = case.ggns[some].sum(0) * 2
    near(curvature.eigvalsh()[:6], torch.linalg.eigvalsh(G).flip(0)[:6])
    pairs = curvature.eigh(4)
    vectors = flat(pairs.vectors, 1)
    near(vectors @ G, vectors * pairs.values.unsqueeze(1))
    found = curvature.derivatives(pairs)
    near(found.gammas, N * case.gradients[[5, 2]] @ vectors.T)
    near(found.lambdas, N * torch.einsum("kp,npq,kq->nk", vectors, case.ggns[some], vectors))
    near(found.lambdas.mean(0), pairs.values)
    near(curvature.derivatives(pairs.vectors).lambdas, found.lambdas)
    g = case.gradients[[5, 2]].sum(0) * 3
    eye = torch.eye(len(G), dtype=torch.float64)
    solution = torch.linalg.solve(G + 1e-2 * eye, g)
    near(flat(curvature.solve(1e-2)), solution)
    step = curvature.newton(curvature.eigh(), 1e-2, bulk=1e-2)
    near(flat(step), -solution, 1e-5)


def test_several_passes() -> None:
    """Batches count together: as one batch whose loss is the sum of theirs."""
    case = brute(nn.CrossEntropyLoss(reduction="sum"))
    lossfunc = extend(nn.CrossEntropyLoss(reduction="sum"))
    with LowRank() as whole:
        case.loss().backward()
    parts = LowRank()
    for here in (slice(0, 2), slice(2, 3), slice(3, 6)):
        with parts:
            lossfunc(case.model(X[here]), Y[here]).backward()
    near(parts.eigvalsh(), whole.eigvalsh())
    a, b = parts.eigh(5), whole.eigh(5)
    for u, v in zip(a.vectors, b.vectors, strict=True):
        near(u.abs(), v.abs())
    near(parts.derivatives(a).gammas.abs(), whole.derivatives(b).gammas.abs())
    near(parts.derivatives(a).lambdas, whole.derivatives(b).lambdas)
    near(flat(parts.solve(0.1)), flat(whole.solve(0.1)))
    near(parts.influence(), whole.influence())


@pytest.mark.parametrize("gradient", [True, False])
def test_without_the_gradient(gradient: bool) -> None:
    case = brute()
    with LowRank(gradient=gradient) as curvature:
        case.loss().backward()
    assert all((p.grad is not None) == gradient for p in case.model.parameters())
    near(curvature.trace(), case.ggns.sum(0).trace())
    near(curvature.gradient_gram(), case.gradients @ case.gradients.T)
    centred = case.gradients - case.gradients.mean(0)
    near(curvature.gradient_gram(centred=True), centred @ centred.T)
    assert not any(name.startswith("_vivit") for p in case.model.parameters() for name in vars(p))


def test_other_quantities_beside() -> None:
    case = brute()
    with LowRank(extensions=[E.BatchL2Grad()]) as curvature:
        case.loss().backward()
    norms = sum(p.batch_l2 for p in case.model.parameters())
    near(curvature.gradient_gram().diagonal(), norms)


def test_test_set() -> None:
    """Influence on losses of other samples, and the variance of predictions at them."""
    case = brute(nn.CrossEntropyLoss(reduction="sum"))
    torch.manual_seed(5)
    x, y = torch.rand(4, 1, 6, 6).double(), torch.tensor([0, 2, 1, 1])
    other = brute(nn.CrossEntropyLoss(reduction="sum"), x, y)
    with LowRank() as train:
        case.loss().backward()
    with LowRank(None) as test:
        extend(nn.CrossEntropyLoss(reduction="sum"))(case.model(x), y).backward()
    with LowRank("jacobian", gradients=False) as outputs:
        case.model(x).sum().backward()
    delta = 0.3
    G = case.ggns.sum(0)
    inverse = torch.linalg.inv(G + delta * torch.eye(len(G), dtype=torch.float64))
    near(train.influence(test, damping=delta), other.gradients @ inverse @ case.gradients.T)
    near(
        train.influence([1, 3], [0, 2, 5], delta),
        case.gradients[[1, 3]] @ inverse @ case.gradients[[0, 2, 5]].T,
    )
    J = other.jacobian
    near(train.covariance(outputs, delta), torch.einsum("ncp,pq,ndq->ncd", J, inverse, J))
    with pytest.raises(RuntimeError, match="gradients=False"):
        outputs.gradient_gram()


def test_pairs_of_another_batch() -> None:
    """Slopes of one batch along directions of another."""
    case = brute()
    with LowRank() as curvature:
        case.loss().backward()
    with LowRank("mc", mc_samples=2) as other:
        case.loss().backward()
    pairs = other.eigh(3)
    vectors = flat(pairs.vectors, 1)
    near(curvature.derivatives(pairs).gammas, N * case.gradients @ vectors.T)
    near(
        curvature.derivatives(pairs).lambdas,
        N * torch.einsum("kp,npq,kq->nk", vectors, case.ggns, vectors),
    )
    g = case.gradients.sum(0)
    near(curvature.share(pairs), (vectors @ g).square() / (g @ g))
    with pytest.raises(ValueError, match="same curvature"):
        curvature.newton(pairs, 1.0)


def test_damping_of_each_direction() -> None:
    case = brute()
    with LowRank() as curvature:
        case.loss().backward()
    pairs = curvature.eigh(3)
    numbers = curvature.newton(pairs, torch.tensor([1.0, 2.0, 3.0]))
    chosen = curvature.newton(pairs, lambda p, d: torch.arange(1, 1 + d.gammas.shape[1]))
    near(flat(numbers), flat(chosen))


def test_noise() -> None:
    case = brute()
    with LowRank() as curvature:
        case.loss().backward()
    found = curvature.derivatives(curvature.eigh(2))
    slopes, curvatures = found.snr
    near(slopes, found.gammas.mean(0) ** 2 / found.gammas.var(0, unbiased=False))
    near(curvatures, found.lambdas.mean(0) ** 2 / found.lambdas.var(0, unbiased=False))


def test_single_precision() -> None:
    """Where terms cancel, products are in double."""
    case = brute()
    G, g = case.ggns.sum(0), case.gradients.sum(0)
    model, lossfunc = extend(network().float()), extend(nn.CrossEntropyLoss())
    with LowRank() as curvature:
        lossfunc(model(X.float()), Y).backward()
    values = curvature.eigvalsh()
    assert values.dtype == torch.float32
    near(values[:8], torch.linalg.eigvalsh(G).flip(0)[:8], 1e-5)
    delta = 1e-4 * float(values[0])
    eye = torch.eye(len(G), dtype=torch.float64)
    solution = torch.linalg.solve(G + delta * eye, g)
    near(flat(curvature.solve(delta)), solution, 2e-4)
    near(flat(curvature.newton(curvature.eigh(), delta, bulk=delta)), -solution, 2e-3)
    inverse = torch.linalg.inv(G + delta * eye)
    near(curvature.influence(damping=delta), case.gradients @ inverse @ case.gradients.T, 1e-3)


def test_small_eigenvalues_are_named() -> None:
    """Fewer parameters than rows: the last eigenvalues are zeros with rounding errors."""
    model, lossfunc = extend(nn.Linear(2, C)), extend(nn.CrossEntropyLoss())
    with LowRank() as curvature:
        lossfunc(model(torch.rand(N, 2)), Y).backward()
    with pytest.warns(UserWarning, match="6 of 12 eigenvalues .* cannot be told from zero"):
        curvature.eigh(12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = curvature.eigh()
    assert len(pairs) == 6
    assert float(pairs.values[-1]) > curvature.resolution()


def test_frozen_and_unused() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    case = Brute(model, nn.CrossEntropyLoss(), X, Y)
    with LowRank() as curvature:
        case.loss().backward()
    near(curvature.trace(), case.ggns.sum(0).trace())
    near(curvature.trace(model), case.ggns.sum(0).trace())
    with pytest.raises(ValueError, match="took no part"):
        curvature.trace([model[0].weight])


def test_two_sizes() -> None:
    """Models with batches of their own: groups of one size are fine."""
    a, b = extend(nn.Linear(3, 2)), extend(nn.Linear(3, 2))
    lossfunc = extend(nn.MSELoss())
    with LowRank() as curvature:
        loss = lossfunc(a(torch.rand(4, 3)), torch.rand(4, 2))
        (loss + lossfunc(b(torch.rand(5, 3)), torch.rand(5, 2))).backward()
    assert curvature.derivatives(curvature.eigh(1, a)).gammas.shape == (4, 1)
    assert curvature.derivatives(curvature.eigh(1, b)).gammas.shape == (5, 1)
    with pytest.raises(ValueError, match="different sizes"):
        curvature.eigvalsh()


def test_refusals() -> None:
    case = brute()
    curvature = LowRank()
    with pytest.raises(RuntimeError, match="no backward pass"):
        curvature.eigvalsh()
    with pytest.raises(RuntimeError, match="two backward passes"), curvature:
        case.loss().backward()
        case.loss().backward()
    with pytest.raises(RuntimeError, match="open already"), curvature, curvature:
        pass
    with curvature:
        case.loss().backward()
    p = case.model[0].weight
    for group, message in (([], "no parameters"), ([p, p], "twice")):
        with pytest.raises(ValueError, match=message):
            curvature.eigvalsh(group)
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive"):
            curvature.solve(damping)
    with pytest.raises(ValueError, match="do not fit"):
        curvature.solve(1.0, [torch.zeros(2)])
    with pytest.raises(ValueError, match="do not fit"):
        curvature.derivatives([torch.zeros_like(p)] * len(curvature.parameters))
    for options in ({"columns": "all"}, {"mc_samples": 0}, {"top": True}, {"subsampling": [1, 1]}):
        with pytest.raises(ValueError):
            LowRank(**options)
    with pytest.raises(IndexError, match="out of range"), LowRank(subsampling=[7]):
        case.loss().backward()
    with pytest.raises(ValueError, match="twice"), LowRank(subsampling=[1, 1 - N]):
        case.loss().backward()


def test_changed_inputs_are_noticed() -> None:
    """Forms refer to the batch itself; numbers of another one would be wrong."""
    model, lossfunc, x = extend(nn.Linear(4, 3)), extend(nn.MSELoss()), torch.rand(5, 4)
    with LowRank() as curvature:
        lossfunc(model(x), torch.rand(5, 3)).backward()
    curvature.eigvalsh()
    x.copy_(torch.rand(5, 4))
    with pytest.raises(RuntimeError, match="changed in place"):
        curvature.solve(0.1)


def test_parameters_may_move() -> None:
    """An update of the parameters after the pass does not count."""
    case = brute()
    with LowRank() as curvature:
        case.loss().backward()
    torch.optim.SGD(case.model.parameters(), lr=0.1).step()
    near(curvature.trace(), case.ggns.sum(0).trace())
    near(
        flat(curvature.solve(1.0)),
        torch.linalg.solve(case.ggns.sum(0) + torch.eye(len(case.ggns[0])), case.gradients.sum(0)),
    )


def test_memory_is_let_go() -> None:
    """Nothing waits for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        case = brute()
        with LowRank() as curvature:
            case.loss().backward()
        pairs = curvature.eigh(2)
        pairs.vectors
        rows = weakref.ref(curvature._passes[0].columns[N])
        del curvature, pairs
        assert rows() is None
    finally:
        gc.enable()


def test_graph_of_gradients() -> None:
    """With ``create_graph``, numbers are the same, and hold no graph."""
    case = brute()
    with warnings.catch_warnings(), LowRank() as curvature:
        warnings.simplefilter("ignore")
        case.loss().backward(create_graph=True)
    assert not curvature.eigvalsh().requires_grad
    near(curvature.trace(), case.ggns.sum(0).trace())
    assert not any(v.requires_grad for v in curvature.eigh(2).vectors)
    near(flat(curvature.solve(1.0)), flat(curvature.newton(curvature.eigh(), 1.0, bulk=1.0)) * -1, 1e-6)
    for p in case.model.parameters():
        p.grad = None


def test_autocast() -> None:
    """Columns in half precision are summed in single precision."""
    model, lossfunc = extend(network().float()), extend(nn.CrossEntropyLoss())
    with torch.autocast("cpu", torch.bfloat16):
        loss = lossfunc(model(X.float()), Y)
    with LowRank() as curvature:
        loss.backward()
    G = brute().ggns.sum(0)
    values = curvature.eigvalsh()
    assert values.dtype == torch.float32
    near(values[:3], torch.linalg.eigvalsh(G).flip(0)[:3], 0.05)
    pairs = curvature.eigh(3)
    found = curvature.derivatives(pairs.vectors)
    near(found.lambdas.mean(0), pairs.values.double(), 1e-3)


def test_checkpointing() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    model, lossfunc = extend(Checkpointed()), extend(nn.CrossEntropyLoss())
    with LowRank() as curvature:
        lossfunc(model(X), Y).backward()
    near(curvature.trace(), brute().ggns.sum(0).trace())


def test_empty_batch() -> None:
    model, lossfunc = extend(nn.Linear(3, 2)), extend(nn.MSELoss(reduction="sum"))
    with LowRank() as curvature:
        lossfunc(model(torch.rand(0, 3)), torch.rand(0, 2)).backward()
    assert curvature.eigvalsh().shape == (0,) and float(curvature.trace()) == 0
    pairs = curvature.eigh(3)
    assert [v.shape for v in pairs.vectors] == [(0, 2, 3), (0, 2)]
    assert curvature.derivatives(pairs).gammas.shape == (0, 0)
    assert all(float(s.abs().sum()) == 0 for s in curvature.solve(1.0))
    assert all(float(s.abs().sum()) == 0 for s in curvature.newton(pairs, 1.0))


def test_inputs_are_held_once() -> None:
    """Padded inputs are made for columns and for gradients: one copy stays, one form serves both."""
    model = extend(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten()))
    with LowRank() as curvature:
        extend(nn.MSELoss())(model(X.float()), torch.rand(N, 72)).backward()
    weight = model[0].weight
    (columns,), (gradients,) = curvature._columns([weight]), curvature._gradients([weight])
    ((_, a),), ((_, b),) = columns.of(weight), gradients.of(weight)
    assert a.inputs is b.inputs
    before = curvature.gradient_gram()
    curvature._known.clear()
    curvature.gram()
    near(curvature.gradient_gram(), before.double(), 1e-5)
    assert len(curvature._known) == 3
