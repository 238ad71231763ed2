"""What can be said of the pages without building the site."""

from __future__ import annotations

import re
import runpy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("howto/*.md"), *DOCS.parent.glob("*.md")])


def test_public_names_are_on_api_pages() -> None:
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.rst"))
    directives = re.findall(r"^\.\. auto(?:class|function|data):: ([\w.]+)", text, re.MULTILINE)
    assert len(set(directives)) == len(directives)
    public = runpy.run_path(str(DOCS / "undocumented.py"))["public_names"]()
    assert len(public) > 50
    assert public - set(directives) == set()
    for name in directives:
        resolve(name)


def resolve(name: str) -> Any:
    """What a full name stands for, with as many parts as can be imported taken for modules."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_names_exist(page: Path) -> None:
    """Full names in the text, with arguments or without, lead to something."""
    for name in re.findall(r"`(backpack(?:\.\w+)+)[`(]", page.read_text()):
        try:
            resolve(name)
        except (AttributeError, ModuleNotFoundError) as error:
            raise AssertionError(f"{name} is on {page.name} only") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links(page: Path) -> None:
    """Those to files lead somewhere; pages of tutorials have a script of their name."""
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        place = page.parent / link
        if link.startswith(("tutorials/", "../tutorials/")):
            place = DOCS.parent / f"{link.removeprefix('../')}.py"
        if link != "tutorials/index":
            # The site has no pages for folders; the repository's own pages may lead to them.
            assert place.is_file() or (place.is_dir() and DOCS not in page.parents), link


def test_first_example(capsys: pytest.CaptureFixture[str]) -> None:
    """What the README prints is what its example does."""
    text = (DOCS.parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_absolute_links_of_the_readme(tmp_path: Path) -> None:
    """What goes to a package index has no relative link, and the address in its metadata."""
    for name in ("README.md", "pyproject.toml"):
        (tmp_path / name).write_text((DOCS.parent / name).read_text())
    runpy.run_path(str(DOCS / "absolute.py"))["main"]("https://example.org/some/project/", tmp_path)
    written, address = (tmp_path / "README.md").read_text(), "https://example.org/some/project"
    links = re.findall(r"\]\(([^)]*)\)", written)
    assert links and all(each.startswith("https://") for each in links)
    version = re.findall(r'^version = "(.*)"', (tmp_path / "pyproject.toml").read_text(), re.MULTILINE)[
        0
    ]
    ours = [each.removeprefix(f"{address}/") for each in links if each.startswith(address)]
    for place in ours:
        kind, tag, path = place.split("/", 2)
        assert tag == f"v{version}" and (DOCS.parent / path).is_file()
        assert (kind == "raw") == path.endswith(".png")
    assert len(ours) > 20 and f'Source = "{address}"' in (tmp_path / "pyproject.toml").read_text()


def test_quick_start(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    exec(compile(code, "index.md", "exec"), {})
    size = "torch.Size([32, 64])"
    assert f"0.weight {size} {size} {size}" in capsys.readouterr().out
