"""Tracing of models with custom modules."""

from __future__ import annotations

from torch import nn
from torch.fx import Tracer

from backpack.compat import convert_module_to_backpack
from backpack.custom_module.branching import Parallel, SumModule
from backpack.custom_module.pad import Pad
from backpack.custom_module.permute import Permute
from backpack.custom_module.reduce_tuple import ReduceTuple
from backpack.custom_module.scale_module import ScaleModule
from backpack.custom_module.slicing import Slicing

__all__ = ["BackpackTracer", "convert_module_to_backpack"]

_LEAVES = (Pad, Parallel, Permute, ReduceTuple, ScaleModule, Slicing, SumModule)


class BackpackTracer(Tracer):
    """A ``torch.fx.Tracer`` that keeps the custom modules whole, as it does those of ``torch.nn``.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), ScaleModule(2.0))
        >>> [node.op for node in BackpackTracer().trace(model).nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of the module is one node of the graph."""
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)
