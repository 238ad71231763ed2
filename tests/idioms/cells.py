"""Cells of the table {idiom} x {loss} x {reduction} x {how the loss is called}."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from backpack import extend
from tests.idioms.compare import Comparison
from tests.idioms.idioms import IDIOMS, SIZES, Idiom, Sizes, expanded, made
from tests.idioms.losses import LOSSES, Loss
from tests.idioms.reference import Truth

WAYS = ("extended", "module", "function")


class Cell(NamedTuple):
    """One program."""

    idiom: Idiom
    loss: Loss
    reduction: str
    way: str
    sizes: Sizes = SIZES

    def __str__(self) -> str:
        return f"{self.idiom.name}-{self.loss.name}-{self.reduction}-{self.way}"

    def truth(self) -> Truth:
        """Brute force."""
        idiom, loss = self.idiom, self.loss
        at = expanded(idiom.kind, idiom.forwards, loss.name, self.sizes)
        return Truth(at, lambda os: _total(loss.truth(f, self.reduction) for f in idiom.apply(os)))

    def comparison(self, truth: Truth | None = None) -> Comparison:
        """The program, to be compared with brute force."""
        idiom, loss = self.idiom, self.loss
        model, inputs, batch_dim = made(idiom.kind, idiom.forwards, loss, self.sizes)
        extend(model, batch_dim=batch_dim)
        truth = self.truth() if truth is None else truth
        call = self._call()

        def backward() -> None:
            fs = idiom.apply([model(each) for each in inputs])
            value = _total(loss.scalar(call(f)) for f in fs)
            assert abs(float(value.detach() - truth.loss)) < 1e-10
            value.backward()

        ends_linear = loss.last is LOSSES[0].last
        # Every loss has columns of its own.
        taken = sum(f.numel() for f in idiom.apply(truth.at.outputs))
        columns = max(len(truth.at.owner), taken) // truth.at.samples
        if loss.terms > 1 and self.way != "extended":
            # Each of its functions of the output counts as a loss.
            columns *= loss.terms
        # Rows of two passes beside each other may be either.
        options = {"forwards": "same"} if idiom.name in ("cat", "two-losses") else {}
        return Comparison(truth, model, backward, ends_linear, columns=columns, options=options)

    def _call(self) -> Callable[[Tensor], Tensor]:
        loss, reduction = self.loss, self.reduction
        if self.way == "function":
            return lambda f: loss.function(
                f, *loss.targets(f.detach()), reduction=reduction, **loss.chosen(f)
            )

        def call(f: Tensor) -> Tensor:
            module = loss.module(f, reduction)
            module = extend(module) if self.way == "extended" else module
            return module(f, *loss.targets(f.detach()))

        return call


def _total(values: Iterator[Tensor]) -> Tensor:
    first, *rest = values
    for value in rest:
        first = first + value
    return first


def quiet() -> None:
    """Torch's advice about KL divergence's mean is not about numbers."""
    warnings.filterwarnings("ignore", "reduction: 'mean' divides")


def cells(sizes: Sizes = SIZES) -> Iterator[Cell]:
    """The whole table."""
    for idiom in IDIOMS:
        for loss in LOSSES:
            if idiom.fits(loss, sizes):
                for way in WAYS:
                    for reduction in loss.reductions:
                        yield Cell(idiom, loss, reduction, way, sizes)
