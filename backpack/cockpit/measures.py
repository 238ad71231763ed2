"""The quantities of a monitor: functions of what passes have left, for the model and for its layers.

Letters: ``B`` samples of a step, ``g`` the gradient that the optimizer is given (before clipping),
``g_n = B G_n`` each sample's gradient as a mean over samples has it, ``S = sum_n ||g_n||^2``,
``r_n = g_n^T g``, ``d`` the update. Several backward passes before one step are one step: samples of
all of them together.

A measure asks a :class:`Step` for what it needs. What is not there raises :class:`MissingError`, and
the measure is left out; the others are not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backpack.cockpit.alpha import End
from backpack.cockpit.collect import Piece, projected
from backpack.cockpit.histograms import counted

DECAY = 0.9
# Of the first step's loss: samples above are hard, samples below are learned.
HARD, LEARNED = 1.5, 0.25
EPSILON = {"mean_gsnr": 1e-5, "early_stopping": 1e-5, "tic_diag": 1e-7, "tic_trace": 1e-7}


class MissingError(Exception):
    """Something that a quantity needs is not there; the message says why."""


@dataclass
class Passed:
    """One backward pass of a step.

    Attributes:
        loss: its loss.
        share: the factor of its ``G_n`` in the step's gradient.
        pieces: what it has left, by parameter.
        curvature: trace and diagonal of curvature matrices, by matrix and parameter.
        columns: forms of sampled columns of the GGN, by parameter; ``None`` if they were not kept.
        losses: each sample's share of the loss; ``None`` where that cannot be read.
        unread: why it cannot.
        raw: parameters that meet the model's inputs.
    """

    loss: Tensor
    share: float = 1.0
    pieces: dict[Tensor, Piece] = field(default_factory=dict)
    curvature: dict[str, dict[Tensor, Any]] = field(default_factory=dict)
    columns: dict[Tensor, list[Any]] | None = None
    losses: Tensor | None = None
    unread: Exception | None = None
    raw: set[Tensor] = field(default_factory=set)

    @property
    def samples(self) -> int:
        """Number of samples.

        Raises:
            MissingError: if parameters meet different numbers of them.
        """
        sizes = {piece.samples for piece in self.pieces.values()}
        if len(sizes) != 1:
            raise MissingError(
                "parameters meet different numbers of samples"
                if sizes
                else "no pass through the model was seen"
            )
        return sizes.pop()


class Group:
    """Processes that train together, of which there is one."""

    size = 1
    first = True

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""
        return tensor


class Step:
    """One step of the optimizer, as far as it was seen.

    Args:
        parameters: those that are looked at.
        groups: rows of zeros and ones, ``[groups, parameters]``; the first is the whole model.
        passes: its backward passes.
        group: the processes that train together.
        lost: parts that could not be computed, and why.

    Attributes:
        grad_norms: norm of each parameter's gradient, all terms of the loss included.
        update: what the optimizer has added to each parameter.
        last: what it had added in the step before, if that is to be known.
        update_norms: norms of that.
        parameter_norms: norms of the parameters before the step.
        distances: norms of their distances to where they were when the monitor began.
        rates: learning rates of the optimizer's groups.
        plain: whether the optimizer is plain SGD.
        memory: what measures remember from step to step.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        groups: Tensor,
        passes: Sequence[Passed],
        group: Group,
        lost: dict[str, str],
    ) -> None:
        self.parameters = list(parameters)
        self.groups = groups
        self.passes = list(passes)
        self.group = group
        self.lost = lost
        self.grad_norms: Tensor | None = None
        self.update: dict[Tensor, Tensor] | None = None
        self.last: dict[Tensor, Tensor] | None = None
        self.update_norms: Tensor | None = None
        self.parameter_norms: Tensor | None = None
        self.distances: Tensor | None = None
        self.rates: list[float] | None = None
        self.plain = False
        self.memory: dict[str, Tensor] = {}

    # ---------------------------------------------------------------------------------
    # Sums over samples

    def _need(self, *parts: str) -> None:
        for part in parts:
            if part in self.lost:
                raise MissingError(self.lost[part])
        if not self.passes:
            raise MissingError("no backward call was seen")

    @cached_property
    def samples(self) -> int:
        """``B``."""
        self._need("statistics")
        count = sum(passed.samples for passed in self.passes)
        device = self.parameters[0].device
        return int(self.group.sum(torch.tensor(count, dtype=torch.float64, device=device)))

    def several(self) -> int:
        """``B``, if that is more than one.

        Raises:
            MissingError: if it is not.
        """
        if self.samples < 2:
            raise MissingError("a variance over samples needs two of them")
        return self.samples

    def _rows(self, part: str, value: Callable[[Piece], Tensor | None], power: int) -> Tensor:
        """A number (or several) for each parameter and sample, ``[parameters, ..., samples]``."""
        self._need("statistics", part)
        columns = []
        for passed in self.passes:
            found, _ = {}, passed.samples
            for p, piece in passed.pieces.items():
                row = value(piece)
                if row is None:
                    raise MissingError(self.lost.get(part, f"{part} were not computed"))
                found[p] = row.double()
            zeros = torch.zeros_like(next(iter(found.values())))
            rows = [found.get(p, zeros).to(zeros.device) for p in self.parameters]
            columns.append(torch.stack(rows) * passed.share**power)
        return torch.cat(columns, -1)

    def _numbers(self, values: Sequence[Tensor | None]) -> Tensor:
        """A number for each parameter -> its sum over each group."""
        like = self.parameters[0]
        zero = torch.zeros((), dtype=torch.float64, device=like.device)
        stacked = torch.stack([zero if v is None else v.detach().double() for v in values])
        return self.groups @ stacked.cpu()

    @cached_property
    def norms(self) -> Tensor:
        """``sum_n ||G_n||^2`` of each group."""
        norms = self._rows("norms", lambda piece: piece.norms, 2)
        return self.groups @ self.group.sum(norms.sum(1)).cpu()

    @property
    def S(self) -> Tensor:
        """``sum_n ||g_n||^2``."""
        return self.samples**2 * self.norms

    @cached_property
    def gradients(self) -> dict[Tensor, Tensor]:
        """The gradient of the data term of the loss, for each parameter that has one."""
        self._need("statistics")
        found: dict[Tensor, Tensor] = {}
        for passed in self.passes:
            for p, piece in passed.pieces.items():
                if piece.gradient is None:
                    raise MissingError("the gradient was not kept")
                part = piece.gradient if passed.share == 1 else piece.gradient * passed.share
                found[p] = found[p] + part if p in found else part
        if self.group.size > 1:  # all processes in the same order, whatever took part in each
            found = {p: found.get(p, torch.zeros_like(p)) for p in self.parameters}
        return {p: self.group.sum(g) for p, g in found.items()}

    @cached_property
    def squared_norm(self) -> Tensor:
        """``||g||^2`` of each group."""
        found = self.gradients
        return self._numbers([_squared(found[p]) if p in found else None for p in self.parameters])

    @cached_property
    def along_gradient(self) -> Tensor:
        """``G_n^T g`` for each parameter and sample of this process."""
        if len(self.passes) == 1 and self.group.size == 1 and not self.keeps:
            return self._rows("projections", lambda piece: piece.projections, 2)
        return self._from_forms["gradient"]

    @property
    def along_update(self) -> Tensor:
        """``G_n^T d`` for each parameter and sample, from the forms that were kept."""
        return self._from_forms["update"]

    @cached_property
    def along_last(self) -> Tensor:
        """``G_n^T d`` with the last step's update, at its end."""
        kept = self.keeps and "last" in self._from_forms
        return self._from_forms["last"] if kept else self._rows("ends", lambda piece: piece.ends, 1)

    @property
    def keeps(self) -> bool:
        """Whether there are forms to project with."""
        pieces = [piece for passed in self.passes for piece in passed.pieces.values() if piece.reached]
        return any(piece.form is not None for piece in pieces)

    @cached_property
    def _from_forms(self) -> dict[str, Tensor]:
        """Projections of the ``G_n`` on all that is known, in one look at each layer's inputs."""
        given = {"gradient": self.gradients, "update": self.update, "last": self.last}
        known = {name: vectors for name, vectors in given.items() if vectors is not None}
        owners = {id(piece): p for passed in self.passes for p, piece in passed.pieces.items()}

        def value(piece: Piece) -> Tensor:
            p = owners[id(piece)]
            if not piece.reached:
                return p.new_zeros(len(known), piece.samples).double()
            if piece.form is None:
                raise MissingError(
                    "inputs and output gradients of layers were not kept (they take more memory than "
                    "`hold` allows)"
                )
            if not piece.intact:
                raise MissingError("an input of a layer was written to after the backward pass")
            vectors = [known[name].get(p) for name in known]
            return projected(
                piece.form, [torch.zeros_like(p).detach() if v is None else v for v in vectors]
            )

        rows = self._rows("projections", value, 1)
        return dict(zip(known, rows.unbind(1), strict=True))

    @cached_property
    def projections(self) -> Tensor:
        """``sum_n r_n^2`` of each group."""
        rows = self.groups.to(self.along_gradient.device) @ self.along_gradient
        squares = self.group.sum(rows.square().sum(1)).cpu()
        return self.samples**2 * squares

    # ---------------------------------------------------------------------------------
    # Sums over entries

    def _squares(self, p: Tensor) -> tuple[Tensor, Tensor] | None:
        """``1/B sum_n g_n^2`` and ``g`` of a parameter."""
        self._need("squares")
        total: Tensor | None = None
        for passed in self.passes:
            piece = passed.pieces.get(p)
            if piece is None:
                continue
            if piece.squares is None:
                raise MissingError(self.lost.get("squares", "squares were not computed"))
            part = piece.squares * passed.share**2
            total = part if total is None else total + part
        if total is None:
            return None
        second, g = self.group.sum(total) * self.samples, self.gradients[p]
        half = second.dtype in (torch.float16, torch.bfloat16)
        return (second.float(), g.float()) if half else (second, g)

    def over_entries(self, value: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The sum over entries of ``value(p, second moment, g)``, of each group."""
        numbers = []
        for p in self.parameters:
            found = self._squares(p)
            numbers.append(None if found is None else value(p, *found).sum().double())
        return self._numbers(numbers)

    @cached_property
    def entries(self) -> Tensor:
        """Number of entries of the parameters that have a gradient, of each group."""
        sizes = [float(p.numel()) if p in self.gradients else 0.0 for p in self.parameters]
        return self.groups @ torch.tensor(sizes, dtype=torch.float64)

    def _curvature(self, matrix: str, p: Tensor) -> tuple[Tensor, Tensor | None] | None:
        total: tuple[Tensor, Tensor | None] | None = None
        for passed in self.passes:
            if matrix not in passed.curvature:
                raise MissingError(self.lost.get(matrix, f"the curvature ({matrix}) was not computed"))
            state = passed.curvature[matrix].get(p)
            if state is None:
                continue
            trace = state[0] * passed.share
            diagonal = None if state[1] is None else state[1] * passed.share
            if total is not None:
                trace = total[0] + trace
                diagonal = None if diagonal is None else total[1] + diagonal
            total = trace, diagonal
        return total

    def trace(self, matrix: str) -> Tensor:
        """The trace of each group's block of a curvature matrix."""
        self._need(matrix)
        found = [self._curvature(matrix, p) for p in self.parameters]
        return self._numbers([None if x is None else self.group.sum(x[0]) for x in found])

    def diagonal(self, matrix: str, p: Tensor) -> Tensor:
        """The diagonal of a parameter's block of a curvature matrix."""
        self._need(matrix)
        found = self._curvature(matrix, p)
        if found is None or found[1] is None:
            raise MissingError(f"the diagonal of the curvature ({matrix}) was not computed")
        return self.group.sum(found[1])

    @cached_property
    def activity(self) -> Tensor:
        """Sums over inputs and output gradients of the layers of each group, ``[groups, 6]``."""
        self._need("statistics", "activity")
        zeros = torch.zeros(6, dtype=torch.float64, device=self.parameters[0].device)
        rows = []
        for p in self.parameters:
            row = zeros
            for passed in self.passes:
                piece = passed.pieces.get(p)
                if piece is not None and piece.activity is not None:
                    part = piece.activity.to(zeros).clone()
                    if p in passed.raw:
                        part[2:4] = 0
                    part[4] *= passed.share**2
                    row = row + part
            rows.append(row)
        return self.groups @ self.group.sum(torch.stack(rows)).cpu()

    def counts(self, joint: bool = False) -> Tensor:
        """Counts of entries in bins, of the whole model; against parameters' values if ``joint``."""
        self._need("statistics", "counts")
        entries, scales = [], []
        for passed in self.passes:
            for piece in passed.pieces.values():
                if piece.entries is not None:
                    entries.append(piece.entries)
                    scales.append(passed.share * self.samples)
        if not entries:
            raise MissingError("entries were not counted")
        return self.group.sum(counted(entries, scales, joint)).cpu()

    # ---------------------------------------------------------------------------------
    # Loss, update

    @property
    def loss(self) -> float:
        """The step's loss: the sum of those whose backward was called."""
        self._need()
        return float(self.group.sum(sum(passed.loss for passed in self.passes)) / self.group.size)  # type: ignore[arg-type]

    def curvature_along(self, update: dict[Tensor, Tensor]) -> float:
        """``d^T G d``, an unbiased estimate."""
        self._need("columns")
        total = torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)
        for passed in self.passes:
            if passed.columns is None:
                raise MissingError("columns of the GGN were not kept (see `hold`)")
            sums: list[Tensor] = []
            for p, forms in passed.columns.items():
                direction = update[p].unsqueeze(0)
                for k, form in enumerate(forms):
                    part = form.project(direction.to(form.like.dtype))[0].double()
                    sums[k : k + 1] = [sums[k] + part if k < len(sums) else part]
            total = total + sum(x.square().sum() for x in sums) * passed.share
        return float(self.group.sum(total))

    def moments(self, rows: Tensor) -> tuple[float, float]:
        """Mean and unbiased variance over all samples of ``B x_n``, for shares ``x_n``."""
        count = self.several()
        x = rows * count
        sums = self.group.sum(torch.stack([x.sum(), (x * x).sum()])).tolist()
        mean = sums[0] / count
        return mean, max(sums[1] - count * mean**2, 0.0) / (count - 1)

    @property
    def losses(self) -> Tensor:
        """Each sample's share of the loss, ``[samples of this process]``."""
        found = []
        for passed in self.passes:
            if passed.losses is None:
                raise MissingError(f"each sample's loss cannot be read: {passed.unread}")
            found.append(passed.losses.double() * passed.share)
        self._need("losses")
        return torch.cat(found)

    def end(self, slopes: Tensor, length: float) -> End:
        """The loss and a slope, from ``G_n^T d [samples]``."""
        slope, variance = self.moments(slopes / (length or 1.0))
        # The variance about the mean needs the shares, not the loss itself.
        _, spread = self.moments(self.losses.to(slopes))
        return End(self.loss, spread, slope, variance)

    def need_update(self, value: Tensor | None) -> Tensor:
        """Squares of norms that are known once the optimizer has stepped, summed over groups."""
        if value is None:
            raise MissingError("the optimizer's step was not seen")
        return self.groups @ value.double().cpu().square()


