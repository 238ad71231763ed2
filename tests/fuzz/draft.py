"""Random programs: a model as a list of operations on a pool of tensors, and how one is drawn."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

LARGEST_VALUE, LARGEST_PARAMETER, MOST_PARAMETERS = 150, 64, 220
LARGEST_ENTRY = 100.0


class NoSuchProgram(Exception):  # noqa: N818
    """The operation cannot be applied there."""


@dataclass
class Given:
    """What an operation works on.

    Attributes:
        x: its tensor.
        y: another tensor of the pool.
        axis: an axis of ``x``, at times negative.
        at: an index along that axis.
        seed: of further choices; the same in every call.
        p: its parameters, if it has any.
        layer: its module, if it has one.
    """

    x: Tensor
    y: Tensor
    axis: int
    at: int
    seed: int
    p: list[Tensor] = field(default_factory=list)
    layer: nn.Module = field(default_factory=nn.Identity)

    @property
    def size(self) -> int:
        """Length of the axis."""
        return self.x.shape[self.axis]

    @property
    def dim(self) -> int:
        """The axis, counted from the front."""
        return self.axis % self.x.dim()

    @property
    def rng(self) -> random.Random:
        """Choices, from the start."""
        return random.Random(self.seed)

    def choose(self, *options: object) -> object:
        """One of the options."""
        return self.rng.choice(options)

    def other_axis(self) -> int:
        """Some axis."""
        return self.rng.randrange(self.x.dim())

    def axes(self) -> tuple[int, ...]:
        """The axis, or that and another."""
        return tuple(sorted({self.dim, self.other_axis()})) if self.seed % 3 == 0 else (self.dim,)

    def keeps(self) -> bool:
        """Whether reductions keep their axis."""
        return self.seed % 10 < 3

    def picks(self, count: int | None = None) -> Tensor:
        """Indices along the axis, with repeats."""
        rng = self.rng
        count = rng.choice([1, 2, 3, self.size]) if count is None else count
        return torch.tensor([rng.randrange(self.size) for _ in range(count)])

    def order(self) -> Tensor:
        """A permutation of the axis."""
        order = list(range(self.size))
        self.rng.shuffle(order)
        return torch.tensor(order)

    def before(self) -> tuple[slice, ...]:
        """An index that keeps all axes before the axis."""
        return (slice(None),) * self.dim

    def base(self) -> Tensor:
        """What is written into: zeros, or the tensor itself."""
        return torch.zeros_like(self.x) if self.seed % 5 < 2 else self.x

    def constant(self, *shape: int) -> Tensor:
        """A constant."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))


Run = Callable[[Given], Tensor]


@dataclass(frozen=True)
class Operation:
    """A kind of operation: one row of the tables in ``tests/fuzz/operations``.

    Attributes:
        name: what it is called.
        run: what it does.
        parameters: shapes of its parameters.
        layer: makes its module.
        dims: the fewest and most axes of its tensor.
    """

    name: str
    run: Run
    parameters: Callable[[Given], Sequence[Sequence[int]]] | None = None
    layer: Callable[[Given], nn.Module] | None = None
    dims: tuple[int, int] = (1, 9)


@dataclass
class Step:
    """An operation in its place in a program.

    Attributes:
        operation: the operation.
        sources: places of its tensors in the pool.
        axis, at, seed: see :class:`Given`.
        own: places of its parameters in the program's list.
        layer: place of its module in the program's list.
        shape: of its result.
    """

    operation: Operation
    sources: tuple[int, int]
    axis: int
    at: int
    seed: int
    own: list[int] = field(default_factory=list)
    layer: int | None = None
    shape: tuple[int, ...] = ()

    def given(self, pool: Sequence[Tensor]) -> Given:
        x, y = (pool[source] for source in self.sources)
        return Given(x, y, self.axis, self.at, self.seed)

    def __str__(self) -> str:
        x, y = self.sources
        return (
            f"{self.operation.name} [of {x}, {y}; {self.axis}, {self.at}, {self.seed}] -> {self.shape}"
        )


