"""Rules of analytic operations, for complex numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.forms.complex_pairs import conjugate
from backpack.forms.several import of_one
from backpack.rules.base import ParameterForms, ToForm

# Operations whose rules are right for complex numbers too, as conjugates.
ANALYTIC = frozenset(
    {
        *(F.linear, torch.matmul, Tensor.matmul, Tensor.__rmatmul__, torch.mm, Tensor.mm),
        *(torch.einsum, torch.addmm, Tensor.addmm),
        *(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__rmul__),
        *(torch.add, Tensor.add, Tensor.__radd__, torch.sub, Tensor.sub, Tensor.__setitem__),
        *(getattr(torch, f"conv{kind}{n}d") for n in (1, 2, 3) for kind in ("", "_transpose")),
    }
)


def conjugated(pairs: ParameterForms) -> ParameterForms:
    """Rules give ``J^T g`` as of real numbers; the gradient of an analytic function is ``J^H g``."""
    return [(tensor, conjugated_form(form)) for tensor, form in pairs]


def conjugated_form(form: ToForm) -> ToForm:
    """The same of one form: ``J^H g = conj(J^T conj(g))``."""
    return lambda g: of_one(form(g.conj()), conjugate)
