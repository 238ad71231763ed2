"""Every quantity that the original has too, on models and losses that it supports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import record
import torch
from torch import Tensor, nn

from backpack import backpack, extend, extensions
from backpack.custom_module.branching import Parallel
from backpack.custom_module.reduce_tuple import ReduceTuple

QUANTITIES = """BatchGrad BatchL2Grad SumGradSquared Variance DiagGGNExact BatchDiagGGNExact DiagHessian
BatchDiagHessian SqrtGGNExact KFLR KFRA GGNMP HMP""".split()
N = 4


class Last(nn.Module):
    """The last step of a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        """Pick it."""
        return x[:, -1]


class Recurrent(nn.Module):
    """A recurrent layer's outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Leave the states aside."""
        return self.layer(x)[0]


class Model(NamedTuple):
    """Layers, and the shape of one input."""

    layers: Callable[[], list[nn.Module]]
    shape: tuple[int, ...]
    outputs: int = 3
    vocabulary: int = 0


def dense(width: int, outputs: int = 3) -> list[nn.Module]:
    """What ends every model."""
    return [nn.Flatten(), nn.Linear(width, outputs)]


def calibrated(norm: nn.Module) -> nn.Module:
    """A normalisation with statistics and weights that are not the default."""
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return norm.eval()


MODELS = {
    "linear": Model(lambda: [nn.Linear(4, 3)], (4,)),
    "mlp": Model(lambda: [nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.ReLU(), *dense(4)], (4,)),
    "mlp, no bias": Model(lambda: [nn.Linear(4, 5, bias=False), nn.Tanh(), *dense(5)], (4,)),
    "one output": Model(lambda: [nn.Linear(4, 5), nn.Tanh(), *dense(5, 1)], (4,), outputs=1),
    "activations": Model(
        lambda: [
            *(nn.Linear(4, 5), nn.ELU(), nn.Linear(5, 5), nn.SELU(), nn.Linear(5, 5)),
            *(nn.LeakyReLU(), nn.Linear(5, 5), nn.LogSigmoid(), *dense(5)),
        ],
        (4,),
    ),
    "conv1d": Model(
        lambda: [nn.Conv1d(2, 3, 3, padding=1), nn.Sigmoid(), nn.MaxPool1d(2), *dense(9)], (2, 6)
    ),
    "conv2d": Model(
        lambda: [
            *(nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(3, 2, 2, dilation=1), nn.Tanh(), *dense(2)),
        ],
        (2, 8, 8),
    ),
    "conv2d, max pooling": Model(
        lambda: [
            *(nn.ZeroPad2d(1), nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.MaxPool2d(2, padding=1)),
            *(nn.Dropout(), nn.Conv2d(3, 2, 2, bias=False), nn.ReLU(), *dense(8)),
        ],
        (1, 5, 5),
    ),
    "conv2d, groups": Model(
        lambda: [nn.Conv2d(4, 6, 3, groups=2), nn.Sigmoid(), *dense(24)], (4, 4, 4)
    ),
    "conv3d": Model(lambda: [nn.Conv3d(1, 2, 2), nn.Sigmoid(), *dense(16)], (1, 3, 3, 3)),
    "transposed conv1d": Model(
        lambda: [nn.ConvTranspose1d(2, 3, 3, stride=2), nn.Sigmoid(), *dense(27)], (2, 4)
    ),
    "transposed conv2d": Model(
        lambda: [nn.ConvTranspose2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2), *dense(18)], (2, 3, 3)
    ),
    "batch norm": Model(
        lambda: [nn.Linear(4, 5), calibrated(nn.BatchNorm1d(5)), nn.Sigmoid(), *dense(5)], (4,)
    ),
    "batch norm 2d": Model(
        lambda: [nn.Conv2d(1, 3, 2), calibrated(nn.BatchNorm2d(3)), nn.ReLU(), *dense(12)], (1, 3, 3)
    ),
    "linear over steps": Model(
        lambda: [nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2), *dense(10)], (5, 4)
    ),
    "embedding": Model(
        lambda: [nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 4), nn.Sigmoid(), *dense(4)],
        (4,),
        vocabulary=7,
    ),
    "rnn": Model(lambda: [Recurrent(nn.RNN(2, 3, batch_first=True)), *dense(12)], (4, 2)),
    "lstm": Model(lambda: [Recurrent(nn.LSTM(2, 3, batch_first=True)), *dense(12)], (4, 2)),
    "lstm, last step": Model(
        lambda: [Recurrent(nn.LSTM(2, 3, batch_first=True)), Last(), *dense(3)], (4, 2)
    ),
    "lstm, output by a module": Model(
        lambda: [nn.LSTM(2, 3, batch_first=True), ReduceTuple(), *dense(12)], (4, 2)
    ),
    "residual": Model(
        lambda: [
            nn.Linear(4, 4),
            Parallel(nn.Identity(), nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())),
            *dense(4),
        ],
        (4,),
    ),
}


LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss, lambda outputs: torch.randint(outputs, (N,))),
    "squared error": (nn.MSELoss, lambda outputs: torch.rand(N, outputs)),
    "logistic": (nn.BCEWithLogitsLoss, lambda outputs: torch.randint(2, (N, 1)).double()),
}


def compute(model: Model, loss: str, reduction: str, quantity: str, mode: str = "") -> Any:
    """One quantity of all parameters; of a root its square, of a function a value."""
    net = extend(nn.Sequential(*model.layers()).eval())
    cls, targets = LOSSES[loss]
    lossfunc = extend(cls(reduction=reduction))
    size = (N, *model.shape)
    X = torch.randint(model.vocabulary, size) if model.vocabulary else torch.rand(size)
    options = {"subsampling": [2, 0]} if mode == "subsampled" else {}
    ext = getattr(extensions, quantity)(**options)
    value = lossfunc(net(X), targets(model.outputs))
    with backpack(ext):
        value.backward(create_graph=mode == "create_graph")
    found = [getattr(p, ext.savefield) for p in net.parameters()]
    if quantity == "SqrtGGNExact":
        root = torch.cat([v.flatten(2) for v in found], 2).flatten(0, 1)
        found = [root.T @ root]
    if callable(found[0]):
        torch.manual_seed(1)  # the original draws random numbers on its way
        vectors = [torch.rand(2, *p.shape) for p in net.parameters()]
        found = [function(v) for function, v in zip(found, vectors, strict=True)]
    return {"value": value, quantity: found}


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and functions."""
    for (name, model), quantity in product(MODELS.items(), QUANTITIES):
        for loss, reduction in product(LOSSES, ("mean", "sum")):
            if loss == "squared error" or (loss == "logistic") == (model.outputs == 1):
                case = partial(compute, model, loss, reduction, quantity)
                yield f"{name}, {loss}, {reduction}: {quantity}", case
        case = partial(compute, model, "squared error", "mean", quantity)
        yield f"{name}, create_graph: {quantity}", partial(case, "create_graph")
        if quantity in ("BatchGrad", "SqrtGGNExact"):
            yield f"{name}, subsampled: {quantity}", partial(case, "subsampled")


if __name__ == "__main__":
    record.main(dict(cases()))
