"""Helpers of the examples: a brute-force GGN diagonal and the MNIST data.

Letters: ``D`` entries of all trainable parameters, flattened and concatenated in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from backpack.hessianfree.ggnvp import ggn_vector_product_from_plist
from backpack.utils.convert_parameters import vector_to_parameter_list

_MNIST_FOLDER = "./data"
_MNIST_MEAN, _MNIST_STD = 0.1307, 0.3081


def autograd_diag_ggn_exact(
    X: Tensor,
    y: Tensor,
    model: nn.Module,
    loss_function: nn.Module,
    idx: Iterable[int] | None = None,
) -> Tensor:
    """Diagonal of the generalised Gauss-Newton matrix, by plain autograd.

    ``diag(J^T H J)`` with the Jacobian ``J`` of the model output in the parameters and the Hessian
    ``H`` of the (reduced) loss in the model output: one matrix-vector product per entry.

    Args:
        X: input of the model.
        y: target of the loss.
        model: any module; its parameters that require grad count.
        loss_function: called as ``loss_function(model(X), y)``, gives a scalar.
        idx: entries of the diagonal to compute; ``None`` for all.

    Returns:
        ``[D]``, or ``[len(idx)]``.
    """
    columns = _autograd_ggn_exact_columns(X, y, model, loss_function, idx=idx)
    entries = [column[position] for position, column in columns]
    return torch.stack(entries) if entries else X.new_zeros(0)


def _autograd_ggn_exact_columns(
    X: Tensor,
    y: Tensor,
    model: nn.Module,
    loss_function: nn.Module,
    idx: Iterable[int] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(position, column [D])`` of the generalised Gauss-Newton matrix, one at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    zero = torch.zeros_like(parameters_to_vector(parameters)).detach()
    output = model(X)
    loss = loss_function(output, y)
    for position in range(zero.numel()) if idx is None else idx:
        unit = zero.clone()
        unit[position] = 1
        direction = vector_to_parameter_list(unit, parameters)
        product = ggn_vector_product_from_plist(loss, output, parameters, direction)
        yield position, torch.cat([part.flatten() for part in product])


def get_mnist_dataloader(
    batch_size: int = 64, shuffle: bool = True
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Normalised MNIST training images ``[N, 1, 28, 28]`` and labels ``[N]`` in batches.

    The data is downloaded to ``./data`` once.

    Args:
        batch_size: samples per batch ``N``.
        shuffle: whether the order changes with every epoch.

    Raises:
        ImportError: if torchvision is not installed.
    """
    datasets, transforms = _torchvision("datasets"), _torchvision("transforms")
    normalise = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((_MNIST_MEAN,), (_MNIST_STD,))]
    )
    mnist = datasets.MNIST(_MNIST_FOLDER, train=True, download=True, transform=normalise)
    return DataLoader(mnist, batch_size=batch_size, shuffle=shuffle)


def load_one_batch_mnist(batch_size: int = 64, flat: bool = True) -> tuple[Tensor, Tensor]:
    """One random batch of MNIST training images and labels.

    Args:
        batch_size: number of samples ``N``.
        flat: images as vectors ``[N, 784]`` rather than ``[N, 1, 28, 28]``.

    Raises:
        ImportError: if torchvision is not installed.
    """
    X, y = next(iter(get_mnist_dataloader(batch_size=batch_size)))
    return (X.flatten(start_dim=1) if flat else X), y


def _torchvision(part: str) -> Any:
    """A module of torchvision, which is needed for the data alone and thus imported late."""
    try:
        return import_module(f"torchvision.{part}")
    except ImportError as error:
        raise ImportError(
            "MNIST is loaded by torchvision, which could not be imported. Install it with "
            "`pip install torchvision`, or pass your own images and labels."
        ) from error
