"""A process that trains with one monitor, told by lines of JSON on its input what to do.

    python -m benchmarks.cockpit_worker KIND [FOLDER]

``KIND`` is ``original`` (cockpit-for-pytorch, found in the folder), ``names`` (this library's classes
of the same names, in the same loop) or ``watch`` (one line, and a loop that is not touched).
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.problems import make, setting

KIND = sys.argv[1] if len(sys.argv) > 1 else "watch"
if len(sys.argv) > 2:
    sys.path.insert(0, sys.argv[2])

from backpack import extend  # noqa: E402

if KIND == "original":
    from cockpit import Cockpit, quantities
    from cockpit.utils.configuration import configuration
    from cockpit.utils.schedules import linear
else:
    from backpack.cockpit import Cockpit, hess_trace, quantities, tic_diag, tic_trace, watch
    from backpack.cockpit.utils.configuration import configuration
    from backpack.cockpit.utils.schedules import linear

Batch = tuple[Tensor, Tensor]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
MORE = "Parameters", "MeanGSNR", "TICTrace"
# What is timed: of so many steps the first two are tracked.
PERIOD = 5
PARTS = "tracked", "every", "after", "between", "between"


def small(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Networks on which values are compared."""
    if name == "mlp":
        layers = (nn.Linear(25, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        return nn.Sequential(nn.Flatten(), *layers), (1, 5, 5)
    layers = (nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.Tanh())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3)), (1, 8, 8)


class Loop:
    """A training loop, with or without a monitor.

    Args:
        model: the network.
        optimizer: its optimizer.
        tracked: quantities, or the name of a configuration; ``None``: nobody watches.
        schedule: says of a step whether it is tracked.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tracked: Any,
        schedule: Callable[[int], bool],
    ) -> None:
        self.model, self.optimizer, self.count = model, optimizer, 0
        self.lossfunc: nn.Module = nn.CrossEntropyLoss()
        self.each = nn.CrossEntropyLoss(reduction="none")
        self.monitor: Any = None
        self.cockpit: Any = None
        if tracked is None:
            return
        if KIND == "watch":
            self.monitor = watch(model, optimizer, quantities=tracked, every=schedule, per="model")
            return
        extend(model)
        self.lossfunc = extend(self.lossfunc)
        if isinstance(tracked, str):
            tracked = configuration(tracked, track_schedule=schedule)
        self.cockpit = Cockpit(model.parameters(), quantities=tracked)

    def step(self, X: Tensor, y: Tensor) -> None:
        """One step."""
        self.optimizer.zero_grad()
        outputs = self.model(X)
        loss = self.lossfunc(outputs, y)
        if self.cockpit is None:
            loss.backward()
        else:
            losses = self.each(outputs, y)
            losses = losses.flatten(1).mean(1) if losses.dim() > 1 else losses
            known = {"batch_size": len(X), "individual_losses": losses}
            info = {**known, "loss": loss, "optimizer": self.optimizer}
            with self.cockpit(self.count, info=info):
                loss.backward(create_graph=self.cockpit.create_graph(self.count))
        self.optimizer.step()
        self.count += 1


def everything() -> list[Any]:
    """The full configuration and what it lacks, of the exact Hessian."""
    if KIND == "watch":
        curvature = [hess_trace("hessian"), tic_diag("hessian"), tic_trace("hessian")]
        names = "loss grad_norm distance update_size alpha norm_test inner_test ortho_test mean_gsnr"
        return [*names.split(), "hess_max_ev", *curvature]
    more = [getattr(quantities, name)(linear(1)) for name in MORE]
    return [*configuration("full", track_schedule=linear(1)), *more]


def plain(value: Any) -> Any:
    """Numbers in lists."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def eigenvalues(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, float]:
    """The Hessian's largest eigenvalue, and that of largest magnitude, by brute force."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    flat = torch.cat([p.flatten() for p in parameters.values()])
    sizes = [p.numel() for p in parameters.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(parameters.items(), flat.split(sizes), strict=True)
        given = {name: part.view_as(p) for (name, p), part in parts}
        return nn.functional.cross_entropy(torch.func.functional_call(model, given, (X,)), y)

    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
    return {"largest": float(values[-1]), "magnitude": float(values[values.abs().argmax()])}


class Worker:
    """The state between two lines."""

    def values(self, problem: str, optimizer: str, steps: int, batch: int) -> Any:
        """What the monitor says of a run, in double precision: numbers by step and name."""
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        model, shape = small(problem)
        loop = Loop(model, OPTIMIZERS[optimizer](model.parameters()), everything(), linear(1))
        generator = torch.Generator().manual_seed(1)
        exact = []
        for _ in range(steps):
            X = torch.rand(batch, *shape, generator=generator)
            y = torch.randint(3, (batch,), generator=generator)
            exact.append(eigenvalues(model, X, y) if KIND == "watch" else {})
            loop.step(X, y)
        torch.set_default_dtype(torch.float32)
        if loop.monitor is not None:
            loop.monitor.close()
            return {record["step"]: record | exact[record["step"]] for record in loop.monitor.history()}
        return {step: plain(found) for step, found in loop.cockpit.get_output().items()}

    def open(self, problem: str, batch: int | None, optimizer: str) -> None:
        """Choose what is timed."""
        self.chosen, self.optimizer = setting(problem, batch=batch), optimizer
        self.loops: dict[str, Loop] = {}

    def time(self, tracked: Sequence[str] | str | None, rounds: int) -> dict[str, list[float]]:
        """Seconds of processor time of steps, by what they are.

        Tracked after one that is not; tracked like the one before (``every``); the one ``after``, which
        knows where a tracked step has ended; and others (``between``).
        """
        found: dict[str, list[float]] = {part: [] for part in PARTS}
        key = str(tracked)
        if key not in self.loops:
            self.loops[key] = self._loop(tracked)
            self._timed(self.loops[key])  # with all that is done once
        loop = self.loops[key]
        for _ in range(rounds * PERIOD):
            part = PARTS[loop.count % PERIOD] if tracked is not None else "every"
            found[part].append(self._timed(loop))
        return found

    def _loop(self, tracked: Sequence[str] | str | None) -> Loop:
        model, self.X, self.y = make(self.chosen)
        stepper = OPTIMIZERS[self.optimizer](model.parameters())
        for group in stepper.param_groups:
            group["lr"] = 1e-3
        wanted: Any = tracked
        if isinstance(tracked, list) and KIND != "watch":
            wanted = [getattr(quantities, name)(_tracked) for name in tracked]
        return Loop(model, stepper, wanted, _tracked)

    def _timed(self, loop: Loop) -> float:
        start = time.process_time()
        loop.step(self.X, self.y)
        return time.process_time() - start


def _tracked(step: int) -> bool:
    return step % PERIOD < 2


def main() -> None:
    """Answer line by line."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Whatever a library prints is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        given = json.loads(line)
        try:
            answer = {"is": getattr(worker, given.pop("do"))(**given)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
