"""Products with curvature blocks, as quantities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from backpack.quantities.base import BackpropExtension, Context
from backpack.quantities.combining import Functions
from backpack.quantities.reading import Reader
from backpack.sources.table import NoColumns


class Product(BackpropExtension):
    """A function saved to the parameter; the graph is kept for it."""

    of: ClassVar[Reader[Callable[[Tensor], Tensor]]] = Reader()
    source = NoColumns()
    needs_gradient = per_sample = False
    mixed = True  # functions of the whole batch
    combine = Functions(1)
    curvature: Literal["ggn", "hessian", "positive"]
    modify = "clip"

    def __init__(self, savefield: str | None = None) -> None:
        if savefield is not None:
            self.savefield = savefield

    def zero(self, context: Context) -> Any:
        return torch.zeros_like


class GGNMP(Product):
    """Products with the parameter's block of the generalized Gauss-Newton.

    ``ggnmp(mat)`` maps ``[K, *p]`` (or one vector ``p``) to the same shape, after the ``with`` block
    too: the graph is kept until the field is overwritten or deleted.

    Of several batches: the sum, whose graphs are all kept.

    Args:
        savefield: another name of the field.
    """

    savefield = "ggnmp"
    curvature = "ggn"


class HMP(Product):
    """Products with the parameter's block of the Hessian, ``hmp(mat)``, as :class:`GGNMP`.

    Args:
        savefield: another name of the field.
    """

    savefield = "hmp"
    curvature = "hessian"


class PCHMP(Product):
    """Products with the block of the positive-curvature Hessian (Chen et al., arXiv:1802.06502).

    The generalized Gauss-Newton plus the curvature of activations, made positive entry by entry. It is
    defined where all else between a parameter and the loss is piecewise linear, the parameter's own
    operation too.

    Args:
        savefield: another name of the field.
        modify: ``"clip"`` negative curvature of activations to zero, or take its ``"abs"`` value.

    Raises:
        KeyError: for another ``modify``.
        NotImplementedError: in the backward pass, for a parameter for which it is not defined.
    """

    savefield = "pchmp"
    curvature = "positive"

    def __init__(self, savefield: str | None = None, modify: str = "clip") -> None:
        super().__init__(savefield)
        if modify not in ("clip", "abs"):
            raise KeyError(f"modify must be 'clip' or 'abs', got {modify!r}")
        self.modify = modify
