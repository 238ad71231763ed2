"""Influence of samples by EKFAC: ``python -m benchmarks.influence agree``, ``cost`` or ``large``.

``agree`` and ``cost`` run beside kronfluence (``benchmarks/peers/kronfluence.txt``), as a black box: on
a network without biases, as it takes a layer's weight and bias for one matrix. Drawn labels, which two
programs do not share, are left out for ``agree``: every sample stands there once for each class, with
the class's probability as the weight of its square. ``large`` is ours alone: each step of GPT-2 small,
ViT-B/16 and ResNet-50 as a multiple of a gradient, with the most memory beyond the model.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from backpack import accumulate, backpack, extend
from backpack.extensions import EKFAC, EKFLR, KFAC, BackpropExtension, BatchGrad
from backpack.forms.base import Form
from backpack.own import Joined
from benchmarks.large import MODELS, bytes_of, problem
from benchmarks.worker import peak_bytes, reset_peak

CLASSES, DAMPING = 10, 1e-3


class Scores(BackpropExtension):
    """Scalar products of samples' gradients, which are not written out, with vectors: ``[Q, N]``.

    Args:
        vectors: of each parameter, ``[Q, *p]``.
    """

    savefield = "influence"
    needs_gradient = False
    combine = Joined(1, axis=1)

    def __init__(self, vectors: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        self.vectors = vectors

    def begin(self, parameter: Tensor, form: Form, sign: Tensor | None = None) -> Tensor:
        return form.project(self.vectors[parameter])[:, 0]


def solved(
    model: nn.Module, loss: Callable[[], Tensor], field: str, damping: float
) -> dict[Tensor, Tensor]:
    """``(F + damping)^-1 g`` for the gradient of each query in a loss that is a sum over queries."""
    with backpack(BatchGrad(), gradient=False):
        loss().backward()
    found = {}
    for p in model.parameters():
        found[p] = getattr(p, field).solve(p.grad_batch, damping)
        del p.grad_batch
    return found


def scores(model: nn.Module, loader: DataLoader, vectors: Mapping[Tensor, Tensor]) -> Tensor:
    """How much each sample's gradient moves each query's loss, ``[Q, N]``."""
    summed = nn.CrossEntropyLoss(reduction="sum")
    accumulate(model, summed, loader, [Scores(vectors)], gradient=False)
    return sum((p.influence for p in model.parameters()), torch.zeros(()))


# --------------------------------------------------------------------------------------
# Beside kronfluence


def network(width: int) -> nn.Sequential:
    layers = nn.Linear(64, width, False), nn.Tanh(), nn.Linear(width, width, False)
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(width, CLASSES, False))


def data(samples: int, dtype: torch.dtype) -> TensorDataset:
    return TensorDataset(torch.randn(samples, 64, dtype=dtype), torch.randint(CLASSES, (samples,)))


def ours(
    model: nn.Module,
    train: TensorDataset,
    queries: TensorDataset,
    batch: int,
    curvature: BackpropExtension,
) -> Tensor:
    loader, (X, y) = DataLoader(train, batch_size=batch), queries.tensors
    accumulate(extend(model), nn.CrossEntropyLoss(), loader, [curvature], gradient=False)
    vectors = solved(
        model, lambda: F.cross_entropy(model(X), y, reduction="sum"), curvature.savefield, DAMPING
    )
    return scores(model, loader, vectors)


class EveryClass(Dataset):
    """Each sample once for each class."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data) * CLASSES

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.data[i // CLASSES][0], i % CLASSES


def theirs(
    model: nn.Module, train: TensorDataset, queries: TensorDataset, batch: int, exact: bool
) -> Tensor:
    """The same by kronfluence, which keeps its factors in files."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            X, y = batch
            logits = model(X)
            if exact and fitting:
                probabilities = logits.detach().softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
                return (F.cross_entropy(logits, y, reduction="none") * probabilities.sqrt()).sum()
            if sample:
                y = torch.multinomial(logits.detach().softmax(1), 1).squeeze(1)
            return F.cross_entropy(logits, y, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            X, y = batch
            return F.cross_entropy(model(X), y, reduction="sum")

    task, fitting = Classification(), True
    prepared = prepare_model(model, task)
    dtype = next(model.parameters()).dtype
    names = "activation_covariance gradient_covariance per_sample_gradient lambda".split()
    dtypes: Any = dict.fromkeys([f"{name}_dtype" for name in names], dtype)
    further = ("per_sample_gradient_dtype", "precondition_dtype", "score_dtype")
    damping = DAMPING / CLASSES if exact else DAMPING
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "influence",
            prepared,
            task,
            cpu=True,
            disable_tqdm=True,
            output_dir=folder,
            log_level=logging.ERROR,
        )
        analyzer.fit_all_factors(
            "factors",
            EveryClass(train) if exact else train,
            per_device_batch_size=batch,
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=exact, **dtypes),
        )
        fitting = False
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            queries,
            train,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=batch,
            score_args=ScoreArguments(
                damping_factor=damping,
                **dict.fromkeys(further, dtype),  # type: ignore[arg-type]
            ),
        )
        found = analyzer.load_pairwise_scores("scores")["all_modules"]
    return found / CLASSES if exact else found


def agree() -> None:
    """Print how far scores are apart, in double precision and of the largest."""
    torch.manual_seed(0)
    model, train, queries = network(32).double(), data(200, torch.float64), data(20, torch.float64)
    here = ours(copy.deepcopy(model), train, queries, 64, EKFLR())
    there = theirs(model, train, queries, 64, exact=True)
    error = float((here - there).abs().max() / here.abs().max())
    print(f"largest difference, of the largest score: {error:.1e}")


def cost(rounds: int, width: int, samples: int) -> None:
    """Print seconds of both, in turns, the least of some rounds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, train, queries = network(width), data(samples, torch.float32), data(50, torch.float32)
    ways: dict[str, Callable[[], Tensor]] = {
        "this library": lambda: ours(copy.deepcopy(model), train, queries, 128, EKFAC()),
        "kronfluence": lambda: theirs(copy.deepcopy(model), train, queries, 128, exact=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    least = {name: min(each) for name, each in seconds.items()}
    print(
        f"| {samples} samples, 50 queries, width {width} | seconds | of this library's |\n|---|---|---|"
    )
    for name, each in least.items():
        print(f"| {name} | {each:.2f} | {each / least['this library']:.2f} |")


# --------------------------------------------------------------------------------------
# Large models

STEPS = "factors eigenvectors eigenvalues queries scores".split()


def measure(name: str, samples: int) -> dict[str, Any]:
    """Multiples of a gradient's time, and memory, with as many queries as samples of a batch."""
    torch.set_num_threads(1)
    model, loss = problem(name, samples)
    started = time.process_time()

    def taken(step: Callable[[], Any]) -> float:
        nonlocal started
        started = time.process_time()
        step()
        return time.process_time() - started

    def pass_with(ext: BackpropExtension, **options: Any) -> None:
        with backpack(ext, **options):
            loss().backward()

    def eigenvectors() -> None:
        for p in parameters:
            bases[p] = p.kfac.eig().eigenvectors
            del p.kfac

    loss().backward()
    gradient = min(taken(lambda: loss().backward()) for _ in range(3))
    model.zero_grad()
    before = reset_peak()
    parameters = list(extend(model).parameters())
    bases: dict[Tensor, Any] = {}
    vectors: dict[Tensor, Tensor] = {}
    steps: dict[str, Callable[[], Any]] = {
        "factors": lambda: pass_with(KFAC(), gradient=False),
        "eigenvectors": eigenvectors,
        "eigenvalues": lambda: pass_with(EKFAC(bases=bases), gradient=False),
        "queries": lambda: vectors.update(solved(model, loss, "ekfac", DAMPING)),
        "scores": lambda: pass_with(Scores(vectors), gradient=False),
    }
    multiples = {step: taken(steps[step]) / gradient for step in STEPS}
    values = sum(bytes_of([*p.ekfac._tensors()]) for p in parameters)
    asked = sum(map(bytes_of, vectors.values()))
    return {
        "gradient": gradient,
        **multiples,
        "values": values,
        "asked": asked,
        "peak": peak_bytes() - before,
    }


def large(names: list[str], samples: int | None) -> None:
    """Print a table, each model in a process of its own."""
    print(f"| model | gradient, s | {' | '.join(STEPS)} | most, GB | EKFAC, GB | queries, GB |")
    print("|---" * (len(STEPS) + 5) + "|")
    for name in names:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.influence", "large"]
        command += ["--models", name, "--samples", str(samples or MODELS[name]), "--child"]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            print(f"| {name} | {ran.stderr.strip().splitlines()[-1]} |", flush=True)
            continue
        found = json.loads(ran.stdout.splitlines()[-1])
        numbers = [f"{found[key]:.2f}" for key in ("gradient", *STEPS)]
        numbers += [f"{found[key] / 2**30:.2f}" for key in ("peak", "values", "asked")]
        print(f"| {name} | {' | '.join(numbers)} |", flush=True)


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("agree", "cost", "large"))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--samples", type=int, help="of a batch, or of the data set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.models[0], given.samples)))
    elif given.what == "agree":
        agree()
    elif given.what == "cost":
        cost(given.rounds, given.width, given.samples or 2000)
    else:
        large(given.models, given.samples)


if __name__ == "__main__":
    main()
