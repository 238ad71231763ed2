"""Curvature matrices as linear maps, over data that need not fit in memory at once.

Letters: ``D`` numbers of all parameters, ``K`` vectors, ``N`` samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backpack import disable
from backpack.hessianfree import ggn_vector_product_from_plist, hessian_vector_product

Data = Iterable[tuple[Any, Any]]


class Operator(ABC):
    """A symmetric matrix ``[D, D]`` in the space of some parameters, known by its products.

    ``operator @ x`` takes vectors ``[D]`` or matrices ``[D, K]``; :meth:`product` takes and gives a
    list of tensors ``[K, *p]``, one for each parameter; :meth:`scipy` makes a ``LinearOperator``.

    Attributes:
        parameters: in the order in which their numbers follow each other.
    """

    parameters: list[Tensor]

    @abstractmethod
    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The matrix times vectors ``[K, *p]``, in the same shapes."""

    @property
    def size(self) -> int:
        """``D``."""
        return sum(p.numel() for p in self.parameters)

    @property
    def shape(self) -> tuple[int, int]:
        """``(D, D)``."""
        return self.size, self.size

    @property
    def like(self) -> Tensor:
        """A tensor of the vectors' dtype and device."""
        return self.parameters[0].detach()

    def split(self, flat: Tensor) -> list[Tensor]:
        """Vectors ``[K, D]`` as a list of ``[K, *p]``."""
        parts = flat.split([p.numel() for p in self.parameters], 1)
        return [
            part.reshape(len(flat), *p.shape) for part, p in zip(parts, self.parameters, strict=True)
        ]

    def join(self, vectors: Sequence[Tensor]) -> Tensor:
        """A list of ``[K, *p]`` as vectors ``[K, D]``."""
        return torch.cat([v.reshape(len(v), v.shape[1:].numel()) for v in vectors], 1)

    def __matmul__(self, x: Tensor) -> Tensor:
        if x.dim() not in (1, 2) or len(x) != self.size:
            raise ValueError(f"an operator {self.shape} cannot multiply {tuple(x.shape)}")
        columns = x.unsqueeze(1) if x.dim() == 1 else x
        found = self.join(self.product(self.split(columns.mT.to(self.like)))).mT.to(x.dtype)
        return found[:, 0] if x.dim() == 1 else found

    def scipy(self) -> Any:
        """The same as a ``scipy.sparse.linalg.LinearOperator``, of NumPy arrays."""
        from scipy.sparse.linalg import LinearOperator

        def times(x: Any) -> Any:
            flat = torch.as_tensor(x, device=self.like.device).reshape(self.size, -1)
            return (self @ flat.to(self.like.dtype)).reshape(x.shape).cpu().numpy()

        kind = torch.empty(0, dtype=self.like.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=times, rmatvec=times, matmat=times, dtype=kind)


class _OfModel(Operator):
    """A matrix of a model's loss over data: a sum over batches."""

    def __init__(
        self,
        model: nn.Module,
        lossfunc: Callable[[Any, Any], Tensor],
        data: Data,
        parameters: Iterable[Tensor] | None = None,
        *,
        mean: bool | None = None,
        check: bool = True,
        progress: bool = False,
    ) -> None:
        own = model.parameters() if parameters is None else parameters
        self.parameters = [p for p in own if p.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter requires grad")
        if iter(data) is data:
            raise ValueError("data are gone through several times: give a list or a loader")
        self.model, self.lossfunc, self.data = model, lossfunc, data
        self.mean = getattr(lossfunc, "reduction", "mean") == "mean" if mean is None else mean
        self.progress = progress
        self.samples = sum(_length(X) for X, _ in data)
        if check:
            self._check()

    def _losses(self, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Output and loss of every batch, weighted so that the losses sum to that of all data."""
        done = 0
        for X, y in self.data:
            count = _length(X)
            with torch.enable_grad(), disable():
                output = self.model(*X) if isinstance(X, (tuple, list)) else self.model(X)
                loss = self.lossfunc(output, y)
            done += count
            if self.progress:
                print(f"\r{what}: {done} of {self.samples} samples", end="", flush=True)
            yield output, loss * (count / self.samples) if self.mean else loss
        if self.progress:
            print()
        if done != self.samples:
            raise RuntimeError(
                f"data had {self.samples} samples at first and have {done} now; give the same each time"
            )

    def gradient(self) -> list[Tensor]:
        """Gradient of the loss over all data, one tensor for each parameter."""
        total = [torch.zeros_like(p) for p in self.parameters]
        for _, loss in self._losses("gradient"):
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            total = [t if g is None else t + g for t, g in zip(total, found, strict=True)]
        return total

    def _check(self) -> None:
        first, second = self.gradient(), self.gradient()
        for a, b in zip(first, second, strict=True):
            if not torch.allclose(a, b, rtol=1e-3, atol=1e-4 * max(float(a.abs().max()), 1e-30)):
                raise RuntimeError(
                    "two passes over the data gave different gradients: data that are shuffled are "
                    "fine, but augmented data, dropout or batch norm in training mode are not; call "
                    "model.eval(), or say check=False"
                )

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        total = [torch.zeros_like(v) for v in vectors]
        for output, loss in self._losses("product"):
            products = self._product(output, loss, vectors)
            total = [t + each for t, each in zip(total, products, strict=True)]
        return total

    @abstractmethod
    def _product(self, output: Any, loss: Tensor, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Of one batch."""


class GGN(_OfModel):
    """The generalized Gauss-Newton matrix of a loss over data, without a copy of it.

    Example:
        >>> model, data = nn.Linear(3, 2), [(torch.rand(4, 3), torch.tensor([0, 1, 1, 0]))]
        >>> (GGN(model, nn.CrossEntropyLoss(), data) @ torch.ones(8)).shape
        torch.Size([8])

    Args:
        model: any module; its output is one tensor.
        lossfunc: ``lossfunc(output, y)``, a scalar.
        data: batches ``(X, y)``, gone through for each product; ``X`` may be a tuple of inputs.
        parameters: some of the model's, in that order; all that require grad by default.
        mean: whether the loss of all data is the mean over samples, not the sum over batches; by
            default what ``lossfunc.reduction`` says, or the mean.
        check: whether to compare gradients of two passes over the data.
        progress: whether to print how far a product is.

    Raises:
        RuntimeError: if two passes over the data give different gradients.
        ValueError: if data are an iterator, or no parameter requires grad.
    """

    def _product(self, output: Any, loss: Tensor, vectors: Sequence[Tensor]) -> list[Tensor]:
        if not isinstance(output, Tensor):
            raise ValueError(f"the model's output must be one tensor, got {type(output).__name__}")
        found = [
            ggn_vector_product_from_plist(loss, output, self.parameters, v)
            for v in zip(*vectors, strict=True)
        ]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]


class Hessian(_OfModel):
    """The Hessian of a loss over data; arguments as of :class:`GGN`, for any output of the model."""

    def _product(self, output: Any, loss: Tensor, vectors: Sequence[Tensor]) -> list[Tensor]:
        gradient = torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)
        found = [
            hessian_vector_product(loss, self.parameters, v, gradient)
            for v in zip(*vectors, strict=True)
        ]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]


def _length(X: Any) -> int:
    return len(X[0] if isinstance(X, (tuple, list)) else X)
