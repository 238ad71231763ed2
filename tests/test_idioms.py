"""What lies between a model's output and its loss: every idiom, every loss, every quantity, or an error."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.idioms.cells import Cell, cells
from tests.idioms.idioms import Sizes
from tests.idioms.refusals import NOT_CONVEX, refusal

# Losses that the fast tests try with all idioms, and in another way than extended too.
COMMON = ("ce", "mse", "bce-logits", "multi-margin-2")
# Idioms much like one before them.
ALIKE = "flatten times-first mask-rows stack scaled column plain-pixels shift-transpose".split()


def fast() -> Iterator[Cell]:
    """Idioms with every loss, extended; common ones also as a function, or not extended."""
    for number, cell in enumerate(_with_one_reduction()):
        if cell.way == "extended":
            if cell.loss.name in COMMON or cell.idiom.name not in ALIKE:
                yield cell
        elif cell.loss.name in COMMON and cell.way == ("module", "function")[number // 3 % 2]:
            yield cell


def _with_one_reduction() -> Iterator[Cell]:
    """Reductions in turns."""
    pairs: dict[tuple[str, str], str] = {}
    for cell in cells():
        key = cell.idiom.name, cell.loss.name
        turn = pairs.setdefault(key, cell.loss.reductions[len(pairs) % len(cell.loss.reductions)])
        if cell.reduction == turn:
            yield cell


def judge(cell: Cell, gradient: bool = True) -> None:
    """Right, or refused by the words of the table."""
    truth = cell.truth()
    if cell.sizes == Sizes():
        assert truth.convex == (cell.loss.name not in NOT_CONVEX.get(cell.idiom.name, ()))
    assert not truth.mixes
    faults = []
    for group, text in cell.comparison(truth).outcome(gradient=gradient).items():
        allowed = refusal(cell, group)
        if text and not (text.startswith("refused") and allowed and re.search(allowed, text)):
            faults.append(f"{group}: {text}")
    assert not faults, "\n".join([str(cell), *faults])


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("cell", fast(), ids=str)
def test_idiom(cell: Cell) -> None:
    judge(cell)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("cell", cells(), ids=str)
def test_idiom_of_the_whole_table(cell: Cell, gradient: bool) -> None:
    judge(cell, gradient)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("cell", cells(Sizes(3, 3, 3)), ids=str)
def test_idiom_where_sizes_coincide(cell: Cell) -> None:
    judge(cell)