class Program(nn.Module):
    """A model: steps on a pool of tensors that begins with the inputs, then an ending."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.own = nn.ParameterList()
        self.layers = nn.ModuleList()
        self.ending: Callable[[Program, list[Tensor]], Tensor] = lambda program, pool: pool[-1]
        self.text = ""
        # The inputs that the pool begins with: tables that come first or after are constants.
        self.table_first = False

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.ending(self, self.pool(inputs))

    def pool(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """All values."""
        pool = [each for each in inputs if each.is_floating_point()]
        if self.table_first:
            pool = [*pool[1:], pool[0]]
        for step in self.steps:
            pool.append(self.run(step, pool))
        return pool

    def run(self, step: Step, pool: Sequence[Tensor]) -> Tensor:
        given = step.given(pool)
        given.p = [self.own[i] for i in step.own]
        if step.layer is not None:
            given.layer = self.layers[step.layer]
        return step.operation.run(given)

    def __str__(self) -> str:
        return "; ".join([*map(str, self.steps), self.text])


class Draft:
    """Draws steps of a program.

    Args:
        rng: choices.
        program: the program, which grows.
        pool: its values at the inputs drawn.
    """

    def __init__(self, rng: random.Random, program: Program, pool: list[Tensor]) -> None:
        self.rng, self.program, self.pool = rng, program, pool

    def place(self, dims: tuple[int, int]) -> int:
        """A place in the pool, mostly the last."""
        fits = [i for i, v in enumerate(self.pool) if dims[0] <= v.dim() <= dims[1]]
        if not fits:
            raise NoSuchProgram
        return fits[-1] if self.rng.random() < 0.82 else self.rng.choice(fits)

    def add(self, operation: Operation) -> None:
        """One more step with this operation.

        Raises:
            NoSuchProgram: if it cannot be applied, or is too large; the program is as before.
        """
        program, rng = self.program, self.rng
        counts = len(program.own), len(program.layers)
        try:
            step = self._drawn(operation)
            value = program.run(step, self.pool)
            self._check(value)
        except Exception as error:
            program.own = nn.ParameterList(list(program.own)[: counts[0]])
            program.layers = nn.ModuleList(list(program.layers)[: counts[1]])
            rng.random()
            raise NoSuchProgram from error
        step.shape = tuple(value.shape)
        program.steps.append(step)
        self.pool.append(value)

    def _drawn(self, operation: Operation) -> Step:
        rng, program = self.rng, self.program
        sources = self.place(operation.dims), self.place((1, 9))
        shape = self.pool[sources[0]].shape
        axis = rng.randrange(len(shape)) if len(shape) else 0
        at = rng.randrange(max(shape[axis], 1)) if len(shape) else 0
        axis = axis - len(shape) if len(shape) and rng.random() < 0.3 else axis
        step = Step(operation, sources, axis, at, rng.randrange(10**6))
        given = step.given(self.pool)
        torch.manual_seed(step.seed)
        for each in operation.parameters(given) if operation.parameters else ():
            if math.prod(each) > LARGEST_PARAMETER:
                raise NoSuchProgram
            step.own.append(len(program.own))
            program.own.append(nn.Parameter(0.7 * torch.randn(tuple(each))))
        if operation.layer is not None:
            step.layer = len(program.layers)
            program.layers.append(operation.layer(given).eval())
        return step

    @staticmethod
    def _check(value: Tensor) -> None:
        small = isinstance(value, Tensor) and 0 < value.numel() <= LARGEST_VALUE
        if not small or not value.is_floating_point():
            raise NoSuchProgram
        if (
            not bool(value.detach().isfinite().all())
            or float(value.detach().abs().max()) > LARGEST_ENTRY
        ):
            raise NoSuchProgram
