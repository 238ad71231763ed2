"""A stranger's first hour: ``python tests/project/stranger.py [--packages]``, or ``make stranger``.

Clones the repository into an empty folder, makes the environment and the demo with one command and the
smoke test with another, then copies the README's example and every how-to's program from its page and
runs each in a folder of its own, as a user would. Prints what took how long; fails if anything fails.
With ``--packages`` also the pages that need transformers, Lightning or TensorBoard.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Job(NamedTuple):
    """What was done, how long it took, and its last words where it failed."""

    name: str
    seconds: float
    failed: str


def run(name: str, command: list[str], folder: Path) -> Job:
    """Run a command in a folder."""
    # What this process was told of paths is nothing that a stranger has.
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "MAKE", "MFLAGS"))
    }
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean)
    job = Job(name, time.perf_counter() - start, done.stderr[-2000:] if done.returncode else "")
    print(f"{name}: {job.seconds:.0f} s{' FAILED' if job.failed else ''}", file=sys.stderr, flush=True)
    return job


def programs(clone: Path) -> dict[str, str]:
    """What there is to copy, by page."""
    pages = [clone / "README.md", *sorted((clone / "docs" / "howto").glob("*.md"))]
    found = {
        page: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        for page in pages
    }
    return {page.relative_to(clone).as_posix(): code[0] for page, code in found.items() if code}


def needs_packages(code: str) -> bool:
    """Whether a program imports what the ordinary environment does not have."""
    return (
        re.search(
            r"^\s*(import|from) (transformers|lightning|torch\.utils\.tensorboard)", code, re.MULTILINE
        )
        is not None
    )


PACKAGES = ["transformers", "accelerate", "lightning", "tensorboard"]


def visit(folder: Path, packages: bool) -> list[Job]:
    """All jobs, in the order in which a stranger would do them."""
    clone = folder / "clone"
    jobs = [run("git clone", ["git", "clone", "--quiet", str(ROOT), str(clone)], folder)]
    jobs.append(run("make demo, with its environment", ["make", "demo"], clone))
    jobs.append(run("make smoke", ["make", "smoke"], clone))
    python = str(clone / ".venv" / "bin" / "python")
    special = {page: code for page, code in programs(clone).items() if needs_packages(code)}
    for page, code in programs(clone).items():
        if page not in special:
            jobs.append(page_job(page, code, python, folder))
    if packages:
        install = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--constraint",
            "constraints.txt",
            *PACKAGES,
        ]
        jobs.append(run(f"pip install {' '.join(PACKAGES)}", install, clone))
        jobs += [page_job(page, code, python, folder) for page, code in special.items()]
    return jobs


def page_job(page: str, code: str, python: str, folder: Path) -> Job:
    """A page's program in a folder of its own."""
    place = folder / page.replace("/", "-").removesuffix(".md")
    place.mkdir()
    (place / "program.py").write_text(code)
    return run(page, [python, "program.py"], place)


def table(jobs: list[Job]) -> str:
    """In Markdown."""
    lines = ["| job | minutes | |", "|---|---|---|"]
    lines += [
        f"| {job.name} | {job.seconds / 60:.1f} | {'fails' if job.failed else 'works'} |"
        for job in jobs
    ]
    return "\n".join(lines)


def main() -> int:
    """Visit, and tell; how many jobs failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--packages", action="store_true")
    parser.add_argument(
        "--folder", type=Path, help="an empty folder; by default one that is deleted afterwards"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        jobs = visit(given.folder or Path(temporary), given.packages)
    print(table(jobs))
    for job in jobs:
        if job.failed:
            print(f"\n{job.name}\n{job.failed}", file=sys.stderr)
    return sum(bool(job.failed) for job in jobs)


if __name__ == "__main__":
    sys.exit(main())
