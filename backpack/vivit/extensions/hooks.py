"""Hooks that make Gram matrices of what a backward pass saves.

They are arguments of ``backpack(..., extension_hook=...)``, each good for one backward pass. They take
values that are written out, which ``gram`` and ``gradient_gram`` of :class:`backpack.vivit.LowRank` do
not need. Letters: ``N`` samples, ``C`` columns.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class _Hook:
    """Looks once at each parameter that has a value."""

    reads: ClassVar[str]

    def __init__(self, savefield: str) -> None:
        self.savefield = savefield
        self._seen: set[Tensor] = set()

    def __call__(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in self._seen or not parameter.requires_grad:
                continue
            value = getattr(parameter, self.reads, None)
            if value is not None:
                self._seen.add(parameter)
                self._look(parameter, value)

    def _look(self, parameter: Tensor, value: Tensor) -> None:
        raise NotImplementedError


class _Gram(_Hook):
    axes: ClassVar[int] = 1

    def __init__(self, savefield: str, layerwise: bool, free: bool) -> None:
        super().__init__(savefield)
        self.layerwise, self.free = layerwise, free
        self._total: Tensor | None = None

    def _look(self, parameter: Tensor, value: Tensor) -> None:
        rows = value.reshape(value.shape[: self.axes].numel(), value.shape[self.axes :].numel())
        gram = rows @ rows.mT
        if self.layerwise:
            setattr(parameter, self.savefield, gram)
        self._total = gram.clone() if self._total is None else self._total + gram
        if self.free:
            delattr(parameter, self.reads)

    def get_result(self) -> Tensor:
        """The Gram matrix, summed over parameters.

        Raises:
            RuntimeError: if no parameter had a value.
        """
        if self._total is None:
            raise RuntimeError(f"{type(self).__name__} has seen no parameter with {self.reads}")
        return self._total


class CenteredBatchGrad(_Hook):
    """Saves individual gradients less their mean, ``[N, *p]``. Needs ``BatchGrad()``.

    Args:
        savefield: where it is saved.
    """

    reads = "grad_batch"

    def __init__(self, savefield: str = "centered_grad_batch") -> None:
        super().__init__(savefield)

    def _look(self, parameter: Tensor, value: Tensor) -> None:
        setattr(parameter, self.savefield, value - value.mean(0))


class GramBatchGrad(_Gram):
    """Inner products of individual gradients, ``[N, N]``. Needs ``BatchGrad()``.

    Args:
        savefield: where each parameter's own is saved, if ``layerwise``.
        layerwise: whether it is.
        free_grad_batch: whether the gradients are deleted afterwards.
    """

    reads = "grad_batch"

    def __init__(
        self,
        savefield: str = "gram_grad_batch",
        layerwise: bool = False,
        free_grad_batch: bool = False,
    ) -> None:
        super().__init__(savefield, layerwise, free_grad_batch)


class CenteredGramBatchGrad(GramBatchGrad):
    """As :class:`GramBatchGrad`, of gradients less their mean, which take the place of ``grad_batch``.

    Args:
        savefield: where each parameter's own is saved, if ``layerwise``.
        layerwise: whether it is.
        free_grad_batch: whether the gradients are deleted afterwards.
    """

    def __init__(
        self,
        savefield: str = "centered_gram_grad_batch",
        layerwise: bool = False,
        free_grad_batch: bool = False,
    ) -> None:
        super().__init__(savefield, layerwise, free_grad_batch)

    def _look(self, parameter: Tensor, value: Tensor) -> None:
        with torch.no_grad():
            # Not in place: memory may be shared with gradients that are still on their way.
            centred = value - value.mean(0)
        setattr(parameter, self.reads, centred)
        super()._look(parameter, centred)


class GramSqrtGGNExact(_Gram):
    """Inner products of columns of the GGN's root, ``[C N, C N]``. Needs ``SqrtGGNExact()``.

    Args:
        savefield: where each parameter's own is saved, if ``layerwise``.
        layerwise: whether it is.
        free_sqrt_ggn: whether the columns are deleted afterwards.
    """

    reads = "sqrt_ggn_exact"
    axes = 2

    def __init__(
        self,
        savefield: str = "gram_sqrt_ggn_exact",
        layerwise: bool = False,
        free_sqrt_ggn: bool = False,
    ) -> None:
        super().__init__(savefield, layerwise, free_sqrt_ggn)


class GramSqrtGGNMC(_Gram):
    """Inner products of random columns of the GGN's root, ``[M N, M N]``. Needs ``SqrtGGNMC()``.

    Args:
        savefield: where each parameter's own is saved, if ``layerwise``.
        layerwise: whether it is.
        free_sqrt_ggn: whether the columns are deleted afterwards.
    """

    reads = "sqrt_ggn_mc"
    axes = 2

    def __init__(
        self,
        savefield: str = "gram_sqrt_ggn_mc",
        layerwise: bool = False,
        free_sqrt_ggn: bool = False,
    ) -> None:
        super().__init__(savefield, layerwise, free_sqrt_ggn)