def _squared(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


# --------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Measure:
    """One quantity.

    Attributes:
        name: its key.
        needs: what it is made from: ``norms``, ``projections``, ``squares``, ``activity``, ``update``,
            ``reference``, ``losses``, ``ends``, ``counts``, or ``trace`` or ``diagonal`` of a matrix.
        value: a step -> a number for each group.
        layered: whether it has values for layers.
        matrix: the curvature matrix, where one is needed.
    """

    name: str
    needs: frozenset[str]
    value: Callable[[Step], Tensor]
    layered: bool = True
    matrix: str | None = None


MEASURES: dict[str, Measure] = {}


def _measure(
    needs: str = "", layered: bool = True, matrix: str | None = None
) -> Callable[[Callable[[Step], Tensor]], Callable[[Step], Tensor]]:
    def register(function: Callable[[Step], Tensor]) -> Callable[[Step], Tensor]:
        name = function.__name__
        MEASURES[name] = Measure(name, frozenset(needs.split()), function, layered, matrix)
        return function

    return register


def _one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A quotient; not a number where the denominator is zero."""
    return numerator / torch.where(denominator == 0, torch.nan, denominator)


@_measure(layered=False)
def loss(step: Step) -> Tensor:
    return _one(step.loss)


@_measure("update", layered=False)
def learning_rate(step: Step) -> Tensor:
    if not step.rates:
        raise MissingError("there is no optimizer")
    return _one(step.rates[0])


@_measure("gradient")
def grad_norm(step: Step) -> Tensor:
    if step.grad_norms is None:
        raise MissingError("no backward call was seen")
    return step.need_update(step.grad_norms).sqrt()


@_measure("update")
def param_norm(step: Step) -> Tensor:
    return step.need_update(step.parameter_norms).sqrt()


@_measure("update")
def update_size(step: Step) -> Tensor:
    return step.need_update(step.update_norms).sqrt()


@_measure("update")
def update_ratio(step: Step) -> Tensor:
    return _divided(update_size(step), param_norm(step))


@_measure("update reference")
def distance(step: Step) -> Tensor:
    return step.need_update(step.distances).sqrt()


def noise(step: Step) -> Tensor:
    """``tr Sigma = (S - B ||g||^2) / (B - 1)``, the trace of the covariance of the ``g_n``."""
    count = step.several()
    return ((step.S - count * step.squared_norm) / (count - 1)).clamp(min=0)


@_measure("losses", layered=False)
def hard_samples(step: Step) -> Tensor:
    """The share of samples with a large loss, once most have a small one; not a number before."""
    losses = step.losses * step.samples
    first = step.memory.get("first_loss")
    if first is None:
        first = step.group.sum(losses.sum()).cpu() / step.samples
        step.memory["first_loss"] = first
    counted = torch.stack([losses > HARD * first.item(), losses < LEARNED * first.item()]).sum(1)
    hard, learned = (step.group.sum(counted.double()) / step.samples).tolist()
    return _one(hard if learned > 0.5 else torch.nan)


@_measure("norms")
def norm_test(step: Step) -> Tensor:
    return _divided(noise(step), step.samples * step.squared_norm).sqrt()


@_measure("norms")
def grad_noise(step: Step) -> Tensor:
    return noise(step)


@_measure("norms")
def grad_signal(step: Step) -> Tensor:
    return step.squared_norm - noise(step) / step.samples


@_measure("norms")
def noise_scale(step: Step) -> Tensor:
    """Numerator and denominator are smoothed over steps, each by itself (arXiv:1812.06162)."""
    parts = torch.stack([grad_noise(step), grad_signal(step)])
    if bool(parts.isfinite().all()):
        before = step.memory.get("noise_scale")
        step.memory["noise_scale"] = (
            parts if before is None else before + (1 - DECAY) * (parts - before)
        )
    noise_, signal = step.memory.get("noise_scale", parts)
    # Where the estimate of the signal is negative there is none to speak of.
    return torch.where(signal > 0, noise_ / signal, torch.nan)


@_measure("norms update", layered=False)
def cabs(step: Step) -> Tensor:
    if not step.plain or not step.rates or len(set(step.rates)) != 1:
        return _one(torch.nan)  # it is defined for plain SGD with one learning rate
    count = step.samples
    value = step.rates[0] * (step.S - count * step.squared_norm) / (count * step.loss)
    return value[:1]


@_measure("norms projections")
def inner_test(step: Step) -> Tensor:
    count = step.several()
    ratio = _divided(step.projections, step.squared_norm**2)
    return ((ratio - count).clamp(min=0) / (count * (count - 1))).sqrt()


@_measure("norms projections")
def ortho_test(step: Step) -> Tensor:
    count = step.several()
    ratio = _divided(step.S, step.squared_norm) - _divided(step.projections, step.squared_norm**2)
    return (ratio.clamp(min=0) / (count * (count - 1))).sqrt()


@_measure("squares")
def mean_gsnr(step: Step) -> Tensor:
    epsilon = EPSILON["mean_gsnr"]
    total = step.over_entries(lambda p, second, g: g * g / (second - g * g + epsilon))
    return _divided(total, step.entries)


@_measure("squares")
def early_stopping(step: Step) -> Tensor:
    count, epsilon = step.several(), EPSILON["early_stopping"]

    def value(p: Tensor, second: Tensor, g: Tensor) -> Tensor:
        return g * g / ((second - g * g) * (count / (count - 1)) + epsilon)

    return 1 - count * _divided(step.over_entries(value), step.entries)


@_measure("trace", matrix="ggn_mc")
def hess_trace(step: Step) -> Tensor:
    return step.trace("ggn_mc")


@_measure("norms trace", matrix="ggn_mc")
def tic_trace(step: Step) -> Tensor:
    return _divided(step.S / step.samples, step.trace("ggn_mc") + EPSILON["tic_trace"])


@_measure("squares diagonal", matrix="ggn_mc")
def tic_diag(step: Step) -> Tensor:
    epsilon = EPSILON["tic_diag"]
    return step.over_entries(
        lambda p, second, g: second / (step.diagonal("ggn_mc", p).to(second.dtype) + epsilon)
    )


@_measure("activity")
def activation_rms(step: Step) -> Tensor:
    return _divided(step.activity[:, 0], step.activity[:, 1]).sqrt()


@_measure("activity")
def dead_units(step: Step) -> Tensor:
    return _divided(step.activity[:, 2], step.activity[:, 3])


@_measure("activity")
def output_grad_rms(step: Step) -> Tensor:
    return _divided(step.activity[:, 4], step.activity[:, 5]).sqrt()
