"""The sum of products that are written out piece by piece, which so costs no product of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Tally:
    """What is added up where products are written out piece by piece, the first time.

    Attributes:
        total: the sum of the products, ``[q, o, i]``.
        rows: of how many columns and samples.
    """

    total: Tensor | None = None
    rows: int = 0

    def add(self, products: Tensor, centre: Tensor | None) -> None:
        """Add ``products [n, q, o, i]``, from each of which ``centre`` was subtracted."""
        part = products[0] if len(products) == 1 else products.sum(0)
        if centre is not None:
            part = torch.add(part, centre, alpha=len(products))
        if self.total is None:
            self.total = part.clone() if len(products) == 1 else part
        else:
            self.total += part
        self.rows += len(products)
