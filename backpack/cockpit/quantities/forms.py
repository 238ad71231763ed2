"""What quantities find on a parameter after the backward pass: its form, from which all are made.

Letters: ``B`` samples, ``g_n`` each sample's own gradient for a mean loss (``B`` times the n-th part of
the gradient), ``g`` the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backpack.cockpit.collect import Look, nested, released, versions
from backpack.cockpit.context import get_batch_size
from backpack.own import BackpropExtension, Context, Dense, Form, Pass

FORM, LOSSES, EIGENVALUE = "cockpit_form", "cockpit_losses", "cockpit_eigenvalue"


@dataclass
class Found:
    """A parameter's form, and its gradient in that pass.

    Attributes:
        form: the form.
        gradient: the gradient.
        versions: of the tensors of the form.
    """

    form: Form
    gradient: Tensor
    versions: tuple[int, ...]

    def project(self, vector: Tensor) -> Tensor:
        """``G_n^T u [N]``.

        Raises:
            RuntimeError: if somebody has written to an input of a layer.
        """
        if versions(self.form) != self.versions:
            raise RuntimeError("an input of a layer was written to after the backward pass")
        return self.form.project(vector.unsqueeze(0).to(self.form.like.dtype))[0].sum(0)


class KeptForm(BackpropExtension):
    """The form itself, kept until the block is over."""

    savefield = FORM
    mixed = True
    of_complex = None

    def reduce(self, form: Form, sign: Tensor | None = None) -> Form:
        with torch.no_grad():
            if any(hasattr(each, "vjp") for each in nested(form)):
                return Dense(form.dense())
            return released(form)

    def finish(self, state: Form, context: Context) -> Found:
        gradient = context.gradient()
        gradient = gradient.detach() if gradient.requires_grad else gradient
        return Found(state, gradient, versions(state))

    def zero(self, context: Context) -> Found:
        p = context.parameter.detach()
        zeros = Dense(p.new_zeros(()).expand(1, context.samples, *p.shape))
        return Found(zeros, torch.zeros_like(p), versions(zeros))


class Peek(BackpropExtension):
    """Calls a function with the pass before it begins, and saves its result to each parameter.

    Args:
        field: the attribute.
        function: of the pass.
    """

    needs_gradient = False
    mixed = True

    def __init__(self, field: str, function: Callable[[Pass], Any]) -> None:
        self.savefield = field
        self.function = function
        self.result: Any = None
        self.source = Look(self)

    def look(self, given: Pass) -> None:
        """Call the function."""
        self.result = self.function(given)

    def zero(self, context: Context) -> Any:
        return self.result


def found(params: Sequence[Tensor]) -> list[Found]:
    """What was found of each parameter.

    Raises:
        AttributeError: if a parameter took no part in the backward pass.
    """
    return [getattr(p, FORM) for p in params]


def samples(global_step: int, params: Sequence[Tensor]) -> int:
    """``B``: as the user has said, or as the pass had it."""
    said = get_batch_size(global_step)
    return found(params)[0].form.samples if said is None else int(said)


def squared_norms(params: Sequence[Tensor]) -> Tensor:
    """``||G_n||^2 [N]`` over all parameters."""
    return sum(each.form.squared_norms().double() for each in found(params))  # type: ignore[return-value]


def squared_norm(params: Sequence[Tensor]) -> float:
    """``||g||^2``."""
    return float(sum(each.gradient.double().square().sum() for each in found(params)))


def projections(params: Sequence[Tensor], vectors: Sequence[Tensor] | None = None) -> Tensor:
    """``G_n^T u [N]``, by default of the gradient."""
    kept = found(params)
    vectors = [each.gradient for each in kept] if vectors is None else vectors
    return sum(each.project(u).double() for each, u in zip(kept, vectors, strict=True))  # type: ignore[return-value]


def entries(params: Sequence[Tensor], B: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``1/B sum_n g_n^2`` and ``g`` of each parameter."""
    for each in found(params):
        yield each.form.square_sum() * B, each.gradient
