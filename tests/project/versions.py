"""The smoke suite and the table of cases with other versions of Python and torch.

    python3 tests/project/versions.py python3.10:2.11.0 python3.13:2.15.0    (make versions)

Each pair has an environment of its own in ``.venv-versions``; a Python is looked for as a command and
among those of pyenv. Builds of torch for CUDA bring some 3 GB of libraries. With ``--bare`` they are
installed without: libraries of these names are made that define the same symbols and do nothing, so
that torch can be imported and does what it does on a CPU. That takes gcc, nm and readelf.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-versions"
TESTS = """tests/project/test_smoke.py tests/quantities/test_cases.py tests/engine/test_processes.py
    tests/engine/test_sharded.py""".split()
# What torch and the tests import.
PACKAGES = """filelock fsspec hypothesis jinja2 networkx numpy pytest pytest-xdist scikit-learn
    setuptools sympy typing_extensions""".split()
CUDA = re.compile(r"lib(cu|nv|nccl)")


def python_of(name: str) -> str | None:
    """The command of a Python."""
    version = re.sub(r"^python", "", name)
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    places = [*map(str, sorted(kept.glob(f"{version}*/bin/python"), reverse=True)), shutil.which(name)]
    for place in filter(None, places):  # a command may be no more than a shim
        if not subprocess.run([place, "--version"], capture_output=True).returncode:
            return place
    return None


def output_of(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def make_empty_libraries(folder: Path) -> None:
    """Libraries of CUDA's names in torch's folder, which define what torch asks of them."""
    libraries = [*folder.glob("*.so*"), *folder.parent.glob("_C*.so")]
    needed, versions, defined, asked = set[str](), dict[str, set[str]](), set[str](), set[str]()
    for library in map(str, libraries):
        needed |= set(re.findall(r"NEEDED.*\[(.*?)\]", output_of("readelf", "-d", library)))
        file = ""
        for line in output_of("readelf", "-V", library).splitlines():
            if found := re.search(r"File: (\S+)", line):
                file = found[1]
            elif found := re.search(r"Name: (\S+)\s+Flags", line):
                versions.setdefault(file, set()).add(found[1])
        for line in output_of("nm", "-D", library).splitlines():
            kind, symbol = line.split()[-2:]
            (asked.add if kind in "Uvw" else lambda s: defined.add(s.split("@")[0]))(symbol)
    symbols: dict[str, set[str]] = {}
    for symbol in asked:
        name, _, version = symbol.partition("@")
        if name not in defined:
            symbols.setdefault(version.strip("@"), set()).add(name)
    for name in sorted(needed - {library.name for library in libraries}):
        if not CUDA.match(name):
            continue
        parts = {version: symbols.get(version, set()) for version in sorted(versions.get(name, ()))}
        names = set().union(*parts.values())
        if name.startswith("libcudart"):
            names |= {s for s in symbols.get("", ()) if re.match(r"_*(cu|nccl|nvrtc|nvshmem)", s, re.I)}
        source, script = folder / "empty.c", folder / "empty.map"
        source.write_text("\n".join(f"int {symbol}() {{ return 100; }}" for symbol in sorted(names)))
        script.write_text(
            "\n".join(
                f"{v} {{ global: {' '.join(s + ';' for s in sorted(of))} }};" for v, of in parts.items()
            )
        )
        command = [
            "gcc",
            "-shared",
            "-fPIC",
            "-w",
            "-fno-builtin",
            str(source),
            "-o",
            str(folder / name),
        ]
        command += [f"-Wl,-soname,{name}"] + ([f"-Wl,--version-script={script}"] if parts else [])
        subprocess.run(command, check=True)
    for file in ("empty.c", "empty.map"):
        (folder / file).unlink(missing_ok=True)


def environment(python: str, torch: str, place: Path, bare: bool) -> dict[str, str]:
    """An environment with a version of torch; the variables that its Python needs."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    own = str(place / "bin/python")
    if not (place / "made").exists():
        subprocess.run([python, "-m", "venv", "--clear", str(place)], check=True)
        install = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *(["--no-deps"] if bare else []), f"torch=={torch}"], check=True)
        subprocess.run([*install, *PACKAGES], check=True)
    libraries = next(place.glob("lib/python3*/site-packages/torch/lib"))
    if bare:
        if not (place / "made").exists():
            make_empty_libraries(libraries)
        variables["LD_LIBRARY_PATH"] = str(libraries)
    (place / "made").touch()
    return variables


def main() -> int:
    """Run the tests with each pair, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="+", metavar="PYTHON:TORCH")
    parser.add_argument("--bare", action="store_true", help="without CUDA's libraries")
    parser.add_argument("--tests", nargs="*", default=TESTS)
    given = parser.parse_args()
    rows, failed = [], False
    for pair in given.pairs:
        name, _, torch = pair.partition(":")
        python = python_of(name)
        if python is None:
            rows.append((name, torch, "this Python is not on this machine"))
            continue
        place = FOLDER / f"{name}-{torch}"
        variables = environment(python, torch, place, given.bare)
        command = [
            str(place / "bin/python"),
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *given.tests,
        ]
        ran = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        print(ran.stdout, ran.stderr, sep="", file=sys.stderr)
        rows.append(
            (name, torch, ran.stdout.strip().splitlines()[-1] if ran.stdout.strip() else "no tests ran")
        )
        failed |= bool(ran.returncode)
    print("| Python | torch | tests |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
