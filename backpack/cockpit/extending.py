"""Models are extended while somebody listens, and left as they were when nobody does any longer."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from backpack import extend, unextend
from backpack._torch import uncompiled

_MARK, _ROOT = "_backpack_extend", "_backpack_root"
_DIM, _SAMPLES = "_backpack_batch_dim", "_backpack_samples"


class _Ours(int):
    """The mark of modules that are extended for a monitor; the user's is ``True``."""


_OURS = _Ours(1)
# Those that are on (not held: a monitor may go without being closed), and what the user had said of
# modules that are extended for them too.
_active: weakref.WeakSet[Extension] = weakref.WeakSet()
_said: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


class Extension:
    """A model that is extended for a while.

    What the user has extended stays so, also if he does it meanwhile, and if several monitors look at
    models that have modules in common.

    Args:
        model: the model.
        batch_dim: the axis of its inputs that holds the samples.
    """

    def __init__(self, model: nn.Module, batch_dim: int) -> None:
        self.model, self.batch_dim = model, batch_dim

    def on(self) -> None:
        """Extend the model."""
        _active.add(self)
        if _MARK not in uncompiled(self.model).__dict__:
            self._extend()

    def off(self) -> None:
        """Leave the model as it was, as far as no other monitor needs it."""
        if self not in _active:
            return
        _active.discard(self)
        modules = list(self.model.modules())
        marked = [each for each in modules if each.__dict__.get(_MARK) is True]
        said = {each: _said.pop(each, {}) or _said_of(each) for each in marked}
        if uncompiled(self.model) in marked:
            return  # the user's, all of it
        unextend(self.model)
        for each in sorted(marked, key=lambda each: _ROOT not in said[each]):
            if _MARK not in each.__dict__:
                extend(each, batch_dim=said[each].get(_DIM, 0), samples=said[each].get(_SAMPLES))
        for each in marked:
            each.__dict__.update(said[each])
        for other in list(_active):
            if not set(modules).isdisjoint(other.model.modules()):
                other._extend()

    def _extend(self) -> None:
        known = [each for each in self.model.modules() if each.__dict__.get(_MARK) is True]
        if uncompiled(self.model) in known:
            return
        for each in known:
            _said.setdefault(each, _said_of(each))
        extend(self.model, batch_dim=self.batch_dim)
        for each in self.model.modules():
            if _MARK in each.__dict__ and each not in _said:
                each.__dict__[_MARK] = _OURS


def _said_of(module: nn.Module) -> dict[str, Any]:
    names = (_ROOT, _DIM, _SAMPLES)
    return {name: module.__dict__[name] for name in names if name in module.__dict__}
