"""What a backward pass leaves for each parameter: small sums over forms, never individual gradients.

Letters: ``N`` samples of a pass, ``G_n`` the gradient of the n-th sample's share of the loss as
:mod:`backpack` has it (they sum to the gradient), ``p`` a parameter's shape, ``d`` the last update.

Projections on the step's gradient or on its update are made at once where these are known, and else
from forms that are kept until they are: a layer's inputs and output gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from backpack.cockpit.histograms import Entries, entries_of
from backpack.cockpit.losses import individual_losses
from backpack.cockpit.norms import squared_norm
from backpack.cockpit.small import SMALL, is_small
from backpack.own import (
    BackpropExtension,
    Columns,
    ColumnSource,
    Context,
    Dense,
    Form,
    Outer,
    Pass,
    Wanted,
)

# Vectors of so many entries may be copied.
HELD = 2**14


@dataclass
class Wish:
    """What is wanted of the first-order forms of one pass.

    Attributes:
        norms: squared norms of the ``G_n``.
        squares: the elementwise sum of their squares.
        projections: products with the step's gradient.
        activity: sums over a layer's inputs and output gradients.
        holds: keep the gradient until the step is over; a large one is else let go at once, since a
            tensor that is held is copied to become ``p.grad``.
        keep: keep forms and gradient until the step is over, or else use them at once.
        limit: number of bytes of forms that are kept at most.
        ends: updates to project on, by parameter.
        entries: how many entries of each parameter are written down for histograms; ``0``: none.
        joint: whether the parameter's values are wanted beside them.
        share: the factor of the ``G_n`` of this pass in the step's.
    """

    norms: bool = True
    squares: bool = False
    projections: bool = False
    activity: bool = False
    holds: bool = True
    keep: bool = True
    limit: int = 2**30
    ends: dict[Tensor, Tensor] | None = None
    entries: int = 0
    joint: bool = False
    share: float = 1.0


@dataclass
class Piece:
    """One parameter in one backward pass.

    Attributes:
        samples: number of samples.
        share: the factor of the ``G_n`` in the step's.
        norms: ``||G_n||^2 [N]``.
        squares: ``sum_n G_n^2 [p]``.
        projections: ``G_n^T g [N]`` on the gradient of this pass alone, if no form is kept.
        ends: ``G_n^T d [N]``.
        activity: sums over inputs and output gradients, and counts (:func:`_activity`).
        entries: some entries of the ``G_n``.
        form: the form, if it is kept.
        gradient: the gradient of this pass, if it is held.
        squared: its squared norm, if it is not.
        place: where it was in memory then.
        rows: all ``G_n``, ``[N, entries]``, of a parameter of few entries until the pass is over; what
            is wanted of them is computed for all such parameters at once.
        merged: whether what is as large as the parameter was added to that of the step's first pass.
        versions: of the tensors in the form, when it was kept.
        reached: whether a gradient has reached the parameter.
    """

    samples: int
    share: float = 1.0
    norms: Tensor | None = None
    squares: Tensor | None = None
    projections: Tensor | None = None
    ends: Tensor | None = None
    activity: tuple[list[Tensor], tuple[int, int, int]] | None = None
    entries: Entries | None = None
    form: Form | None = None
    gradient: Tensor | None = None
    squared: Tensor | None = None
    place: int = 0
    rows: Tensor | None = None
    merged: bool = False
    versions: tuple[int, ...] = ()
    reached: bool = True

    @property
    def intact(self) -> bool:
        """Whether nobody has written to what the form is made from."""
        return self.form is not None and versions(self.form) == self.versions


class Careful(BackpropExtension):
    """What is common to a monitor's extensions.

    An error in them does not end the user's backward pass; and it is noted on which parameters they
    leave something, as the user's own block may look at more than the monitor.

    Attributes:
        found: the parameters.
    """

    def __init__(self, field: str, failed: Callable[[str, Exception], None]) -> None:
        self.savefield = field
        self.failed = failed
        self.found: list[Tensor] = []

    def conclude(self, state: Any, context: Context, reached: bool) -> Any:
        self.found.append(context.parameter)
        return super().conclude(state, context, reached)

    def take(self, parameters: Iterable[Tensor]) -> dict[Tensor, Any]:
        """What it has left on these parameters; on no parameter anything stays."""
        left = {p: p.__dict__.pop(self.savefield, None) for p in dict.fromkeys(self.found)}
        self.found.clear()
        return {p: left[p] for p in parameters if left.get(p) is not None}

    def guarded(self, part: str, function: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        """What a function gives, or something else if it raises."""
        try:
            return function()
        except Exception as error:
            self.failed(part, error)
            return otherwise()


class FirstOrder(Careful):
    """Everything of first order that is wanted of a parameter, in one look at its form.

    Args:
        field: the attribute that holds the :class:`Piece` until the pass is over.
        failed: called with the name of a part that could not be computed, and why.
    """

    mixed = True
    of_complex = None

    def __init__(self, field: str, failed: Callable[[str, Exception], None]) -> None:
        super().__init__(field, failed)
        self.wish = Wish()
        self.held = 0
        self._storages: set[int] = set()

    def prepare(self, wish: Wish, first: bool = True) -> None:
        """A pass begins, the first of a step or a further one."""
        self.wish = wish
        if first:
            self.held, self._storages = 0, set()

    def reduce(self, form: Form, sign: Tensor | None = None) -> Piece:
        piece = Piece(form.samples, self.wish.share)
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            return self.guarded("statistics", lambda: self._reduce(form, piece), lambda: piece)

    def _reduce(self, form: Form, piece: Piece) -> Piece:
        wish = self.wish
        if wish.activity and isinstance(form, Outer):
            piece.activity = self._try("activity", lambda: _activity(form))
        if is_small(form):
            piece.rows = form.dense()[0].reshape(form.samples, form.shape.numel())
            return piece
        if wish.norms:
            piece.norms = self._try("norms", lambda: form.squared_norms().double())
        if wish.squares:
            piece.squares = self._try("squares", form.square_sum)
        # What goes through a graph does so while it is there.
        later = wish.projections or wish.ends
        through = later and any(hasattr(each, "vjp") for each in nested(form))
        piece.form = Dense(form.dense()) if through else form
        return piece

    def add(self, state: Piece, other: Piece) -> Piece:
        raise RuntimeError("a parameter's gradient has arrived twice in one pass")

    def _try(self, part: str, function: Callable[[], Any]) -> Any:
        """A part that fails is left out; the others go on."""
        return self.guarded(part, function, lambda: None)

    def finish(self, state: Piece, context: Context) -> Piece:
        gradient = context.gradient()
        gradient = gradient.detach() if gradient.requires_grad else gradient
        form = state.form
        if form is None:
            state.gradient = gradient
            return state
        with torch.no_grad():
            self._try("statistics", lambda: self._finish(state, form, context.parameter, gradient))
        return state

    def _finish(self, state: Piece, form: Form, p: Tensor, gradient: Tensor) -> None:
        wish = self.wish
        direction = None if wish.ends is None else wish.ends.get(p)
        if wish.entries:
            state.entries = self._try("counts", lambda: entries_of(form, p, wish.entries, wish.joint))
        # A tensor that nobody holds becomes p.grad, which is changed later; not if there is one.
        if wish.holds or gradient.numel() <= HELD or p.grad is not None:
            state.gradient = gradient
        else:
            state.squared, state.place = squared_norm(gradient), gradient.data_ptr()
        kept = wish.keep and self._keep(state)
        if not kept:
            state.form = None
        # What is not kept is used at once, in one look at the layer's inputs.
        vectors: dict[str, Tensor] = {}
        if direction is not None and not kept:
            vectors["ends"] = direction
        if wish.projections and not kept:
            vectors["projections"] = gradient
        found = self._try("projections", lambda: projected(form, list(vectors.values())))
        for name, rows in zip(vectors, found if found is not None else (), strict=False):
            setattr(state, name, rows)

    def _keep(self, piece: Piece) -> bool:
        """Keep a form, if there is room for it."""
        assert piece.form is not None
        form = released(piece.form)
        self.held += new_bytes(form, self._storages)
        if self.held > self.wish.limit:
            return False
        piece.form, piece.versions = form, versions(form)
        return True

    def zero(self, context: Context) -> Piece:
        """No gradient reaches the parameter."""
        p, zeros = context.parameter, context.parameter.new_zeros(context.samples).double()
        nothing = p.detach().new_zeros(()).expand(p.shape)
        piece = Piece(context.samples, self.wish.share, zeros, nothing, zeros, zeros)
        piece.gradient, piece.reached = nothing, False
        return piece


def projected(form: Form, vectors: Sequence[Tensor]) -> Tensor:
    """``G_n^T u`` of several vectors, summed over columns, ``[k, N]``, in double precision."""
    if not vectors:
        return form.like.new_zeros(0, form.samples)
    # Where inputs are no patches, nothing is won by one look at them that a copy would not cost.
    alone = isinstance(form, Outer) and form.positions == 1 and form.shape.numel() > HELD
    if alone and len(vectors) > 1:
        return torch.cat([projected(form, [vector]) for vector in vectors])
    given = [vector.to(form.like.dtype) for vector in vectors]
    stacked = torch.stack(given) if len(given) > 1 else given[0].unsqueeze(0)
    products = form.project(stacked)
    return (products[:, 0] if form.columns == 1 else products.sum(1)).double()


def _activity(form: Outer) -> tuple[list[Tensor], tuple[int, int, int]]:
    """Squares of a layer's inputs, features that are not silent, squares of output gradients.

    And of how many each is. Of patches the entry in the middle counts: each place of the input once.
    """
    x: Any = form.inputs
    places: tuple[int, ...] = (2,)
    if isinstance(x, Tensor):
        features = x.shape[1] * x.shape[3]
    else:
        ndim, x = x.ndim, x.windows
        for size in reversed(x.shape[3 : 3 + ndim]):
            x = x.select(3, size // 2)
        features, places = x.shape[1] * x.shape[2], tuple(range(3, x.dim()))
    heard = torch.count_nonzero(x.any((0, *places)))
    g = form.g
    sums = [_squares(x, places), heard, _squares(g, tuple(range(2, g.dim())))]
    return sums, (x.numel(), features, g.numel())


def _squares(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The sum of squares in double precision; of large tensors from norms along some axes."""
    if x.numel() > SMALL:
        half = x.dtype in (torch.float16, torch.bfloat16)
        x = torch.linalg.vector_norm(x, dim=dims, dtype=torch.float32 if half else None)
    x = x.double().flatten()
    return x.dot(x)


