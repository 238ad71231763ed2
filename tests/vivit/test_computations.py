"""The original's computations and hooks: problems x groups x criteria x subsets, by brute force."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from backpack import backpack
from backpack import extensions as E
from backpack.custom_module.branching import Parallel
from backpack.custom_module.pad import Pad
from backpack.custom_module.slicing import Slicing
from backpack.vivit import (
    DirectionalDampedNewtonComputation,
    DirectionalDerivativesComputation,
    EighComputation,
    EigvalshComputation,
    optim,
)
from backpack.vivit.extensions.hooks import (
    CenteredBatchGrad,
    CenteredGramBatchGrad,
    GramBatchGrad,
    GramSqrtGGNExact,
    GramSqrtGGNMC,
)
from tests.cases import classes, norm
from tests.vivit.dense import Brute, flat, near


class Problem(NamedTuple):
    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss
    target: Callable[[Tensor], Tensor] = classes


def mlp() -> nn.Module:
    layers = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)
    return nn.Sequential(*layers)


def convolution() -> nn.Module:
    layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    return nn.Sequential(*layers)


def with_axes() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten())


def batch_norm(d: int) -> nn.Module:
    convolutions = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    norms = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    layers = (
        convolutions[d](2, 3, 2),
        norm(norms[d](3)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 2**d, 3),
    )
    return nn.Sequential(*layers).eval()


def branched() -> nn.Module:
    left = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), Pad((1, 2), mode="constant", value=0.5))
    right = nn.Sequential(nn.Linear(4, 6), Slicing((slice(None), slice(0, 6))), nn.Tanh())
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Parallel(left, right), nn.Linear(6, 3))


PROBLEMS = [
    Problem("mlp", mlp, (5, 4)),
    Problem("mlp-sum", mlp, (5, 4), lambda: nn.CrossEntropyLoss(reduction="sum")),
    Problem("mlp-mse", mlp, (5, 4), nn.MSELoss, torch.rand_like),
    Problem("mlp-mse-sum", mlp, (5, 4), lambda: nn.MSELoss(reduction="sum"), torch.rand_like),
    Problem("convolution", convolution, (4, 1, 6, 6)),
    Problem("one-axis", with_axes, (4, 2, 3)),
    Problem("two-axes", with_axes, (3, 2, 2, 3)),
    Problem("three-axes", with_axes, (3, 2, 1, 2, 3), nn.MSELoss, torch.rand_like),
    Problem("batch-norm-1", lambda: batch_norm(1), (4, 2, 3)),
    Problem("batch-norm-2", lambda: batch_norm(2), (4, 2, 3, 3)),
    Problem("batch-norm-3", lambda: batch_norm(3), (3, 2, 3, 3, 3)),
    Problem("branched", branched, (4, 4)),
]
SUBSETS = [None, [0, 1], [2, 0]]
Damping = Callable[..., Tensor]


@cache
def brute_of(problem: Problem) -> Brute:
    """Shared by all tests of a problem."""
    torch.manual_seed(0)
    model, X = problem.model().double(), torch.rand(problem.shape).double()
    with torch.no_grad():
        y = problem.target(model(X))
    return Brute(model, problem.loss(), X, y)


def one(brute: Brute) -> list[list[Tensor]]:
    return [list(brute.parameters.values())]


def two(brute: Brute) -> list[list[Tensor]]:
    weights = [p for n, p in brute.parameters.items() if "weight" in n]
    return [weights, [p for n, p in brute.parameters.items() if "bias" in n]]


def each(brute: Brute) -> list[list[Tensor]]:
    return [[p] for p in brute.parameters.values()]


def leading(k: int) -> Callable[[Tensor], list[int]]:
    """The k largest, or fewer that are no zeros; last first."""

    def criterion(values: Tensor) -> list[int]:
        assert bool((values[1:] >= values[:-1] - 1e-12).all())
        largest = float(values[-1])
        return [j for j in range(len(values)) if values[j] > 1e-5 * largest][-k:][::-1]

    return criterion


def grid(subsets: Sequence[Any]) -> Any:
    table = product(PROBLEMS, (one, two, each), (1, 10), subsets)
    ids = [
        f"{p.name}-{g.__name__}-{k}-{s}"
        for p, g, k, s in product(PROBLEMS, (one, two, each), (1, 10), subsets)
    ]
    return pytest.mark.parametrize(("problem", "groups", "k", "subset"), list(table), ids=ids)


def ggn(brute: Brute, group: list[Tensor], subset: list[int] | None) -> tuple[Tensor, Tensor]:
    """Each sample's GGN, and their sum as an estimate of that of all."""
    at = brute.entries(group)
    parts = brute.ggns[:, at][:, :, at]
    parts = parts if subset is None else parts[subset]
    return parts, parts.sum(0) * (brute.samples / len(parts))


