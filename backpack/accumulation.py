"""Several backward passes whose values are combined: those of a data set, and micro-batches.

A quantity is collected when it is finished, in each backward pass, and put together by its rule
(:mod:`backpack.combining`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from backpack.backprop import leaves_below
from backpack.blocks import current_block
from backpack.combining import Added, Joined, Never, Rule
from backpack.engine import backpack
from backpack.factors import Form
from backpack.kronecker import KroneckerBlock
from backpack.quantities import BackpropExtension, Context

# Where values of single samples go: a function that is called after each batch, or a folder.
Individual = Callable[[slice], object] | str | Path | None
_GRADIENT = "grad"
# What a class that computes another value than its base class overrides.
_COMPUTE = ("reduce", "begin", "add", "update", "refine", "finish", "zero")


def rule_of(ext: BackpropExtension) -> Rule | None:
    """The rule of a quantity, unless it is that of a base class that computes something else."""
    if "combine" in vars(ext):
        return ext.combine
    for cls in type(ext).__mro__:
        if "combine" in vars(cls):
            return ext.combine
        if any(name in vars(cls) for name in _COMPUTE):
            return None
    return None


@dataclass
class _Entry:
    """What batches have contributed to one quantity of one parameter.

    Attributes:
        rule: how they are put together.
        part: what they make together.
        samples: of how many samples.
        dtype: that of the value to save.
    """

    rule: Rule
    part: Any
    samples: int
    dtype: torch.dtype | None

    def value(self) -> Any:
        """The value to save."""
        found = self.rule.value(self.part)
        if self.dtype is not None and _dtype(found) not in (None, self.dtype):
            return found.to(self.dtype)
        return found

    def with_samples(self, samples: int) -> None:
        """Samples that do not reach the parameter."""
        part = self.rule.absent(self.part, self.samples, samples)
        if part is not None:
            self.part = self.rule.add(self.part, part)
            self.samples += samples


class Totals:
    """Values of all batches so far.

    Attributes:
        entries: for each parameter and field.
        batches: number of backward passes.
        samples: number of samples.
        weight: the sum of weights of their losses.
    """

    def __init__(self) -> None:
        self.entries: dict[Tensor, dict[str, _Entry]] = {}
        self.batches, self.samples, self.weight = 0, 0, 0.0

    def add(self, batch: Mapping[Tensor, Mapping[str, _Entry]], samples: int, weight: float) -> None:
        """Put a batch's values to those of the batches before it."""
        for p, fields in batch.items():
            known = self.entries.setdefault(p, {})
            for field, entry in fields.items():
                if field not in known:
                    known[field] = self._late(entry)
                    continue
                known[field].part = entry.rule.add(known[field].part, entry.part)
                known[field].samples += entry.samples
        for p, known in self.entries.items():
            for field, entry in known.items():
                if field not in batch.get(p, {}):
                    entry.with_samples(samples)
        self.batches, self.samples, self.weight = (
            self.batches + 1,
            self.samples + samples,
            self.weight + weight,
        )

    def _late(self, entry: _Entry) -> _Entry:
        """The first value of a parameter that earlier batches did not reach."""
        part = entry.rule.absent(entry.part, entry.samples, self.samples) if self.samples else None
        if part is None:
            return entry
        both = entry.rule.add(part, entry.part)
        return _Entry(entry.rule, both, self.samples + entry.samples, entry.dtype)

    def weigh(self, factor: float) -> None:
        """Multiply the loss with a factor."""
        for fields in self.entries.values():
            for entry in fields.values():
                entry.part = entry.rule.weigh(entry.part, factor)

    def values(self) -> Iterator[tuple[Tensor, str, Any]]:
        """Parameters, fields, and values to save."""
        for p, fields in self.entries.items():
            for field, entry in fields.items():
                yield p, field, entry.value()


class _Collecting(BackpropExtension):
    """A quantity whose values are noted when they are finished."""

    # Who notes them, held weakly: graphs and gradients are not to wait for the garbage collector.
    _for: weakref.ref[Batches]

    def _note(self, value: Any, context: Context) -> None:
        batches = self._for()
        assert batches is not None
        batches.take(self.savefield, value, context)

    def finish(self, state: Any, context: Context) -> Any:
        value = super().finish(state, context)
        self._note(value, context)
        return value

    def zero(self, context: Context) -> Any:
        value = super().zero(context)
        nothing = partial(torch.zeros_like, context.parameter)
        self._note(value, context._replace(gradient=nothing))
        return value


@lru_cache(256)
def _collecting(cls: Any) -> Any:
    return type(cls.__name__, (_Collecting, cls), {})


