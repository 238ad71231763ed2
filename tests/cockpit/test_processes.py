"""Two processes that train together give the numbers of one with the whole batch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpack.cockpit import watch
from tests.processes import spawn

NAMES = """loss grad_norm param_norm update_size norm_test inner_test ortho_test noise_scale alpha
mean_gsnr early_stopping activation_rms output_grad_rms grad_hist hess_max_ev""".split()


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return nn.Sequential(*layers).double()


def train(net: nn.Module, rank: int, world: int, path: str | None, passes: int) -> dict[str, Any]:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    logged = []
    monitor = watch(
        net,
        optimizer,
        quantities=NAMES,
        every=1,
        path=path,
        log=lambda values, step: logged.append(step),
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(passes):
            X = torch.randn(8, 4, generator=generator).double()
            y = torch.randint(3, (8,), generator=generator)
            mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
            (F.cross_entropy(net(X[mine]), y[mine]) / passes).backward()
        optimizer.step()
    monitor.close()
    return {"left out": monitor.left_out, "records": list(monitor.history()), "logged": logged}


def passes_of(passes: int, folder: Path, rank: int, size: int) -> dict[str, Any]:
    net = nn.parallel.DistributedDataParallel(model())
    return train(net, rank, size, f"{folder}/run.jsonl", passes)


@pytest.mark.parametrize("passes", [1, 2])
def test_two_processes(tmp_path: Path, passes: int) -> None:
    together = spawn(functools.partial(passes_of, passes, tmp_path), 2, tmp_path)
    alone = train(model(), 0, 1, None, passes)
    assert [each["left out"] for each in together] == [{}, {}] and alone["left out"] == {}
    # Only the first logs.
    assert together[0]["logged"] and not together[1]["logged"]
    assert (tmp_path / "run.jsonl").exists()
    for each in together:
        for found, expected in zip(each["records"], alone["records"], strict=True):
            for key, value in expected.items():
                if key.startswith("hess_max_ev") and passes > 1:
                    continue  # still on its way
                if isinstance(value, float) and key != "time":
                    assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-12), key
                elif isinstance(value, dict):
                    assert found[key] == value
