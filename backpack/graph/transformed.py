"""Forward passes inside of transforms (``torch.func``), where no operation is seen: their samples."""

from __future__ import annotations

import weakref

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from backpack._torch import unwrapped
from backpack.graph.taps import Recording

# Of each parameter the last such pass of its model.
_passes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# The last one of all: its parameters may be made from others (``torch.func.functional_call``).
_last: list[Recording] = []


def note_transformed(module: nn.Module, size: int | None) -> None:
    """An extended model is called inside of a transform, for so many samples."""
    recording = Recording(weakref.ref(module), size)
    _last[:] = [recording]
    for parameter in module.parameters():
        _passes[unwrapped(parameter)] = recording


def transformed(parameter: Tensor) -> Recording | None:
    """The last pass of a parameter's model inside of a transform; of others the last one of all."""
    found: Recording | None = _passes.get(parameter)
    if found is None and _last and _last[0].module() is not None:
        return _last[0]
    return found