class _Samples(BackpropExtension):
    """The number of samples, where no quantity is asked for that would tell."""

    savefield = "_backpack_samples"
    needs_gradient = False
    combine = Added(0)

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        return torch.tensor(float(form.samples))

    def add(self, state: Any, other: Any) -> Any:
        return state

    def zero(self, context: Context) -> Any:
        return torch.tensor(float(context.samples))


class Batches:
    """Collects the quantities of backward passes in blocks; what to make of them is for subclasses.

    Args:
        extensions: the quantities, each with a rule of how values combine.
    """

    def __init__(self, extensions: Sequence[BackpropExtension], rules: Sequence[Rule]) -> None:
        self.rules = {ext.savefield: rule for ext, rule in zip(extensions, rules, strict=True)}
        self.extensions = [self._noting(ext) for ext in extensions]
        self.totals = Totals()
        # Values of the backward pass under way.
        self._batch: dict[Tensor, dict[str, _Entry]] | None = None
        self.owner: backpack | None = None

    def _noting(self, ext: BackpropExtension) -> BackpropExtension:
        noting: Any = copy.copy(ext)
        cls: Any = type(ext)
        noting.__class__ = _collecting(cls)
        noting._for = weakref.ref(self)
        return noting

    def take(self, field: str, value: Any, context: Context) -> None:
        """Note a value of the backward pass under way."""
        if self._batch is None:
            self._unseen()
        assert self._batch is not None
        rule = self.rules[field]
        entry = _Entry(rule, rule.take(value, context), context.samples, _dtype(value))
        self._batch.setdefault(context.parameter, {})[field] = entry

    def _unseen(self) -> None:
        """A backward pass that was not seen to begin."""
        raise RuntimeError(
            "a backward pass whose values are to be combined must be a call of loss.backward(), not of "
            "a function of torch.autograd"
        )

    @contextmanager
    def block(self, *more: BackpropExtension, **options: Any) -> Iterator[backpack]:
        """A block whose backward passes are collected."""
        # Of two quantities with the same field the last one counts.
        with backpack(*more, *self.extensions, **options) as self.owner, _Calls(self):
            yield self.owner

    def backward(self, loss: Tensor, call: Callable[[], Any]) -> Any:
        """One backward pass."""
        self._batch = {}
        try:
            result = call()
        except BaseException:
            self._batch = None
            raise
        self._done()
        return result

    def _done(self) -> None:
        batch, self._batch = self._batch, None
        assert batch is not None
        with torch.no_grad():
            self.commit(batch)

    def commit(self, batch: dict[Tensor, dict[str, _Entry]]) -> None:
        """A backward pass is over."""
        raise NotImplementedError


