"""Run programs written for the original library on it and on this one, and compare their numbers.

``make clients`` calls it: ``python clients/compare.py ORIGINAL OURS [PROGRAM ...]``, with the Python
interpreters of two environments that differ in the library only. It fails if a number differs, or
if ours fails where the original does not.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
PROGRAMS = "with_laplace", "with_cockpit", "with_curvlinops", "against_original"
TOLERANCE = 1e-10

# Cases whose numbers are not the original's, and why: "program: case: path" with wildcards.
DIFFERENT = {
    "against_original: conv2d, groups*: BatchL2Grad: /BatchL2Grad": (
        "the original adds terms across groups to the norm of a grouped convolution's weight"
    ),
}


class Difference(NamedTuple):
    """One place where two results differ."""

    path: str
    size: float
    text: str


def differences(a: Any, b: Any, path: str = "") -> Iterator[Difference]:
    """Places where ``b`` differs from ``a``; numbers are compared list by list."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            if key not in a or key not in b:
                yield Difference(f"{path}/{key}", math.inf, "is there only once")
            else:
                yield from differences(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list) and isinstance(b, list) and not (_numeric(a) and _numeric(b)):
        if len(a) != len(b):
            yield Difference(path, math.inf, f"lengths {len(a)} and {len(b)}")
            return
        for place, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path}/{place}")
    elif isinstance(a, (list, int, float)) and isinstance(b, (list, int, float)):
        x, y = _flat(a), _flat(b)
        if _shape(a) != _shape(b):
            yield Difference(path, math.inf, f"shapes {_shape(a)} and {_shape(b)}")
            return
        scale = max([abs(each) for each in x if math.isfinite(each)], default=0.0)
        error = max((_distance(s, t) for s, t in zip(x, y, strict=True)), default=0.0)
        yield Difference(path, error / max(scale, 1e-12), "numbers")
    elif a != b:
        yield Difference(path, math.inf, f"{a!r} and {b!r}")


def _numeric(a: Any) -> bool:
    """Whether nested lists hold numbers only, and form an array."""
    if isinstance(a, list):
        return all(_numeric(each) for each in a) and len({str(_shape(each)) for each in a}) < 2
    return isinstance(a, (int, float))


def _shape(a: Any) -> list[int]:
    if not isinstance(a, list):
        return []
    return [len(a), *(_shape(a[0]) if a else [])]


def _flat(a: Any) -> list[float]:
    return [x for each in a for x in _flat(each)] if isinstance(a, list) else [a]


def _distance(a: float, b: float) -> float:
    return 0.0 if a == b or (a != a and b != b) else abs(a - b) if math.isfinite(a - b) else math.inf


def run(python: str, program: str, pattern: str) -> dict[str, Any]:
    """What a program gives in one environment."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "numbers.json"
        command = [os.path.abspath(python), str(HERE / f"{program}.py"), str(output), pattern]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        # Not in this repository, whose package would be imported in place of the installed one.
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return json.loads(output.read_text())


def judge(program: str, name: str, original: dict, ours: dict) -> tuple[str, str, bool]:
    """A verdict, details, and whether it is as it should be."""
    if "error" in original and "error" in ours:
        return "neither", ours["error"], True
    if "error" in original:
        return "ours only", f"the original: {original['error']}", True
    if "error" in ours:
        return "FAILS", ours["error"] + "\n" + ours["traceback"], False
    expected, found = [], []
    worst = 0.0
    for each in differences(original["numbers"], ours["numbers"]):
        key = f"{program}: {name}: {each.path}"
        reason = next((why for k, why in DIFFERENT.items() if fnmatch.fnmatch(key, k)), None)
        if each.size <= TOLERANCE:
            worst = max(worst, each.size)
        elif reason is None:
            found.append(each)
        else:
            expected.append((each, reason))
    if found:
        found.sort(key=lambda each: -each.size)
        lines = [f"{each.path}: {each.text} {each.size:.1e}" for each in found[:4]]
        return "DIFFERS", f"{len(found)} places\n" + "\n".join(lines), False
    if expected:
        reasons = sorted({reason for _, reason in expected})
        return "differs", f"as it should in {len(expected)} places: " + "; ".join(reasons), True
    return "agrees", f"largest error {worst:.0e}", True


def main() -> int:
    """Run, compare, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pythons", nargs=2, help="interpreters with the original and with this library")
    parser.add_argument("programs", nargs="*", default=PROGRAMS, metavar="program")
    parser.add_argument("--only", default="", help="compare cases whose names contain this")
    parser.add_argument("--brief", action="store_true", help="list what differs only")
    given = parser.parse_intermixed_args()
    fine = True
    counts: dict[tuple[str, str], int] = {}
    for program in given.programs:
        with ThreadPoolExecutor() as pool:
            both = pool.map(partial(run, program=program, pattern=given.only), given.pythons)
            original, ours = both
        for name in original:
            verdict, details, good = judge(program, name, original[name], ours[name])
            fine &= good
            counts[program, verdict] = counts.get((program, verdict), 0) + 1
            if not good or verdict == "differs" or not given.brief:
                seconds = f"{original[name]['seconds']:5.1f} {ours[name]['seconds']:5.1f} s"
                details = details.strip().replace("\n", "\n    ")
                print(f"{verdict:9} {seconds}  {program}: {name}: {details}", flush=True)
    print()
    for (program, verdict), count in counts.items():
        print(f"{program:18} {verdict:9} {count:4}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
