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
# Rooms in the order in which data flows, and the files of each: a file imports from no later one.
ROOMS = {
    "samples": """axis aliases separability movers segments contractions indexing reductions entries
        packing writes propagate""",
    "forms": """memory limits triton products overlaps base layout lookup strips tally sides outer sums
        ragged several complex_pairs at_output""",
    "rules": """base recursions elementwise linear convolution lookup einsum normalization recurrent
        packed fallback analytic decompositions components jagged""",
    "losses": "blocks base likelihoods elementwise piecewise softmax twice",
    "graph": """nodes retained taps outputs origins making transformed scaling tangents tracing carry
        derived recognised node_rules above region followed differentiated residuals unseen survey
        forwards""",
    "capture": """switch functions contest inputs said loss_records row_pairs tracker in_place sequences
        recorder passages hooks marks extend""",
    "sources": "columns at_output curvature_map at_parameter hessian kfra table",
    "kronecker": "matrices block eigen factored lists",
    "quantities": """products processes combining reading base parts first_order diagonal square_root
        kronecker matrix_products""",
    "engine": """left_out state layer_io refusals costs debug certificate collect alone exchange shards
        loop pass_state saving reducing listening run direct watch block plan""",
    "dataset": "totals micro_batches spread reductions individual accumulating loop",
    "testing": "report copies outputs oracle",
}
RIVER = [f"{room}.{file}" for room, files in ROOMS.items() for file in files.split()]
# Optimizers stand on all of it; each file of theirs on those of the first five before it.
OPTIMIZERS = """base curvature accounting bounds factors
    diagonal gram kronecker newton private""".split()
# What stands on the core as anybody's own code may: low-rank curvature and the monitor.
OPEN = {"backpack", "backpack.own", "backpack.hessianfree", "backpack._torch"}
# Packages that one function imports; an extra installs them, or torch's build for a device brings them.
EXTRAS = {
    "forms/triton.py": {"triton"},
    "dataset/loop.py": {"rich", "tqdm"},
    "optim/accounting.py": {"dp_accounting"},
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
# Lines of the longest file: some 400.
LONGEST = 420
# Files at the top, which hold names only.
TOP = {"__init__", "_ambient", "_torch", "own", "compat", "context"}


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
    found = ours(ROOT / f"{name.replace('.', '/')}.py")
    above = {f"backpack.{other}" for other in RIVER[: RIVER.index(name)]}
    above |= {"backpack._ambient", "backpack._torch"}
    assert found <= above | {f"backpack.{room}" for room in ROOMS if f"backpack.{room}.base" in above}


def test_every_file_has_a_room() -> None:
    files = {f"{p.parent.name}.{p.stem}" for room in ROOMS for p in (ROOT / room).glob("*.py")}
    assert files - {f"{room}.__init__" for room in ROOMS} == set(RIVER)
    assert {path.stem for path in ROOT.glob("*.py")} == TOP


def test_reading_order() -> None:
    text = (ROOT.parent / "CONTRIBUTING.md").read_text()
    for room, files in ROOMS.items():
        assert f"| `{room}/` | {', '.join(files.split())} |" in text, room


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_have_one_purpose(path: Path) -> None:
    """And are read at one sitting."""
    assert len(path.read_text().splitlines()) <= LONGEST, "split it into files of one purpose each"


@pytest.mark.parametrize("room", ROOMS)
def test_heads_say_what_comes_in_and_goes_out(room: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
    assert text is not None and "\nIn: " in text and " Out: " in text.replace("\n", " ")


@pytest.mark.parametrize("room", ROOMS)
def test_tables_are_filled(room: str) -> None:
    """A file that registers functions is imported with its room, whatever is asked of it."""
    head = imports(ROOT / room / "__init__.py")
    for file in ROOMS[room].split():
        tree = ast.parse((ROOT / room / f"{file}.py").read_text())
        called = {ast.unparse(d.func) for node in tree.body for d in decorators(node)}
        if called & {"op_rule", "loss_rule", "mover"}:
            assert f"backpack.{room}.{file}" in head or file == "movers"


def decorators(node: ast.stmt) -> list[ast.Call]:
    found = getattr(node, "decorator_list", [])
    return [each for each in found if isinstance(each, ast.Call)]


def test_optimizers_stand_on_everything() -> None:
    files = {path.stem: ours(path) for path in (ROOT / "optim").glob("*.py")}
    assert files.keys() == {"__init__", *OPTIMIZERS}
    for name in OPTIMIZERS:
        above = {m for m in files[name] if m.startswith("backpack.optim")}
        below = OPTIMIZERS[: min(OPTIMIZERS.index(name), 5)]
        assert above <= {f"backpack.optim.{other}" for other in below}, name
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
def test_private_names_of_torch_are_in_one_file(path: Path) -> None:
    """But for attributes of tensors and nodes, which that file lists."""
    if path.stem == "_torch":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            private = ast.unparse(node).startswith("torch._")
            assert not private, (path.name, node.lineno, ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            private = [part for part in (node.module or "").split(".") if part.startswith("_")]
            assert not private, (path.name, node.module)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_arguments_are_written_one_by_one(path: Path) -> None:
    """None are packed to save lines, as in ``f(*(a, b), c)``."""
    for node in ast.walk(ast.parse(path.read_text())):
        for each in node.args if isinstance(node, ast.Call) else ():
            packed = isinstance(each, ast.Starred) and isinstance(each.value, (ast.Tuple, ast.List))
            assert not packed, (path.name, each.lineno, ast.unparse(each))


def test_forms_are_what_their_base_declares() -> None:
    for path in (ROOT / "forms").glob("*.py"):
        assert "ignore[override]" not in path.read_text(), path


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_limits_by_device_are_in_one_file(path: Path) -> None:
    """Whoever adds a device finds them there, but for the monitor's and what a kernel needs."""
    if path.stem in ("limits", "triton"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            assert not keys & {"cpu", "cuda"}, (path.name, node.lineno)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_ambient_state_is_in_one_file(path: Path) -> None:
    """But for the monitor's, which stands on the door as anybody's code."""
    if path.stem == "_ambient" or path.parent.name == "cockpit":
        return
    names = {
        ast.unparse(n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)
    }
    assert not names & {"threading.local", "contextvars.ContextVar"}
    assert not imports(path) & {"contextvars", "_thread"}


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
