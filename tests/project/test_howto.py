"""Each page of `docs/howto` is one program, which runs as it is pasted and says what it found."""

from __future__ import annotations

import ast
import re
import socket
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "docs" / "howto"
PAGES = {page.stem: page for page in sorted(FOLDER.glob("*.md")) if page.stem != "index"}
# Those whose packages are in the environment of `make zoo` only.
PACKAGES = {"gradient-norms", "lightning", "tensorboard", "trainer"}


def program(name: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGES[name].read_text(), re.DOTALL | re.MULTILINE)
    return code


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    state = torch.random.get_rng_state()
    try:
        exec(compile(program(name), f"{name}.md", "exec"), {"__name__": "page"})
    finally:
        torch.random.set_rng_state(state)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:a compiled Sequential runs uncompiled:UserWarning")
@pytest.mark.parametrize("name", sorted(PAGES.keys() - PACKAGES))
def test_page(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(name, monkeypatch)
    assert capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_page_with_packages(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(name, monkeypatch)
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", PAGES)
def test_form(name: str) -> None:
    """A screen or two, with a check of its own, and listed among the others."""
    text, code = PAGES[name].read_text(), program(name)
    assert text.startswith("# ") and len(text.splitlines()) <= 85
    checks = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assert)]
    assert checks or "assert_close" in code


def test_all_are_listed() -> None:
    listed = re.findall(r"^[\w-]+$", (FOLDER / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(PAGES)
