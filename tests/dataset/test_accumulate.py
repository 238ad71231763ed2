"""Quantities of batches, combined, against those of one batch of all samples."""

from __future__ import annotations

import copy
import gc
import io
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import backpack
from backpack import backpack as block_of
from backpack import extend
from backpack import extensions as E
from backpack.forms.base import Form
from backpack.kronecker.eigen import KroneckerEigen
from backpack.kronecker.factored import KroneckerFactored
from backpack.own import Added, ExactRoot, Joined, Moments
from backpack.testing.copies import exactly
from backpack.testing.oracle import Oracle
from tests.cases import Apply, P

N = 7
SIZES = (3, 2, 2)  # the last batches are smaller


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(a: Any, b: Any) -> None:
    """To 1e-10, relative to the largest entry."""
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            close(x, y)
        return
    assert a.shape == b.shape
    scale = float(b.abs().max()) if b.numel() else 0.0
    assert not b.numel() or float((a - b).abs().max()) <= 1e-10 * scale


QUANTITIES: dict[str, Callable[[], E.BackpropExtension]] = {
    "BatchGrad": E.BatchGrad,
    "BatchL2Grad": E.BatchL2Grad,
    "SumGradSquared": E.SumGradSquared,
    "Variance": E.Variance,
    "DiagGGNExact": E.DiagGGNExact,
    "DiagGGNMC": lambda: exactly(E.DiagGGNMC()),
    "BatchDiagGGNExact": E.BatchDiagGGNExact,
    "BatchDiagGGNMC": lambda: exactly(E.BatchDiagGGNMC()),
    "DiagHessian": E.DiagHessian,
    "BatchDiagHessian": E.BatchDiagHessian,
    "SqrtGGNExact": E.SqrtGGNExact,
    "SqrtGGNMC": lambda: exactly(E.SqrtGGNMC()),
    "KFLR": E.KFLR,
    "KFLR expand": lambda: E.KFLR(kfac_approx="expand"),
    "KFLR reduce": lambda: E.KFLR(kfac_approx="reduce"),
    "KFAC": lambda: exactly(E.KFAC()),
    "EmpiricalKFAC": E.EmpiricalKFAC,
    "EKFLR": E.EKFLR,
    "EKFAC": lambda: exactly(E.EKFAC()),
    "GGNMP": E.GGNMP,
    "HMP": E.HMP,
    "PCHMP": E.PCHMP,
}
LOSSES: dict[str, Callable[[str], nn.Module]] = {
    "cross-entropy": lambda reduction: nn.CrossEntropyLoss(reduction=reduction),
    "square": lambda reduction: nn.MSELoss(reduction=reduction),
}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.ConvTranspose2d(3, 2, 2, groups=1), nn.Sigmoid()),
        *(nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(18, 3)),
    )


def words() -> nn.Module:
    layers = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    return nn.Sequential(*layers)


def padded_words() -> nn.Module:
    layers = nn.Embedding(6, 4, padding_idx=0), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    return nn.Sequential(*layers)


def one_by_one() -> nn.Module:
    """Layers on single samples."""

    def forward(module: Any, x: Tensor) -> Tensor:
        return torch.stack([module.o(module.i(sample).tanh().mean(0)) for sample in x])

    return Apply(forward, i=nn.Linear(2, 3), o=nn.Linear(3, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(N, 4).double()),
    "convolutions": (convolutions, lambda: torch.randn(N, 2, 3, 3).double()),
    "words": (words, lambda: torch.randint(6, (N, 3))),
    "padded words": (padded_words, lambda: torch.randint(3, (N, 3))),
    "one by one": (one_by_one, lambda: torch.randn(N, 4, 2).double()),
}


