"""cockpit-for-pytorch, all of its quantities, over a training run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import record
import torch
from cockpit import Cockpit, quantities
from cockpit.utils.configuration import configuration
from cockpit.utils.schedules import linear
from torch import nn

from backpack import extend, extensions

STEPS, N = 5, 8
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """Cockpit's own test network."""
    layers = (nn.Linear(25, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    return nn.Sequential(nn.Flatten(), *layers), (1, 5, 5)


def cnn() -> tuple[nn.Module, tuple[int, ...]]:
    """With convolutions and curved activations."""
    layers = (nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.Tanh())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3)), (1, 8, 8)


def everything(curvature: str) -> list[quantities.Quantity]:
    """Every quantity there is, with the given matrix where there is a choice."""
    names = """Parameters GradHist1d GradHist2d MeanGSNR Alpha Distance UpdateSize GradNorm InnerTest
    NormTest OrthoTest Loss""".split()
    found = [getattr(quantities, name)(linear(1)) for name in names]
    for name in ("HessTrace", "TICDiag", "TICTrace"):
        found.append(getattr(quantities, name)(linear(1), curvature=curvature))
    return found


def train(
    model: Callable[[], tuple[nn.Module, tuple[int, ...]]],
    optimizer: str,
    tracked: Callable[[], list[quantities.Quantity]],
    own: tuple[type, ...] = (),
) -> dict[str, Any]:
    """Train for a few steps; everything the cockpit logged, and the final parameters."""
    net, shape = model()
    net, lossfunc = extend(net), extend(nn.CrossEntropyLoss())
    each = nn.CrossEntropyLoss(reduction="none")
    opt = OPTIMIZERS[optimizer](net.parameters())
    cockpit = Cockpit(net.parameters(), quantities=tracked())
    kept = []
    for step in range(STEPS):
        X, y = torch.rand(N, *shape), torch.randint(3, (N,))
        opt.zero_grad()
        outputs = net(X)
        loss = lossfunc(outputs, y)
        info = {
            "batch_size": N,
            "individual_losses": each(outputs, y),
            "loss": loss,
            "optimizer": opt,
        }
        asked = [cls() for cls in own]
        with cockpit(step, *asked, info=info):
            loss.backward(create_graph=cockpit.create_graph(step))
        kept.append([[getattr(p, ext.savefield) for ext in asked] for p in net.parameters()])
        fields = "grad_batch", "diag_h", "grad_batch_transforms", "diag_ggn_exact"
        left = [f for f in fields if any(hasattr(p, f) for p in net.parameters())]
        kept.append({"left over": left})
        opt.step()
    cockpit.log(STEPS - 1, 0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.1)
    return {
        "logged": record.plain(cockpit.get_output()),
        "kept": kept,
        "parameters": list(net.parameters()),
    }


def cases() -> dict[str, Callable[[], Any]]:
    """Names and functions."""
    found: dict[str, Callable[[], Any]] = {}
    for optimizer in OPTIMIZERS:
        for model in (mlp, cnn):
            full = partial(configuration, "full")
            found[f"full {model.__name__} {optimizer}"] = partial(train, model, optimizer, full)
            for matrix in ("diag_h", "diag_ggn_exact"):
                found[f"every quantity {matrix} {model.__name__} {optimizer}"] = partial(
                    train, model, optimizer, partial(everything, matrix)
                )
    plain = (quantities.CABS, quantities.EarlyStopping)
    found["plain SGD only"] = partial(train, mlp, "sgd", lambda: [cls(linear(1)) for cls in plain])
    own = (extensions.DiagHessian, extensions.BatchGrad, extensions.KFLR)
    found["the user's own extensions"] = partial(train, mlp, "sgd", partial(configuration, "full"), own)
    rare = partial(configuration, "full", track_schedule=linear(2))
    found["every other step"] = partial(train, cnn, "adam", rare)
    return found


if __name__ == "__main__":
    record.main(cases())
