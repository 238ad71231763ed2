"""Counts of verdicts, and the reasons of refusals with an example each."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from tests.fuzz.trial import Verdict, reason


class Tally:
    """Runs trials and counts what came out."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, tuple[int, Verdict]] = {}
        self.faults: list[tuple[int, Verdict]] = []
        self.last = -1

    def run(
        self,
        trial: Callable[[int], Verdict],
        seeds: range,
        seconds: float = float("inf"),
        show: Callable[[str], None] | None = None,
    ) -> Tally:
        """Trials of all seeds, until the time is over."""
        start = time.monotonic()
        for seed in seeds:
            self.add(seed, verdict := trial(seed))
            if verdict.fault and show is not None:
                show(f"{verdict.kind} seed {seed} | {verdict.why} | {verdict.what}")
            if time.monotonic() - start > seconds:
                break
        return self

    def add(self, seed: int, verdict: Verdict) -> None:
        self.last = seed
        self.kinds[verdict.kind] += 1
        if verdict.fault:
            self.faults.append((seed, verdict))
        if verdict.why:
            key = f"{verdict.kind}: {reason(verdict.why)}"
            self.reasons[key] += 1
            self.examples.setdefault(key, (seed, verdict))

    @property
    def programs(self) -> int:
        """How many programs were compared."""
        return sum(n for kind, n in self.kinds.items() if not kind.startswith("no "))

    def lines(self, most: int = 40) -> list[str]:
        """A report."""
        found = [f"{self.programs} programs up to seed {self.last}: {dict(self.kinds.most_common())}"]
        for key, count in self.reasons.most_common(most):
            seed, verdict = self.examples[key]
            found.append(f"{count:5d} {key}")
            found.append(f"      seed {seed} | {verdict.what} | {verdict.why[-230:]}")
        return found
