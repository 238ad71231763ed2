"""Random programs: ``python -m tests.fuzz FIRST LAST --length 3,8 --seconds 60 --mode programs``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from tests.fuzz import optimizers, privacy, trial
from tests.fuzz.tally import Tally

MODES: dict[str, Callable[..., trial.Verdict]] = {
    "programs": trial.trial,
    "privacy": privacy.trial,
    "optimizers": optimizers.trial,
}


def main() -> int:
    """Run trials, print what is wrong, then counts and reasons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--length", default="3,8", help="fewest and most operations")
    parser.add_argument("--direct", action="store_true", help="one loss, of the output as it is")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--mode", choices=MODES, default="programs")
    options = parser.parse_args()
    length = tuple(map(int, options.length.split(",")))
    trial.settled()
    one = partial(MODES[options.mode], length=length, direct=options.direct)
    tally = Tally().run(one, range(options.first, options.last), options.seconds, _show)
    print("\n".join(tally.lines()))
    return bool(tally.faults)


def _show(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
