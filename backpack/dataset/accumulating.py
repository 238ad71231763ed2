"""Several backward passes whose values are combined: those of a data set, and micro-batches.

A quantity is collected when it is finished, in each backward pass, and put together by its rule
(:class:`backpack.own.Rule`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from backpack.dataset.individual import PutAway
from backpack.dataset.reductions import alike, reduction_of
from backpack.dataset.spread import Spread
from backpack.dataset.totals import GRADIENT, Individual, SampleCount, Totals
from backpack.engine.block import backpack
from backpack.graph.survey import leaves_below
from backpack.quantities.base import BackpropExtension
from backpack.quantities.combining import Added, Rule
from backpack.quantities.parts import Entry, checked_rule
from backpack.quantities.processes import Processes


class accumulating(PutAway):
    """A block in which quantities of all backward passes are combined, as if they were of one batch.

    Example:
        >>> import torch
        >>> from backpack import accumulating, extend
        >>> from backpack.extensions import Variance
        >>> model, lossfunc = extend(torch.nn.Linear(2, 3)), extend(torch.nn.CrossEntropyLoss())
        >>> loader = [(torch.rand(n, 2), torch.arange(n) % 3) for n in (4, 1)]
        >>> with accumulating(Variance()) as total:
        ...     for X, y in loader:
        ...         lossfunc(model(X), y).backward()
        >>> total.samples, model.weight.variance.shape
        (5, torch.Size([3, 2]))

    When the block ends, parameters hold what one pass over one batch of all samples had left: fields of
    the quantities, and ``grad`` (added to one that was there before). Until then they hold nothing. If
    it ends by an exception, nothing is saved. A block may be entered again, and goes on.

    With ``N`` samples in batches of ``N_k``, the loss of all is ``sum_k N_k / N loss_k`` if losses are
    means, and ``sum_k loss_k`` if they are sums. Each quantity has a rule by which its values combine
    (:class:`backpack.own.Rule`): gradients, diagonals and the Kronecker factor ``B`` are added, ``A``
    is averaged, individual values are concatenated, variances are computed from means and variances.

    Args:
        *extensions: quantities, instances of the classes in :mod:`backpack.extensions`.
        reduction: ``"mean"`` or ``"sum"``. By default as the loss says: torch's losses are known by
            their node in the graph, others need it to be given. A mean over something else than samples
            (targets that are not ignored, weights of classes) counts with what it divides by, where one
            node of torch's says so; otherwise set ``total.weight`` before each ``backward``.
        individual: where values of single samples (``grad_batch`` and the like) go, if not into memory:
            a function that is called after each batch with the ``slice`` of its samples among all,
            while the parameters hold their values (scaled as those of all); or a folder, for
            memory-mapped files. Either needs ``samples``.
        samples: number of samples of all batches.
        model: for names, which ``state_dict``, files and processes need.
        process_group: processes that go over parts of one data set: values are those of all of their
            samples, in the order of ranks, and the same in all. They are put together when the block
            ends, which all processes must come to; before, they need not keep step. A
            ``DistributedDataParallel`` model exchanges no gradients in the block.
        gather: whether values of single samples are gathered from all processes; with ``False`` each
            process has those of its own samples, scaled as those of all.
        **options: of :class:`backpack.backpack`. With ``gradient=False`` there is no ``grad``.

    Raises:
        NotImplementedError: for a quantity whose values do not combine, or that does not say how.
        ValueError: for a quantity of some samples only (``subsampling``), or a ``process_group`` with
            ``individual``, or without the model.
        RuntimeError: at the end of the block, if it has ended by an error in another process.

    Attributes:
        batches: number of backward passes so far.
        samples: number of samples so far, in this process.
        weight: of the next losses, in place of the number of samples; ``None`` by default.
    """

    def __init__(
        self,
        *extensions: BackpropExtension,
        reduction: Literal["mean", "sum"] | None = None,
        individual: Individual = None,
        samples: int | None = None,
        model: nn.Module | None = None,
        process_group: Any = None,
        gather: bool = True,
        **options: Any,
    ) -> None:
        if reduction not in (None, "mean", "sum"):
            raise ValueError(f"reduction must be 'mean', 'sum' or None, got {reduction!r}")
        self.spread: Spread | None = None
        if process_group is not None:
            if model is None or individual is not None:
                raise ValueError(
                    "values of several processes go to the parameters of the `model`, which must be "
                    "given, and not to `individual`; with gather=False each process keeps its samples'"
                )
            self.spread = Spread(Processes(process_group, gather), model)
        extensions = backpack(*extensions, **options).extensions or (SampleCount(),)
        rules = [_checked_rule(ext) for ext in extensions]
        super().__init__(extensions, rules, individual, samples, model)
        self.reduction, self.options = reduction, options
        self.weight: float | Tensor | None = None
        # Parts have the weight of their loss over this one.
        self._reference: float | None = None
        # What means divided by in the first batch, for each sample.
        self._ratios: list[float] | None = None
        self._told = False
        self._divisors: list[float] = []
        self._gradients: dict[Tensor, Tensor] = {}
        # Gradients that were written when the block ended, and those that were there before.
        self._written: dict[Tensor, tuple[Tensor, Tensor | None]] = {}
        self._stack: ExitStack | None = None

    @property
    def batches(self) -> int:
        """Number of backward passes so far."""
        return self.totals.batches

    @property
    def samples(self) -> int:
        """Number of samples so far."""
        return self.totals.samples

    # ----------------------------------------------------------------------------------
    # The block

    def __enter__(self) -> accumulating:
        if self._stack is not None:
            raise RuntimeError("this accumulating(...) block is open already")
        for p, (written, before) in self._written.items():
            if p.grad is written:
                p.grad = before
        self._written.clear()
        self._stack = ExitStack()
        if self.spread is not None:
            self._stack.enter_context(self.spread.apart())
        self._stack.enter_context(self.block(**self.options))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None
        stack.__exit__(kind, error, trace)
        # Who raises an error tells the other processes, but does not wait for them if interrupted.
        waits = self.spread is not None and (error is None or isinstance(error, Exception))
        if waits or (kind is None and self.batches):
            with torch.no_grad():
                self._save(error)

    def _save(self, error: BaseException | None = None) -> None:
        """Write the values of all batches to the parameters, unless the loop ended by an error."""
        if self.individual is not None and self.samples != self.expected:
            raise RuntimeError(
                f"individual values were scaled as those of {self.expected} samples, but there were "
                f"{self.samples}; pass the right number of `samples`"
            )
        if self.reduction != "sum" and self.batches:
            assert self._reference is not None
            factor, self._reference = self._reference / self.totals.weight, self.totals.weight
            self.totals.weigh(factor)
            for (_, field), file in self._files.items() if factor != 1 else ():
                file.mul_(factor ** self.rules[field].degree)
        totals = self.totals
        if self.spread is not None:
            rules = {**self.rules, GRADIENT: _RULE_OF_GRADIENTS}
            mean, ratios = self.reduction != "sum", self._ratios or ()
            totals = self.spread.of_all(totals, rules, mean, ratios, error)
        if error is not None:
            return
        for p, field, value in totals.values():
            if field == GRADIENT:
                before = p.grad
                p.grad = value if before is None else before + value
                self._written[p] = p.grad, before
            elif field != SampleCount.savefield:
                setattr(p, field, value)
        for (p, field), file in self._files.items():
            setattr(p, field, file)

    # ----------------------------------------------------------------------------------
    # One backward pass

    def backward(self, loss: Tensor, call: Callable[[], Any]) -> Any:
        if loss.grad_fn is None:
            return call()  # which says so
        self._look_at(loss.grad_fn)
        takes = self.options.get("gradient", True)
        leaves = leaves_below(get_gradient_edge(loss)) if takes else []
        before = {leaf: leaf.grad for leaf in leaves}
        for leaf in leaves:
            leaf.grad = None
        try:
            self._batch = {}
            result = call()
            assert self._batch is not None
            for leaf in leaves:
                if isinstance(leaf, nn.Parameter) or leaf in self._batch:
                    if leaf.grad is not None:
                        self._gradients[leaf] = leaf.grad
                elif leaf.grad is not None:  # an input, whose gradient is nobody else's business
                    old = before[leaf]
                    before[leaf] = leaf.grad if old is None else old + leaf.grad
            self._done()
        finally:
            self._batch = None
            self._gradients.clear()
            for leaf, grad in before.items():
                leaf.grad = grad
        return result

    def _look_at(self, root: Node) -> None:
        """Find out what the loss is a mean of, while its graph is there."""
        kind, self._divisors = reduction_of(root)
        if self.reduction is None:
            self.reduction = "mean" if self.weight is not None else kind  # type: ignore[assignment]
        if self.reduction is None:
            raise ValueError(
                f"cannot tell whether the loss ({root.name()}) is a mean or a sum over samples; pass "
                "reduction='mean' or reduction='sum'"
            )
        if self.reduction == "mean" and kind == "sum":
            raise ValueError(
                f"the loss ({root.name()}) is a sum, but reduction is 'mean'; pass reduction='sum', or "
                "use losses of one kind"
            )

    def commit(self, batch: dict[Tensor, dict[str, Entry]]) -> None:
        counts = {entry.samples for fields in batch.values() for entry in fields.values()}
        if len(counts) != 1:
            what = f"parameters meet batches of {sorted(counts)} samples" if counts else "no quantity"
            raise RuntimeError(
                f"{what} in one backward pass, so that it has no number of samples; extend the model, "
                "and give each pass one batch"
            )
        (samples,) = counts
        weight = self._weight(samples)
        if self._reference is None:
            self._reference = weight if self.expected is None else float(self.expected)
        if self.reduction == "sum":
            self._reference = 1.0
        for p, gradient in self._gradients.items():
            part = _RULE_OF_GRADIENTS.take(gradient, None)
            entry = Entry(_RULE_OF_GRADIENTS, part, samples, gradient.dtype)
            batch.setdefault(p, {})[GRADIENT] = entry
        for p, fields in batch.items():
            for field in [*fields]:
                p.__dict__.pop(field, None)
                fields[field].part = fields[field].rule.weigh(
                    fields[field].part, weight / self._reference
                )
        self._put_away(batch, samples)
        self.totals.add(batch, samples, weight)

    def _weight(self, samples: int) -> float:
        """The weight of a batch's loss, in samples."""
        if self.reduction == "sum":
            return 1.0
        divisors = self._divisors if self.weight is None else [float(self.weight)]
        ratios = [each / max(samples, 1) for each in divisors]
        if self._ratios is None:
            self._ratios, self._told = ratios, self.weight is not None
        if self._told != (self.weight is not None):
            raise ValueError("total.weight must be set for all batches or for none")
        if len(ratios) == len(self._ratios) and all(map(alike, ratios, self._ratios)):
            return float(samples)
        one = len(set(ratios)) == len(set(self._ratios)) == 1
        if not one or callable(self.individual):
            raise ValueError(
                "the loss is a mean over other things than samples, of which batches do not have as "
                f"many for each sample (this one {ratios}, the first one {self._ratios}); use a loss "
                "that is a sum"
                + ("" if one else ", or set total.weight to what it divides by before each backward")
            )
        return samples * ratios[0] / self._ratios[0]

    # ----------------------------------------------------------------------------------
    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """All that a new object of the same arguments needs to go on after these batches.

        It holds tensors, numbers and strings, so that ``torch.save`` and ``torch.load`` take it; not
        the state of generators. Individual values in files stay there.
        """
        return {
            "fields": sorted(self.rules),
            "reduction": self.reduction,
            "batches": self.batches,
            "samples": self.samples,
            "weight": self.totals.weight,
            "reference": self._reference,
            "ratios": self._ratios,
            "told": self._told,
            "entries": {
                self._name(p): {
                    field: {
                        "part": entry.rule.pack(entry.part),
                        "samples": entry.samples,
                        "dtype": entry.dtype,
                    }
                    for field, entry in fields.items()
                }
                for p, fields in self.totals.entries.items()
            },
            "files": [
                [self._name(p), field, list(file.shape), file.dtype]
                for (p, field), file in self._files.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batches of a ``state_dict``; the next batch is number ``total.batches``.

        Args:
            state: what :meth:`state_dict` gave.

        Raises:
            ValueError: if it is of other quantities, or of a model with other parameters.
        """
        if state["fields"] != sorted(self.rules):
            raise ValueError(
                f"the state is of {', '.join(state['fields'])}, but this one computes "
                f"{', '.join(sorted(self.rules))}"
            )
        if self._names is None:
            raise ValueError("parameters need names here; pass the `model`")
        places = {name: p for p, name in self._names.items()}
        strange = [name for name in state["entries"] if name not in places]
        if strange:
            raise ValueError(f"the state is of a model with a parameter '{strange[0]}'")
        self.reduction, self.totals = state["reduction"], Totals()
        self.totals.batches, self.totals.samples = state["batches"], state["samples"]
        self.totals.weight = state["weight"]
        self._reference, self._told = state["reference"], state["told"]
        self._ratios = state["ratios"]
        for name, fields in state["entries"].items():
            p = places[name]
            entries = self.totals.entries.setdefault(p, {})
            for field, each in fields.items():
                rule = _RULE_OF_GRADIENTS if field == GRADIENT else self.rules[field]
                part = rule.unpack(each["part"])
                entries[field] = Entry(rule, part, each["samples"], each["dtype"])
        for name, field, shape, dtype in state["files"]:
            self._files[places[name], field] = self._open(places[name], field, shape, dtype)


_RULE_OF_GRADIENTS = Added(1)


def _checked_rule(ext: BackpropExtension) -> Rule:
    """The rule of a quantity of a data set."""
    rule = checked_rule(ext, "a data set")
    if ext.before() is not None:
        raise NotImplementedError(
            f"{ext!r} has eigenvectors of its own in every batch; accumulate the factors first (KFLR "
            "or KFAC), and then eigenvalues in their basis, EKFLR(bases={p: p.kflr.eig().eigenvectors "
            "for p in model.parameters()}), or call backpack.accumulate, which does both"
        )
    return rule
