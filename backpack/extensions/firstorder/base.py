"""Names of the original; see :mod:`backpack.extensions._absent`."""

from backpack.extensions._absent import ModuleExtension
from backpack.quantities.base import BackpropExtension as FirstOrderBackpropExtension


class FirstOrderModuleExtension(ModuleExtension):
    """Stands for the original's class for one first-order quantity of one kind of module."""


__all__ = ["FirstOrderBackpropExtension", "FirstOrderModuleExtension"]
