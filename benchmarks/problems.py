"""Networks, batches and losses to measure with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import models


class Problem(NamedTuple):
    """A network and what goes into it.

    Args:
        build: from the number of classes (characters, words) to a network.
        shape: of one input; of ids where ``tokens`` is true.
        classes: by default.
        batch: number of samples, by default on a CPU and on a device.
        tokens: whether inputs are ids and every position has a target.
        skip: quantities left out, and why.
    """

    build: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    classes: int
    batch: tuple[int, int]
    tokens: bool = False
    skip: dict[str, str] = {}


EXACT = "DiagGGNExact", "KFLR"
COLUMNS = dict.fromkeys(EXACT, "thousands of columns: one for every output at every step")
ENTRIES = {"DiagHessian": "curvature between the layers: one product for every entry"}

PROBLEMS = {
    "logreg": Problem(models.logreg, (784,), 10, (128, 128)),
    "mlp": Problem(models.mlp, (784,), 10, (128, 128)),
    "2c2d": Problem(models.net_2c2d, (1, 28, 28), 10, (32, 128)),
    "3c3d": Problem(models.net_3c3d, (3, 32, 32), 10, (32, 128)),
    "allcnnc": Problem(models.all_cnn_c, (3, 32, 32), 100, (4, 256)),
    "resnet-32": Problem(models.resnet_32, (3, 32, 32), 10, (16, 128)),
    "wrn-16-4": Problem(models.wide_resnet, (3, 32, 32), 10, (8, 128)),
    "char-lstm": Problem(models.CharLSTM, (50,), 83, (50, 50), True, COLUMNS | ENTRIES),
    "gpt2": Problem(
        *(lambda words: models.TokensLast(models.GPT2(words)), (64,), 512, (8, 64), True),
        COLUMNS | ENTRIES,
    ),
    "vit": Problem(models.ViT, (3, 32, 32), 10, (16, 128), False, ENTRIES),
}


class Setting(NamedTuple):
    """A problem with its sizes; the defaults where a size is ``None``."""

    problem: str
    batch: int
    classes: int
    steps: int | None = None
    sweep: str = ""

    @property
    def key(self) -> str:
        """What it is called among the results."""
        sizes = f"batch={self.batch},classes={self.classes}" + f",steps={self.steps}" * bool(self.steps)
        return f"{self.problem}:{sizes}" + f":{self.sweep}" * bool(self.sweep)


SWEEPS: dict[str, dict[str, list[int]]] = {
    "batch": {"mlp": [16, 64, 256, 1024], "3c3d": [4, 16, 64], "char-lstm": [10, 50, 100]},
    "classes": {"mlp": [5, 20, 80, 320]},
    "steps": {"char-lstm": [10, 25, 50, 100]},
}


def setting(name: str, device: str = "cpu", batch: int | None = None, **sizes: Any) -> Setting:
    """A problem's setting, by default the standard one."""
    problem = PROBLEMS[name]
    steps = problem.shape[0] if problem.tokens else None
    sizes = {"classes": problem.classes, "steps": steps} | sizes
    return Setting(name, batch or problem.batch[device != "cpu"], **sizes)


def sweeps(names: list[str], device: str) -> list[Setting]:
    """Settings in which one size varies."""
    return [
        setting(name, device, **{size: value}, sweep=size)
        for size, lists in SWEEPS.items()
        for name, values in lists.items()
        if name in names
        for value in values
    ]


def make(chosen: Setting) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, with batch norm in evaluation mode, and one batch.

    All parameters are drawn, also those which start as zeros or ones.
    """
    problem = PROBLEMS[chosen.problem]
    torch.manual_seed(0)
    model = problem.build(chosen.classes)
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean = torch.randn(each.num_features) * 0.1
            each.running_var = torch.rand(each.num_features) + 0.5
            each.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.01)
    if problem.tokens:
        assert chosen.steps is not None
        size = (chosen.batch, chosen.steps)
        return model, torch.randint(chosen.classes, size), torch.randint(chosen.classes, size)
    return (
        model,
        torch.rand(chosen.batch, *problem.shape),
        torch.randint(chosen.classes, (chosen.batch,)),
    )
