"""Values of one backward pass, put together with those of the same pass in other processes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backpack.engine.collect import Leaf
from backpack.quantities.base import BackpropExtension, Context
from backpack.quantities.combining import Rule
from backpack.quantities.parts import Entries, Entry, dtype_of, exchanged, rule_of
from backpack.quantities.processes import Processes

# Reasons why parameters do not have fields, by both; those of ``None`` are of all parameters.
Without = Mapping[Tensor | None, Mapping[str, str]]


class Exchange:
    """What a process has computed, until its pass is over and all processes have met.

    The loss of all is the mean of the processes' losses, whose gradient ``DistributedDataParallel``
    computes.

    Args:
        processes: with which values are exchanged.
        rules: how values of quantities combine, by their fields.
    """

    def __init__(self, processes: Processes, rules: Mapping[str, Rule]) -> None:
        self.processes, self.rules = processes, rules
        self.entries: Entries = {}

    @property
    def gathers(self) -> bool:
        """Whether values of single samples are gathered from all processes."""
        return self.processes.gathers

    def take(self, ext: BackpropExtension, value: Any, context: Context, reached: bool) -> None:
        """Note a parameter's value; ``reached``: whether any column has reached it."""
        rule = self.rules[ext.savefield]
        if not reached:
            context = context._replace(gradient=partial(torch.zeros_like, context.parameter))
        part = rule.weigh(rule.take(value, context), 1 / self.processes.size)
        entry = Entry(rule, part, context.samples, dtype_of(value))
        self.entries.setdefault(context.parameter, {})[ext.savefield] = entry

    def share(
        self, exts: Sequence[BackpropExtension], leaves: Collection[Leaf], known: Mapping[Tensor, str]
    ) -> None:
        """Replace what quantities have found at a first look at columns by that of all processes."""
        rules: dict[str, Rule] = {}
        for ext in exts:
            first = ext.before()
            rule = None if first is None else rule_of(first)
            if rule is None:
                raise NotImplementedError(
                    f"{ext!r} looks at columns twice, and does not say by `before` what it needs of "
                    "all processes first; see backpack.own.BackpropExtension"
                )
            rules[ext.savefield] = rule
        entries: Entries = {}
        for leaf in leaves:
            for field, rule in rules.items():
                if field in leaf.states:
                    state = leaf.states[field]
                    part = rule.weigh(rule.take(state, None), 1 / self.processes.size)
                    entry = Entry(rule, part, leaf.samples, dtype_of(state))
                    entries.setdefault(leaf.parameter, {})[field] = entry
        with torch.no_grad():
            all_of = exchanged(entries, known, rules, samples_of(leaves), self.processes).entries
        for leaf in leaves:
            for field in rules:
                shared = all_of.get(leaf.parameter, {}).get(field)
                if shared is not None and field not in leaf.without:
                    leaf.states[field] = shared.value()

    def run(
        self, known: Mapping[Tensor, str], samples: int, without: Without
    ) -> Iterator[tuple[Tensor, str, Any, str | None]]:
        """Parameters, fields and values of all samples, or reasons why there are none."""
        left_out = {
            (p, field): why
            for p in known
            for field, why in {**without.get(None, {}), **without.get(p, {})}.items()
            if field in self.rules
        }
        found = exchanged(self.entries, known, self.rules, samples, self.processes, left_out)
        self.entries = {}
        for (p, field), why in found.left_out.items():
            if (p, field) not in left_out:
                yield p, field, None, why
        for p, fields in found.entries.items():
            for field, entry in fields.items():
                yield p, field, entry.value(), None


def samples_of(leaves: Collection[Leaf]) -> int:
    """The number of samples of a pass."""
    return max((leaf.samples for leaf in leaves), default=0)