class _Calls(TorchFunctionMode):
    """Sees calls of ``loss.backward()`` in a block."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches = batches

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = partial(func, *args, **(kwargs or {}))
        if func is not Tensor.backward:
            return call()
        block = current_block()
        if block is None or block.owner is not self.batches.owner or block.nested or not block.listens:
            return call()
        return self.batches.backward(args[0], call)


class MicroBatches(Batches):
    """Micro-batches of one step: the loss is the sum of those whose ``backward`` was called.

    After each pass the parameters hold the values of all passes so far. A rule that does not combine
    values is an error with the second pass only.
    """

    def __init__(self, extension: BackpropExtension) -> None:
        rule = rule_of(extension)
        if rule is None:
            rule = Never(f"{extension!r} does not say how values of several backward passes combine")
        super().__init__([extension], [rule])
        self.field = extension.savefield
        # The pass under way, if it was not seen to begin.
        self._task: int | None = None

    def refuse_more(self) -> str | None:
        """Why there can be no further pass."""
        (rule,) = self.rules.values()
        return rule.why if self.totals.batches and isinstance(rule, Never) else None

    def backward(self, loss: Tensor, call: Callable[[], Any]) -> Any:
        try:
            return super().backward(loss, call)
        except BaseException:
            self.drop()
            raise

    def take(self, field: str, value: Any, context: Context) -> None:
        if self._task is not None and self._task != torch._C._current_graph_task_id():
            self.drop()  # it raised
        super().take(field, value, context)

    def _unseen(self) -> None:
        """Begin it with its first value; the engine says when it has ended, if it does not raise."""
        self._batch, self._task = {}, torch._C._current_graph_task_id()
        Variable._execution_engine.queue_callback(self._done)

    def _done(self) -> None:
        self._task = None
        super()._done()

    @contextmanager
    def block(self, *more: BackpropExtension, **options: Any) -> Iterator[backpack]:
        with super().block(*more, **options) as block:
            yield block
        if self._task is not None:
            self.drop()

    def commit(self, batch: dict[Tensor, dict[str, _Entry]]) -> None:
        samples = max((e.samples for f in batch.values() for e in f.values()), default=0)
        if self.totals.batches and (why := self.refuse_more()):
            self.drop()
            raise NotImplementedError(why)
        alone = not self.totals.batches
        self.totals.add(batch, samples, 1.0)
        for p, field, value in () if alone else self.totals.values():
            setattr(p, field, value)

    def drop(self) -> None:
        """Delete the values from the parameters."""
        for p in self.totals.entries:
            p.__dict__.pop(self.field, None)
        self.totals, self._batch, self._task = Totals(), None, None


class accumulating(Batches):
    """A block in which quantities of all backward passes are combined, as if they were of one batch.

    Example:
        >>> with backpack.accumulating(KFLR(), Variance()) as total:  # doctest: +SKIP
        ...     for X, y in loader:
        ...         lossfunc(model(X), y).backward()
        >>> total.samples, parameter.kflr, parameter.grad  # doctest: +SKIP

    When the block ends, parameters hold what one pass over one batch of all samples had left: fields of
    the quantities, and ``grad`` (added to one that was there before). Until then they hold nothing. If
    it ends by an exception, nothing is saved. A block may be entered again, and goes on.

    With ``N`` samples in batches of ``N_k``, the loss of all is ``sum_k N_k / N loss_k`` if losses are
    means, and ``sum_k loss_k`` if they are sums. Each quantity has a rule by which its values combine
    (:mod:`backpack.combining`): gradients, diagonals and the Kronecker factor ``B`` are added, ``A`` is
    averaged, individual values are concatenated, variances are computed from means and variances.

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
        model: for names, which ``state_dict`` and files need.
        **options: of :class:`backpack.backpack`. With ``gradient=False`` there is no ``grad``.

    Raises:
        NotImplementedError: for a quantity whose values do not combine, or that does not say how.
        ValueError: for a quantity of some samples only (``subsampling``).

    Attributes:
        batches: number of backward passes so far.
        samples: number of samples so far.
        weight: of the next losses, in place of the number of samples; ``None`` by default.
    """

    def __init__(
        self,
        *extensions: BackpropExtension,
        reduction: Literal["mean", "sum"] | None = None,
        individual: Individual = None,
        samples: int | None = None,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        if reduction not in (None, "mean", "sum"):
            raise ValueError(f"reduction must be 'mean', 'sum' or None, got {reduction!r}")
        extensions = backpack(*extensions, **options).extensions or (_Samples(),)
        super().__init__(extensions, [_checked_rule(ext) for ext in extensions])
        if individual is not None and samples is None:
            raise ValueError("individual values are scaled and placed by the number of all `samples`")
        if individual is not None and not callable(individual) and model is None:
            raise ValueError("files are named by parameters; pass the `model`")
        self.reduction, self.options = reduction, options
        self.individual, self.expected = individual, samples
        self.weight: float | Tensor | None = None
        self._names: dict[Tensor, str] | None = None
        if model is not None:
            self._names = {p: name for name, p in model.named_parameters()}
        self._files: dict[tuple[Tensor, str], Tensor] = {}
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
        self._stack.enter_context(self.block(**self.options))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None
        stack.__exit__(kind, error, trace)
        if kind is None and self.batches:
            with torch.no_grad():
                self._save()

    def _save(self) -> None:
        """Write the values of all batches to the parameters."""
        if self.individual is not None and self.samples != self.expected:
            raise RuntimeError(
                f"individual values were scaled as those of {self.expected} samples, but there were "
                f"{self.samples}; pass the right number of `samples`"
            )
        if self.reduction != "sum":
            assert self._reference is not None
            factor, self._reference = self._reference / self.totals.weight, self.totals.weight
            self.totals.weigh(factor)
            for (_, field), file in self._files.items() if factor != 1 else ():
                file.mul_(factor ** self.rules[field].degree)
        for p, field, value in self.totals.values():
            if field == _GRADIENT:
                before = p.grad
                p.grad = value if before is None else before + value
                self._written[p] = p.grad, before
            elif field != _Samples.savefield:
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
        kind, self._divisors = _reduction(root)
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

    def commit(self, batch: dict[Tensor, dict[str, _Entry]]) -> None:
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
            entry = _Entry(_RULE_OF_GRADIENTS, part, samples, gradient.dtype)
            batch.setdefault(p, {})[_GRADIENT] = entry
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
        if len(ratios) == len(self._ratios) and all(map(_alike, ratios, self._ratios)):
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
    # Values of single samples

    def _put_away(self, batch: dict[Tensor, dict[str, _Entry]], samples: int) -> None:
        """Hand individual values to the function, or write them to files."""
        if self.individual is None:
            return
        rows = slice(self.samples, self.samples + samples)
        assert self.expected is not None
        if rows.stop > self.expected:
            raise RuntimeError(
                f"there are more samples than the {self.expected} that individual values were scaled "
                "for; pass the right number of `samples`"
            )
        found = [
            (p, field, fields.pop(field))
            for p, fields in batch.items()
            for field in [*fields]
            if isinstance(fields[field].rule, Joined)
        ]
        if not callable(self.individual):
            for p, field, entry in found:
                self._write(p, field, entry, rows)
            return
        for p, field, entry in found:
            setattr(p, field, entry.value())
        try:
            self.individual(rows)
        finally:
            for p, field, _ in found:
                p.__dict__.pop(field, None)

    def _write(self, p: Tensor, field: str, entry: _Entry, rows: slice) -> None:
        assert isinstance(entry.rule, Joined)
        value, axis = entry.value(), entry.rule.axis
        shape = [*value.shape]
        shape[axis] = self.expected or 0
        if not value.numel():
            return
        if (p, field) not in self._files:
            self._place(p, field).unlink(missing_ok=True)
            self._files[p, field] = self._open(p, field, shape, value.dtype)
        file = self._files[p, field]
        if list(file.shape) != shape:
            raise ValueError(
                f"{field} of parameter '{self._name(p)}' has the shape {tuple(value.shape)}, which "
                f"does not fit those of earlier batches, {tuple(file.shape)} with all samples"
            )
        file[(slice(None),) * axis + (rows,)] = value.to(file.device)

    def _place(self, p: Tensor, field: str) -> Path:
        assert isinstance(self.individual, (str, Path))
        folder = Path(self.individual)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self._name(p)}.{field}"

    def _open(self, p: Tensor, field: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        file = torch.from_file(str(self._place(p, field)), shared=True, size=size, dtype=dtype)
        return file.reshape(tuple(shape))

    # ----------------------------------------------------------------------------------
    # Resuming

    def _name(self, p: Tensor) -> str:
        if self._names is None:
            raise ValueError("parameters need names here; pass the `model`")
        if p not in self._names:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is not in the model that was given"
            )
        return self._names[p]

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
                rule = _RULE_OF_GRADIENTS if field == _GRADIENT else self.rules[field]
                part = rule.unpack(each["part"])
                entries[field] = _Entry(rule, part, each["samples"], each["dtype"])
        for name, field, shape, dtype in state["files"]:
            self._files[places[name], field] = self._open(places[name], field, shape, dtype)


_RULE_OF_GRADIENTS = Added(1)


def _checked_rule(ext: BackpropExtension) -> Rule:
    """The rule of a quantity of a data set."""
    rule = rule_of(ext)
    if rule is None:
        raise NotImplementedError(
            f"{ext!r} does not say how its values of several batches make that of all of them; give "
            "its class an attribute `combine`, such as backpack.combining.Added(degree=1) for sums "
            "over samples or Joined(degree=1) for values of single samples"
        )
    if isinstance(rule, Never):
        raise NotImplementedError(f"{ext!r}: {rule.why}")
    if ext.subsampling is not None:
        raise ValueError(
            f"{ext!r} has subsampling={list(ext.subsampling)}, which picks samples of one batch; leave "
            "it out for a data set"
        )
    if ext.before() is not None:
        raise NotImplementedError(
            f"{ext!r} has eigenvectors of its own in every batch; accumulate the factors first (KFLR "
            "or KFAC), and then eigenvalues in their basis, EKFLR(bases={p: p.kflr.eig().eigenvectors "
            "for p in model.parameters()}), or call backpack.accumulate, which does both"
        )
    return rule


def _reduction(root: Node) -> tuple[str | None, list[float]]:
    """Whether a loss is a mean or a sum, if its node tells, and what each mean in it divides by."""
    kind = "mean" if _divides_by(root) is not None else None
    if getattr(root, "_saved_reduction", None) == 2:
        kind = "sum"
    found, stack, seen = [], [root], set[Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        divisor = _divides_by(node)
        if divisor is not None:
            found.append(divisor)
            continue
        for child, place in node.next_functions:
            about = getattr(child, "_input_metadata", ())
            if child is not None and len(about) > place and not len(about[place].shape):
                stack.append(child)
    return kind, found


def _divides_by(node: Node) -> float | None:
    """What a mean divides by; ``None`` for other nodes."""
    if getattr(node, "_saved_reduction", None) == 1:
        weight = getattr(node, "_saved_total_weight", None)
        return float(node._saved_self.numel() if weight is None else weight)  # type: ignore[attr-defined]
    if node.name().startswith("MeanBackward"):
        number = getattr(node, "_saved_self_sym_numel", None)
        return None if number is None else float(number)
    return None


def _alike(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-12 * abs(b)


def _dtype(value: Any) -> torch.dtype | None:
    if isinstance(value, Tensor):
        return value.dtype
    return value._tensors()[-1].dtype if isinstance(value, KroneckerBlock) else None
