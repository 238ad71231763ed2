"""Forward passes inside of transforms (``torch.func``), where no operation is seen: their samples."""

from __future__ import annotations

import weakref

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from backpack._torch import leaf_of, unwrapped
from backpack.graph.nodes import walk
from backpack.graph.taps import Recording

# Of each parameter the last such passes of its model, one for each number of samples.
_CAPACITY = 8
_passes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def note_transformed(module: nn.Module, size: int | None) -> None:
    """An extended model is called inside of a transform, for so many samples."""
    recording = Recording(weakref.ref(module), size)
    # What the module computes with may be made from others (``torch.func.functional_call``).
    used = [unwrapped(parameter) for parameter in module.parameters()]
    made = walk({tensor.grad_fn for tensor in used if tensor.grad_fn is not None})
    for leaf in (*(t for t in used if t.grad_fn is None), *(leaf_of(node) for node in made)):
        if leaf is not None:
            passes = _passes.setdefault(leaf, {})
            passes.pop(size, None)
            passes[size] = recording
            if len(passes) > _CAPACITY:
                del passes[next(iter(passes))]


def transformed(parameter: Tensor) -> list[Recording]:
    """The last passes of a parameter's model inside of transforms, of different numbers of samples."""
    return list(_passes.get(parameter, {}).values())
