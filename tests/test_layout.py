"""One river: files import only from files above them, and the core needs nothing but torch."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest

import backpack
from backpack import extensions, optim, vivit

ROOT = Path(backpack.__file__).parent
RIVER = [
    *"batch aliases probe moves entries placing propagation memory kernels factors recurrent".split(),
    *"rules losses opened taps functions inputs tangents tracing capture backprop".split(),
    *"certificate columns hessian products chain sources kronecker combining quantities".split(),
    *"blocks checks exposed run direct engine extend accumulation dataset oracle".split(),
]
# Optimizers stand on all of it; each file of theirs on the first one only.
OPTIMIZERS = ("base", "diagonal", "gram", "kronecker", "newton", "private")
# What stands on the core as anybody's own code may: low-rank curvature and the monitor.
OPEN = {"backpack", *(f"backpack.{name}" for name in "own engine extend hessianfree".split())}
# Packages that one function imports; an extra installs them, or torch's build for a device brings them.
EXTRAS = {
    "kernels.py": {"triton"},
    "dataset.py": {"rich", "tqdm"},
    "optim/private.py": {"dp_accounting"},
    "vivit/operators.py": {"scipy"},
    "vivit/figures.py": {"matplotlib"},
    "cockpit/history.py": {"pandas"},
    "cockpit/report.py": {"IPython", "matplotlib"},
    "cockpit/figure.py": {"matplotlib"},
    "cockpit/callbacks.py": {"lightning", "pytorch_lightning", "transformers"},
    "cockpit/plotter.py": {"PIL"},
    "cockpit/terminal.py": {"rich"},
    "cockpit/__main__.py": {"rich"},
}
CORE = sorted(p.stem for p in ROOT.glob("*.py") if p.stem != "__init__")


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            assert node.module is not None
            submodules = [a.name for a in node.names if _is_module(node.module, a.name)]
            found |= {f"{node.module}.{name}" for name in submodules} or {node.module}
    return found


def _is_module(package: str, name: str) -> bool:
    if not package.startswith("backpack"):
        return False
    place = ROOT.joinpath(*package.split(".")[1:], name)
    return place.is_dir() or place.with_suffix(".py").exists()


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "backpack"}


@pytest.mark.parametrize("name", RIVER)
def test_imports_go_one_way(name: str) -> None:
    above = RIVER[: RIVER.index(name)]
    later = {f"backpack.{other}" for other in RIVER if other not in above}
    assert ours(ROOT / f"{name}.py").isdisjoint(later)
    assert "backpack" not in ours(ROOT / f"{name}.py")


def test_reading_order() -> None:
    assert f"    {', '.join(RIVER)}\n" in (ROOT.parent / "CONTRIBUTING.md").read_text()


def test_no_cycles() -> None:
    """Files that the river does not name take part in no cycle either."""
    below = {name: {m.split(".")[1] for m in ours(ROOT / f"{name}.py") if "." in m} for name in CORE}
    done: set[str] = set()
    while len(done) < len(CORE):
        ready = {name for name in CORE if name not in done and below[name] & set(CORE) <= done}
        assert ready, f"a cycle among {sorted(set(CORE) - done)}"
        done |= ready


def test_optimizers_stand_on_everything() -> None:
    files = {path.stem: ours(path) for path in (ROOT / "optim").glob("*.py")}
    assert files.keys() == {"__init__", *OPTIMIZERS}
    for name in OPTIMIZERS:
        above = {m for m in files[name] if m.startswith("backpack.optim")}
        assert above <= ({"backpack.optim.base"} if name != "base" else set()), name
    for path in ROOT.rglob("*.py"):
        if path.parent.name != "optim":
            assert not any(m.startswith("backpack.optim") for m in ours(path)), path


@pytest.mark.parametrize("package", ["vivit", "cockpit"])
def test_packages_stand_on_the_door(package: str) -> None:
    """They import what code outside the library may import; nothing of the core imports them."""
    for path in ROOT.rglob("*.py"):
        inside = path.relative_to(ROOT).parts[0] == package
        for name in ours(path):
            if name.startswith(f"backpack.{package}"):
                assert inside or path.parent.name == "optim", path
            elif inside:
                assert name in OPEN or name.startswith("backpack.hessianfree"), (path, name)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_needs_only_torch(path: Path) -> None:
    extra = EXTRAS.get(str(path.relative_to(ROOT)), set())
    allowed = {"backpack", "torch", *extra, *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(path)} <= allowed
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not any(name in ast.unparse(node) for name in extra), (
                "an extra is imported with the file"
            )
    assert ast.get_docstring(ast.parse(path.read_text())), "no docstring"


@pytest.mark.parametrize("space", [backpack, extensions, optim, vivit], ids=lambda m: m.__name__)
def test_public_names_are_documented(space) -> None:
    assert len(set(space.__all__)) == len(space.__all__)
    for name in space.__all__:
        each = getattr(space, name)
        if not inspect.ismodule(each):
            assert (each.__doc__ or "").strip(), name
