"""Print cells that are neither right nor refused as they may be: ``python -m tests.idioms [WORD ...]``.

Words pick cells whose name holds all of them, as ``view`` ``extended`` ``mean``.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict

from tests.idioms.cells import cells, quiet
from tests.idioms.refusals import fine


def main(words: list[str]) -> None:
    """Group what disagrees by quantities, way and idiom."""
    quiet()
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    count = 0
    for cell in cells():
        if not all(word in f"-{cell}-" for word in words):
            continue
        truth = cell.truth()
        if not truth.loss.isfinite():
            continue
        count += 1
        for group, text in cell.comparison(truth).outcome().items():
            if not fine(cell, group, text):
                what = re.sub(r"[\d.]+e[+-]\d+", "", text)[:90]
                found[group, cell.way, what, cell.idiom.name].append(
                    f"{cell.loss.name}-{cell.reduction}"
                )
    for key, names in sorted(found.items()):
        print(" | ".join(key), f"| {len(names)}:", ", ".join(names[:4]))
    print(f"{sum(map(len, found.values()))} disagreements in {count} cells")


if __name__ == "__main__":
    main(sys.argv[1:])