# --------------------------------------------------------------------------------------
# Forms that are kept


def nested(form: Any) -> Iterator[Any]:
    """A form and what it is made from."""
    yield form
    for field in fields(form):
        value = getattr(form, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            if is_dataclass(each) and not isinstance(each, type):
                yield from nested(each)


def tensors_of(form: Form) -> Iterator[Tensor]:
    """The tensors that a form is made from."""
    for each in nested(form):
        for field in fields(each):
            value = getattr(each, field.name)
            if isinstance(value, Tensor):
                yield value


def new_bytes(form: Form, storages: set[int]) -> int:
    """Memory that a form takes besides these storages, to which its own are added."""
    total = 0
    for each in tensors_of(form):
        storage = each.untyped_storage()
        if storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def versions(form: Form) -> tuple[int, ...]:
    """The versions of these tensors, which change when somebody writes to them."""
    return tuple(each._version for each in tensors_of(form))


def released(form: Any) -> Any:
    """The form without patches that were written out for others."""
    inputs = getattr(form, "inputs", None)
    if inputs is not None and not isinstance(inputs, Tensor) and getattr(inputs, "keep", False):
        return replace(form, inputs=replace(inputs, keep=False, _kept=None))
    return form


# --------------------------------------------------------------------------------------
# A look at the graph


@dataclass(frozen=True, eq=False)
class Look(ColumnSource):
    """No columns, but a look at the pass before anything of it is freed."""

    looker: Any

    second_order = False

    def chunks(self, given: Pass, wanted: Wanted) -> Iterator[Columns]:
        self.looker.look(given)
        yield from ()


class Probe(Careful):
    """Reads from the graph each sample's loss, and which layers see raw data.

    Attributes:
        losses: each sample's share of the loss ``[N]``.
        complete: whether these add up to all of it.
        raw: parameters that meet inputs of the model and no activations.
        reason: why losses could not be read, if they could not.
    """

    needs_gradient = False
    mixed = True

    def __init__(self, field: str, failed: Callable[[str, Exception], None]) -> None:
        super().__init__(field, failed)
        self.source = Look(self)
        self.prepare()

    def prepare(self) -> None:
        """A pass begins."""
        self.losses: Tensor | None = None
        self.complete = True
        self.raw: set[Tensor] = set()
        self.reason: Exception | None = None

    def look(self, given: Pass) -> None:
        """Read what there is to read."""
        leaves: Any = given.leaves
        self.raw = {leaf.parameter for leaf in leaves if all(not tap.inputs for _, tap, _ in leaf.uses)}
        try:
            self.losses, rest = individual_losses(given, leaves[0].samples)
            self.complete = not rest
        except Exception as error:  # whatever it is: the training run goes on
            self.reason = error

    def zero(self, context: Context) -> None:
        return None
