"""The state of the innermost ``with backpack(...)`` block, for programs that ask for it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from backpack.engine.state import Options, current_block
from backpack.quantities.base import BackpropExtension


def _owner() -> Options | None:
    block = current_block()
    return None if block is None else block.owner


def _no_op(module: nn.Module) -> None:
    """The extension hook where none is set."""


class CTX:
    """What the innermost block of this thread was given, and the defaults outside of blocks."""

    @staticmethod
    def get_active_exts() -> tuple[BackpropExtension, ...]:
        """The block's quantities."""
        owner = _owner()
        return () if owner is None else owner.extensions

    @staticmethod
    def is_extension_active(*extension_classes: type[BackpropExtension]) -> bool:
        """Whether the block computes a quantity of one of these classes."""
        return any(isinstance(ext, extension_classes) for ext in CTX.get_active_exts())

    @staticmethod
    def get_extension_hook() -> Callable[[nn.Module], None]:
        """The block's hook; one that does nothing if it has none."""
        owner = _owner()
        return _no_op if owner is None or owner.extension_hook is None else owner.extension_hook

    @staticmethod
    def get_debug() -> bool:
        """Whether the block prints what it does."""
        owner = _owner()
        return owner is not None and owner.debug

    @staticmethod
    def get_retain_graph() -> bool:
        """Whether the block keeps what was captured."""
        owner = _owner()
        return owner is not None and owner.retain_graph

    @staticmethod
    def remove_hooks() -> None:
        """Do nothing, for programs written for the original.

        There it takes the hooks off every extended module of the process. Here an extended module
        holds nothing between passes; to make one plain again, call :func:`backpack.unextend`.
        """
