"""Inputs of modules that ``fully_shard`` wraps, which its hooks hand on as other tensors.

The tensors that come out of these hooks are those that went in, cast or at a node of their own; what
the hooks do besides (gathering parameters) is no part of the model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed, nn

from backpack._torch import sharded_modules
from backpack.capture.functions import is_custom, settle
from backpack.capture.recorder import Recorder
from backpack.capture.tracker import flatten
from backpack.samples.axis import SampleAxis, mark


class Passages:
    """What goes into wrapped modules during one forward pass."""

    def __init__(self, recorder: Recorder, root: nn.Module) -> None:
        self.recorder = recorder
        self.before: list[tuple[Tensor, SampleAxis | None]] = []
        self.handles: list[Any] = []
        for module in sharded_modules(root):
            if module is not root:  # whose hooks are over
                for hook, first in ((self._enter, True), (self._entered, False)):
                    handle = module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True)
                    self.handles.append(handle)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before torch's hook."""
        self.before = [(t, self.recorder.axis_of(t)) for t in flatten((*args, *kwargs.values()))]
        self.recorder.live = False

    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After it."""
        self.recorder.live = True
        after = list(flatten((*args, *kwargs.values())))
        before, self.before = self.before, []
        for (old, axis), new in zip(before, after, strict=False) if len(before) == len(after) else ():
            if new is not old and axis is not None:
                mark(new, axis)
                if is_custom(new):
                    settle(new, axis)

    def close(self) -> None:
        """See no more."""
        for handle in self.handles:
            handle.remove()


def passages(recorder: Recorder, root: nn.Module | None) -> Passages | None:
    """Look at wrapped modules in ``root``, if there are any."""
    if root is None or not (distributed.is_available() and distributed.is_initialized()):
        return None
    found = Passages(recorder, root)
    return found if found.handles else None
