"""Low-rank curvature of a whole data set, one batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backpack.vivit.lowrank import Derivatives, Eigenpairs, LowRank

Data = Iterable[tuple[Any, Any]]
LossFunction = Callable[[Any, Any], Tensor]


def over(
    model: nn.Module,
    lossfunc: LossFunction,
    data: Data,
    *,
    memory: int | None = None,
    rank: int | None = None,
    mean: bool | None = None,
    progress: bool = False,
    **options: Any,
) -> LowRank:
    """Low-rank curvature of the loss of a whole data set.

    The samples of all batches count as those of one. Once more is kept than ``memory``, it is merged
    (:meth:`LowRank.merge`): spectrum and steps then are still those of all data, up to eigenvalues for
    whose eigenvectors there is no room; ``curvature.lost`` is their sum.

    Args:
        model: an extended model.
        lossfunc: an extended loss.
        data: batches ``(X, y)``; ``X`` may be a tuple of inputs.
        memory: bytes that may be kept between batches; half of it is for the eigenvectors. (A batch
            itself takes what it takes, as does the Gram matrix.) Without a limit nothing is merged.
        rank: number of eigenvectors that are kept in merging, where that is less than fit in.
        mean: whether the loss of all data is the mean over samples, not the sum over batches; by
            default what ``lossfunc.reduction`` says, or the mean.
        progress: whether to print how far it is.
        options: arguments of :class:`LowRank`.

    Raises:
        ValueError: if not a single eigenvector fits into ``memory``, or there are no data.

    Example:
        >>> from backpack import extend
        >>> model, lossfunc = extend(nn.Linear(4, 3)), extend(nn.CrossEntropyLoss())
        >>> data = [(torch.rand(5, 4), torch.tensor([0, 1, 2, 1, 0])) for _ in range(3)]
        >>> over(model, lossfunc, data).derivatives(over(model, lossfunc, data).eigh(2)).gammas.shape
        torch.Size([15, 2])
    """
    averages = _averages(lossfunc, mean)
    curvature = LowRank(**{"gradient": False, **options})
    for X, y in _shown(data, progress):
        loss = _loss(model, lossfunc, X, y)
        with curvature:
            (loss * _length(X) if averages else loss).backward()
        if memory is not None and curvature.memory > memory:
            curvature.merge(_rank(curvature, memory, rank))
    if not curvature.samples:
        raise ValueError("there are no data")
    if averages:
        curvature.scale(1 / curvature.samples)
    return curvature


def derivatives_over(
    model: nn.Module,
    lossfunc: LossFunction,
    data: Data,
    directions: Eigenpairs | Sequence[Tensor],
    *,
    parameters: Iterable[Tensor] | None = None,
    mean: bool | None = None,
    progress: bool = False,
    **options: Any,
) -> Derivatives:
    """Slope and curvature of every sample of a data set along directions.

    Scales are those of :meth:`LowRank.derivatives` for one batch of all samples.

    Args:
        model: an extended model.
        lossfunc: an extended loss.
        data: batches ``(X, y)``.
        directions: eigenpairs, or tensors ``[K, *p]`` for each parameter of the group.
        parameters: the group, where directions are tensors.
        mean: as for :func:`over`.
        progress: whether to print how far it is.
        options: arguments of :class:`LowRank`.
    """
    averages, samples = _averages(lossfunc, mean), 0
    group = directions.parameters if isinstance(directions, Eigenpairs) else parameters
    group = None if group is None else list(group)
    vectors = directions.vectors if isinstance(directions, Eigenpairs) else list(directions)
    gammas, lambdas = [], []
    for X, y in _shown(data, progress):
        curvature = LowRank(**{"gradient": False, **options})
        loss = _loss(model, lossfunc, X, y)
        with curvature:
            loss.backward()
        found, count = curvature.derivatives(vectors, group), _length(X)
        samples += count
        # Of each sample's own loss, or else of the number of samples times its share.
        gammas.append(found.gammas if averages else found.gammas / count)
        lambdas.append(found.lambdas if averages else found.lambdas / count)
    if not samples:
        raise ValueError("there are no data")
    factor = 1 if averages else samples
    return Derivatives(torch.cat(gammas) * factor, torch.cat(lambdas) * factor)


def _averages(lossfunc: LossFunction, mean: bool | None) -> bool:
    return getattr(lossfunc, "reduction", "mean") == "mean" if mean is None else mean


def _loss(model: nn.Module, lossfunc: LossFunction, X: Any, y: Any) -> Tensor:
    with torch.enable_grad():
        return lossfunc(model(*X) if isinstance(X, (tuple, list)) else model(X), y)


def _length(X: Any) -> int:
    return len(X[0] if isinstance(X, (tuple, list)) else X)


def _rank(curvature: LowRank, memory: int, rank: int | None) -> int:
    """How many eigenvectors fit into half of the memory."""
    size = sum(p.numel() * p.element_size() for p in curvature.parameters)
    fit = memory // (2 * max(size, 1))
    if not fit:
        raise ValueError(f"memory={memory} has no room for an eigenvector, of {size} bytes")
    return fit if rank is None else min(rank, fit)


def _shown(data: Data, progress: bool) -> Iterator[tuple[Any, Any]]:
    """The batches, with a line that says how many are done."""
    total = len(data) if hasattr(data, "__len__") else None  # type: ignore[arg-type]
    for number, batch in enumerate(data):
        if progress:
            print(f"\rbatch {number + 1}" + (f" of {total}" if total else ""), end="", flush=True)
        yield batch
    if progress:
        print()
