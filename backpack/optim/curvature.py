"""What the optimizers with curvature share: the block, micro-batches, scales, what is due in a step.

Letters: ``theta`` parameters, ``C`` a curvature block, ``d`` a direction, ``gamma = damping + l2``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from backpack.dataset.micro_batches import MicroBatches
from backpack.dataset.totals import refuse_processes
from backpack.engine.block import backpack
from backpack.optim.base import BackpackOptimizer, Params, State, _finite
from backpack.quantities.base import BackpropExtension
from backpack.quantities.parts import checked_rule


@dataclass(frozen=True)
class Use:
    """A parameter in one step.

    Attributes:
        parameter: the parameter.
        name: its name, for messages.
        gradient: ``grad + l2 theta``, without a scaler's factor.
        quantity: the value that the extension saved; ``None`` if this step needs none.
        scale: the scaler's factor in the quantity.
        gamma: ``damping + l2``.
        group: the options.
        state: what the last step left.
    """

    parameter: Tensor
    name: str
    gradient: Tensor
    quantity: Any
    scale: float
    gamma: float
    group: dict[str, Any]
    state: State


class CurvatureOptimizer(BackpackOptimizer):
    """Optimizers whose direction is ``d = (C + (damping + l2) I)^{-1} (grad + l2 theta)``.

    The update rule of Dangel, Kunstner, Hennig (ICLR 2020, arXiv:1912.10985, section 4). ``C`` is one
    block per parameter, which a quantity of this library gives in the backward pass:

        >>> import torch
        >>> from backpack import extend
        >>> from backpack.optim import KFAC
        >>> model, lossfunc = torch.nn.Linear(4, 3), extend(torch.nn.CrossEntropyLoss())
        >>> X, y = torch.rand(5, 4), torch.tensor([0, 1, 2, 1, 0])
        >>> optimizer = KFAC(model, lr=0.1, damping=1e-2)
        >>> optimizer.zero_grad()
        >>> loss = lossfunc(model(X), y)
        >>> with optimizer.backpack():
        ...     loss.backward()
        >>> optimizer.step()

    Parameters without a gradient and frozen ones (``requires_grad=False``) stay as they are.

    Several backward passes before a step, in one block or in several, are micro-batches of one loss:
    the sum of those whose ``backward`` was called. Gradients add up, and curvature combines by the rule
    of its quantity (:class:`backpack.own.Rule`). So ``k`` equal parts of a batch, each with its mean
    loss divided by ``k``, make the step of the whole batch; parts of ``N_k`` out of ``N`` samples do
    with ``N_k / N * loss``, and losses that are sums as they are.

    Args:
        params: a model or parameters, see :class:`BackpackOptimizer`.
        extension: the quantity.
        kl_clip: if given, directions of all parameters are multiplied with
            ``nu = min(1, sqrt(kl_clip / sum lr^2 d^T (grad + l2 theta)))``, where
            ``d^T (grad + l2 theta) = d^T (C + gamma I) d``: a bound on the step in the metric of the
            damped curvature, for likelihoods on twice the KL divergence that the step makes
            (Ba, Grosse, Martens, ICLR 2017, section 5).
        process_local: see :class:`BackpackOptimizer`, as ``process_group``.
        defaults: options of groups.
    """

    _step_supports_amp_scaling = True  # torch: `step` itself undoes the scaler's factor

    _RANGES = {**BackpackOptimizer._RANGES, "update_every": (1, False)}

    # Backward passes since the last step, and marks of the gradients that they left.
    _passes: MicroBatches | None = None
    _gradients: Mapping[Tensor, tuple[int, int] | None] = {}

    def __init__(
        self,
        params: Params,
        extension: BackpropExtension,
        kl_clip: float | None,
        process_local: bool = False,
        process_group: Any = None,
        **defaults: Any,
    ) -> None:
        if kl_clip is not None and not (math.isfinite(kl_clip) and kl_clip > 0):
            raise ValueError(f"{type(self).__name__}: kl_clip must be positive, got {kl_clip!r}")
        self.kl_clip = kl_clip
        self._extension = extension
        self._scale: float | None = None
        super().__init__(params, defaults, process_local=process_local, process_group=process_group)
        if self.processes is not None:
            self._for_processes()

    def _for_processes(self) -> None:
        """Prepare the quantity for several processes."""
        checked_rule(self._extension, "several processes")

    def _own(self) -> tuple[str, ...]:
        return (*super()._own(), "kl_clip", "_extension", "_scale")

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if group.get("update_every", 1) % 1:
            raise ValueError(
                f"{type(self).__name__}: update_every must be an integer, got {group['update_every']!r}"
            )

    # ----------------------------------------------------------------------------------
    # The loop

    @property
    def extensions(self) -> tuple[BackpropExtension, ...]:
        """The quantities that the next step needs, to be given to ``backpack(...)``.

        Empty when no parameter's curvature is due (``update_every``), so that the pass costs no more
        than the gradient.
        """
        return (self._extension,) if any(self._due(p, g) for p, g in self._trained()) else ()

    @contextmanager
    def backpack(
        self, *more: BackpropExtension, scale: float | None = None, **options: Any
    ) -> Iterator[backpack]:
        """The block for the step's backward pass: ``backpack(*optimizer.extensions, *more)``.

        Several passes before a step, in one block or in several, are of micro-batches (see the class).
        Further quantities are those of the last pass.

        Args:
            *more: further quantities, for other purposes.
            scale: the factor that the loss was multiplied with and the gradients are not to keep, such
                as ``scaler.get_scale()``. Needed only where ``scaler.unscale_(optimizer)`` comes
                before ``scaler.step(optimizer)``; without it, ``scaler.step`` tells the factor.
            **options: further arguments of :class:`backpack.backpack`, but for ``process_group``: the
                optimizer exchanges its own values in :meth:`step`.

        Raises:
            NotImplementedError: with a ``process_group``.
            RuntimeError: if gradients and quantities of another block are still there, or those of an
                earlier pass, for a quantity whose values do not combine.
            ValueError: if ``scale`` is not positive, or another than that of earlier micro-batches.
        """
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be positive and finite, got {scale!r}")
        refuse_processes(options)
        self._check_earlier(scale)
        if not self.extensions:
            with backpack(*more, **options) as block:
                yield block
        else:
            passes = self._passes or MicroBatches(self._extension)
            with passes.block(*more, **options) as block:
                yield block
            self._passes = passes if passes.totals.batches else None
            self._gradients = {p: _mark(p.grad) for p in passes.totals.entries}
        self._scale, self._entered = scale, True

    # Whether there was a block since the last step.
    _entered = False

    def _check_earlier(self, scale: float | None) -> None:
        """See whether earlier passes are of the same step, and can have another one added to them."""
        field = self._extension.savefield
        if self._passes is not None and self._reset():
            self._discard()
        known = self._passes.totals.entries if self._passes is not None else {}
        for p, _ in self._trained():
            if p.grad is not None and hasattr(p, field) and p not in known:
                raise RuntimeError(
                    f"parameter {self._name(p)} has a gradient and {field} of a backward pass outside "
                    "of this optimizer's blocks, to which no other can be added; call optimizer.step() "
                    "or optimizer.zero_grad() first"
                )
        if self._passes is None:
            return
        why = self._passes.refuse_more()
        if why is not None:
            p = next(iter(known))
            raise RuntimeError(
                f"parameter {self._name(p)} has a gradient and {field} of an earlier backward pass, to "
                f"which no other can be added ({why}); call optimizer.step() or optimizer.zero_grad() "
                "first"
            )
        if scale != self._scale:
            raise ValueError(
                f"micro-batches of one step have one scale, but it is {scale} now and was {self._scale}"
            )

    def _reset(self) -> bool:
        """Whether gradients of earlier passes were reset otherwise than by this optimizer."""
        had = [p for p, mark in self._gradients.items() if mark is not None]
        gone = [p for p in had if p.grad is None]
        if gone and len(gone) < len(had):
            raise RuntimeError(
                f"the gradient of parameter {self._name(gone[0])} was reset, but not those of all "
                "parameters; call optimizer.zero_grad()"
            )
        changed = all(_mark(p.grad) != self._gradients[p] for p in had)
        return bool(had) and changed and not any(p.grad is not None and p.grad.any() for p in had)

    def _discard(self) -> None:
        self._scale = self._passes = None
        self._gradients, self._entered = {}, False
        for group in self.param_groups:
            for p in group["params"]:
                p.__dict__.pop(self._extension.savefield, None)

    def _due(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether the next step takes new curvature for a parameter."""
        state = self.state.get(parameter, {})
        return "updates" not in state or state["step"] % group["update_every"] == 0

    # ----------------------------------------------------------------------------------
    # The step

    def _directions(self) -> list[tuple[Tensor, Tensor, dict[str, Any], State]]:
        self._check_copies()
        uses = self._uses(self._of_all())
        moves, decrease = [], 0.0
        for use, new in zip(uses, self._updates(uses), strict=True):
            direction = self._solve(use, {**use.state, **new})
            moves.append((use.parameter, direction, use.group, new))
            if self.kl_clip is not None:
                decrease += use.group["lr"] ** 2 * float((direction * use.gradient).sum())
        if self.kl_clip is not None and decrease > self.kl_clip:
            for _, direction, _, _ in moves:
                direction.mul_(math.sqrt(self.kl_clip / decrease))
        return moves

    def _of_all(self) -> dict[Tensor, Any] | None:
        """Curvature of the samples of all processes; ``None``: there is one process."""
        if self.processes is None:
            return None
        error: Exception | None = None
        passes = self._passes
        if passes is None and any(hasattr(p, self._extension.savefield) for p, _ in self._trained()):
            error = RuntimeError(
                f"{self._extension.savefield} was not computed in this optimizer's blocks, so that it "
                "cannot be exchanged between processes; write `with optimizer.backpack():`"
            )
        self.processes.agree(error)
        passes = passes or MicroBatches(self._extension)
        return passes.of_all(self.processes, {p: self._name(p) for p, _ in self._trained()})

    # Whether processes share the work of new curvature.
    _shares_work = False

    def _updates(self, uses: Sequence[Use]) -> list[State]:
        """What steps count, and new curvature."""
        mine: dict[int, State] = {}
        found: list[State] = []
        owners = _owners(uses, self.processes.size) if self.processes and self._shares_work else None
        error: Exception | None = None
        for i, use in enumerate(uses):
            found.append({"step": use.state.get("step", 0) + 1})
            if use.quantity is None:
                continue
            updates = use.state.get("updates", 0) + 1
            found[-1]["updates"] = updates
            # A plain mean until there is enough to forget (Martens, Grosse, 2015, section 5).
            decay = min(1 - 1 / updates, use.group["ema_decay"])
            if owners is None or self.processes is None:
                found[-1] |= self._update(use, decay)
            elif owners[i] == self.processes.rank and error is None:
                try:
                    mine[i] = self._update(use, decay)
                except (ValueError, RuntimeError, NotImplementedError) as raised:
                    error = raised
        if owners is not None and self.processes is not None:
            self.processes.agree(error)
            for states in self.processes.states(mine, uses[0].parameter.device if uses else None):
                for i, state in states.items():
                    found[i] |= state
        return found

    def _update(self, use: Use, decay: float) -> State:
        """New curvature: what of it is kept for this and further steps."""
        raise NotImplementedError

    def _solve(self, use: Use, state: State) -> Tensor:
        """``(C + gamma I)^{-1} use.gradient``, a new tensor."""
        raise NotImplementedError

    def _uses(self, of_all: Mapping[Tensor, Any] | None = None) -> list[Use]:
        """Everything that the step depends on, checked; ``of_all``: curvature of all processes."""
        field, uses = self._extension.savefield, []
        scale, in_gradient = self._scales()
        for p, group in self._trained():
            if p.grad is None:
                continue
            value = getattr(p, field, None) if of_all is None else of_all.get(p)
            quantity = value if self._due(p, group) else None
            if quantity is None and self._due(p, group):
                remedy = (
                    "in the block no extended model was seen that has it; call extend(model) before "
                    "the forward pass, or give the model to the optimizer instead of its parameters"
                    if self._entered
                    else "call loss.backward() within `with optimizer.backpack():` before every step"
                )
                raise RuntimeError(
                    f"parameter {self._name(p)} has a gradient, but no {field} that belongs to it; "
                    + remedy
                )
            gradient = p.grad.to_dense() if p.grad.is_sparse else p.grad
            gradient = gradient / in_gradient if in_gradient != 1 else gradient
            for what, each in (("gradient", gradient), (field, quantity)):
                if not all(map(_finite, _tensors(each))):
                    raise ValueError(f"the {what} of parameter {self._name(p)} is not finite")
            gradient = gradient.add(p, alpha=group["l2"]) if group["l2"] else gradient
            gamma, state = group["damping"] + group["l2"], self.state.get(p, {})
            uses.append(Use(p, self._name(p), gradient, quantity, scale, gamma, group, state))
        if not uses:
            raise RuntimeError(
                "no parameter has a gradient; call loss.backward() within `with optimizer.backpack():` "
                "before every step"
            )
        return uses

    def _scales(self) -> tuple[float, float]:
        """The scaler's factor in the quantities, and the one that gradients still have."""
        in_gradient = getattr(self, "grad_scale", None)
        if in_gradient is None and hasattr(self, "found_inf") and self._scale is None:
            raise RuntimeError(
                "scaler.unscale_(optimizer) has divided the gradients by the scaler's factor, which "
                "the quantities still have; write `with optimizer.backpack(scale=scaler.get_scale()):`"
            )
        in_gradient = 1.0 if in_gradient is None else float(in_gradient)
        return (in_gradient if self._scale is None else self._scale), in_gradient


