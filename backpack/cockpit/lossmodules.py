"""Loss modules are extended while a monitor looks at curvature, so that their Hessians are known."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.loss import _Loss
from torch.nn.modules.module import register_module_forward_pre_hook

from backpack import extend, unextend


class LossModules:
    """Extends torch's loss modules when they are called, and undoes it."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._ours: list[nn.Module] = []

    def listen(self, on: bool) -> None:
        """Look at calls of modules, or no longer."""
        if on and self._handle is None:
            self._handle = register_module_forward_pre_hook(self._called)
        elif not on and self._handle is not None:
            self._handle.remove()
            self._handle = None
            for module in self._ours:
                unextend(module)
            self._ours.clear()

    def _called(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, _Loss) and "_backpack_extend" not in module.__dict__:
            extend(module)
            self._ours.append(module)
