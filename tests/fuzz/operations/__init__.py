"""Tables of operations, and how often each is drawn."""

from __future__ import annotations

from tests.fuzz.draft import Operation
from tests.fuzz.operations.axes import ALONG, REDUCING
from tests.fuzz.operations.elementwise import UNARY, WITH_DATA, WITH_PARAMETER
from tests.fuzz.operations.indexing import PICKS
from tests.fuzz.operations.layers import LAYERS, RECURRENT
from tests.fuzz.operations.products import LINEAR, MODULES
from tests.fuzz.operations.shapes import JOINS, SHAPES
from tests.fuzz.operations.special import SPECIAL
from tests.fuzz.operations.writing import IN_PLACE, WRITES

# Families of operations with their weights.
FAMILIES: list[tuple[list[Operation], int]] = [
    (UNARY, 2),
    (MODULES, 4),
    (LINEAR, 4),
    (WITH_PARAMETER, 2),
    (WITH_DATA, 1),
    (REDUCING, 1),
    (ALONG, 2),
    (SHAPES, 4),
    (JOINS, 1),
    (PICKS, 4),
    (WRITES, 1),
    (IN_PLACE, 2),
    (LAYERS, 2),
    (RECURRENT, 2),
    (SPECIAL, 3),
]