class Problem:
    """A model, data and a loss; the quantities of one batch, to compare with."""

    def __init__(
        self, model: str = "mlp", loss: str = "cross-entropy", reduction: str = "mean"
    ) -> None:
        make, data = MODELS[model]
        self.model, self.X = extend(make().double()), data()
        self.y = torch.arange(N) % 3 if loss == "cross-entropy" else torch.randn(N, 3).double()
        self.lossfunc = extend(LOSSES[loss](reduction))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.X.split(SIZES), self.y.split(SIZES), strict=True))

    def whole(self, *exts: E.BackpropExtension) -> dict[str, list[Any]]:
        """One pass over all samples; the model is left without its values."""
        with block_of(*exts):
            self.lossfunc(self.model(self.X), self.y).backward()
        return self.taken(*exts)

    def taken(self, *exts: E.BackpropExtension) -> dict[str, list[Any]]:
        found = {}
        for field in [ext.savefield for ext in exts] + ["grad"]:
            found[field] = [getattr(p, field) for p in self.parameters]
            for p in self.parameters:
                if field == "grad":
                    p.grad = None
                else:
                    delattr(p, field)
        return found

    def loop(self, total: backpack.accumulating) -> None:
        with total:
            for X, y in self.batches():
                self.lossfunc(self.model(X), y).backward()

    def compare(self, found: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
        for field, values in expected.items():
            for p, a, b in zip(self.parameters, found[field], values, strict=True):
                if callable(b):
                    vectors = torch.randn(2, *p.shape, dtype=p.dtype)
                    a, b = a(vectors), b(vectors)
                elif isinstance(b, KroneckerEigen):
                    assert isinstance(a, KroneckerEigen)
                    a, b = a.to_dense(), b.to_dense()
                elif isinstance(b, KroneckerFactored):
                    assert isinstance(a, KroneckerFactored)
                    assert a.averaged_over == b.averaged_over
                close(a, b)


# --------------------------------------------------------------------------------------
# Every quantity, against one batch


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "name, model",
    # The positive-curvature Hessian is not defined with norms between parameters and loss.
    [(q, m) for q in QUANTITIES for m in MODELS if (q, m) != ("PCHMP", "convolutions")],
)
def test_data_set(name: str, model: str, loss: str, reduction: str) -> None:
    problem, ext = Problem(model, loss, reduction), QUANTITIES[name]()
    expected = problem.whole(ext)
    total = backpack.accumulate(problem.model, problem.lossfunc, problem.batches(), [ext])
    assert (total.samples, total.batches) == (N, len(SIZES))
    problem.compare(problem.taken(ext), expected)
    assert not any(vars(p) for p in problem.parameters)


ONE_PASS = [name for name in QUANTITIES if not name.startswith("EK")]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loop_of_ones_own(reduction: str) -> None:
    """All quantities at once, except that of two passes."""
    problem = Problem(reduction=reduction)
    exts = [QUANTITIES[name]() for name in ONE_PASS if " " not in name]
    expected = problem.whole(*exts)
    problem.loop(backpack.accumulating(*exts))
    problem.compare(problem.taken(*exts), expected)


@pytest.mark.parametrize("gradient", [True, False])
def test_without_quantities_or_gradient(gradient: bool) -> None:
    problem = Problem()
    expected = problem.whole(E.KFLR())
    exts = [] if gradient else [E.KFLR()]
    problem.loop(backpack.accumulating(*exts, gradient=gradient))
    if gradient:
        problem.compare(problem.taken(), {"grad": expected["grad"]})
        assert not any(vars(p) for p in problem.parameters)
    else:
        assert all(p.grad is None for p in problem.parameters)
        close([p.kflr for p in problem.parameters], expected["kflr"])


def test_by_brute_force() -> None:
    """The comparison with one batch is one with the oracle."""
    problem = Problem()
    exts = [E.Variance(), E.BatchGrad(), E.DiagHessian()]
    oracle = Oracle(copy.deepcopy(problem.model), F.cross_entropy, problem.X, problem.y)
    problem.loop(backpack.accumulating(*exts))
    for ext in exts:
        expected = oracle.value(ext.savefield).values()
        close([getattr(p, ext.savefield) for p in problem.parameters], list(expected))


def test_factors_added_by_hand_are_too_large() -> None:
    """What the docstrings say: for three batches the block is exactly three times too large."""
    problem = Problem(reduction="sum")
    problem.X, problem.y = problem.X[:6], problem.y[:6]
    expected = problem.whole(E.KFLR())["kflr"][0]
    sums = [torch.zeros_like(f) for f in expected]
    for X, y in zip(problem.X.split(2), problem.y.split(2), strict=True):
        with block_of(E.KFLR()):
            problem.lossfunc(problem.model(X), y).backward()
        sums = [s + f for s, f in zip(sums, problem.parameters[0].kflr, strict=True)]
    close(torch.kron(*sums), 3 * torch.kron(*expected))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (30, 1, 9), (1, 30, 9), (10, 10, 10, 10)])
