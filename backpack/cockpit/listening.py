"""Half a monitor: what it wants of backward passes, and what it takes from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from backpack._torch import leaf_of
from backpack.cockpit import passes
from backpack.cockpit.alpha import End
from backpack.cockpit.attention import AttentionLogits
from backpack.cockpit.collect import Careful, FirstOrder, Piece, Probe, Wish, projected
from backpack.cockpit.configurations import SPECIAL, chosen
from backpack.cockpit.curvature import Curvature, KeptColumns
from backpack.cockpit.eigenvalue import TopEigenvalue
from backpack.cockpit.history import History
from backpack.cockpit.lossmodules import LossModules
from backpack.cockpit.measures import MEASURES, Measure
from backpack.cockpit.moves import Moves
from backpack.cockpit.norms import norms_of
from backpack.cockpit.passed import Group, MissingError, Passed
from backpack.cockpit.small import put_together
from backpack.own import BackpropExtension, walk

# Entries that are looked at for a histogram, and how many of a parameter at least.
ENTRIES, LEAST = 2**14, 2**9
# So many steps may be begun without one of the optimizer before that is said.
PATIENCE = 100
# What is no matter of first-order forms.
_OTHERS = {"gradient", "update", "reference", "products", "attention", "columns"}


@dataclass
class Start:
    """The start of a step whose end is not yet known."""

    step: int
    end: End
    length: float
    update: dict[Tensor, Tensor] | None


class Listening:
    """Listens to calls of ``backward``; :class:`~backpack.cockpit.monitor.Monitor` is the whole."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    closure: Callable[[], Any] | None
    processes: Group
    hold: int
    step_count: int
    groups: list[str]
    attention: AttentionLogits | None
    loss_modules: LossModules | None
    _parameters: list[Tensor]
    _among: frozenset[Tensor]
    _rows: Tensor
    _field: str
    _refused: dict[str, str]
    _history: History
    _generator: torch.Generator | None
    _moves: Moves
    _start: Start | None
    _tracking: bool
    _listening: bool
    _without_step: int
    _keep: bool
    _full: bool

    def close(self) -> None:
        """Take every hook off again."""
        raise NotImplementedError

    def _several(self) -> bool:
        """Whether a step's gradient is expected to be a sum of several."""
        raise NotImplementedError

    def _look_again(self) -> None:
        """Look at the parameters that are trained now."""
        raise NotImplementedError

    def _try(self, name: str, function: Callable[[], None]) -> None:
        """Leave a quantity out if it cannot be computed."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------
    # What is wanted

    def _choose(self, quantities: str | Sequence[str | Measure]) -> None:
        self.quantities = quantities
        self.measures, self.special = chosen(quantities)
        self.needs = frozenset().union(
            *(measure.needs for measure in self.measures), *(SPECIAL[name] for name in self.special)
        )
        # What a measure of the user's own may ask a step for is held.
        self._all_held = any(m.matrix is None and m is not MEASURES.get(m.name) for m in self.measures)
        self._begin_anew()
        for listener in (self.attention, self.loss_modules):
            if listener is not None:
                listener.listen(False)
        second = any(m.matrix is not None for m in self.measures) or "columns" in self.needs
        self.loss_modules = LossModules() if second else None
        self.attention = AttentionLogits() if "attention_logit" in self.special else None

    def _begin_anew(self) -> None:
        """Forget what depends on parameters."""
        self._made: list[Careful] | None = None
        self._curvatures: dict[str, Curvature] = {}
        self.top = TopEigenvalue(self.processes) if "hess_max_ev" in self.special else None

    def _make(self) -> list[Careful]:
        """The extensions, those of curvature first."""
        if self._made is None:
            device, failed = self._parameters[0].device, self._part_failed
            self._generator = torch.Generator(device).manual_seed(0)
            matrices: dict[str, bool] = {}
            for measure in self.measures:
                if measure.matrix is not None:
                    diagonal = "diagonal" in measure.needs
                    matrices[measure.matrix] = matrices.get(measure.matrix, False) or diagonal
            self._curvatures = {
                matrix: Curvature(f"{self._field}_{matrix}", failed, matrix, diagonal, self._generator)
                for matrix, diagonal in matrices.items()
            }
            self._first = FirstOrder(self._field, failed)
            self._probe = Probe(f"{self._field}_probe", failed)
            self._columns = KeptColumns(f"{self._field}_columns", failed, self._generator)
            self._made = [*self._curvatures.values(), self._columns, self._probe, self._first]
        return self._made

    def _wish(self, share: float) -> Wish:
        ends = self._start.update if self._start else None
        needs = self.needs if self._tracking else frozenset[str]()
        entries = max(LEAST, ENTRIES // len(self._parameters)) if "counts" in needs else 0
        return Wish(
            norms=bool(needs & {"norms", "projections", "squares"}),
            squares="squares" in needs,
            projections="projections" in needs and (self._keep or not self._several()),
            activity="activity" in needs,
            holds=self._holds(needs),
            keep=self._keep and bool(needs & {"projections", "ends"}),
            limit=self.hold,
            ends=ends,
            entries=entries,
            joint="grad_hist_2d" in self.special,
            share=share,
        )

    def _holds(self, needs: frozenset[str]) -> bool:
        """Whether gradients are wanted when the step is over, and not their norms alone."""
        return self._keep or self._several() or self._all_held or bool(needs & {"squares", "columns"})

    # ---------------------------------------------------------------------------------
    # Backward passes

    def _reset(self) -> None:
        """No step has begun."""
        self._moves.forget()
        self._inside = False
        self._restart()

    def _restart(self) -> None:
        """Forget the backward passes of the step, which begins again."""
        self._passes: list[Passed] = []
        if self._start is not None and self._start.update is None:
            self._start = None  # a step that has failed when its start had been used
        self._grad_norms: Tensor | None = None
        self._passed_inside = False
        self._lost: dict[str, str] = {}
        # Gradients as a pass has left them, and their versions.
        self._noted: dict[Tensor, tuple[Tensor, int]] = {}

    @property
    def parameters(self) -> Collection[Tensor]:
        """The parameters that are looked at."""
        return self._among

    def begins(self, call: passes.Call) -> list[BackpropExtension]:
        """A backward pass begins."""
        if self._listening and not self._passes:
            self._look_again()
        seen = self._inside and self._passed_inside  # of a closure's calls the first counts
        self._concerned = self._listening and not seen and self._reached(call)
        if not self._concerned:
            return []
        if self._passes and self._was_zeroed():
            self._restart()
            self._given_up()
        if self._passes:
            self._hold_gradients()
        share = 1.0 / (call.scale * self.processes.size)
        if self._tracking and self.top is not None and call.finite:
            self._try("hess_max_ev", lambda: self._top(call, share))
        made = self._make()
        self._first.prepare(self._wish(share), first=not self._passes)
        self._probe.prepare()
        wanted: list[BackpropExtension] = []
        if self._tracking:
            wanted += self._curvatures.values()
        if self._tracking and "columns" in self.needs:
            self._columns.prepare(self.hold, first=not self._passes)
            wanted.append(self._columns)
        ends, needs = self._start is not None, self.needs if self._tracking else frozenset()
        if ends or needs & {"losses", "activity"}:
            wanted.append(self._probe)
        if ends or needs - _OTHERS:
            wanted.append(self._first)
        return [ext for ext in made if ext in wanted and ext.savefield not in self._refused]

    def _given_up(self) -> None:
        """A step was begun, and another one after it, but the optimizer has not made any."""
        self._without_step += 1
        if self._without_step == PATIENCE:
            reason = (
                f"gradients were computed for {PATIENCE} steps, but the optimizer that is watched "
                f"({type(self.optimizer).__name__}) has made none: is it another one that trains?"
            )
            self._history.event(self.step_count, "no step", reason)
            warnings.warn(f"cockpit: {reason}", stacklevel=2)

    def _hold_gradients(self) -> None:
        """Hold gradients of a pass that was not the last, contrary to what was expected.

        What nobody has held has become ``p.grad``, to which the next pass will add.
        """
        for p, piece in self._passes[-1].pieces.items():
            grad = p.grad
            if piece.squared is None or grad is None or not self._is_noted(p, grad):
                continue
            if grad.data_ptr() == piece.place:
                piece.gradient, piece.squared = grad.detach().clone(), None

    def _is_noted(self, parameter: Tensor, grad: Tensor) -> bool:
        """Whether a gradient is as the last pass has left it."""
        noted, version = self._noted.get(parameter, (None, 0))
        return noted is grad and grad._version == version

    def _top(self, call: passes.Call, share: float) -> None:
        assert self.top is not None
        self.top.look(call, self._parameters, share, first=not self._passes)

    def _reached(self, call: passes.Call) -> bool:
        """Whether the graph of a loss comes to the parameters that are looked at."""
        root = call.root.grad_fn
        leaves = map(leaf_of, walk([root] if root is not None else []))
        return any(leaf is not None and leaf in self._among for leaf in leaves)

    def _was_zeroed(self) -> bool:
        """Whether gradients were set to zero since the last pass: another step has begun.

        A scaler skips steps whose gradients overflow; an error may end one in the middle.
        """
        now = {p: p.grad for p in self._parameters if p.grad is not None}
        if not now:
            return True
        if now.keys() == self._noted.keys() and all(self._is_noted(p, g) for p, g in now.items()):
            return False
        return not any(bool((g.coalesce().values() if g.is_sparse else g).any()) for g in now.values())

    def refused(self, ext: BackpropExtension, error: Exception) -> None:
        """A quantity cannot be computed on this model."""
        self._refused[ext.savefield] = str(error)

    def failed(self) -> None:
        """A backward pass raised an error."""
        self._collect()
        self._restart()

    def broke(self, error: Exception) -> None:
        """An error of the monitor's own: a warning, and training goes on unwatched."""
        reason = f"{type(error).__name__}: {error}"
        self._history.event(self.step_count, "left out", f"everything: {reason}", quantity="all")
        self.close()
        warnings.warn(f"cockpit: the monitor is closed, as it raised {reason}", stacklevel=2)

    def ended(self, call: passes.Call) -> None:
        """A backward pass is over."""
        if not self._concerned:
            return
        if not call.finite:
            self._lost["statistics"] = "the loss is not finite"
        share = 1.0 / (call.scale * self.processes.size)
        found = self._collect()
        pieces: dict[Tensor, Piece] = found.pop(self._field, {})
        passed = Passed(call.loss.cpu(), share, pieces)
        for matrix in self._curvatures:
            field = f"{self._field}_{matrix}"
            if field in found:
                passed.curvature[matrix] = found[field]
        if self._columns.savefield in found and not self._columns.full:
            passed.columns = found[self._columns.savefield]
        passed.losses, passed.unread = self._losses(call)
        passed.raw = self._probe.raw
        with torch.no_grad():
            self._put_together(passed)
        if pieces and self._first.held > self.hold:
            self._settle(passed)
            self._full = True
        first = next((each for each in self._passes if each.pieces), None)
        if first is not None:
            passed.merge_into(first)
        self._passes.append(passed)
        self._passed_inside = self._inside
        with torch.no_grad():
            self._note_gradients(call.scale)

    def _put_together(self, passed: Passed) -> None:
        """Parameters of few entries, all at once."""
        wish = self._first.wish
        passed.small = put_together(passed.pieces)
        for small in passed.small:
            small.look(passed.pieces, wish)
            if wish.entries:
                passed.entries += small.entries(wish.entries, wish.joint)

    def _settle(self, passed: Passed) -> None:
        """Use kept forms at once, and let go of them."""
        last = (self._start and self._start.update) or {}
        with torch.no_grad():
            for p, piece in passed.pieces.items():
                if piece.form is not None and piece.gradient is not None:
                    vectors = [piece.gradient, last.get(p, piece.gradient)]
                    piece.projections, piece.ends = projected(piece.form, vectors)
                    piece.form = None
            for small in passed.small:
                small.look(passed.pieces, replace(self._first.wish, keep=False))
        for earlier in self._passes:
            for piece in earlier.pieces.values():
                piece.form = None  # the gradient of the step is not that of a pass

    def _losses(self, call: passes.Call) -> tuple[Tensor | None, Exception | None]:
        losses, probe = self._probe.losses, self._probe
        if not call.finite:
            return None, MissingError("the loss is not finite")
        if losses is None:
            refused = self._refused.get(probe.savefield)
            return None, MissingError(refused) if refused else probe.reason
        total, whole = float(losses.sum()) / call.scale, float(call.loss)
        exact = 1e-3 if call.root.dtype.itemsize > 2 else 1e-2  # numbers of two bytes have few digits
        if probe.complete and abs(total - whole) > exact * max(abs(whole), float(losses.abs().sum())):
            return None, MissingError("what the graph tells does not add up to the loss")
        return losses, None

    def _collect(self) -> dict[str, dict[Tensor, Any]]:
        """Take from the parameters what extensions have left there."""
        found = {ext.savefield: ext.take(self._parameters) for ext in self._made or ()}
        return {field: values for field, values in found.items() if values}

    def _note_gradients(self, scale: float) -> None:
        """Norms of the gradients as they are now, before anybody clips them."""
        grads = [p.grad for p in self._parameters]
        self._noted = {
            p: (g, g._version) for p, g in zip(self._parameters, grads, strict=True) if g is not None
        }
        if "gradient" not in self.needs or not self._tracking or not self._noted:
            return
        self._grad_norms = norms_of(grads) / scale

    def _part_failed(self, part: str, error: Exception) -> None:
        self._lost[part] = str(error) or type(error).__name__
