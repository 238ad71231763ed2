"""What batches and processes have contributed to quantities of parameters, and its exchange."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backpack.kronecker.block import KroneckerBlock
from backpack.quantities.base import BackpropExtension
from backpack.quantities.combining import Functions, Joined, Never, Rule, Sums
from backpack.quantities.processes import Processes

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


def checked_rule(ext: BackpropExtension, of: str) -> Rule:
    """The rule of a quantity, for values that must combine.

    Args:
        ext: the quantity.
        of: what they are of, for errors.

    Raises:
        NotImplementedError: if there is none.
        ValueError: for a quantity of some samples of one batch.
    """
    rule = rule_of(ext)
    if rule is None:
        raise NotImplementedError(
            f"{ext!r} does not say how its values of several batches make that of all of them; give "
            "its class an attribute `combine`, such as backpack.own.Added(degree=1) for sums "
            "over samples or Joined(degree=1) for values of single samples"
        )
    if isinstance(rule, Never):
        raise NotImplementedError(f"{ext!r}: {rule.why}")
    if ext.subsampling is not None:
        raise ValueError(
            f"{ext!r} has subsampling={list(ext.subsampling)}, which picks samples of one batch; leave "
            f"it out for {of}"
        )
    return rule


@dataclass
class Entry:
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
        if self.dtype is not None and dtype_of(found) not in (None, self.dtype):
            return found.to(self.dtype)
        return found

    def with_samples(self, samples: int) -> None:
        """Samples that do not reach the parameter."""
        part = self.rule.absent(self.part, self.samples, samples)
        if part is not None:
            self.part = self.rule.add(self.part, part)
            self.samples += samples


def dtype_of(value: Any) -> torch.dtype | None:
    if isinstance(value, Tensor):
        return value.dtype
    return value._tensors()[-1].dtype if isinstance(value, KroneckerBlock) else None


# Parameters, and the entries of their fields.
Entries = dict[Tensor, dict[str, Entry]]


@dataclass
class Exchanged:
    """What is the same in all processes after an exchange.

    Attributes:
        entries: those of all samples.
        left_out: reasons why parameters do not have fields, by both.
    """

    entries: Entries
    left_out: dict[tuple[Tensor, str], str]


@dataclass
class _Told:
    """What a process tells the others, before tensors are exchanged."""

    parameters: tuple[int, str]
    fields: list[str]
    samples: int
    # By numbers of parameters and fields: samples, dtype, shape and dtype of values of single samples.
    having: dict[tuple[int, str], tuple[int, torch.dtype | None, Any]]
    left_out: dict[tuple[int, str], str]


def exchanged(
    entries: Entries,
    order: Mapping[Tensor, str],
    rules: Mapping[str, Rule],
    samples: int,
    processes: Processes,
    left_out: Mapping[tuple[Tensor, str], str] | None = None,
) -> Exchanged:
    """Entries of the samples of all processes, in the order of their ranks.

    Args:
        entries: those of this process's samples.
        order: parameters that may have entries in any process, in the same order in all, with names.
        rules: of all fields, which are the same in all.
        samples: their number in this process.
        processes: all of them call this function.
        left_out: reasons why parameters do not have fields, by both; they then have none anywhere.

    Raises:
        RuntimeError: in all processes, if they are not of the same model and quantities.
    """
    numbers = {p: i for i, p in enumerate(order)}
    mine = {(numbers[p], field): e for p, fields in entries.items() for field, e in fields.items()}
    joins = processes.gathers
    told = processes.objects(
        _Told(
            _digest(order),
            sorted(rules),
            samples,
            {key: (e.samples, e.dtype, _joined(e) if joins else None) for key, e in mine.items()},
            {(numbers[p], field): why for (p, field), why in (left_out or {}).items()},
        )
    )
    _check(told)
    missing: dict[tuple[int, str], str] = {}
    for each in told:
        missing = {**each.left_out, **missing}
    keys = {key for each in told for key in each.having} - missing.keys()
    places = list(order)
    state = _Exchange(told, processes, rules, order, mine)
    found: Entries = {}
    for (i, field), entry in state.run(sorted(keys)).items():
        if places:
            found.setdefault(places[i], {})[field] = entry
    without = {(places[i], field): why for (i, field), why in missing.items() if places}
    return Exchanged(found, without)


class _Exchange:
    def __init__(
        self,
        told: list[_Told],
        processes: Processes,
        rules: Mapping[str, Rule],
        order: Mapping[Tensor, str],
        mine: dict[tuple[int, str], Entry],
    ) -> None:
        self.told, self.processes, self.rules = told, processes, rules
        self.order, self.places, self.mine = order, list(order), mine
        self.samples = [each.samples for each in told]

    def run(self, keys: Sequence[tuple[int, str]]) -> dict[tuple[int, str], Entry]:
        sums: dict[tuple[int, str], Sums] = {}
        found: dict[tuple[int, str], Entry] = {}
        joined: list[tuple[int, str]] = []
        for key in keys:
            rule, having = self.rules[key[1]], [each.having.get(key) for each in self.told]
            if isinstance(rule, Joined):
                joined.append(key)
                continue
            if isinstance(rule, Functions):
                self.mine.setdefault(key, Entry(rule, (), 0, None))
            if rule.everywhere and None in having:
                name = list(self.order.values())[key[0]] if self.order else "of the model"
                raise NotImplementedError(
                    f"{key[1]} of parameter {name} is missing in process {having.index(None)}, whose "
                    "pass does not reach the parameter; its values cannot be put together then"
                )
            way: Sums | None = None
            if key in self.mine and (isinstance(rule, Functions) or None not in having):
                seen = [0 if each is None else each[0] for each in having]
                way = rule.across(self.mine[key].part, seen, self.processes.sums)
            if way is not None:
                sums[key] = way
            else:
                found[key] = self._gather(key, rule)
        total = sum(self.samples)
        for key, part in _summed(sums, self.processes).items():
            found[key] = Entry(self.rules[key[1]], part, total, self.mine[key].dtype)
        return {**found, **self._join(joined)}

    def _join(self, keys: Sequence[tuple[int, str]]) -> dict[tuple[int, str], Entry]:
        """Values of single samples."""
        if not self.processes.gathers:
            return {key: self.mine[key] for key in keys if key in self.mine}
        device = self.places[0].device if self.places else torch.device("cpu")
        here = [self.mine[key] for key in keys if key in self.mine]
        having = [{key: each.having[key] for key in keys if key in each.having} for each in self.told]
        tensors = self.processes.gather(
            [entry.rule.value(entry.part) for entry in here],
            [[about for *_, about in each.values()] for each in having],
            device,
        )
        by_rank = [dict(zip(h, t, strict=True)) for h, t in zip(having, tensors, strict=True)]
        return {key: self._joined(key, [each.get(key) for each in by_rank]) for key in keys}

    def _joined(self, key: tuple[int, str], tensors: Sequence[Tensor | None]) -> Entry:
        rule = self.rules[key[1]]
        example = next([tensor] for tensor in tensors if tensor is not None)
        dtype = next(each.having[key][1] for each in self.told if key in each.having)
        whole: Any = None
        for tensor, samples in zip(tensors, self.samples, strict=True):
            part = rule.absent(example, 1, samples) if tensor is None else [tensor]
            whole = part if whole is None else rule.add(whole, part)
        return Entry(rule, whole, sum(self.samples), dtype)

    def _gather(self, key: tuple[int, str], rule: Rule) -> Entry:
        """Whatever parts there are, those of processes that do not reach the parameter included."""
        entry = self.mine.get(key)
        packed = None if entry is None else (rule.pack(entry.part), entry.samples, entry.dtype)
        whole: Entry | None = None
        before = 0
        for each, samples in zip(self.processes.objects(packed), self.samples, strict=True):
            if each is None:
                if whole is not None:
                    whole.with_samples(samples)
                before += samples
                continue
            part, seen, dtype = rule.unpack(each[0]), each[1], each[2]
            if whole is None:
                whole = Entry(rule, part, seen, dtype)
                earlier = rule.absent(part, seen, before) if before else None
                if earlier is not None:
                    whole.part, whole.samples = rule.add(earlier, part), before + seen
            else:
                whole.part, whole.samples = rule.add(whole.part, part), whole.samples + seen
        assert whole is not None
        return whole


def _summed(sums: Mapping[tuple[int, str], Sums], processes: Processes) -> dict[tuple[int, str], Any]:
    """Parts of all processes, whose sums are made together, round by round."""
    found: dict[tuple[int, str], Any] = {}
    asked = {key: next(way) for key, way in sums.items()}
    while asked:
        flat = [tensor for tensors in asked.values() for tensor in tensors]
        totals = iter(processes.sums(flat))
        following = {}
        for key, tensors in asked.items():
            try:
                following[key] = sums[key].send([next(totals) for _ in tensors])
            except StopIteration as end:
                found[key] = end.value
        asked = following
    return found


def _joined(entry: Entry) -> tuple[Any, torch.dtype] | None:
    if not isinstance(entry.rule, Joined):
        return None
    value = entry.rule.value(entry.part)
    return tuple(value.shape), value.dtype


def _digest(order: Mapping[Tensor, str]) -> tuple[int, str]:
    text = repr([(name, tuple(p.shape)) for p, name in order.items()])
    return len(order), hashlib.sha256(text.encode()).hexdigest()


def _check(told: Sequence[_Told]) -> None:
    for rank, each in enumerate(told):
        if each.fields != told[0].fields:
            raise RuntimeError(
                "processes of one process_group compute the same quantities, but process 0 computes "
                f"{', '.join(told[0].fields)} and process {rank} {', '.join(each.fields)}"
            )
    kinds = {each.parameters for each in told if each.parameters[0]}
    if len(kinds) > 1:
        raise RuntimeError(
            "backward passes in the processes of one process_group are of different models, or of "
            f"parts of one (they have {', '.join(str(n) for n, _ in sorted(kinds))} parameters of "
            "other names, orders or shapes); give all processes one model, extended as a whole"
        )
