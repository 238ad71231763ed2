"""Examples in docstrings run, and give what they say; what docstrings say of files is true."""

from __future__ import annotations

import ast
import doctest
from importlib import import_module
from pathlib import Path

import pytest

import backpack

ROOT = Path(backpack.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def examples(path: Path) -> list[doctest.DocTest]:
    module = import_module(module_of(path))
    found = doctest.DocTestFinder().find(module, module.__name__, extraglobs={"__name__": "example"})
    return [each for each in found if each.examples]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples(path: Path) -> None:
    text = path.read_text()
    assert "+SKIP" not in text
    # Each line of an example is in a docstring that the finder knows, not in a comment or elsewhere.
    found = examples(path)
    assert sum(len(each.examples) for each in found) == text.count(">>> ")
    for each in found:
        runner = doctest.DocTestRunner(verbose=False)
        assert not runner.run(each).failed, f"{each.name}, see the output above"


def test_there_are_examples() -> None:
    assert sum(len(each.examples) for path in FILES for each in examples(path)) > 30


# Files of which the judge is made, and which know nothing of the library themselves.
OF_THE_JUDGE = {"backpack.testing.outputs", "backpack.testing.rows"}


def test_the_oracle_is_independent() -> None:
    """No name that its file takes from the library is used in the class that judges the library."""
    tree = ast.parse((ROOT / "testing" / "oracle.py").read_text())
    taken = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("backpack")
        if node.module not in OF_THE_JUDGE
        for alias in node.names
    }
    for module in OF_THE_JUDGE:
        text = (ROOT / f"{module.removeprefix('backpack.').replace('.', '/')}.py").read_text()
        others = [line.split()[1] for line in text.splitlines() if line.startswith("from backpack")]
        assert "import backpack" not in text and set(others) <= OF_THE_JUDGE, module
    assert "backpack" in taken
    (judge,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Oracle")
    used = {node.id for node in ast.walk(judge) if isinstance(node, ast.Name)}
    assert used & taken == set()
