"""Quantities of a data set: a loop over its batches."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from backpack.capture.extend import extend
from backpack.dataset.accumulating import accumulating
from backpack.dataset.spread import refuse_repeated
from backpack.dataset.totals import Individual
from backpack.engine.block import backpack
from backpack.quantities.base import BackpropExtension, listed

_REDUCTIONS: dict[Any, Literal["mean", "sum"]] = {"mean": "mean", "sum": "sum", "batchmean": "mean"}


def accumulate(
    model: nn.Module,
    lossfunc: Callable[..., Tensor] | None,
    loader: Iterable[Any],
    extensions: BackpropExtension | Sequence[BackpropExtension],
    *,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    target: str = "labels",
    reduction: Literal["mean", "sum"] | None = None,
    weight: Callable[[Any], float | Tensor] | None = None,
    individual: Individual = None,
    samples: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    process_group: Any = None,
    gather: bool = True,
    **options: Any,
) -> accumulating:
    """Compute quantities of a data set, as if all of it were one batch.

    Afterwards every parameter has the quantities' fields and ``grad``, as after one backward pass over
    one batch of all samples; :class:`accumulating` says which loss that is of, and by which rules
    values combine. The model stays in the mode (``train`` or ``eval``) it is in.

    Quantities that need something of all batches first (EKFAC and EKFLR: the basis of the eigenvalues)
    take a second pass over the loader, which must then be one that can be iterated again.

    Args:
        model: any module; it is extended unless it is already.
        lossfunc: a loss module or function of output and targets; ``None`` if the model's output has
            a ``loss``, or with ``forward``.
        loader: gives batches: pairs ``(X, y)``, where ``X`` may be a tuple of inputs or a dictionary of
            arguments, or dictionaries of arguments with the targets among them. (Of more than two
            entries the last is ``y``.) Other batches need ``forward``.
        extensions: the quantities, or one.
        forward: ``forward(model, batch)`` computes the loss.
        target: the key of targets in a dictionary.
        reduction: ``"mean"`` or ``"sum"``; by default that of ``lossfunc``, or as the loss says.
        weight: ``weight(batch)`` is what the loss of a batch divides by, where that is no number of
            samples and ``lossfunc`` none of torch's; see :class:`accumulating`.
        individual: where values of single samples go, see :class:`accumulating`.
        samples: number of all samples, where ``individual`` is given and the loader does not tell.
        device: where batches are moved.
        progress: whether to show a bar (by rich or tqdm, if one is installed); by default if the
            standard error is a terminal.
        checkpoint: a file to which the state is written after each ``every`` batches. If it is there,
            the batches before it are skipped (so the loader must give the same ones). It is deleted at
            the end.
        every: see ``checkpoint``.
        process_group: processes each of which has a loader for its part of the data set: values are
            those of all samples, see :class:`accumulating`. Parts need not be of one size.
        gather: see :class:`accumulating`.
        **options: of :class:`backpack.backpack`. With ``gradient=False`` there is no ``grad``.

    Returns:
        The :class:`accumulating` block, whose ``samples`` and ``batches`` were counted.

    Raises:
        ValueError: if the reduction is not known, the loader is empty, cannot be iterated twice, or
            repeats samples, with a ``process_group``.

    Example:
        >>> import torch
        >>> from backpack import accumulate
        >>> from backpack.extensions import Variance
        >>> model, lossfunc = torch.nn.Linear(2, 3), torch.nn.CrossEntropyLoss()
        >>> loader = [(torch.rand(n, 2), torch.arange(n) % 3) for n in (4, 1)]
        >>> total = accumulate(model, lossfunc, loader, [Variance()])
        >>> total.samples, model.weight.variance.shape
        (5, torch.Size([3, 2]))
    """
    spread = {"process_group": process_group, "gather": gather}
    if process_group is not None:
        refuse_repeated(loader)
    extensions = backpack(*listed(extensions), **options).extensions
    if not getattr(model, "_backpack_extend", False):
        extend(model)
    if isinstance(lossfunc, nn.Module) and not getattr(lossfunc, "_backpack_extend", False):
        extend(lossfunc)
    if reduction is None and forward is None and hasattr(lossfunc, "reduction"):
        reduction = _reduction_of(lossfunc.reduction)  # type: ignore[union-attr]
    if individual is not None and samples is None:
        samples = _samples_of(loader)
    firsts = [ext.before() for ext in extensions]
    now = [ext if first is None else first for ext, first in zip(extensions, firsts, strict=True)]
    later = [(e, f) for e, f in zip(extensions, firsts, strict=True) if f is not None]
    if later and isinstance(loader, Iterator):
        names = ", ".join(ext.savefield for ext, _ in later)
        raise ValueError(f"{names} take two passes over the data; give a loader, not an iterator")
    same: dict[str, Any] = {"reduction": reduction, "model": model, **spread}
    total = accumulating(*now, individual=individual, samples=samples, **same, **options)
    state = _Checkpoint(checkpoint, every)

    def losses(batches: Iterator[Any], block: accumulating) -> Iterator[Tensor]:
        for batch in batches:
            batch = batch if device is None else moved(batch, device)
            if weight is not None:
                block.weight = weight(batch)
            yield _loss(model, lossfunc, batch, forward, target)

    loop = _Loop(loader, losses, progress, state)
    loop.run(total, "quantities")
    if later:
        seconds = []
        for ext, first in later:
            among = total.totals.entries if process_group is None else model.parameters()
            having = [p for p in among if first.savefield in vars(p)]
            found = {p: vars(p).pop(first.savefield) for p in having}
            seconds.append(ext.after(found))
        loop.run(accumulating(*seconds, **same, **{**options, "gradient": False}), "second pass")
    state.remove()
    return total


class _Checkpoint:
    """A file with the states of blocks that have ended, and of the one under way."""

    def __init__(self, path: str | Path | None, every: int) -> None:
        if every < 1:
            raise ValueError(f"every must be a positive number of batches, got {every!r}")
        self.path, self.every = None if path is None else Path(path), every
        self.states: list[Any] = []
        if self.path is not None and self.path.exists():
            self.states = torch.load(self.path, weights_only=True)
        self.number = 0

    def begin(self, block: accumulating) -> bool:
        """Load what is known of the next block; whether it has ended."""
        self.number += 1
        if len(self.states) < self.number:
            return False
        block.load_state_dict(self.states[self.number - 1]["block"])
        return bool(self.states[self.number - 1]["ended"])

    def write(self, block: accumulating, ended: bool = False) -> None:
        if self.path is None or not (ended or block.batches % self.every == 0):
            return
        state = {"block": block.state_dict(), "ended": ended}
        self.states = [*self.states[: self.number - 1], state]
        unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        torch.save(self.states, unfinished)
        os.replace(unfinished, self.path)

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class _Loop:
    """Passes over a loader."""

    def __init__(
        self,
        loader: Iterable[Any],
        losses: Callable[[Iterator[Any], accumulating], Iterator[Tensor]],
        progress: bool | None,
        state: _Checkpoint,
    ) -> None:
        self.loader, self.losses, self.state = loader, losses, state
        self.shows = sys.stderr.isatty() if progress is None else progress

    def run(self, block: accumulating, what: str) -> None:
        """Accumulate quantities in one pass."""
        with torch.enable_grad(), block:
            if self.state.begin(block):
                return
            skipped = block.batches
            batches = iter(_shown(self.loader, what) if self.shows else self.loader)
            for _ in range(skipped):
                next(batches, None)
            for loss in self.losses(batches, block):
                loss.backward()
                self.state.write(block)
            if not block.batches and block.spread is None:
                raise ValueError("the loader has no batches")
            self.state.write(block, ended=True)


def _shown(loader: Iterable[Any], what: str) -> Iterable[Any]:
    """With a progress bar, if a package for it is installed."""
    total = len(loader) if isinstance(loader, Sized) else None
    try:
        from rich.progress import track

        return track(loader, what, total=total)
    except ImportError:
        pass
    try:
        from tqdm import tqdm

        return tqdm(loader, what, total=total)
    except ImportError:
        return loader


def _loss(
    model: nn.Module,
    lossfunc: Callable[..., Tensor] | None,
    batch: Any,
    forward: Callable[[nn.Module, Any], Tensor] | None,
    target: str,
) -> Tensor:
    """The loss of a batch."""
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return _loss_of_arguments(model, lossfunc, batch, target)
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError(
            f"a batch is a {type(batch).__name__}, of which inputs and targets cannot be told; pass "
            "forward=lambda model, batch: ..., which computes the loss"
        )
    if lossfunc is None:
        raise ValueError("batches of inputs and targets need a lossfunc")
    *inputs, y = batch
    X = inputs[0] if len(inputs) == 1 else tuple(inputs)
    if isinstance(X, Mapping):
        return lossfunc(_logits(model(**X)), y)
    return lossfunc(_logits(model(*X) if isinstance(X, (tuple, list)) else model(X)), y)


def _loss_of_arguments(
    model: nn.Module,
    lossfunc: Callable[..., Tensor] | None,
    batch: Mapping[str, Any],
    target: str,
) -> Tensor:
    if lossfunc is None:
        output = model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise ValueError("the model's output has no loss; pass a lossfunc, or forward=...")
        return loss
    if target not in batch:
        raise ValueError(
            f"batches have no '{target}', but {', '.join(batch)}; pass the key of the targets, target="
        )
    arguments = {name: value for name, value in batch.items() if name != target}
    return lossfunc(_logits(model(**arguments)), batch[target])


def _logits(output: Any) -> Any:
    """What a loss takes of a model's output."""
    return getattr(output, "logits", output)


def moved(value: Any, device: torch.device | str) -> Any:
    """A batch on a device: tensors in tuples, lists and dictionaries, and what has a method ``to``."""
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(each, device) for each in value))
    if isinstance(value, (tuple, list)):
        return type(value)(moved(each, device) for each in value)
    if isinstance(value, Mapping):
        return {name: moved(each, device) for name, each in value.items()}
    return value


def _reduction_of(name: Any) -> Literal["mean", "sum"]:
    if name not in _REDUCTIONS:
        raise ValueError(
            f"the loss has reduction {name!r}, so that it is no number; use 'mean' or 'sum', or pass "
            "forward=lambda model, batch: ... and the reduction of the loss that it computes"
        )
    return _REDUCTIONS[name]


def _samples_of(loader: Any) -> int:
    """Number of samples that a loader gives in one pass."""
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, Sized):
        raise ValueError(
            "cannot tell how many samples there are, by which individual values are scaled; pass "
            "samples="
        )
    count = len(sampler)
    if getattr(loader, "drop_last", False) and loader.batch_size:
        count -= count % loader.batch_size
    return count
