"""Arming modules for capture."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from backpack.capture.hooks import LOSS_MODULES, after_forward, after_loss, before_forward

Module = TypeVar("Module", bound=nn.Module)

_HOOKS = (before_forward, after_forward, after_loss)
_ATTRIBUTES = ("_backpack_extend", "_backpack_root", "_backpack_batch_dim")


def extend(
    module: Module, debug: bool = False, use_converter: bool = False, *, batch_dim: int = 0
) -> Module:
    """Make a model or a loss function visible to :class:`backpack.backpack`.

    The module is changed in place (hooks on it and on each submodule with parameters) and returned.
    It computes what it did before; its ``state_dict`` is the same; copies and pickles of it are
    extended too. Extending again is harmless.

    Args:
        module: any module.
        debug: print each module that is armed.
        use_converter: accepted for programs written for the original; nothing needs converting.
        batch_dim: axis of the inputs that holds the samples.

    Raises:
        TypeError: if ``module`` is not a ``torch.nn.Module`` instance.
    """
    if isinstance(module, type) or not isinstance(module, nn.Module):
        raise TypeError(
            f"extend expects a torch.nn.Module instance, but got {module!r}"
            + ("; instantiate it first" if isinstance(module, type) else "")
        )
    for each in module.modules():
        if isinstance(each, torch.jit.ScriptModule):
            continue
        if debug:
            print(f"[DEBUG] Extending {each}")
        if each is module or next(each.parameters(), None) is not None:
            _arm(each)
        each.__dict__.update(_backpack_extend=True, _backpack_batch_dim=batch_dim)
    if before_forward in module._forward_pre_hooks.values() and "_backpack_root" not in module.__dict__:
        module.register_forward_hook(after_forward, always_call=True)
        module.__dict__["_backpack_root"] = True
    return module


def _arm(module: nn.Module) -> None:
    if type(module) in LOSS_MODULES:
        if after_loss not in module._forward_hooks.values():
            module.register_forward_hook(after_loss, with_kwargs=True)
    elif before_forward not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(before_forward, with_kwargs=True)


def unextend(module: Module) -> Module:
    """Undo :func:`extend` for a module and its submodules."""
    for each in module.modules():
        before = (each._forward_pre_hooks, each._forward_pre_hooks_with_kwargs)
        after = (
            *(each._forward_hooks, each._forward_hooks_with_kwargs),
            each._forward_hooks_always_called,
        )
        for hooks, *marks in (before, after):
            for key in [key for key, hook in hooks.items() if hook in _HOOKS]:
                for kept in (hooks, *marks):
                    kept.pop(key, None)  # type: ignore[attr-defined]
        for name in _ATTRIBUTES:
            each.__dict__.pop(name, None)
    return module
