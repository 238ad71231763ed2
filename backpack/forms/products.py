"""Products of the matrices that forms hold: Gram matrices, spectra, and what is kept of them."""

from __future__ import annotations

import torch
from torch import Tensor

from backpack._ambient import ambient, within
from backpack._torch import has_values
from backpack.forms.memory import fresh

# On a CPU, products of a matrix with itself of so many multiplications are done by halves.
MIRRORED = 2**26


# Products that may serve a weight and its bias are kept up to this size.
LARGEST_KEPT = 2**11


def products_kept() -> within:
    """Within the block, :func:`gram` of the same entries is computed once."""
    return within(grams=[])


def gram(x: Tensor) -> Tensor:
    """``x^T x``, a new tensor."""
    known = ambient.grams if x.shape[1] <= LARGEST_KEPT and not torch.is_grad_enabled() else None
    known = known if has_values(x) else None
    for y, product in known or ():
        if (y.data_ptr(), y.shape, y.stride()) == (x.data_ptr(), x.shape, x.stride()):
            return product.clone()
    product = gram_matrix(x)
    if known is not None:
        known.append((x, product))
    return product


def gram_matrix(x: Tensor, count: int = 1) -> Tensor:
    """``x^T x / count``; on a CPU by blocks, of which those above the diagonal are mirrored."""
    size = x.shape[1]
    if torch.is_grad_enabled():
        return x.mT @ x / count
    product = fresh(x, (size, size))
    write_gram(x, product, max(count, 1))
    return product


def write_gram(x: Tensor, product: Tensor, count: int = 1) -> None:
    """Write ``x^T x / count``."""
    rows, size = x.shape
    parts = 1 if x.device.type != "cpu" or rows * size**2 < MIRRORED else 3
    step = max(1, -(-size // parts))
    for i in range(0, size, step):
        strip = product[i : i + step, : i + step]
        torch.addmm(strip, x[:, i : i + step].mT, x[:, : i + step], beta=0, alpha=1 / count, out=strip)
        product[:i, i : i + step] = strip[:, :i].mT


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices, found in double precision.

    A vector stands for a diagonal matrix, and so do its eigenvectors, a vector of ones.

    On matrices of low rank, LAPACK in single precision may give up, or return NaN and say nothing.
    """
    if matrix.dim() == 1:
        return matrix.clone(), torch.ones_like(matrix)
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix), vectors.to(matrix)


def row_products(left: Tensor, right: Tensor) -> Tensor:
    return gram_matrix(left.mT) if left is right else left @ right.mT
