"""What lies between a model's output and its loss: right in every quantity, or an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.idioms.cells import WAYS, Cell, cells
from tests.idioms.idioms import IDIOMS, SIZES, Idiom, Sizes
from tests.idioms.refusals import NOT_CONVEX, fine

# Torch's advice about the mean of a KL divergence.
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")

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


def faults(cell: Cell, gradient: bool = True) -> list[str]:
    """What is neither right nor refused by the words of the table."""
    truth = cell.truth()
    if not truth.loss.isfinite():
        return []  # a mean over nothing: all labels are ignored
    if cell.sizes == SIZES:
        assert truth.convex == (cell.loss.name not in NOT_CONVEX.get(cell.idiom.name, ()))
    assert not truth.mixes
    outcome = cell.comparison(truth).outcome(gradient=gradient)
    return [
        f"{cell}, {group}: {text}" for group, text in outcome.items() if not fine(cell, group, text)
    ]


@pytest.mark.parametrize("cell", list(fast()), ids=str)
def test_idiom(cell: Cell) -> None:
    found = faults(cell)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("sizes", [Sizes(3, 3, 3), Sizes(1, 2, 2)], ids=str)
@pytest.mark.parametrize("idiom", IDIOMS, ids=lambda idiom: idiom.name)
def test_idiom_at_other_sizes(idiom: Idiom, sizes: Sizes) -> None:
    """Axes of one length, and one sample: some cells of each, the gradient left out in turns."""
    mine = [cell for cell in cells(sizes) if cell.idiom is idiom and cell.loss.name in COMMON]
    number = IDIOMS.index(idiom)
    some = mine[number % 7 :: max(len(mine) // 3, 1)][:3]
    found = [fault for j, cell in enumerate(some) for fault in faults(cell, (number + j) % 2 == 0)]
    assert some and not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("sizes", [SIZES, Sizes(3, 3, 3), Sizes(1, 2, 2)], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("idiom", IDIOMS, ids=lambda idiom: idiom.name)
def test_idiom_with_all_losses(idiom: Idiom, way: str, sizes: Sizes, gradient: bool) -> None:
    mine = [cell for cell in cells(sizes) if cell.idiom is idiom and cell.way == way]
    found = [fault for cell in mine for fault in faults(cell, gradient)]
    assert not found, "\n".join(found)
