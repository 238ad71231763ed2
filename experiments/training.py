"""One run: a problem is trained by an optimizer with given hyper-parameters."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backpack import extend
from benchmarks.suite import machine
from experiments.data import Data, Part
from experiments.optimizers import OPTIMIZERS
from experiments.problems import PROBLEMS, settle_batch_norm, training_mode

Record = dict[str, Any]
CURVES = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")


@dataclass(frozen=True)
class Setting:
    """What a run depends on, the machine aside.

    Args:
        problem: name in ``PROBLEMS``.
        optimizer: name in ``OPTIMIZERS``.
        lr: learning rate.
        damping: of the curvature, for optimizers that have one.
        seed: of initialization, order of samples, dropout and Monte-Carlo samples.
        epochs: passes over the training set.
        batch: samples of one step.
        samples: the largest size of each set, where they are cut.
    """

    problem: str
    optimizer: str
    lr: float
    damping: float | None
    seed: int
    epochs: int
    batch: int
    samples: int | None = None

    @property
    def path(self) -> Path:
        """Where the record is, below the output folder: a file for each setting."""
        sizes = f"epochs={self.epochs},batch={self.batch}"
        sizes += "" if self.samples is None else f",samples={self.samples}"
        damping = "" if self.damping is None else f"damping={self.damping:g},"
        name = f"{self.optimizer},lr={self.lr:g},{damping}seed={self.seed}.json"
        return Path(self.problem, sizes, name)


class Diverged(Exception):  # noqa: N818
    """There is no going on with a run; the message says why."""


class Trainer:
    """A model with its optimizer: one step, and what there is to say about its state.

    Parameters start the same for all optimizers, and samples come in the same order, for one seed.
    """

    def __init__(self, setting: Setting, data: Data, device: str = "cpu") -> None:
        problem = PROBLEMS[setting.problem]
        if why := problem.skip.get(setting.optimizer):
            raise ValueError(f"{setting.optimizer} is not offered on {problem.title}: {why}")
        if setting.batch > len(data.train.y):
            raise ValueError(
                f"{problem.title}: a batch of {setting.batch} needs as many training samples, "
                f"but there are {len(data.train.y)}"
            )
        torch.manual_seed(setting.seed)
        self.setting, self.data, self.device = setting, data, device
        self.order = torch.Generator().manual_seed(setting.seed)
        self.model = problem.build(data.classes).to(device)
        self.lossfunc: nn.Module = nn.CrossEntropyLoss()
        settle_batch_norm(self.model, data.train.x[:1024])
        self.optimizer = OPTIMIZERS[setting.optimizer].build(
            self.model, setting.lr, setting.damping, problem.l2
        )
        self.block: Callable[[], Any] = getattr(self.optimizer, "backpack", nullcontext)
        if self.block is not nullcontext:
            self.lossfunc = extend(self.lossfunc)

    @property
    def steps(self) -> int:
        """Steps of an epoch; samples that fill no batch wait for the next one."""
        return len(self.data.train.y) // self.setting.batch

    def step(self, x: Tensor, y: Tensor) -> None:
        """Train on one batch.

        Raises:
            Diverged: if the loss, or what the step is computed from, is not finite, or a Kronecker
                factor cannot be decomposed.
        """
        self.optimizer.zero_grad()
        with self.block():
            loss = self.lossfunc(self.model(x), y)
            if not loss.isfinite():
                raise Diverged("the loss is not finite")
            try:
                loss.backward()
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise Diverged(str(error)) from error
        try:
            self.optimizer.step()
        except ValueError as error:
            # What the optimizers raise for numbers from which there is no step.
            raise Diverged(str(error)) from error

    def epoch(self, advance: Callable[[], None]) -> None:
        """Train on every sample once."""
        training_mode(self.model)
        order = torch.randperm(len(self.data.train.y), generator=self.order)
        for index in order[: self.steps * self.setting.batch].to(self.device).split(self.setting.batch):
            self.step(self.data.train.x[index], self.data.train.y[index])
            advance()
        synchronize(self.device)

    @torch.no_grad()
    def evaluate(self, part: Part) -> tuple[float, float]:
        """Mean loss, without L2 regularization, and accuracy; the model is in evaluation mode."""
        self.model.eval()
        loss, correct = 0.0, 0
        for x, y in zip(part.x.split(500), part.y.split(500), strict=True):
            f = self.model(x)
            loss += float(nn.functional.cross_entropy(f, y, reduction="sum"))
            correct += int((f.argmax(1) == y).sum())
        return loss / part.y.numel(), correct / part.y.numel()

    def state(self) -> list[float]:
        """The values of ``CURVES``.

        On the training side from as many samples as there are for validation.
        """
        count = len(self.data.validation.y)
        train = Part(self.data.train.x[:count], self.data.train.y[:count])
        return [*self.evaluate(train), *self.evaluate(self.data.validation)]


def train(
    setting: Setting, data: Data, device: str = "cpu", advance: Callable[[], None] = lambda: None
) -> Record:
    """Train, and record the curves; those of a run that diverges end with the last finite loss.

    Time is that of training alone, evaluations are not in it.

    Args:
        setting: what to do.
        data: as the problem loads it.
        device: where to do it.
        advance: called after each step.

    Returns:
        What goes into the JSON file: ``setting``, ``environment``, ``date``, ``data`` (sizes),
        ``parameters``, ``curves`` (with ``epoch`` and ``seconds``), ``diverged`` (why, or ``None``) and
        ``test``.
    """
    data = data.first(setting.samples).to(device)
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    trainer = Trainer(setting, data, device)
    rows: list[list[float]] = [[0, 0.0, *trainer.state()]]
    seconds, diverged = 0.0, None
    for epoch in range(1, setting.epochs + 1):
        try:
            start = time.perf_counter()
            trainer.epoch(advance)
            seconds += time.perf_counter() - start
            row = [epoch, seconds, *trainer.state()]
            if not all(map(isfinite, row)):
                raise Diverged("a loss after the epoch is not finite")
        except Diverged as reason:
            diverged = f"epoch {epoch}: {reason}"
            break
        rows.append(row)
    test = trainer.evaluate(data.test)
    columns = zip(("epoch", "seconds", *CURVES), zip(*rows, strict=True), strict=True)
    return {
        "setting": asdict(setting),
        "environment": environment(device),
        "date": date,
        "data": {
            **{name: len(getattr(data, name).y) for name in ("train", "validation", "test")},
            "note": data.note,
        },
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "curves": {name: [float(f"{value:.6g}") for value in values] for name, values in columns},
        "diverged": diverged,
        "test": None if diverged else {"loss": test[0], "accuracy": test[1]},
    }


def step_times(
    settings: list[Setting], data: Data, device: str, rounds: int, advance: Callable[[], None]
) -> Record:
    """Seconds of an optimizer's step: forward and backward pass, and update.

    All take turns on the same batch, in an order that rotates, so that what else the machine does
    hits all of them. Two turns of each come before and do not count.

    Returns:
        What goes into the JSON file: ``problem``, ``batch``, ``environment``, ``date`` and ``seconds``,
        for each optimizer a list of ``rounds`` numbers.
    """
    data = data.to(device)
    trainers = [Trainer(setting, data, device) for setting in settings]
    size = settings[0].batch
    x, y = data.train.x[:size], data.train.y[:size]
    times: list[list[float]] = [[] for _ in trainers]
    for trainer in trainers:
        training_mode(trainer.model)
    for j in range(-2, rounds):
        for k in range(len(trainers)):
            which = (j + k) % len(trainers)
            start = time.perf_counter()
            trainers[which].step(x, y)
            synchronize(device)
            if j >= 0:
                times[which].append(time.perf_counter() - start)
            advance()
    return {
        "problem": settings[0].problem,
        "batch": size,
        "environment": environment(device),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": {s.optimizer: each for s, each in zip(settings, times, strict=True)},
    }


def environment(device: str) -> Record:
    """Versions and machine."""
    about = machine(device)
    return {
        "backpack": version("backpack-anew"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **{name: about[name] for name in ("cpu", "cores", "gpu", "system")},
    }


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked for."""
    if device != "cpu":
        torch.accelerator.synchronize()
