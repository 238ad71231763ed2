"""Whole programs: inputs, steps, and an ending whose rows belong to samples."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.fuzz.draft import MOST_PARAMETERS, Draft, NoSuchProgram, Program
from tests.fuzz.operations import FAMILIES
from tests.idioms.reference import rows_of

LARGEST_HEAD, LARGEST_OUTPUT = 30, 36
_SHIFTS = (1e-3, -0.31, 0.47, 1.1, -1.7, 2.6)


@dataclass
class Built:
    """A model with an input, and whose sample every entry of its output is.

    Attributes:
        program: the model.
        inputs: its inputs.
        samples: how many samples they hold.
        batch_dim: the axis of these.
        axis: the axis of the output that holds rows of samples.
        apart: whether every entry of the output depends on one sample.
        by_sample: the input's sample of every entry (if apart).
        by_row: the number of its row of every entry, if there is one row for each sample.
        reordered: whether rows of the input are mixed or moved before any parameter.
    """

    program: Program
    inputs: tuple[Tensor, ...]
    samples: int
    batch_dim: int
    axis: int
    apart: bool = False
    by_sample: Tensor | None = None
    by_row: Tensor | None = None
    reordered: bool = False

    def __str__(self) -> str:
        shapes = [tuple(each.shape) for each in self.inputs]
        return f"inputs {shapes}, batch_dim {self.batch_dim} | {self.program}"

    def data(self) -> list[int]:
        """Places of the inputs that hold samples."""
        return _data(self.program, self.inputs)

    def changed(self, n: int, shift: float, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs with another n-th sample."""
        return _changed(self.program, self.inputs, self.samples, self.batch_dim, n, shift, seed)


def _data(program: Program, inputs: tuple[Tensor, ...]) -> list[int]:
    return list(range(int(program.table_first), len(inputs)))


