"""A name of the original; see :mod:`backpack.extensions._absent`."""

from backpack.extensions._absent import ModuleExtension

__all__ = ["ModuleExtension"]
