"""The walk of one value in docs/design.md: its functions exist, and are called in its order."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import nn

import backpack as package
from backpack import backpack, extend
from backpack import extensions as E
from backpack.forms.base import Form

ROOT = Path(package.__file__).parent
SECTION = (
    (ROOT.parent / "docs/design.md").read_text().split("## The walk of one value")[1].split("\n## ")[0]
)
# The steps of all quantities, then those of each under its name.
PARTS = re.split(r"^\*\*(\w+)\*\*", SECTION, flags=re.MULTILINE)
TOLD = {"": PARTS[0], **dict(zip(PARTS[1::2], PARTS[2::2], strict=True))}
# A name in the text, and a file before or behind it: `file.py`, `name` or `name` (`file.py`).
NAME = re.compile(r"(?:`([\w/]+\.py)`,\s+)?`([A-Za-z_][\w.]*)`(?!\w)(?:\s+\(`([\w/]+\.py)`)?")


def steps(text: str) -> list[str]:
    return re.split(r"^\d\. ", text, flags=re.MULTILINE)[1:]


def function_of(name: str, file: str | None) -> Any:
    """The function of that name, in that file if the text names one."""
    files = [file] if file else [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("*/*.py"))]
    for each in files:
        found: Any = import_module("backpack." + each.removesuffix(".py").replace("/", "."))
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    raise AssertionError(f"docs/design.md tells of {name} in {file or 'a file'}, which has none")


def named(step: str) -> list[Any]:
    """What a step names, in the order of the text."""
    found = [(name, before or behind or None) for before, name, behind in NAME.findall(step)]
    return [function_of(name, file) for name, file in found if not name.endswith(".py")]


@pytest.mark.parametrize("quantity", [name for name in TOLD if name])
def test_names_exist(quantity: str) -> None:
    assert named(TOLD[""]) and named(TOLD[quantity])


def told_of(quantity: str) -> list[str]:
    """All steps of a quantity; those of KFAC and DiagHessian are DiagGGNExact's but for some."""
    text = TOLD[quantity]
    if quantity in ("Variance", "DiagGGNExact"):
        return steps(TOLD[""]) + steps(text)
    told = steps(TOLD[""]) + steps(TOLD["DiagGGNExact"])
    if quantity == "KFAC":
        fifth, seventh = text.split(", and in 7 ")
        told[4], told[6] = fifth, "`engine/loop.py`, `_take`: " + seventh
    else:
        told[4] = text
        told[6] = "`engine/loop.py`, `_take`; `DiagHessian.reduce` (`quantities/diagonal.py`)"
    return told


def codes_of(function: Any) -> set[CodeType]:
    """Its code; of a form's method that of any kind of form."""
    found = {inspect.unwrap(function).__code__}
    owner, _, name = function.__qualname__.rpartition(".")
    classes = [Form] if owner == "Form" else []
    for each in classes:
        classes += each.__subclasses__()
        found |= {vars(each)[name].__code__} if name in vars(each) else set()
    return found


@pytest.mark.parametrize("quantity", ["Variance", "DiagGGNExact", "KFAC", "DiagHessian"])
def test_functions_are_called_in_that_order(quantity: str) -> None:
    """The first that a step names in the order of the steps, and all others that it names, too."""
    told = told_of(quantity)
    assert len(told) <= 8
    called: dict[CodeType, int] = {}

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            called.setdefault(frame.f_code, len(called))

    model = extend(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)))
    lossfunc = extend(nn.CrossEntropyLoss())
    y = torch.tensor([0, 1, 2, 0, 1])
    sys.setprofile(note)
    try:
        with backpack(getattr(E, quantity)()):
            lossfunc(model(model[0].weight.new_ones(5, 4)), y).backward()
    finally:
        sys.setprofile(None)
    order = []
    for step in told:
        functions = [each for each in named(step) if inspect.isfunction(each)]
        for each in functions:
            assert codes_of(each) & called.keys(), f"{each.__qualname__} is not called"
        order.append(min(called[code] for code in codes_of(functions[0]) & called.keys()))
    assert order == sorted(order)
