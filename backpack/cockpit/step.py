"""A step of the optimizer, of which quantities are functions; letters as in its measures."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backpack.cockpit.alpha import End
from backpack.cockpit.collect import Piece, projected
from backpack.cockpit.histograms import counted
from backpack.cockpit.norms import squared_norms
from backpack.cockpit.passed import Group, MissingError, Passed
from backpack.cockpit.small import Small


class Step:
    """One step of the optimizer, as far as it was seen.

    Args:
        parameters: those that are looked at.
        groups: rows of zeros and ones, ``[groups, parameters]``; the first is the whole model.
        passes: its backward passes, those without data left out if there are others.
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
        # What has no data (a penalty on the weights) has no samples.
        self._all = list(passes)
        self.passes = [passed for passed in passes if passed.pieces] or self._all
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
        self._listed: dict[str, list[Any]] = {}

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

    def _rows(
        self,
        part: str,
        value: Callable[[Piece], Tensor | None],
        power: int,
        together: Callable[[Small], Tensor | None] | None = None,
    ) -> Tensor:
        """A number (or several) for each parameter and sample, ``[parameters, ..., samples]``.

        Args:
            part: what it is.
            value: a piece -> ``[..., N]``.
            power: of the factor of the pass.
            together: the same for several parameters at once, ``[parameters, ..., N]``.
        """
        self._need("statistics", part)
        together = together or (lambda small: small.sums.get(part))
        columns = []
        for passed in self.passes:
            rows = passed.rows(self.parameters, value, together)
            if rows is None:
                raise MissingError(self.lost.get(part, f"{part} were not computed"))
            columns.append(rows if passed.share == 1 else rows * passed.share**power)
        return torch.cat(columns, -1) if len(columns) > 1 else columns[0]

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

    @cached_property
    def noise(self) -> list[float]:
        """``tr Sigma = (S - B ||g||^2) / (B - 1)``, of each group: how the ``g_n`` vary."""
        count = self.several()
        pairs = zip(self.numbers("norms"), self.numbers("squared_norm"), strict=True)
        return [max(count**2 * norms - count * square, 0.0) / (count - 1) for norms, square in pairs]

    @cached_property
    def gradients(self) -> dict[Tensor, Tensor]:
        """The gradient of the data term of the loss, for each parameter that has one."""
        self._need("statistics")
        return self._gradients(())

    def _gradients(self, without: Container[Tensor]) -> dict[Tensor, Tensor]:
        found: dict[Tensor, Tensor] = {}
        for passed in self.passes:
            first = passed is self.passes[0]
            for p, piece in passed.pieces.items():
                if p in without or (piece.merged and not first):
                    continue
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
        return self.groups @ self.gradient_norms.square()

    @cached_property
    def gradient_norms(self) -> Tensor:
        """The norm of ``g`` of each parameter, on the CPU."""
        self._need("statistics")
        alone = self.passes[0] if len(self.passes) == 1 and self.group.size == 1 else None
        squared: dict[Tensor, Tensor] = {}
        if alone is not None:
            known = {p: piece.squared for p, piece in alone.pieces.items()}
            squared = {p: s * alone.share**2 for p, s in known.items() if s is not None}
        others = self._gradients(squared)
        squared |= dict(zip(others, squared_norms(list(others.values())), strict=True))
        device = self.parameters[0].device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        rows = [squared[p].to(device) if p in squared else zero for p in self.parameters]
        return torch.stack(rows).sqrt().cpu()

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
        return any(passed.keeps for passed in self.passes)

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
                    "inputs and output gradients of layers were not kept: they take more memory than "
                    "`hold` allows, or the step has more backward passes than the last that was tracked"
                )
            if not piece.intact:
                raise MissingError("an input of a layer was written to after the backward pass")
            vectors = [known[name].get(p) for name in known]
            return projected(
                piece.form, [torch.zeros_like(p).detach() if v is None else v for v in vectors]
            )

        def together(small: Small) -> Tensor:
            vectors = [[known[name].get(p) for p in small.parameters] for name in known]
            return small.project(vectors).transpose(0, 1)

        rows = self._rows("projections", value, 1, together)
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
            if piece is None or (piece.merged and passed is not self.passes[0]):
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
        """Sums over inputs and output gradients of a group's layers, and counts, ``[groups, 6]``.

        Sums of squares of inputs, features that are silent, sums of squares of output gradients, and of
        how many each is.
        """
        self._need("statistics", "activity")
        device = self.parameters[0].device
        rows, sums, factors = [], [], []
        for row, p in enumerate(self.parameters):
            for passed in self.passes:
                piece = passed.pieces.get(p)
                if piece is not None and piece.activity is not None:
                    found, (inputs, features, outputs) = piece.activity
                    seen = float(p not in passed.raw)
                    rows.append(row)
                    sums += found
                    factors.append(
                        [1.0, -seen, passed.share**2, inputs, seen * features, outputs, seen * features]
                    )
        total = torch.zeros(len(self.parameters), 6, dtype=torch.float64, device=device)
        if rows:
            given = torch.tensor(factors, dtype=torch.float64, device=device)
            given[:, :3] *= torch.stack([each.to(total) for each in sums]).view(-1, 3)
            given[:, 1] += given[:, 6]  # silent features are those that are not heard
            total.index_add_(0, torch.tensor(rows, device=device), given[:, :6])
        return self.groups @ self.group.sum(total).cpu()

    def counts(self, joint: bool = False) -> Tensor:
        """Counts of entries in bins, of the whole model; against parameters' values if ``joint``."""
        self._need("statistics", "counts")
        entries, scales = [], []
        for passed in self.passes:
            alone = [piece.entries for piece in passed.pieces.values() if piece.entries is not None]
            found = passed.entries + alone
            entries += found
            scales += [passed.share * self.samples] * len(found)
        if not entries:
            raise MissingError("entries were not counted")
        return self.group.sum(counted(entries, scales, joint)).cpu()

    # ---------------------------------------------------------------------------------
    # Loss, update

    @cached_property
    def loss(self) -> float:
        """The step's loss: the sum of those whose backward was called."""
        self._need()
        return float(self.group.sum(sum(passed.loss for passed in self._all)) / self.group.size)  # type: ignore[arg-type]

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

    @cached_property
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
        """The loss and a slope, each with its unbiased variance over samples.

        Both are those of the data: of a term of the loss without any, no sample has a slope.

        Args:
            slopes: ``G_n^T d [samples of this process]``.
            length: of ``d``.
        """
        count = self.several()
        x = torch.stack([slopes / (length or 1.0), self.losses.to(slopes)]) * count
        sums = self.group.sum(torch.stack([x, x * x]).sum(2)).tolist()
        means = [total / count for total in sums[0]]
        pairs = zip(sums[1], means, strict=True)
        variance, spread = (max(s - count * mean * mean, 0.0) / (count - 1) for s, mean in pairs)
        return End(means[1], spread, means[0], variance)

    # ---------------------------------------------------------------------------------
    # Numbers of groups

    def numbers(self, name: str) -> list[Any]:
        """An attribute that has a number (or several) for each group, as a list: it is asked often."""
        if name not in self._listed:
            self._listed[name] = getattr(self, name).tolist()
        return self._listed[name]

    def sizes(self, name: str) -> list[float]:
        """The norm of each group's part, from an attribute that has one for each parameter."""
        if name not in self._listed:
            norms: Tensor | None = getattr(self, name)
            if norms is None:
                raise MissingError("the optimizer's step was not seen")
            self._listed[name] = (self.groups @ norms.double().cpu().square()).sqrt().tolist()
        return self._listed[name]