def test_variance_does_not_cancel(sizes: tuple[int, ...]) -> None:
    """Values that are a million times larger than their differences."""
    rule, part = Moments(), None
    values = 1e6 + torch.randn(sum(sizes)).double()
    for each in values.split(sizes):
        batch = len(each), each.mean(), each.var(unbiased=False)
        part = batch if part is None else rule.add(part, batch)
    expected = float(values.var(unbiased=False))
    assert part is not None and part[0] == len(values)
    assert float(rule.value(part)) == pytest.approx(expected, rel=1e-9)
    moments = float((values**2).mean() - values.mean() ** 2)
    assert moments != pytest.approx(expected, rel=1e-6)


# --------------------------------------------------------------------------------------
# Draws


@pytest.mark.parametrize("name", ["KFAC", "DiagGGNMC", "EKFAC"])
def test_draws_are_unbiased(name: str) -> None:
    """Sampled columns are those of the batches; many of them agree with exact ones."""
    problem = Problem()
    ext = getattr(E, name)(mc_samples=20000, generator=torch.Generator().manual_seed(0))
    expected = problem.whole(exactly(ext))[ext.savefield]
    backpack.accumulate(problem.model, problem.lossfunc, problem.batches(), [ext])
    for p, exact in zip(problem.parameters, expected, strict=True):
        a, b = getattr(p, ext.savefield), exact
        if not isinstance(a, Tensor):
            a, b = a.to_dense(), b.to_dense()
        assert float((a - b).abs().max()) < 0.05 * float(b.abs().max())


# --------------------------------------------------------------------------------------
# Weights of losses


def whole_and_parts(
    problem: Problem, lossfunc: Callable[[Tensor, Tensor], Tensor], **options: Any
) -> None:
    exts = [E.DiagGGNExact(), E.BatchGrad(), E.KFLR(), E.SumGradSquared()]
    with block_of(*exts):
        lossfunc(problem.model(problem.X), problem.y).backward()
    expected = problem.taken(*exts)
    with backpack.accumulating(*exts, **options):
        for X, y in problem.batches():
            lossfunc(problem.model(X), y).backward()
    problem.compare(problem.taken(*exts), expected)


WEIGHTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "functional": F.cross_entropy,
    "ignored targets": lambda f, y: F.cross_entropy(f, y, ignore_index=2),
    "weights of classes": lambda f, y: F.cross_entropy(
        f, y, weight=torch.tensor([0.5, 1.0, 3.0]).double()
    ),
    "both": lambda f, y: F.cross_entropy(
        f, y, weight=torch.tensor([0.5, 1.0, 3.0]).double(), ignore_index=0
    ),
    "smooth": lambda f, y: F.cross_entropy(f, y, reduction="none", label_smoothing=0.1).mean(),
    "mean of squares": lambda f, y: ((f - F.one_hot(y, 3)) ** 2).mean(),
    "sum": lambda f, y: F.nll_loss(f.log_softmax(1), y, reduction="sum"),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_losses_that_say_what_they_divide_by(name: str) -> None:
    whole_and_parts(Problem(), WEIGHTED[name])


def test_means_and_sums_that_are_told() -> None:
    problem = Problem()

    def halved(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y, ignore_index=2) / 2

    whole_and_parts(problem, halved, reduction="mean")
    whole_and_parts(problem, lambda f, y: F.cross_entropy(f, y, reduction="sum") * 2, reduction="sum")
    with pytest.raises(ValueError, match="cannot tell whether the loss .* pass reduction"):
        whole_and_parts(problem, halved)
    with pytest.raises(ValueError, match="is a sum, but reduction is 'mean'"):
        whole_and_parts(problem, WEIGHTED["sum"], reduction="mean")


def test_two_means_in_one_loss() -> None:
    """Both divide by samples, or else it is not known by how much they differ."""
    problem = Problem()

    def both(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y) + (f**2).mean()

    whole_and_parts(problem, both, reduction="mean")
    with pytest.raises(ValueError, match="mean over other things than samples"):
        whole_and_parts(problem, lambda f, y: WEIGHTED["both"](f, y) + (f**2).mean(), reduction="mean")


