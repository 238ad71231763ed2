"""Arming modules for capture."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from backpack._torch import uncompiled
from backpack.capture.hooks import LOSS_MODULES, after_forward, after_loss, before_forward
from backpack.capture.said import Samples

Module = TypeVar("Module", bound=nn.Module)

_HOOKS = (before_forward, after_forward, after_loss)
_ATTRIBUTES = ("_backpack_extend", "_backpack_root", "_backpack_batch_dim", "_backpack_samples")


def extend(
    module: Module,
    debug: bool = False,
    use_converter: bool = False,
    *,
    batch_dim: int = 0,
    samples: Samples | None = None,
) -> Module:
    """Make a model or a loss function visible to :class:`backpack.backpack`.

    The module is changed in place (hooks on it and on each submodule with parameters) and returned.
    It computes what it did before; its ``state_dict`` is the same; copies and pickles of it are
    extended too. Extending again is harmless. Of ``torch.compile(model)`` it extends the model; a
    compiled model may be extended before or after. It runs uncompiled inside of a
    :class:`backpack.backpack` block, where its forward pass must be, and compiled everywhere else.

    Args:
        module: any module.
        debug: print each module that is armed.
        use_converter: accepted for programs written for the original; nothing needs converting.
        batch_dim: axis of the inputs that holds the samples.
        samples: the input that carries the batch, where it is not the only one that may: its name, also
            of a part (``"data.x"``), or its position. Of an input that is a list of tensors each is one
            sample. Or a function of the inputs that returns that input, or a pair ``(x,
            sample_of_row)`` as for :func:`backpack.mark`, or a list of pairs. What an earlier call said
            stays if this one says nothing.

    Raises:
        TypeError: if ``module`` is not a ``torch.nn.Module`` instance, or ``samples`` is none of these.
    """
    if isinstance(module, type) or not isinstance(module, nn.Module):
        raise TypeError(
            f"extend expects a torch.nn.Module instance, but got {module!r}"
            + ("; instantiate it first" if isinstance(module, type) else "")
        )
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, str | int)):
        if not callable(samples):
            raise TypeError(
                "samples is the name or the position of the input that carries the batch, or a "
                f"function of the inputs, but got {samples!r}"
            )
    given, module = module, uncompiled(module)  # type: ignore[assignment]
    for each in module.modules():
        if isinstance(each, torch.jit.ScriptModule):
            continue
        if debug:
            print(f"[DEBUG] Extending {each}")
        if each is module or next(each.parameters(), None) is not None:
            _arm(each)
        each.__dict__.update(_backpack_extend=True, _backpack_batch_dim=batch_dim)
    if samples is not None:
        module.__dict__["_backpack_samples"] = samples
    if before_forward in module._forward_pre_hooks.values() and "_backpack_root" not in module.__dict__:
        module.register_forward_hook(after_forward, always_call=True)
        module.__dict__["_backpack_root"] = True
    return given


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
