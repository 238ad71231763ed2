"""Copies of models and data in another precision, and of quantities with exact columns."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from backpack.quantities.base import BackpropExtension
from backpack.sources.table import ExactRoot, SampledRoot


def copied(module: Any, dtype: torch.dtype, device: torch.device | str | None = None) -> Any:
    made = copy.deepcopy(module)
    tensors = [*made.parameters(), *made.buffers()]
    if not any(t.is_complex() for t in tensors):
        return made.to(device, dtype)
    for t in tensors:  # Module.to would drop imaginary parts
        t.data = cast(t.data, dtype, device)
    return made


def cast(value: Any, dtype: torch.dtype, device: torch.device | str | None = None) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(cast(each, dtype, device) for each in value)
    if isinstance(value, Tensor):
        kind = dtype if value.is_floating_point() else value.dtype
        return value.detach().to(device, dtype.to_complex() if value.is_complex() else kind)
    return value


def exactly(ext: BackpropExtension) -> BackpropExtension:
    """The same quantity of exact columns in place of drawn ones."""
    if not isinstance(ext.source, SampledRoot):
        return ext
    ext = copy.copy(ext)
    ext.source = ExactRoot()
    return ext