def test_weights_by_hand() -> None:
    """A mean over entries of a mask, which nothing in the graph says."""
    problem = Problem()
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]).double()

    def masked(rows: slice) -> Tensor:
        losses = F.cross_entropy(problem.model(problem.X[rows]), problem.y[rows], reduction="none")
        return (losses * mask[rows]).sum() / mask[rows].sum()

    exts = [E.DiagGGNExact(), E.KFLR(), E.BatchL2Grad()]
    with block_of(*exts):
        masked(slice(None)).backward()
    expected = problem.taken(*exts)
    with backpack.accumulating(*exts) as total:
        for rows in (slice(0, 3), slice(3, 5), slice(5, 7)):
            total.weight = mask[rows].sum()
            masked(rows).backward()
    problem.compare(problem.taken(*exts), expected)
    with pytest.raises(ValueError, match="for all batches or for none"), total:
        total.weight = None
        F.cross_entropy(problem.model(problem.X), problem.y).backward()


# --------------------------------------------------------------------------------------
# Individual values elsewhere than in memory

INDIVIDUAL = ["BatchGrad", "BatchL2Grad", "BatchDiagGGNExact", "BatchDiagHessian", "SqrtGGNExact"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_function(reduction: str) -> None:
    """It sees the rows of what one batch had had, and nothing is kept."""
    problem = Problem(reduction=reduction)
    exts = [*(QUANTITIES[name]() for name in INDIVIDUAL), E.DiagGGNExact()]
    expected, seen = problem.whole(*exts), []

    def look(rows: slice) -> None:
        seen.append(rows)
        for ext in exts[:-1]:
            for p, value in zip(problem.parameters, expected[ext.savefield], strict=True):
                close(
                    getattr(p, ext.savefield),
                    value[:, rows] if value.dim() > p.dim() + 1 else value[rows],
                )

    loader = DataLoader(TensorDataset(problem.X, problem.y), batch_size=3)
    backpack.accumulate(problem.model, problem.lossfunc, loader, exts, individual=look)
    assert seen == [slice(0, 3), slice(3, 6), slice(6, 7)]
    problem.compare(problem.taken(exts[-1]), {k: expected[k] for k in ("diag_ggn_exact", "grad")})
    assert not any(vars(p) for p in problem.parameters)


@pytest.mark.parametrize("name", INDIVIDUAL)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_files(name: str, reduction: str, tmp_path: Path) -> None:
    problem, ext = Problem(reduction=reduction), QUANTITIES[name]()
    expected = problem.whole(ext)
    (tmp_path / "0.weight.grad_batch").write_bytes(b"of another run")
    backpack.accumulate(
        *(problem.model, problem.lossfunc, problem.batches(), [ext]), individual=tmp_path, samples=N
    )
    files = {f"{name}.{ext.savefield}" for name, _ in problem.model.named_parameters()}
    assert files <= {path.name for path in tmp_path.iterdir()}
    problem.compare(problem.taken(ext), expected)


def test_files_of_a_weighted_mean(tmp_path: Path) -> None:
    """Which is not known before the last batch; files are scaled in the end."""
    whole_and_parts(
        problem := Problem(),
        WEIGHTED["weights of classes"],
        individual=str(tmp_path),
        samples=N,
        model=problem.model,
    )
    with pytest.raises(ValueError, match="mean over other things than samples"):
        whole_and_parts(problem, WEIGHTED["both"], individual=print, samples=N)


def test_numbers_of_samples() -> None:
    problem = Problem()
    for samples, message in ((6, "more samples than the 6"), (8, "of 8 samples, but there were 7")):
        with pytest.raises(RuntimeError, match=message):
            problem.loop(
                backpack.accumulating(E.BatchGrad(), individual=lambda rows: None, samples=samples)
            )
    with pytest.raises(ValueError, match="number of all `samples`"):
        backpack.accumulating(E.BatchGrad(), individual=print)
    with pytest.raises(ValueError, match="pass the `model`"):
        backpack.accumulating(E.BatchGrad(), individual="folder", samples=3)
    with pytest.raises(ValueError, match="cannot tell how many samples"):
        backpack.accumulate(
            problem.model, problem.lossfunc, problem.batches(), [E.BatchGrad()], individual=print
        )


# --------------------------------------------------------------------------------------
# Parameters that some batches do not reach


class Switch(nn.Module):
    """Two heads; a batch without samples for one leaves it out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        features, result = self.body(x).tanh(), x.new_zeros(len(x), 3)
        for number, head in enumerate(self.heads):
            index = (x[:, 0] > 0).long().eq(number).nonzero()[:, 0]
            if len(index):
                result = result.index_add(0, index, head(features[index]))
        return result


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_parameters_without_samples(order: tuple[int, ...]) -> None:
    model, lossfunc = extend(Switch().double()), extend(nn.CrossEntropyLoss())
    parts = [torch.randn(n, 4).double() for n in (2, 3, 4)]
    parts[0][:, 0], parts[1][:, 0] = 1.0, -1.0  # one head each; the third batch has both
    parts[2][:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    parts = [parts[i] for i in order]
    X, y = torch.cat(parts), torch.arange(9) % 3
    exts = [QUANTITIES[name]() for name in ONE_PASS if " " not in name and "MP" not in name]
    with block_of(*exts):
        lossfunc(model(X), y).backward()
    expected = {e.savefield: [getattr(p, e.savefield) for p in model.parameters()] for e in exts}
    gradients = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
        vars(p).clear()
    backpack.accumulate(
        model, lossfunc, list(zip(parts, y.split([len(x) for x in parts]), strict=True)), exts
    )
    for field, values in expected.items():
        close([getattr(p, field) for p in model.parameters()], values)
    close([p.grad for p in model.parameters()], gradients)


# --------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_state(reduction: str, folder: bool, tmp_path: Path) -> None:
    problem = Problem(reduction=reduction)
    exts = [QUANTITIES[name]() for name in ONE_PASS if " " not in name and "MP" not in name]
    expected = problem.whole(*exts)
    options: dict[str, Any] = {"model": problem.model}
    if folder:
        options |= {"individual": tmp_path, "samples": N}
    first, file = backpack.accumulating(*exts, **options), io.BytesIO()
    batches = problem.batches()
    with pytest.raises(KeyboardInterrupt), first:
        for X, y in batches[:2]:
            problem.lossfunc(problem.model(X), y).backward()
        torch.save(first.state_dict(), file)
        problem.lossfunc(problem.model(problem.X), problem.y).sum()
        raise KeyboardInterrupt
    assert not any(vars(p) or p.grad is not None for p in problem.parameters)
    file.seek(0)
    total = backpack.accumulating(*exts, **options)
    total.load_state_dict(torch.load(file, weights_only=True))
    with total:
        for X, y in batches[total.batches :]:
            problem.lossfunc(problem.model(X), y).backward()
    problem.compare(problem.taken(*exts), expected)


class StopError(Exception):
    pass


@pytest.mark.parametrize("after", range(1, 7))
def test_checkpoint(after: int, tmp_path: Path) -> None:
    """StopError after so many batches, of three in each of two passes."""
    problem, exts = Problem(), [E.EKFLR(), E.Variance()]
    expected, path = problem.whole(*exts), tmp_path / "state.pt"
    left = [after]

    def forward(model: nn.Module, batch: Any) -> Tensor:
        if not left[0]:
            raise StopError
        left[0] -= 1
        return problem.lossfunc(model(batch[0]), batch[1])

    def run() -> None:
        backpack.accumulate(
            *(problem.model, None, problem.batches(), exts),
            forward=forward,
            checkpoint=path,
            every=1,
        )

    if after < 6:
        with pytest.raises(StopError):
            run()
        assert path.exists()
        for p in problem.parameters:
            p.grad = None
            vars(p).clear()
    left[0] = 6 - after if after < 6 else 6
    run()
    assert left[0] == 0 and not list(tmp_path.iterdir())
    problem.compare(problem.taken(*exts), expected)


def test_states_that_do_not_fit() -> None:
    problem = Problem()
    total = backpack.accumulating(E.KFLR(), model=problem.model)
    problem.loop(total)
    with pytest.raises(ValueError, match="the state is of kflr, but this one computes variance"):
        backpack.accumulating(E.Variance(), model=problem.model).load_state_dict(total.state_dict())
    other = backpack.accumulating(E.KFLR(), model=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a model with a parameter '2.weight'"):
        other.load_state_dict(total.state_dict())
    unnamed = backpack.accumulating(E.KFLR())
    problem.loop(unnamed)
    for call in (unnamed.state_dict, lambda: unnamed.load_state_dict(total.state_dict())):
        with pytest.raises(ValueError, match="pass the `model`"):
            call()
    products = backpack.accumulating(E.GGNMP(), model=problem.model)
    problem.loop(products)
    with pytest.raises(NotImplementedError, match="functions with graphs cannot be saved"):
        products.state_dict()


def test_entered_again() -> None:
    problem, exts = Problem(), [E.KFLR(), E.BatchGrad(), E.Variance()]
    expected = problem.whole(*exts)
    total = backpack.accumulating(*exts)
    for X, y in problem.batches():
        with total:
            problem.lossfunc(problem.model(X), y).backward()
    problem.compare(problem.taken(*exts), expected)
    with pytest.raises(RuntimeError, match="is open already"), total, total:
        pass


# --------------------------------------------------------------------------------------
# Gradients that are there, and passes that fail


def test_gradients_that_were_there() -> None:
    problem = Problem()
    expected = problem.whole()["grad"]
    for p in problem.parameters:
        p.grad = torch.ones_like(p)
    problem.loop(backpack.accumulating(E.KFLR()))
    close([p.grad for p in problem.parameters], [g + 1 for g in expected])


def test_gradients_of_inputs_add_up_as_ever() -> None:
    problem = Problem()
    X = problem.X.clone().requires_grad_()
    with backpack.accumulating(E.KFLR()):
        for _ in range(2):
            problem.lossfunc(problem.model(X), problem.y).backward()
    X, twice = problem.X.clone().requires_grad_(), X.grad
    problem.lossfunc(problem.model(X), problem.y).backward()
    close(twice, 2 * X.grad)


def test_sparse_gradients() -> None:
    model, lossfunc = extend(words().double()), extend(nn.CrossEntropyLoss())
    model[0].sparse = True
    X, y = torch.randint(6, (N, 3)), torch.arange(N) % 3
    lossfunc(model(X), y).backward()
    expected = model[0].weight.grad.to_dense()
    model.zero_grad()
    backpack.accumulate(model, lossfunc, list(zip(X.split(SIZES), y.split(SIZES), strict=True)), [])
    assert model[0].weight.grad.is_sparse
    close(model[0].weight.grad.to_dense(), expected)


def test_a_pass_that_raises() -> None:
    """Nothing of it counts, and gradients are as before."""
    problem, fails = Problem(), [False]

    def hook(gradient: Tensor) -> None:
        if fails[0]:
            raise StopError

    problem.parameters[0].register_hook(hook)
    expected = problem.whole(E.Variance(), E.KFLR())
    batches = problem.batches()
    with backpack.accumulating(E.Variance(), E.KFLR()) as total:
        for X, y in batches:
            for fails[0] in (True, False):
                loss = problem.lossfunc(problem.model(X), y)
                if fails[0]:
                    with pytest.raises(StopError):
                        loss.backward()
                    assert all(p.grad is None for p in problem.parameters)
                else:
                    loss.backward()
    assert total.batches == 3
    problem.compare(problem.taken(E.Variance(), E.KFLR()), expected)


def test_passes_that_are_not_seen() -> None:
    problem = Problem()
    with (
        pytest.raises(RuntimeError, match="must be a call of loss.backward()"),
        backpack.accumulating(E.BatchL2Grad()),
    ):
        torch.autograd.backward(problem.lossfunc(problem.model(problem.X), problem.y))
    assert not any("batch_l2" in vars(p) for p in problem.parameters)


def test_passes_that_are_not_meant() -> None:
    """Of a block within, and with everything switched off."""
    problem = Problem()
    expected = problem.whole(E.Variance())
    with backpack.accumulating(E.Variance()) as total:
        for X, y in problem.batches():
            problem.lossfunc(problem.model(X), y).backward()
        with block_of():
            problem.lossfunc(problem.model(problem.X), problem.y).backward()
    assert total.batches == 3
    found = problem.taken(E.Variance())
    close(found["variance"], expected["variance"])
    close(found["grad"], [2 * g for g in expected["grad"]])  # as of two losses


def test_a_model_that_is_not_extended() -> None:
    model = nn.Linear(2, 2)
    with (
        pytest.warns(UserWarning, match="no extended model"),
        pytest.raises(RuntimeError, match="no quantity in one backward pass.*extend the model"),
        backpack.accumulating(E.BatchGrad()),
    ):
        F.mse_loss(model(torch.randn(3, 2)), torch.randn(3, 2)).backward()


def test_nothing_waits_for_the_garbage_collector() -> None:
    problem = Problem()
    gc.collect()
    gc.disable()
    try:
        total = backpack.accumulating(E.BatchGrad(), E.GGNMP())
        problem.loop(total)
        p = problem.parameters[0]
        kept = [weakref.ref(p.grad_batch), weakref.ref(p.ggnmp)]
        problem.taken(E.BatchGrad(), E.GGNMP())
        del total
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()


# --------------------------------------------------------------------------------------
# What is refused


class GradientMax(E.BackpropExtension):
    savefield = "grad_max"

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        return form.dense()[0].flatten(1).abs().amax(1)


class Doubled(E.SumGradSquared):
    """Another value than its base class, whose rule may not be its own."""

    def finish(self, state: Tensor, context: Any) -> Tensor:
        return 2 * state + 1


@pytest.mark.parametrize(
    "ext, message",
    [
        (GradientMax(), "does not say how its values .*`combine`"),
        (Doubled(), "does not say how its values .*`combine`"),
        (E.KFRA(), "averages a matrix over the batch"),
        (E.EKFLR(), "factors first .*bases="),
        (E.EKFAC(), "factors first .*bases="),
    ],
)
def test_quantities_without_a_rule(ext: E.BackpropExtension, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        backpack.accumulating(ext)


def test_subsampling() -> None:
    for ext in (E.BatchGrad([0]), E.SqrtGGNExact([0]), E.SqrtGGNMC(subsampling=[1])):
        with pytest.raises(ValueError, match="picks samples of one batch"):
            backpack.accumulating(ext)


def test_rules_of_ones_own() -> None:
    class Largest(GradientMax):
        combine = Joined(degree=1)

    class Trace(E.BackpropExtension):
        savefield = "trace"
        source = ExactRoot()
        combine = Added(degree=1)

        def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
            return form.squared_norms().sum()

    problem, exts = Problem(), [Largest(), Trace()]
    expected = problem.whole(*exts)
    problem.loop(backpack.accumulating(*exts))
    problem.compare(problem.taken(*exts), expected)


def test_bases() -> None:
    """Eigenvalues of each batch in one basis, by hand."""
    problem = Problem(reduction="sum")
    expected = problem.whole(E.EKFLR())
    problem.loop(backpack.accumulating(E.KFLR()))
    bases = {p: p.kflr.eig().eigenvectors for p in problem.parameters}
    problem.loop(backpack.accumulating(E.EKFLR(bases=bases), gradient=False))
    problem.compare(problem.taken(E.EKFLR()), expected)
    with (
        pytest.raises(ValueError, match=r"no eigenvectors are given for .*\(3, 5\)"),
        block_of(E.EKFLR(bases={})),
    ):
        problem.lossfunc(problem.model(problem.X), problem.y).backward()


# --------------------------------------------------------------------------------------
# Loaders


class Output(dict):
    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Named(nn.Module):
    """As models of transformers are called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, inputs: Tensor, labels: Tensor | None = None, plain: bool = False) -> Any:
        logits = self.layer(inputs)
        if labels is None:
            return Output(logits=logits)
        return Output(loss=F.cross_entropy(logits, labels), logits=logits)


LOADERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[], Any]]] = {
    "dictionaries with losses": (lambda X, y: {"inputs": X, "labels": y}, lambda: None),
    "dictionaries": (lambda X, y: {"inputs": X, "labels": y}, nn.CrossEntropyLoss),
    "pairs of dictionaries": (lambda X, y: ({"inputs": X}, y), nn.CrossEntropyLoss),
    "pairs": (lambda X, y: (X, y), nn.CrossEntropyLoss),
    "pairs of tuples": (lambda X, y: ((X,), y), nn.CrossEntropyLoss),
    "lists": (lambda X, y: [X, y], lambda: F.cross_entropy),
}


@pytest.mark.parametrize("name", LOADERS)
def test_batches(name: str) -> None:
    pack, make = LOADERS[name]
    model, X, y = Named(), torch.randn(N, 4).double(), torch.arange(N) % 3
    F.cross_entropy(model(X).logits, y).backward()
    expected, model.layer.weight.grad = model.layer.weight.grad, None
    batches = [pack(*each) for each in zip(X.split(SIZES), y.split(SIZES), strict=True)]
    backpack.accumulate(model, make(), batches, [E.KFLR()], device="cpu", progress=True)
    close(model.layer.weight.grad, expected)


def test_other_batches() -> None:
    problem = Problem()
    for batch, options, message in (
        (problem.X, {}, "of which inputs and targets cannot be told"),
        ({"x": problem.X}, {}, "batches have no 'labels', but x"),
        ({"input": problem.X}, {"lossfunc": None}, "output has no loss"),
        ((problem.X, problem.y), {"lossfunc": None}, "need a lossfunc"),
        ((problem.X, problem.y), {"lossfunc": nn.MSELoss(reduction="none")}, "has reduction 'none'"),
    ):
        lossfunc = options.get("lossfunc", problem.lossfunc)
        with pytest.raises(ValueError, match=message):
            backpack.accumulate(problem.model, lossfunc, [batch], [E.KFLR()])
    with pytest.raises(ValueError, match="no batches"):
        backpack.accumulate(problem.model, problem.lossfunc, [], [E.KFLR()])


