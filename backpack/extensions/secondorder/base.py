"""A name of the original: its base class of curvature quantities."""

from backpack.quantities.base import BackpropExtension as SecondOrderBackpropExtension

__all__ = ["SecondOrderBackpropExtension"]
