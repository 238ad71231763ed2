"""The test problems of the paper and the thesis (DeepOBS, Schneider et al., 2019, arXiv:1903.05499).

Networks are initialized as torch does by default, images are not augmented, and L2 regularization acts
on all parameters; otherwise networks, batch sizes and epochs are the benchmark's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks import models
from benchmarks.problems import COLUMNS
from experiments import data
from experiments.data import Data


@dataclass(frozen=True)
class Problem:
    """A network, its data, and how long it is trained.

    Args:
        title: for people.
        load: from a folder to the data.
        build: from the number of classes to a network with cross-entropy as loss.
        batch: samples of one step.
        epochs: passes over the training set.
        l2: factor of half the squared norm of all parameters, added to the loss.
        skip: optimizers that are not offered, and why.
    """

    title: str
    load: Callable[[Path | None], Data]
    build: Callable[[int], nn.Module]
    batch: int
    epochs: int
    l2: float = 0.0
    skip: Mapping[str, str] = field(default_factory=dict)


def digits_logreg(classes: int = 10) -> nn.Module:
    """One linear layer, for images ``[N, 1, 8, 8]``."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


def digits_cnn(classes: int = 10) -> nn.Module:
    """Two convolutions and two linear layers, for images ``[N, 1, 8, 8]``."""
    return nn.Sequential(
        *(*models.conv(1, 8, 3, padding=1), nn.MaxPool2d(2)),
        *(*models.conv(8, 16, 3, padding=1), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes)),
    )


def logreg(classes: int = 10) -> nn.Module:
    """One linear layer, for images ``[N, 1, 28, 28]``."""
    return nn.Sequential(nn.Flatten(), models.logreg(classes))


_LARGE = {"KFRA": "its recursion carries a matrix with a row for every number of a feature map"}
_EXACT = "DiagGGNExact", "DiagHessian", "KFLR", "EKFLR"
_TEXT = _LARGE | dict.fromkeys(_EXACT, COLUMNS["KFLR"])
_RESIDUAL = {"KFRA": "its recursion needs a chain of operations"}

PROBLEMS = {
    "digits-logreg": Problem(
        "Logistic regression, digits",
        *(data.digits, digits_logreg, 64, 20),
    ),
    "digits-cnn": Problem("Small CNN, digits", data.digits, digits_cnn, 64, 20, skip=_LARGE),
    "mnist-logreg": Problem("Logistic regression, MNIST", data.mnist, logreg, 128, 50),
    "mnist-2c2d": Problem("2C2D, MNIST", data.mnist, models.net_2c2d, 128, 100, skip=_LARGE),
    "fmnist-2c2d": Problem(
        "2C2D, Fashion-MNIST",
        *(data.fashion_mnist, models.net_2c2d, 128, 100),
        skip=_LARGE,
    ),
    "cifar10-3c3d": Problem(
        "3C3D, CIFAR-10",
        *(data.cifar10, models.net_3c3d, 128, 100, 0.002),
        skip=_LARGE,
    ),
    "cifar100-allcnnc": Problem(
        "All-CNN-C, CIFAR-100",
        *(data.cifar100, lambda classes: models.all_cnn_c(classes, dropout=True), 256, 350, 0.0005),
        skip=_LARGE,
    ),
    "svhn-wrn164": Problem(
        "WideResNet 16-4, SVHN",
        *(data.svhn, models.wide_resnet, 128, 160, 0.0005),
        skip=_RESIDUAL,
    ),
    "tolstoi-char-rnn": Problem(
        "char-RNN, War and Peace",
        *(data.war_and_peace, models.CharLSTM, 50, 200),
        skip=_TEXT,
    ),
}


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def settle_batch_norm(model: nn.Module, x: Tensor) -> None:
    """Give batch norm the statistics of ``x`` at initialization, which it keeps.

    With statistics of each mini-batch, samples have no gradients or curvature of their own. All
    optimizers, first-order ones included, train with these; scale and shift are learned.
    """
    if norms := _batch_norms(model):
        for norm in norms:
            norm.momentum = None  # the running statistics become the mean over all batches seen: one
        model.train()
        with torch.no_grad():
            model(x)


def training_mode(model: nn.Module) -> None:
    """Training mode, but for batch norm."""
    model.train()
    for norm in _batch_norms(model):
        norm.eval()