@grid(SUBSETS[:2])
def test_eigenpairs(problem: Problem, groups: Any, k: int, subset: list[int] | None) -> None:
    brute = brute_of(problem)
    table = [{"params": group, "criterion": leading(k)} for group in groups(brute)]
    values, pairs = EigvalshComputation(subset), EighComputation(subset, warn_small_eigvals=0.0)
    hooks = [c.get_extension_hook(table) for c in (values, pairs)]
    for computation, hook in zip((values, pairs), hooks, strict=True):
        with backpack(computation.get_extension(), extension_hook=hook):
            brute.loss().backward()
    C = brute.jacobian.shape[1]
    for group in table:
        _, G = ggn(brute, group["params"], subset)
        found = values.get_result(group)
        assert found.shape == (C * (brute.samples if subset is None else len(subset)),)
        exact, size = torch.linalg.eigvalsh(G), min(len(found), len(G))
        near(found[-size:], exact[-size:])
        assert float(found[:-size].abs().sum()) < 1e-10 * max(float(exact[-1]), 1)
        evals, evecs = pairs.get_result(group)
        near(evals, exact[-len(evals) :].flip(0))
        assert len(evals) <= k
        assert [v.shape for v in evecs] == [(len(evals), *p.shape) for p in group["params"]]
        vectors = flat(evecs, 1)
        near(vectors @ G, vectors * evals.unsqueeze(1))
        near(vectors @ vectors.T, torch.eye(len(evals)).double(), 1e-6)


@grid(list(zip(SUBSETS, reversed(SUBSETS), strict=True)))
def test_directions(problem: Problem, groups: Any, k: int, subset: Any) -> None:
    brute = brute_of(problem)
    of_gradients, of_ggn = subset

    def damping(evals: Tensor, vectors: Tensor, gammas: Tensor, lambdas: Tensor) -> Tensor:
        assert vectors.shape[1:] == evals.shape == gammas.shape[1:] == lambdas.shape[1:]
        near(lambdas.mean(0), evals)
        return 0.1 + torch.arange(len(evals))

    table = [{"params": g, "criterion": leading(k), "damping": damping} for g in groups(brute)]
    options: dict[str, Any] = {"subsampling_grad": of_gradients, "subsampling_ggn": of_ggn}
    options["warn_small_eigvals"] = 0.0
    pairs = EighComputation(of_ggn, warn_small_eigvals=0.0)
    with backpack(pairs.get_extension(), extension_hook=pairs.get_extension_hook(table)):
        brute.loss().backward()
    derivatives = DirectionalDerivativesComputation(**options)
    newton = DirectionalDampedNewtonComputation(**options)
    for computation in (derivatives, newton):
        hook = computation.get_extension_hook(table)
        with backpack(*computation.get_extensions(), extension_hook=hook):
            brute.loss().backward()
    N = brute.samples
    for group in table:
        parts, _ = ggn(brute, group["params"], of_ggn)
        g = brute.gradients[:, brute.entries(group["params"])]
        g = g if of_gradients is None else g[of_gradients]
        vectors = flat(pairs.get_result(group)[1], 1)
        gammas, lambdas = derivatives.get_result(group)
        expected = N * g @ vectors.T
        assert gammas.shape == expected.shape
        near(gammas.abs(), expected.abs(), 1e-6)
        near(lambdas, N * torch.einsum("kp,npq,kq->nk", vectors, parts, vectors), 1e-6)
        along = expected.mean(0) / (lambdas.mean(0) + 0.1 + torch.arange(len(vectors)))
        step = newton.get_result(group)
        assert [s.shape for s in step] == [p.shape for p in group["params"]]
        near(flat(step), -along @ vectors, 1e-6)


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_random_columns(problem: Problem, draws: int) -> None:
    """Any number of draws, for all computations; the same draws as of the root that is written out."""
    brute = brute_of(problem)
    parameters = one(brute)[0]
    torch.manual_seed(7)
    with backpack(E.SqrtGGNMC(draws)):
        brute.loss().backward()
    V = flat([p.sqrt_ggn_mc for p in parameters], 2)
    G = torch.einsum("vnp,vnq->pq", V, V)
    group = {"params": parameters, "criterion": leading(3), "damping": lambda evals, *_: 0 * evals + 1}
    values = EigvalshComputation(mc_samples=draws)
    torch.manual_seed(7)
    with backpack(values.get_extension(), extension_hook=values.get_extension_hook([group])):
        brute.loss().backward()
    assert len(values.get_result(group)) == draws * brute.samples
    near(values.get_result(group)[-1:], torch.linalg.eigvalsh(G)[-1:])
    newton = DirectionalDampedNewtonComputation(mc_samples_ggn=draws, warn_small_eigvals=0.0)
    torch.manual_seed(7)
    with backpack(*newton.get_extensions(), extension_hook=newton.get_extension_hook([group])):
        brute.loss().backward()
    evals, evecs = torch.linalg.eigh(G)
    keep = leading(3)(evals)
    slopes = brute.gradients.sum(0) @ evecs[:, keep]
    near(flat(newton.get_result(group)), -evecs[:, keep] @ (slopes / (evals[keep] + 1)), 1e-6)


