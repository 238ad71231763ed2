"""Forward passes whose parameters may be used where nobody sees it, and how many samples these have.

They run inside of transforms (``torch.func``), where no operation is seen; or they were differentiated,
with ``create_graph=True``: if that is linear in the data, the derivative's graph knows of none.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from backpack._torch import leaf_of, unwrapped
from backpack.graph.nodes import walk
from backpack.graph.taps import Recording

# Of each parameter the last such passes of its model, one for each number of samples.
_CAPACITY = 8
_transformed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_differentiated: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _note(known: WeakTensorKeyDictionary, leaves: Iterable[Tensor], recording: Recording) -> None:
    for leaf in leaves:
        passes = known.setdefault(leaf, {})
        passes.pop(recording.size, None)
        passes[recording.size] = recording
        if len(passes) > _CAPACITY:
            del passes[next(iter(passes))]


def note_transformed(module: nn.Module, size: int | None) -> None:
    """An extended model is called inside of a transform, for so many samples."""
    # What the module computes with may be made from others (``torch.func.functional_call``).
    used = [unwrapped(parameter) for parameter in module.parameters()]
    made = walk({tensor.grad_fn for tensor in used if tensor.grad_fn is not None})
    leaves = (*(t for t in used if t.grad_fn is None), *(leaf_of(node) for node in made))
    recording = Recording(weakref.ref(module), size)
    _note(_transformed, (leaf for leaf in leaves if leaf is not None), recording)


def note_differentiated(recording: Recording) -> None:
    """The output of an extended model is differentiated, and the result may be once more."""
    module = recording.module()
    if module is not None:  # another recording, which holds nothing of the graph
        found = Recording(weakref.ref(module), recording.size)
        _note(_differentiated, module.parameters(), found)


def transformed(parameter: Tensor) -> list[Recording]:
    """The last passes of a parameter's model inside of transforms, of different numbers of samples."""
    return list(_transformed.get(parameter, {}).values())


def differentiated(parameter: Tensor) -> list[Recording]:
    """The last passes of a parameter's model that were differentiated, likewise."""
    return list(_differentiated.get(parameter, {}).values())
