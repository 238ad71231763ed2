"""When a step is tracked: a schedule, stretched where tracking would cost more than it may."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median

WINDOW = 50
# Steps that are not tracked and must have been timed before the second is.
BASELINE = 3


class Clock:
    """Times steps, and says when the next may be tracked.

    Args:
        due: the schedule, a function of the step.
        budget: the part of the time so far that tracking may take; ``None``: any.
        now: seconds, from any point in time.
    """

    def __init__(
        self,
        due: Callable[[int], bool],
        budget: float | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        if budget is not None and not budget > 0:
            raise ValueError(f"budget must be a positive share of the time, got {budget!r}")
        self.due, self.budget, self.now = due, budget, now
        self.start = now()
        self.last = self.start
        self.tracked = 0
        self.owed = False
        self._with: deque[float] = deque(maxlen=WINDOW)
        self._ends: deque[float] = deque(maxlen=WINDOW)
        self._without: deque[float] = deque(maxlen=WINDOW)

    @property
    def cost(self) -> float:
        """How much longer a tracked step takes than another; 0 as long as that is not known.

        With the step after it, if that is looked at too.
        """
        if not self._with or not self._without:
            return 0.0
        plain = median(self._without)
        after = median(self._ends) - plain if self._ends else 0.0
        return max(0.0, median(self._with) - plain) + max(0.0, after)

    @property
    def overhead(self) -> float:
        """The part of the time so far that tracking has taken."""
        total = self.last - self.start
        return self.tracked * self.cost / total if total > 0 else 0.0

    def stepped(self, tracked: bool, after: bool = False) -> None:
        """A step is over, which was tracked, or is the one after such a step."""
        now = self.now()
        if not tracked:
            (self._ends if after else self._without).append(now - self.last)
        elif self.tracked:  # the first of a run comes with all that is done once
            self._with.append(now - self.last)
        self.tracked += tracked
        self.last = now

    def tracks(self, step: int) -> bool:
        """Whether a step is to be tracked."""
        self.owed = self.owed or self.due(step)
        if not self.owed or not self._affordable():
            return False
        self.owed = False
        return True

    def _affordable(self) -> bool:
        if self.budget is None or not self.tracked:
            return True
        if len(self._without) < BASELINE:
            return False
        if not self._with:
            return True
        spent = (self.tracked + 1) * self.cost
        return spent <= self.budget * (self.last - self.start)
