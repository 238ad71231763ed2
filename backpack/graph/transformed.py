"""Forward passes inside of transforms (``torch.func``), where no operation is seen: their samples."""

from __future__ import annotations

import weakref

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from backpack.graph.taps import Recording

# Of each parameter the last such pass of its model.
_passes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def note_transformed(module: nn.Module, size: int | None) -> None:
    """An extended model is called inside of a transform, for so many samples."""
    recording = Recording(weakref.ref(module), size)
    for parameter in module.parameters():
        _passes[parameter] = recording


def transformed(parameter: Tensor) -> Recording | None:
    """The last pass of a parameter's model inside of a transform."""
    found: Recording | None = _passes.get(parameter)
    return found
