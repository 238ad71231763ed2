"""A model of the zoo with its inputs and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import extend

N = 3


def _same(output: Any) -> Any:
    return output


def call(model: nn.Module, *inputs: Any) -> Any:
    """Calls the model with positional inputs."""
    return model(*inputs)


@dataclass
class Setting:
    """A model, what it is called with, and the loss, twice: as users write it and for the oracle.

    ``loss(call(model, *inputs))`` is the loss of the first kind, ``criterion(outputs(call(...)))`` the
    same as a function of one tensor, which holds all that the loss sees of the model.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    criterion: Callable[[Tensor], Tensor]
    call: Callable[..., Any] = call
    outputs: Callable[[Any], Tensor] = _same
    loss: Callable[[Any], Tensor] | None = None  # by default, ``criterion`` of ``outputs``
    batch_dim: int = 0
    alone: bool = False  # the loss is the mean of the losses of single samples


def named(*names: str) -> Callable[..., Any]:
    """Calls the model with keywords."""
    return lambda model, *inputs: model(**dict(zip(names, inputs, strict=True)))


def labels(classes: int = 3) -> Tensor:
    """A class for every sample."""
    return torch.randint(classes, (N,))


def classifier(model: nn.Module, *inputs: Any, target: Tensor | None = None, **options: Any) -> Setting:
    """Cross-entropy, with three classes if no target is given."""
    target = labels() if target is None else target
    made = Setting(model, inputs, lambda f: F.cross_entropy(f, target), **options)
    lossfunc = extend(nn.CrossEntropyLoss())
    made.loss = lambda output: lossfunc(made.outputs(output), target)
    return made


def regression(model: nn.Module, *inputs: Any, **options: Any) -> Setting:
    """Any output, squared error."""
    made = Setting(model, inputs, _same, **options)
    with torch.no_grad():
        target = torch.randn_like(made.outputs(made.call(model, *inputs)))
    lossfunc = extend(nn.MSELoss())
    made.criterion = lambda f: F.mse_loss(f, target)
    made.loss = lambda output: lossfunc(made.outputs(output), target)
    return made
