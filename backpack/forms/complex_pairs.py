"""Complex numbers as pairs of real ones: forms of complex parameters have an axis of two at the end.

A complex parameter ``p`` is two real ones. Torch's gradient of a real function ``L`` in it is the pair
``dL/d Re p + i dL/d Im p``, so that what arrives at a tap is the form of both, written as complex
numbers. As pairs forms can be squared, added and rotated like any other: nothing else needs to know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backpack.forms.base import Dense, Form
from backpack.forms.layout import Layout, Patches
from backpack.forms.outer import Outer
from backpack.forms.several import Pullback, Wrapped, of_one


def as_pairs(x: Tensor) -> Tensor:
    """``[*shape] -> [*shape, 2]``, real and imaginary parts; real numbers stay what they are."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def from_pairs(x: Tensor) -> Tensor:
    """``[*shape, 2] -> [*shape]``, the inverse of :func:`as_pairs` for complex numbers."""
    return torch.view_as_complex(x.contiguous())


@dataclass(frozen=True, eq=False)
class Paired(Wrapped):
    """A form of complex numbers, as pairs of real ones.

    Attributes:
        form: ``G [v, n, *p]``, complex.
    """

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.form.shape, 2))

    @property
    def samples(self) -> int:
        return self.form.samples

    @property
    def like(self) -> Tensor:
        like = self.form.like
        return like.real if like.is_complex() else like

    def take(self, columns: slice, samples: slice | Tensor) -> Paired:
        return Paired(self.form.take(columns, samples))

    def dense(self) -> Tensor:
        return as_pairs(self.form.dense())

    def total(self) -> Tensor:
        return as_pairs(self.form.total())


def in_pairs(form: Form) -> Form:
    """A form of a complex parameter as one of real numbers, with an axis of two at the end."""
    return of_one(form, _pairs)


def _pairs(form: Form) -> Form:
    if not form.like.is_complex() and not isinstance(form, Pullback):
        form = Dense(torch.complex(form.dense(), torch.zeros_like(form.dense())))
    if isinstance(form, Dense):
        return Dense(as_pairs(form.values))
    # Patches are not written out twice.
    if isinstance(form, Outer) and not isinstance(form.inputs, Patches) and form.layout.kind != "convt":
        return _outer_pairs(form)
    return Paired(form)


def _outer_pairs(form: Outer) -> Outer:
    """Each position counts twice, once for either part of what arrives there.

    ``g a^T = Re g a^T + Im g (i a)^T``, and pairs of ``a`` or of ``g`` are more numbers there.
    """
    a, g = form.a, form.g
    a = a if a.is_complex() else a.to(g.dtype)
    layout = Layout(torch.Size((*form.shape, 2)), form.layout.kind)
    if form.layout.kind == "out_in":
        inputs = torch.cat([as_pairs(a).flatten(-2), as_pairs(1j * a).flatten(-2)], 2)
        return Outer(inputs, torch.cat([g.real, g.imag], 3), layout)
    columns = torch.cat([as_pairs(g).flatten(-2), as_pairs(1j * g).flatten(-2)], 3)
    return Outer(torch.cat([a.real, a.imag], 2), columns, layout)


def real_part(form: Form) -> Form:
    """The real part of a form, which is that of a real parameter."""
    return Dense(form.dense().real) if form.like.is_complex() else form


def conjugate(form: Form) -> Form:
    """The conjugate of a form that a rule for analytic operations has given."""
    if isinstance(form, Outer):
        inputs = form.inputs
        if isinstance(inputs, Patches):
            inputs = Patches(inputs.windows.conj(), inputs.ndim, inputs.keep)
        else:
            inputs = inputs.conj()
        return Outer(inputs, form.g.conj(), form.layout, form.counts)
    if isinstance(form, Pullback):  # which only moves entries
        return Pullback(conjugate(form.form), form.vjp, form.shape)
    return Dense(form.dense().conj())