def made(
    owner: type, quantity: Callable[..., BackpropExtension], arguments: dict[str, Any]
) -> BackpropExtension:
    """The quantity of an optimizer from the arguments that the optimizer does not know itself.

    Raises:
        TypeError: if the quantity does not know them either.
    """
    try:
        return quantity(**arguments)
    except (TypeError, NotImplementedError) as error:
        raise TypeError(f"{owner.__name__} takes no such arguments: {', '.join(arguments)}") from error


def _owners(uses: Sequence[Use], processes: int) -> list[int]:
    """Which process computes which parameter's curvature: the next largest goes to the least busy."""
    costs = [sum(len(f) ** 3 for f in _factors(use.quantity)) for use in uses]
    owners, busy = [0] * len(uses), [0] * processes
    for i in sorted(range(len(uses)), key=lambda i: (-costs[i], i)):
        owners[i] = busy.index(min(busy))
        busy[owners[i]] += costs[i]
    return owners


def _factors(quantity: Any) -> list[Tensor]:
    """Matrices that new curvature decomposes."""
    return [each for each in _tensors(quantity) if each.dim()]


def _mark(gradient: Tensor | None) -> tuple[int, int] | None:
    """What changes when a gradient is replaced or written to."""
    return None if gradient is None else (id(gradient), gradient._version)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