def test_random_columns_estimate_the_exact() -> None:
    brute = brute_of(PROBLEMS[0])
    group = {"params": one(brute)[0]}
    computation = EigvalshComputation(mc_samples=200)
    torch.manual_seed(0)
    with backpack(computation.get_extension(), extension_hook=computation.get_extension_hook([group])):
        brute.loss().backward()
    top, exact = computation.get_result(group)[-1], torch.linalg.eigvalsh(brute.ggns.sum(0))[-1]
    assert abs(top - exact) < 0.1 * exact


def test_single_precision() -> None:
    """As far as its tests ask of the original: eigenvectors to two in a hundred."""
    brute = brute_of(PROBLEMS[4])
    torch.manual_seed(0)
    model = copy.deepcopy(brute.model).float()
    groups = [{"params": g, "criterion": leading(3)} for g in two(brute)]
    parameters = dict(zip(brute.parameters.values(), model.parameters(), strict=True))
    for group in groups:
        group["own"], group["params"] = group["params"], [parameters[p] for p in group["params"]]
    computation = EighComputation(warn_small_eigvals=0.0)
    with backpack(computation.get_extension(), extension_hook=computation.get_extension_hook(groups)):
        brute.lossfunc(model(brute.inputs[0].float()), brute.y).backward()
    for group in groups:
        evals, evecs = computation.get_result(group)
        _, G = ggn(brute, group["own"], None)
        near(evals, torch.linalg.eigvalsh(G)[-len(evals) :].flip(0), 1e-4)
        vectors = flat(evecs, 1).double()
        near(vectors @ G, vectors * evals.unsqueeze(1), 1e-4)


def test_parameters_in_no_group_are_left_out() -> None:
    brute = brute_of(PROBLEMS[0])
    parameters = one(brute)[0]
    group = {"params": parameters[2:4]}
    computation = EigvalshComputation(verbose=True)
    with backpack(computation.get_extension(), extension_hook=computation.get_extension_hook([group])):
        brute.loss().backward()
    _, G = ggn(brute, group["params"], None)
    near(computation.get_result(group)[-1:], torch.linalg.eigvalsh(G)[-1:])
    assert not any("vivit_ggn_exact" in vars(p) for p in parameters[2:4])


