"""Data sets that are spread over processes: what the process of each part has found, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from backpack.dataset.totals import Totals
from backpack.quantities.combining import Rule
from backpack.quantities.parts import Entry, exchanged
from backpack.quantities.processes import Processes


class Spread:
    """The processes that go over parts of one data set.

    Args:
        processes: the processes.
        model: the model, of which each has a copy.
    """

    def __init__(self, processes: Processes, model: nn.Module) -> None:
        self.processes, self.model = processes, model

    def apart(self) -> Any:
        """A context in which processes do not exchange gradients of single passes."""
        parallel = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if parallel else nullcontext()  # type: ignore[operator]

    def of_all(
        self,
        totals: Totals,
        rules: Mapping[str, Rule],
        mean: bool,
        ratios: Sequence[float],
        error: BaseException | None,
    ) -> Totals:
        """The totals of all processes, all of which must call this.

        Args:
            totals: those of this process, of the mean loss of its samples if losses are means.
            rules: how values combine, by their fields.
            mean: whether losses are means.
            ratios: what means divide by, for each sample.
            error: by which the loop of this process has ended.

        Raises:
            RuntimeError: if the loop of a process has ended by an error.
            ValueError: if there are no samples, a parameter is not the model's, or means divide by
                other things than samples.
        """
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        strange = [p for p in totals.entries if p not in names]
        own: Exception | None = None
        if strange and error is None:
            own = ValueError(
                f"a parameter of shape {tuple(strange[0].shape)} is not in the model that was given; "
                "give one that holds all that the loss depends on, or freeze it"
            )
        problem = own if error is None else error
        said = None if problem is None else f"{type(problem).__name__}: {problem}"
        told = self.processes.objects((said, totals.weight, totals.samples, mean, list(ratios)))
        if own is not None:
            raise own
        if error is not None:
            return totals
        for rank, (text, *_) in enumerate(told):
            if text is not None:
                raise RuntimeError(f"in process {rank} of the process_group: {text}")
        having = [each[-1] for each in told if each[2]]
        if not having:
            raise ValueError("no process has any samples")
        mean = any(each[3] for each in told if each[2])
        weights = [each[1] for each in told]
        if mean and any(not _alike(each, having[0]) for each in having):
            if any(len(set(each)) != 1 for each in having):
                raise ValueError(
                    "the losses of processes are means over different things, of which each sample "
                    "does not have as many; use a loss that is a sum, or set total.weight to what it "
                    "divides by before each backward"
                )
            weights = [each[1] * each[-1][0] if each[2] else 0.0 for each in told]
        factor = weights[self.processes.rank] / sum(weights) if mean else 1.0
        entries = {
            p: {
                field: Entry(e.rule, e.rule.weigh(e.part, factor), e.samples, e.dtype)
                for field, e in fields.items()
            }
            for p, fields in totals.entries.items()
        }
        found = Totals()
        found.batches, found.samples, found.weight = totals.batches, totals.samples, totals.weight
        found.entries = exchanged(entries, names, rules, totals.samples, self.processes).entries
        return found


def refuse_repeated(loader: Any) -> None:
    """Refuse a sampler that counts samples twice, so that processes have as many.

    Raises:
        ValueError: if the loader has one.
    """
    sampler = getattr(loader, "sampler", None)
    total, data = getattr(sampler, "total_size", None), getattr(sampler, "dataset", None)
    if total is not None and data is not None and total > len(data):
        raise ValueError(
            f"{type(sampler).__name__} repeats {total - len(data)} of {len(data)} samples, so that all "
            "processes have as many; they would count twice. Leave the rest out (drop_last=True), or "
            "give process r of W the samples range(r, len(data), W): "
            "DataLoader(torch.utils.data.Subset(data, range(r, len(data), W)), ...)"
        )


def _alike(some: Sequence[float], others: Sequence[float]) -> bool:
    pairs = zip(some, others, strict=False)
    return len(some) == len(others) and all(abs(a - b) <= 1e-12 * abs(b) for a, b in pairs)
