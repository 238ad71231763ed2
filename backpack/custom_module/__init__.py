"""Plain modules for what models otherwise do in ``forward``: branch, sum, scale, permute, slice.

Any function does as well in an extended model; these let a model be written as a tree of modules.
"""

from backpack.custom_module.branching import Parallel, SumModule
from backpack.custom_module.pad import Pad
from backpack.custom_module.permute import Permute
from backpack.custom_module.reduce_tuple import ReduceTuple
from backpack.custom_module.scale_module import ScaleModule
from backpack.custom_module.slicing import Slicing

__all__ = ["Pad", "Parallel", "Permute", "ReduceTuple", "ScaleModule", "Slicing", "SumModule"]
