"""Branches that run side by side, and their sum."""

from __future__ import annotations

from collections import OrderedDict
from functools import reduce
from operator import add
from typing import Any

from torch import Tensor, nn

_MERGE = "merge_module"


class SumModule(nn.Module):
    """Sum of all inputs: ``x_1 + x_2 + ...``, broadcast as usual."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Add the inputs up.

        Raises:
            ValueError: if there is none.
        """
        if not inputs:
            raise ValueError("SumModule: nothing to sum; call it with one input or more.")
        return reduce(add, inputs)


class Parallel(nn.Module):
    """Feed one input to several modules and merge their outputs.

    ``merge(f_1(x), f_2(x), ...)``. A residual connection is ``Parallel(nn.Identity(), block)``.
    Branches are named as in ``nn.Sequential``: by position, or by key.

    Args:
        *args: the branches, or one ``OrderedDict`` from names to branches.
        merge_module: takes all branch outputs as its arguments; a :class:`SumModule` if left out.

    Raises:
        ValueError: if there is no branch, or one is named ``merge_module``.
    """

    merge_module: nn.Module

    def __init__(
        self, *args: nn.Module | OrderedDict[str, nn.Module], merge_module: nn.Module | None = None
    ) -> None:
        super().__init__()
        branches: list[tuple[str, Any]]
        if len(args) == 1 and isinstance(args[0], OrderedDict):
            branches = list(args[0].items())
        else:
            branches = [(str(position), branch) for position, branch in enumerate(args)]
        if not branches:
            raise ValueError("Parallel: pass at least one branch.")
        if any(name == _MERGE for name, _ in branches):
            raise ValueError(
                f"Parallel: a branch cannot be named {_MERGE!r}; pass the module that merges by "
                "the keyword of that name."
            )
        for name, branch in branches:
            self.add_module(name, branch)
        self.merge_module = SumModule() if merge_module is None else merge_module

    def forward(self, input: Any) -> Any:
        """Merged outputs of all branches."""
        # `_modules` and not `children()`, which lists a module that serves two branches once.
        branches = (branch for name, branch in self._modules.items() if name != _MERGE)
        return self.merge_module(*[branch(input) for branch in branches if branch is not None])
