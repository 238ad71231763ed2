"""What all optimizers share: parameters and their names, options, processes, and the update itself.

Letters: ``theta`` parameters, ``m`` momentum, ``d`` a direction.

A step has two halves. The first computes every parameter's direction and new state, and may raise;
the second writes, and does not. So a step that raises has changed nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from backpack.capture.extend import extend
from backpack.quantities.processes import Processes

State = dict[str, Any]
# A model, or what any `torch.optim.Optimizer` takes.
Params = nn.Module | ParamsT
# Attributes that a gradient scaler sets while it calls `step`.
_FROM_SCALER = ("grad_scale", "found_inf")


class BackpackOptimizer(Optimizer):
    """The base of the optimizers: a model's parameters with checked options, and the update.

    Subclasses compute directions in :meth:`_directions`; this class checks them, and moves the
    parameters along ``theta <- theta - lr m``, ``m <- momentum m + d``.

    Args:
        params: a model, which is extended in place unless it is already, or what any
            ``torch.optim.Optimizer`` takes (parameters, pairs of name and parameter, dictionaries), of
            models that are extended.
        defaults: options of groups that do not give their own.
        process_local: say that each process trains a model of its own, where ``torch.distributed`` runs
            several.
        process_group: processes that train one model on parts of a batch; that of a
            ``DistributedDataParallel`` model is known. The loss is the mean of theirs. Their gradients
            must be averaged, as such a model does, their curvature is exchanged by :meth:`step`, which
            all of them call. With neither argument, a step is refused where there are several
            processes: copies of one model would drift apart.

    Raises:
        ValueError: if an option is out of its range, in any group, or there are no parameters.
    """

    process_local = False
    # Processes that train one model; copies and pickles do not have them.
    processes: Processes | None = None

    # Lower bound of each option, and whether it must stay below one.
    _RANGES: Mapping[str, tuple[float, bool]] = {
        "lr": (0.0, False),
        "damping": (0.0, False),
        "l2": (0.0, False),
        "momentum": (0.0, True),
        "ema_decay": (0.0, True),
    }

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        process_local: bool = False,
        process_group: Any = None,
    ) -> None:
        self._names: dict[Tensor, str] = {}
        self.process_local = process_local
        if isinstance(params, DistributedDataParallel):
            if process_group is None and not process_local and self._exchanges:
                process_group = params.process_group
            params = params.module
        if process_group is not None and process_local:
            raise ValueError(
                f"{type(self).__name__}: processes of a process_group train one model, and with "
                "process_local=True each trains its own; pass one of the two"
            )
        if process_group is not None:
            processes = Processes(process_group)
            self.processes = processes if processes.size > 1 else None
        if not isinstance(params, nn.Module):
            super().__init__(params, defaults)
            return
        self._names = {p: f"'{name}'" for name, p in params.named_parameters()}
        super().__init__(params.parameters(), defaults)
        # Last, so that a constructor that raises leaves the model as it was.
        if not getattr(params, "_backpack_extend", False):
            extend(params)

    def __getstate__(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k in self._own()}
        return {**super().__getstate__(), **own}

    def _own(self) -> tuple[str, ...]:
        """Attributes that copies and pickles keep, beside those of every optimizer."""
        return ("_names", "process_local")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own.

        Args:
            param_group: ``params``, and options that differ from the constructor's.

        Raises:
            ValueError: if an option is out of its range.
            NotImplementedError: for parameters that are spread over processes, or complex.
        """
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        spread = [p for p in self.param_groups[-1]["params"] if hasattr(p, "placements")]
        if spread:
            name = self._name(spread[0])
            self.param_groups.pop()
            raise NotImplementedError(
                f"{type(self).__name__}: parameter {name} is kept in parts by several processes "
                "(fully_shard, tensor parallelism), and steps are computed from whole ones. Use "
                "DistributedDataParallel, or an optimizer of torch's with fields of backpack(...)"
            )
        found = [p for p in self.param_groups[-1]["params"] if p.is_complex()]
        if found:
            name = self._name(found[0])
            self.param_groups.pop()
            raise NotImplementedError(
                f"{type(self).__name__}: parameter {name} is complex, and steps are those of real "
                "ones. Make it from a real parameter with an axis of two (torch.view_as_complex), or "
                "use an optimizer of torch's with fields of backpack(...)"
            )

    def _check(self, group: Mapping[str, Any]) -> None:
        for option, (low, below_one) in self._RANGES.items():
            value = group.get(option, low)
            if not (math.isfinite(value) and value >= low and (value < 1 or not below_one)):
                upper = "and less than 1" if below_one else "and finite"
                raise ValueError(
                    f"{type(self).__name__}: {option} must be at least {low:g} {upper}, got {value!r}"
                )

    def _name(self, parameter: Tensor) -> str:
        """The parameter's name, for messages."""
        if parameter in self._names:
            return self._names[parameter]
        for number, group in enumerate(self.param_groups):
            for place, each in enumerate(group["params"]):
                if each is parameter and "param_names" in group:
                    return f"'{group['param_names'][place]}'"
                if each is parameter:
                    return f"{place} of group {number}, of shape {tuple(parameter.shape)},"
        return f"of shape {tuple(parameter.shape)}"

    def _trained(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Parameters that are not frozen, with their groups."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    yield p, group

    # ----------------------------------------------------------------------------------
    # The step

    # Whether the class knows how to exchange what a step needs.
    _exchanges = True

    # What a step takes from its own process, for the message that refuses several.
    _local = "the curvature of its own part of the batch"

    def _check_processes(self) -> None:
        """Refuse to let copies of a model drift apart."""
        several = distributed.is_available() and distributed.is_initialized()
        if not several or self.process_local or self.processes is not None:
            return
        if (count := distributed.get_world_size()) > 1:
            remedy = (
                "Give the optimizer the DistributedDataParallel model, or "
                "process_group=torch.distributed.group.WORLD"
                if self._exchanges
                else "This optimizer does not exchange it: train in one process, or use another one"
            )
            raise RuntimeError(
                f"{type(self).__name__}: torch.distributed runs {count} processes, each of which would "
                f"step with {self._local}: copies of one model would drift apart. {remedy}; if each "
                "process trains a model of its own, pass process_local=True to the optimizer"
            )

    def _check_copies(self) -> None:
        """Refuse to go on with gradients or parameters that differ between processes."""
        if self.processes is None:
            return
        sums = [0.0] * 4
        for p, _ in self._trained():
            gradient = p.grad if self._takes_gradients else None
            for i, each in enumerate((p, gradient)):
                if each is not None:
                    each = each.coalesce().values() if each.is_sparse else each
                    sums[2 * i] += float(each.sum())
                    sums[2 * i + 1] += float(each.abs().sum())
        told = self.processes.objects(sums)
        for i, what in enumerate(("parameters", "gradients")):
            size = max(each[2 * i + 1] for each in told)
            for place in (2 * i, 2 * i + 1):
                values = [each[place] for each in told]
                if math.isfinite(size) and max(values) - min(values) > 1e-4 * size:
                    raise RuntimeError(
                        f"{type(self).__name__}: {what} differ between the processes of the "
                        "process_group; all must begin with the same model, and their gradients must "
                        "be averaged before the step (DistributedDataParallel does both, but not in "
                        "its no_sync())"
                    )

    # Whether gradients of parameters play a part in the step.
    _takes_gradients = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters.

        What was computed for this step is deleted from the parameters; gradients stay.

        Args:
            closure: computes the loss anew, with its backward pass, and returns it.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: if something that the step needs was not computed; names the parameter. Or if
                ``torch.distributed`` runs several processes, see ``process_local``.
            ValueError: if a gradient, its curvature or the step is not finite; names the parameter.
        """
        try:
            self._check_processes()
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            found_inf = getattr(self, "found_inf", None)
            moves = [] if found_inf is not None and bool(found_inf) else self._directions()
            for p, direction, _, _ in moves:
                if not _finite(direction):
                    raise ValueError(
                        f"the step of parameter {self._name(p)} is not finite; use more damping"
                    )
        except BaseException:
            # A scaler whose call of `step` raises leaves its attributes behind.
            for name in _FROM_SCALER:
                self.__dict__.pop(name, None)
            raise
        for p, direction, group, new in moves:
            state = self.state[p]
            state.update(new)
            if group["momentum"]:
                if "momentum_buffer" in state:
                    direction.add_(state["momentum_buffer"], alpha=group["momentum"])
                # Never written to again: a loaded state may share its tensors with another optimizer.
                state["momentum_buffer"] = direction
            p.add_(direction, alpha=-group["lr"])
        self._discard()
        return loss

    def _directions(self) -> list[tuple[Tensor, Tensor, dict[str, Any], State]]:
        """Parameters with directions (new tensors), groups and changes of state; changes nothing."""
        raise NotImplementedError

    def _discard(self) -> None:
        """Delete what was computed for a step."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and delete the quantities that belong to them.

        Args:
            set_to_none: set gradients to ``None``, not to zero.
        """
        super().zero_grad(set_to_none)
        self._discard()


def _finite(tensor: Tensor) -> bool:
    """Whether all entries are: those of a finite sum, many times faster to find, or each by itself."""
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())
