"""What :func:`backpack.cockpit.watch` cannot work with."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import nn


def check_arguments(model: Any, optimizer: Any, every: Any, hold: Any) -> None:
    """Look at arguments whose mistakes would show later, and elsewhere.

    Raises:
        TypeError: for a model that is no module, or an optimizer that is none of torch's.
        ValueError: for an interval or a number of bytes that there is not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a torch.nn.Module, got {model!r}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer is a torch.optim.Optimizer, or has one as its attribute `optimizer`; where "
            f"there is none, leave it out and write `with monitor.step(): ...`; got {optimizer!r}"
        )
    whole = isinstance(every, Integral) and not isinstance(every, bool)
    if not callable(every) and not (whole and every > 0):
        raise ValueError(f"every is a positive whole number or a function of the step, got {every!r}")
    if hold < 0:
        raise ValueError(f"hold is a number of bytes, got {hold!r}")
