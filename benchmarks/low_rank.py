"""Each library's way to the low-rank curvature of a batch: spectra, directions, steps."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from benchmarks.libraries import LIBRARIES, Library, Step, Values

TASKS = ("eigenvalues", "pairs", "derivatives", "newton")
EXACT = tuple(f"{task}, exact" for task in TASKS)
SAMPLED = tuple(f"{task}, sampled" for task in TASKS)
PAIRS, DAMPING = 10, 1e-2


def top(values: Tensor) -> Tensor:
    """The largest eigenvalues, from the largest down."""
    return values.sort(descending=True).values[:PAIRS]


class LowRank(Library):
    """This library: one Gram matrix, everything afterwards."""

    distribution = "backpack-anew"
    quantities = EXACT + SAMPLED

    def prepare(self, model: nn.Module) -> nn.Module:
        self.extended = importlib.import_module("backpack").extend(nn.CrossEntropyLoss())
        self.kind = importlib.import_module("backpack.vivit").LowRank
        return importlib.import_module("backpack").extend(model)

    def steps(self, quantity: str) -> Step:
        task, kind = quantity.split(", ")

        def step() -> None:
            with self.kind(columns="exact" if kind == "exact" else "mc") as curvature:
                self.extended(self.model(self.X), self.y).backward()
            if task == "eigenvalues":
                self.found = [curvature.eigvalsh()]
                return
            pairs = curvature.eigh(k=PAIRS)
            if task == "pairs":
                self.found = [pairs.values, pairs.vectors]
            elif task == "derivatives":
                found = curvature.derivatives(pairs)
                self.found = [found.lambdas, found.gammas.abs()]
            else:
                self.found = curvature.newton(pairs, DAMPING)

        return step

    def values(self, quantity: str) -> Values:
        return named(quantity, self.found)


def named(quantity: str, found: Sequence[Tensor]) -> Values:
    """What is compared: the largest eigenvalues, or all of a task, from the largest down."""
    task = quantity.split(", ")[0]
    if task in ("eigenvalues", "pairs"):
        return {task: [top(found[0])]}
    if task == "derivatives":
        order = found[0].mean(0).argsort(descending=True)
        return {"lambdas": [found[0][:, order]], "gammas": [found[1][:, order]]}
    return {"newton": [torch.cat([part.flatten() for part in found])]}


class Vivit(Library):
    """vivit-for-pytorch 1.0.0 on backpack-for-pytorch, with a stand-in for what torch has dropped."""

    distribution = "vivit-for-pytorch"
    quantities = EXACT + SAMPLED

    def prepare(self, model: nn.Module) -> nn.Module:
        Tensor.symeig = symeig
        torch.symeig = symeig
        backpack = importlib.import_module("backpack")
        self.context, self.library = backpack.backpack, importlib.import_module("vivit")
        self.extended = backpack.extend(nn.CrossEntropyLoss())
        return backpack.extend(model)

    def steps(self, quantity: str) -> Step:
        task, kind = quantity.split(", ")
        draws = 0 if kind == "exact" else 1
        group: dict[str, Any] = {"params": list(self.model.parameters())}
        group["criterion"] = lambda values: list(range(len(values)))[-PAIRS:]
        group["damping"] = lambda values, vectors, gammas, lambdas: DAMPING * torch.ones_like(values)
        if task == "eigenvalues":
            computation = self.library.EigvalshComputation(mc_samples=draws)
        elif task == "pairs":
            computation = self.library.EighComputation(mc_samples=draws, warn_small_eigvals=0.0)
        elif task == "derivatives":
            kind_of = self.library.DirectionalDerivativesComputation
            computation = kind_of(mc_samples_ggn=draws, warn_small_eigvals=0.0)
        else:
            kind_of = self.library.DirectionalDampedNewtonComputation
            computation = kind_of(mc_samples_ggn=draws, warn_small_eigvals=0.0)

        def step() -> None:
            several = hasattr(computation, "get_extensions")
            given = computation.get_extensions() if several else [computation.get_extension()]
            with self.context(*given, extension_hook=computation.get_extension_hook([group])):
                self.extended(self.model(self.X), self.y).backward()
            found = computation.get_result(group)
            if task == "eigenvalues":
                self.found = [found]
            elif task == "derivatives":
                self.found = [found[1], found[0].abs()]
            else:
                self.found = list(found)

        return step

    def values(self, quantity: str) -> Values:
        return named(quantity, self.found)


def symeig(matrix: Tensor, eigenvectors: bool = False, upper: bool = True) -> tuple[Tensor, Tensor]:
    """As torch had it."""
    if eigenvectors:
        return tuple(torch.linalg.eigh(matrix, UPLO="U" if upper else "L"))
    return torch.linalg.eigvalsh(matrix), matrix.new_empty(0)


class Lanczos(Library):
    """curvlinops: its operator of the GGN, and SciPy's ``eigsh``."""

    distribution = "curvlinops-for-pytorch"
    quantities = ("pairs, exact",)

    def prepare(self, model: nn.Module) -> nn.Module:
        self.operator = importlib.import_module("curvlinops").GGNLinearOperator
        self.solve: Callable[..., Any] = importlib.import_module("scipy.sparse.linalg").eigsh
        return model

    def steps(self, quantity: str) -> Step:
        parameters = [p for p in self.model.parameters() if p.requires_grad]

        def step() -> None:
            operator = self.operator(
                *(self.model, self.lossfunc, parameters, [(self.X, self.y)]),
                check_deterministic=False,
                num_data=len(self.X),
            )
            start = numpy.random.default_rng(0).standard_normal(operator.shape[0])
            values, vectors = self.solve(operator.to_scipy(), k=PAIRS, v0=start, tol=1e-4)
            self.found = [torch.as_tensor(values), vectors]

        return step

    def values(self, quantity: str) -> Values:
        return named(quantity, self.found)


LIBRARIES |= {"low-rank": LowRank, "vivit-for-pytorch": Vivit, "lanczos": Lanczos}