def test_iterators() -> None:
    problem = Problem()
    expected = problem.whole(E.KFLR())

    def once() -> Iterator[Any]:
        yield from problem.batches()

    with pytest.raises(ValueError, match="ekflr take two passes .* not an iterator"):
        backpack.accumulate(problem.model, problem.lossfunc, once(), [E.EKFLR()])
    backpack.accumulate(problem.model, problem.lossfunc, once(), [E.KFLR()])
    problem.compare(problem.taken(E.KFLR()), expected)


def test_several_inputs() -> None:
    model = Apply(lambda m, a, b: (a @ m.w + b).tanh(), w=P(4, 3)).double()
    a, b, y = torch.randn(N, 4).double(), torch.randn(N, 3).double(), torch.randn(N, 3).double()
    parts = list(zip(a.split(SIZES), b.split(SIZES), y.split(SIZES), strict=True))
    backpack.accumulate(model, nn.MSELoss(), parts, [E.BatchGrad()])
    close(model.w.grad_batch, torch.stack(list(Oracle(model, F.mse_loss, (a, b), y).grad_batch["w"])))


def test_half_precision_is_added_up_in_single() -> None:
    model, lossfunc = nn.Linear(4, 3), nn.MSELoss(reduction="sum")
    X, y = torch.randn(512, 4), torch.randn(512, 3)
    exact = copy.deepcopy(model)
    backpack.accumulate(exact, lossfunc, [(X, y)], [E.DiagGGNExact(), E.KFLR(), E.Variance()])
    model.bfloat16()
    parts = list(zip(X.bfloat16().split(2), y.bfloat16().split(2), strict=True))
    backpack.accumulate(model, lossfunc, parts, [E.DiagGGNExact(), E.KFLR(), E.Variance()])
    for field in ("grad", "diag_ggn_exact", "variance"):
        value, expected = getattr(model.weight, field), getattr(exact.weight, field)
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(
            value.float(), expected, rtol=0.03, atol=0.03 * float(expected.max())
        )
    for a, b in zip(model.weight.kflr, exact.weight.kflr, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=0.03, atol=0.03 * float(b.max()))


# --------------------------------------------------------------------------------------
# The page


def test_page() -> None:
    page = Path(__file__).parents[2] / "docs" / "datasets.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    space: dict[str, Any] = {"__name__": "datasets"}
    exec(compile(code, str(page), "exec"), space)
    model, X, y = space["model"], space["X"], space["y"]
    with block_of(E.BatchGrad(), E.KFLR(), E.Variance(), gradient=False):
        space["lossfunc"](model(X), y).backward()
    squares = sum(p.grad_batch.flatten(1).square().sum(1) for p in model.parameters())
    torch.testing.assert_close(space["norms"], squares.sqrt())
    for a, b in zip(space["F"], space["weight"].kflr, strict=True):
        torch.testing.assert_close(a, b)