def test_reused_extension() -> None:
    """One extension over several passes: each pass on its own."""
    brute = brute_of(PROBLEMS[0])
    group = {"params": one(brute)[0]}
    computation = EigvalshComputation()
    extension, results = computation.get_extension(), []
    for _ in range(3):
        with backpack(extension, extension_hook=computation.get_extension_hook([group])):
            brute.loss().backward()
        results.append(computation.get_result(group))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_checks() -> None:
    brute = brute_of(PROBLEMS[0])
    a, b = one(brute)[0][:2]
    good = {"params": [a], "criterion": leading(1), "damping": lambda evals, *_: evals}
    for computation in (
        EighComputation(),
        DirectionalDerivativesComputation(),
        DirectionalDampedNewtonComputation(),
    ):
        for key in computation.keys:
            with pytest.raises(ValueError, match=key):
                computation.get_extension_hook([{k: v for k, v in good.items() if k != key}])
        with pytest.raises(ValueError, match="two groups"):
            computation.get_extension_hook([good, {**good, "params": [b, a]}])
        with pytest.raises(KeyError, match="No results available for this group"):
            computation.get_result(good)
    EigvalshComputation().get_extension_hook([{"params": [a]}])
    for wrong in ({"subsampling_grad": [1, 1]}, {"subsampling_ggn": [0, 2, 0]}, {"mc_samples_ggn": -1}):
        with pytest.raises(ValueError):
            DirectionalDerivativesComputation(**wrong)
    with pytest.raises(ValueError, match="unique"):
        EigvalshComputation([3, 3])
    assert optim.DirectionalDampedNewtonComputation is DirectionalDampedNewtonComputation


def test_small_eigenvalues_warn() -> None:
    brute = brute_of(PROBLEMS[0])
    group = {"params": one(brute)[0], "criterion": lambda values: [0, len(values) - 1]}
    computation = EighComputation()
    with (
        pytest.warns(UserWarning, match="1 of the kept eigenvalues are smaller than 0.0001"),
        backpack(computation.get_extension(), extension_hook=computation.get_extension_hook([group])),
    ):
        brute.loss().backward()


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("problem", PROBLEMS[::3], ids=lambda p: p.name)
def test_hooks(problem: Problem, layerwise: bool, free: bool) -> None:
    brute = brute_of(problem)
    parameters, g = one(brute)[0], brute.gradients
    centred = g - g.mean(0)
    for kind, field, expected in (
        (GramBatchGrad, "gram_grad_batch", g @ g.T),
        (CenteredGramBatchGrad, "centered_gram_grad_batch", centred @ centred.T),
    ):
        hook = kind(layerwise=layerwise, free_grad_batch=free)
        with backpack(E.BatchGrad(), extension_hook=hook):
            brute.loss().backward()
        near(hook.get_result(), expected)
        near(flat([p.grad for p in parameters]), flat([p.grad for p in parameters]))
        assert all(hasattr(p, "grad_batch") != free for p in parameters)
        if layerwise:
            near(sum(getattr(p, field) for p in parameters), expected)
        assert all(hasattr(p, field) == layerwise for p in parameters)
        if kind is CenteredGramBatchGrad and not free:
            near(flat([p.grad_batch for p in parameters], 1), centred)
        for p in parameters:
            for name in ("grad_batch", field):
                vars(p).pop(name, None)
    hook = CenteredBatchGrad()
    with backpack(E.BatchGrad(), extension_hook=hook):
        brute.loss().backward()
    near(flat([p.centered_grad_batch for p in parameters], 1), centred)
    for extension, kind in ((E.SqrtGGNExact(), GramSqrtGGNExact), (E.SqrtGGNMC(2), GramSqrtGGNMC)):
        torch.manual_seed(0)
        with backpack(extension):
            brute.loss().backward()
        V = flat([getattr(p, extension.savefield) for p in parameters], 2).flatten(0, 1)
        hook = kind(layerwise=layerwise, free_sqrt_ggn=free)  # type: ignore[call-arg]
        torch.manual_seed(0)
        with backpack(extension, extension_hook=hook):
            brute.loss().backward()
        near(hook.get_result(), V @ V.T)
        assert all(hasattr(p, extension.savefield) != free for p in parameters)
    with pytest.raises(RuntimeError, match="no parameter"):
        GramBatchGrad().get_result()


def test_centring_leaves_the_gradient_alone() -> None:
    """Individual gradients may share memory with gradients that are still on their way."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x) + x + self.c

    torch.manual_seed(0)
    brute = Brute(
        Residual().double(), nn.MSELoss(), torch.rand(4, 3).double(), torch.rand(4, 3).double()
    )
    with backpack(E.BatchGrad(), extension_hook=CenteredGramBatchGrad()):
        brute.loss().backward()
    near(flat([p.grad for p in brute.parameters.values()]), brute.gradients.sum(0))
