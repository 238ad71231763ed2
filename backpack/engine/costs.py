"""What quantities of a form take, without computing them: bytes of their values, and operations.

Operations are multiplications and additions in products, the part that grows with layers and samples; a
*contraction* is that of the columns at a layer's outputs with its inputs. Letters: ``v`` columns, ``N``
samples, ``s`` positions, ``q`` groups, ``o``/``i`` outputs and inputs of a layer, ``P`` entries of the
parameter.
"""

from __future__ import annotations

from typing import NamedTuple

from backpack.forms.base import LARGEST_FACTOR, Form, largest_block
from backpack.forms.layout import Patches
from backpack.forms.lookup import Lookup
from backpack.forms.outer import Outer
from backpack.forms.several import Part, Pullback, Scaled
from backpack.forms.sums import Sum
from backpack.quantities.base import BackpropExtension
from backpack.quantities.diagonal import (
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchDiagHessianMC,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    DiagHessianMC,
)
from backpack.quantities.first_order import BatchGrad, BatchL2Grad, SumGradSquared, Variance
from backpack.quantities.kronecker import EKFAC, EKFLR, KFAC, KFLR, KFRA, EmpiricalKFAC
from backpack.quantities.square_root import SqrtGGNExact, SqrtGGNMC

_DIAGONALS = (DiagGGNExact, DiagGGNMC, DiagHessian, DiagHessianMC)
_BATCH_DIAGONALS = (BatchDiagGGNExact, BatchDiagGGNMC, BatchDiagHessian, BatchDiagHessianMC)
_ROOTS = (SqrtGGNExact, SqrtGGNMC)
_FACTORS = (KFAC, KFLR, KFRA, EmpiricalKFAC)
_EIGEN = (EKFAC, EKFLR)
# Operations of an eigendecomposition of a matrix with n rows, in n^3.
_EIGH = 9


class Cost(NamedTuple):
    """Bytes of a value and operations; ``None``: not known."""

    bytes: int | None
    operations: int | None


def described(form: Form) -> str:
    """What a form is made of, in a few words."""
    if isinstance(form, Outer):
        q, s, o, i = form.g.shape[2], form.positions, form.g.shape[-1], form.inputs.shape[-1]
        groups = f"{q} groups of " if q > 1 else ""
        return f"{groups}{o} outputs x {i} inputs" + (f" at {s} positions" if s > 1 else "")
    if isinstance(form, Lookup):
        return f"{form.index.shape[1]} rows read of {form.shape[0]}"
    if isinstance(form, Sum):
        return ", and ".join(map(described, form.forms))
    if isinstance(form, Scaled):
        return f"entry by entry from: {described(form.form)}"
    if isinstance(form, Pullback):
        return f"written out, made from: {described(form.form)}"
    if isinstance(form, Part):
        return f"some samples: {described(form.form)}"
    return "written out"


def contraction(form: Form) -> int:
    """Operations of one column."""
    if isinstance(form, Outer):
        return 2 * form.samples * form.positions * form.g.shape[2] * _sides(form)
    if isinstance(form, Lookup):
        return form.samples * form.index.shape[1] * form.shape[1]
    if isinstance(form, Sum):
        return sum(map(contraction, form.forms))
    if isinstance(form, (Scaled, Part)):
        return contraction(form.form)
    if isinstance(form, Pullback):
        return contraction(form.form) + form.samples * form.shape.numel()
    return form.samples * form.shape.numel()


def _sides(form: Outer) -> int:
    return form.g.shape[-1] * form.inputs.shape[-1]


def _squares(form: Form, columns: int) -> int:
    """Sums of squares over columns and samples."""
    if isinstance(form, Outer) and form.positions == 1:
        return contraction(form) + columns * form.samples * form.g.shape[-1]
    return columns * contraction(form)


def _norms(form: Form) -> int:
    """Squared norms of one column."""
    if isinstance(form, Outer):
        n, q, s, sides = form.samples, form.g.shape[2], form.positions, sum(_both(form))
        return 2 * n * q * sides if s == 1 else min(2 * n * q * s * s * (sides + 1), contraction(form))
    if isinstance(form, Sum):
        return sum(map(_norms, form.forms))
    return contraction(form)


def _both(form: Outer) -> tuple[int, int]:
    return form.g.shape[-1], form.inputs.shape[-1]


def _factors(form: Form, columns: int) -> tuple[list[int], int]:
    """Rows of the Kronecker factors, and operations."""
    n = form.samples
    if isinstance(form, Part):
        return _factors(form.form, columns)
    if isinstance(form, Outer) and len(form.shape) > 1:
        q, s, (o, i) = form.g.shape[2], form.positions, _both(form)
        # Of the pairs of places of a kernel those of one distance share a product.
        overlap = form.inputs.overlap() if isinstance(form.inputs, Patches) else None
        share = 1.0 if overlap is None else 2 / (overlap.kernel + 1)
        return [q * o, i], 2 * n * (columns * (q * o) ** 2 + round(q * s * i * i * share))
    if isinstance(form, Lookup):
        rows, d = form.shape
        return [rows, d], 2 * columns * n * d * d
    size = form.shape.numel()
    return [size], (2 * columns * n * size if size <= largest_block(form.shape) else columns) * size


def cost_of(ext: BackpropExtension, form: Form, columns: int | None) -> Cost:
    """What a quantity of a form takes.

    Args:
        ext: the quantity.
        form: of one column.
        columns: how many there are, if that is known.
    """
    v, n, size = columns, form.samples, form.shape.numel()
    number = form.like.element_size()
    if isinstance(ext, BatchGrad):
        kept = n if ext.subsampling is None else len(ext.subsampling)
        return Cost(number * kept * size, contraction(form) * kept // max(n, 1))
    if isinstance(ext, BatchL2Grad):
        return Cost(number * n, _norms(form))
    if isinstance(ext, (SumGradSquared, Variance)):
        return Cost(number * size, _squares(form, 1))
    if isinstance(ext, _DIAGONALS):
        return Cost(number * size, None if v is None else _squares(form, v))
    if isinstance(ext, _BATCH_DIAGONALS):
        return Cost(number * n * size, None if v is None else v * contraction(form))
    if isinstance(ext, _ROOTS):
        numbers = None if v is None else v * n * size
        return Cost(numbers and number * numbers, None if v is None else v * contraction(form))
    if isinstance(ext, (*_FACTORS, *_EIGEN)):
        rows, operations = _factors(form, 1 if v is None else v)
        largest = LARGEST_FACTOR if len(rows) > 1 else largest_block(form.shape)
        numbers = sum(r * r if r <= largest else r for r in rows)
        if isinstance(ext, _EIGEN):
            numbers += size
            operations += sum(_EIGH * r**3 for r in rows if r <= largest)
            operations += 0 if v is None else _squares(form, v)
        return Cost(number * numbers, None if v is None else operations)
    return Cost(None, None)
