"""A long run: nothing piles up, nothing is lost, and it costs what it may."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack.cockpit import History, Monitor, watch


def tensors() -> int:
    """Number of tensors that are alive."""
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


class Run:
    """A network that learns, with or without a monitor."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.truth = torch.randn(64, 10)

    def step(self) -> float:
        """One step; its loss."""
        X = torch.randn(64, 64)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(X), (X @ self.truth).argmax(1))
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def watched(self, **options: object) -> Monitor:
        """A monitor of it."""
        return watch(self.model, self.optimizer, **options)


@pytest.mark.slow
def test_two_thousand_tracked_steps(tmp_path: Path) -> None:
    """Memory is flat, and the history is exact: in memory, and read back from its file."""
    run, path = Run(), tmp_path / "run.jsonl"
    monitor = run.watched(every=1, path=path, alarms="all", quantities="economy")
    losses, alive = [], []
    for step in range(2000):
        losses.append(run.step())
        if step in (50, 1999):
            alive.append(tensors())
    monitor.close()
    assert alive[0] == alive[1]
    history = monitor.history()
    assert history.steps == list(range(2000)) and monitor.left_out == {}
    steps, found = history.column("loss")
    assert steps == list(range(2000))
    assert found == pytest.approx(losses, rel=1e-6)
    assert len(history.column("alpha")[0]) >= 1990
    read = History.read(path)
    assert list(read) == list(history) and read.events == history.events
    # A step takes some kilobytes, those of the histogram included.
    assert path.stat().st_size < 2000 * 8000


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.05, 0.2])
def test_overhead_within_budget(budget: float) -> None:
    """Measured by itself, and from outside beside a run that nobody watches."""
    plain, watched = Run(), Run()
    monitor = watched.watched(every=1, budget=budget)
    spent = [0.0, 0.0]
    for _ in range(2000):
        for k, run in enumerate((plain, watched)):
            began = time.process_time()
            run.step()
            spent[k] += time.process_time() - began
    monitor.close()
    tracked = len(monitor.history())
    assert 3 < tracked < 2000
    assert monitor.clock.overhead <= 1.1 * budget
    # Hooks of steps that are not tracked, and a machine on which others work.
    assert spent[1] / spent[0] < 1 + 2 * budget + 0.1