def _changed(
    program: Program,
    inputs: tuple[Tensor, ...],
    samples: int,
    batch_dim: int,
    n: int,
    shift: float,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    found = list(inputs)
    generator = torch.Generator().manual_seed(seed)
    for i in _data(program, inputs):
        x = found[i].clone()
        row = x.select(batch_dim, n)
        row += shift * (1 + torch.rand(row.shape, generator=generator, dtype=row.dtype))
        found[i] = x
    return tuple(found)


def owners(program: Program, inputs: tuple[Tensor, ...], samples: int, batch_dim: int) -> list[Tensor]:
    """Which samples every entry of every value depends on, ``[N, *shape]``; the output comes last.

    Raises:
        NoSuchProgram: if shapes depend on the data.
    """
    with torch.no_grad():
        values = _values(program, inputs)
        found = [torch.zeros(samples, *v.shape, dtype=torch.bool) for v in values]
        for n in range(samples):
            # Integers and masks made from data change in leaps: some shifts leave them as they are.
            for seed, shift in enumerate(_SHIFTS):
                others = _values(program, _changed(program, inputs, samples, batch_dim, n, shift, seed))
                for own, value, other in zip(found, values, others, strict=True):
                    if value.shape != other.shape:
                        raise NoSuchProgram
                    own[n] |= (value - other).abs() > 1e-12
    return found


def _values(program: Program, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    pool = program.pool(inputs)
    return [*pool, program.ending(program, pool)]


# --------------------------------------------------------------------------------------
# Endings


def build(seed: int, length: tuple[int, int]) -> Built:
    """Draw a program.

    Args:
        seed: of all choices.
        length: fewest and most operations.

    Raises:
        NoSuchProgram: if nothing came of it.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    program = Program().eval()
    samples, batch_dim, inputs = _inputs(rng, program)
    draft = Draft(rng, program, program.pool(inputs))
    wanted, tries = rng.randint(*length), 0
    while len(program.steps) < wanted and tries < 60:
        tries += 1
        family = rng.choices([f for f, _ in FAMILIES], [w for _, w in FAMILIES])[0]
        try:
            draft.add(rng.choice(family))
        except NoSuchProgram:
            continue
    built = Built(program, inputs, samples, batch_dim, 0)
    _end(rng, built, draft.pool)
    return built


def _inputs(rng: random.Random, program: Program) -> tuple[int, int, tuple[Tensor, ...]]:
    samples = rng.choice([1, 2, 2, 3, 3, 4])
    rest = [rng.choice([1, 2, 3, 4, samples]) for _ in range(rng.choice([1, 1, 2, 2, 3]))]
    batch_dim = min(rng.choice([0] * 8 + [1]), len(rest))
    inputs = [torch.randn(*rest[:batch_dim], samples, *rest[batch_dim:])]
    if rng.random() < 0.12:
        other = [rng.choice([1, 2, 3]) for _ in range(max(1, batch_dim))]
        inputs.append(torch.randn(*other[:batch_dim], samples, *other[batch_dim:]))
    elif batch_dim == 0 and rng.random() < 0.05:
        size = inputs[0].shape[1]
        inputs.insert(0, torch.randn(size, size))
        program.table_first = True
    return samples, batch_dim, tuple(inputs)


def _end(rng: random.Random, built: Built, pool: list[Tensor]) -> None:
    """Give the program an ending: the last value whose rows belong to samples, or one that mixes."""
    program, samples = built.program, built.samples
    found = owners(program, built.inputs, samples, built.batch_dim)
    for place in reversed(range(len(built.inputs), len(pool))):
        if _apart(found[place]):
            for axis in range(pool[place].dim()):
                rows = _rows(found[place], axis)
                if rows is not None and _finish(rng, built, pool[place], place, axis, rows):
                    _settle(built, place)
                    return
    for place in reversed(range(len(built.inputs), len(pool))):
        axes = [a for a, size in enumerate(pool[place].shape) if size == samples]
        if axes and pool[place].numel() // samples <= LARGEST_HEAD:
            _head(rng, built, place, axes[0], list(range(samples)), "mixed")
            _settle(built, place)
            return
    raise NoSuchProgram


def _apart(own: Tensor) -> bool:
    count = own.sum(0)
    return int(count.max()) == 1


def _rows(own: Tensor, axis: int) -> list[int] | None:
    """The sample of every row along an axis (-1: of none), if there is one for each."""
    rows = own.movedim(axis + 1, 1)
    each = rows.reshape(*rows.shape[:2], -1).any(2).T  # [rows, N]
    if int(each.sum(1).max()) > 1:
        return None
    return [int(row.nonzero()[0]) if bool(row.any()) else -1 for row in each]


def _in_order(own: Tensor) -> bool:
    """Whether rows along some axis belong to the samples one after the other, or all to none."""
    samples = len(own)
    for axis in range(own.dim() - 1):
        rows = _rows(own, axis)
        if rows is not None and len(rows) == samples and all(r in (-1, n) for n, r in enumerate(rows)):
            return True
    return not bool(own.any())


def _finish(
    rng: random.Random, built: Built, value: Tensor, place: int, axis: int, rows: list[int]
) -> bool:
    """An ending for a value with these owners of rows, if there is one."""
    samples = built.samples
    count, known = len(rows) // samples, [r for r in rows if r >= 0]
    features = value.numel() // len(rows)
    if features * max(count, 1) > LARGEST_HEAD or not known:
        return False
    plain = len(rows) == samples and all(r in (-1, n) for n, r in enumerate(rows))
    if plain and value.requires_grad and value.numel() <= LARGEST_OUTPUT and rng.random() < 0.2:
        built.program.ending = lambda program, pool: pool[place]
        built.axis, built.program.text = axis, f"{place} as it is"
        return True
    if plain:
        _head(rng, built, place, axis, list(range(samples)), "plain")
    elif sorted(rows) == list(range(samples)) and rng.random() < 0.7:
        _head(rng, built, place, axis, [rows.index(n) for n in range(samples)], "put in order")
    elif len(rows) % samples == 0 and all(r in (-1, n // count) for n, r in enumerate(rows)):
        _joined(built, rng, place, axis, count, inner=True)
    elif len(rows) % samples == 0 and all(r in (-1, n % samples) for n, r in enumerate(rows)):
        _joined(built, rng, place, axis, count, inner=False)
    elif -1 not in rows and len(rows) <= 8:
        _head(rng, built, place, axis, list(range(len(rows))), f"rows of {rows}")
    else:
        return False
    return True


def _layer(rng: random.Random, built: Built, features: int) -> int:
    """The place of a last layer; the number of its outputs."""
    torch.manual_seed(features)
    built.program.layers.append(nn.Linear(features, rng.choice([1, 2, 3, built.samples])))
    return len(built.program.layers) - 1


def _head(rng: random.Random, built: Built, place: int, axis: int, order: list[int], text: str) -> None:
    """A linear layer on every row, or on the last axis; rows may be put in order first."""
    shape = list(_value(built, place).movedim(axis, 0).shape)
    ordered = order != list(range(len(order)))
    times = len(shape) > 2 and rng.random() < 0.5 and len(order) * math.prod(shape[1:-1]) <= 12
    layer = _layer(rng, built, shape[-1] if times else math.prod(shape[1:]))
    turned = rng.random() < 0.06 and not times
    index = torch.tensor(order)

    def ending(program: Program, pool: list[Tensor]) -> Tensor:
        rows = pool[place].movedim(axis, 0)
        rows = rows[index] if ordered else rows
        rows = rows if times else rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
        output = program.layers[layer](rows.tanh())
        return output.t() if turned else output

    built.program.ending, built.axis = ending, int(turned)
    what = "last axis" if times else "rows"
    built.program.text = f"head on {what} of {place}, axis {axis}, {text}{', turned' * turned}"


def _joined(built: Built, rng: random.Random, place: int, axis: int, count: int, inner: bool) -> None:
    """A linear layer on all rows of a sample."""
    samples = built.samples
    layer = _layer(rng, built, _value(built, place).numel() // samples)

    def ending(program: Program, pool: list[Tensor]) -> Tensor:
        rows = pool[place].movedim(axis, 0)
        split = rows.unflatten(0, (samples, count) if inner else (count, samples))
        rows = split if inner else split.transpose(0, 1)
        return program.layers[layer](rows.flatten(1).tanh())

    built.program.ending, built.axis = ending, 0
    built.program.text = (
        f"head on {count} rows of {place}, axis {axis}, {'inner' if inner else 'outer'}"
    )


def _value(built: Built, place: int) -> Tensor:
    with torch.no_grad():
        return built.program.pool(built.inputs)[place]


def settle_order(built: Built, found: list[Tensor] | None = None) -> None:
    """Find out whether data without a gradient is in order, for the parameters that are trained."""
    program = built.program
    found = found or owners(program, built.inputs, built.samples, built.batch_dim)
    pool = program.pool(built.inputs)
    built.reordered = any(
        not value.requires_grad and not _in_order(own) for own, value in zip(found, pool, strict=False)
    )


def _settle(built: Built, place: int) -> None:
    """Drop what is not used, and find the owners of the output's entries."""
    program = built.program
    del program.steps[place - len(built.inputs) + 1 :]
    if sum(p.numel() for p in program.parameters()) > MOST_PARAMETERS:
        raise NoSuchProgram
    output = program(*built.inputs)
    if not output.requires_grad or output.numel() > LARGEST_OUTPUT:
        raise NoSuchProgram
    found = owners(program, built.inputs, built.samples, built.batch_dim)
    own, rows = found[-1], rows_of(output, built.axis).flatten()
    if not bool(own.any()):
        raise NoSuchProgram
    if output.shape[built.axis] == built.samples:
        built.by_row = rows
    settle_order(built, found)
    built.apart = int(own.sum(0).max()) <= 1
    if built.apart:
        flat = own.flatten(1)
        if not bool(flat.any(0).all()):
            raise NoSuchProgram  # an entry that nothing says the sample of
        built.by_sample = flat.int().argmax(0)
