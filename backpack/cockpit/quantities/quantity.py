"""What the original's quantities have in common: when they compute, and where results are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backpack.own import BackpropExtension

Schedule = Callable[[int], bool]


class Quantity:
    """A quantity that is tracked at the steps of a schedule.

    Args:
        track_schedule: says of a step whether it is tracked.
        verbose: print what is stored.

    Attributes:
        output: values by step.
    """

    def __init__(self, track_schedule: Schedule, verbose: bool = False) -> None:
        self._track_schedule = track_schedule
        self._verbose = verbose
        self.output: dict[int, Any] = {}

    def get_output(self) -> dict[int, Any]:
        """Values by step."""
        return self.output

    def create_graph(self, global_step: int) -> bool:
        """Whether the user's call of ``backward`` must keep a graph of the gradient."""
        return False

    def extensions(self, global_step: int) -> Sequence[BackpropExtension]:
        """What is computed in the backward pass."""
        return []

    def extension_hooks(self, global_step: int) -> Sequence[Callable[[nn.Module], None]]:
        """Functions that are called with modules whose quantities are there."""
        return []

    def protected_savefields(self, global_step: int) -> set[str]:
        """Fields of parameters that are not to be deleted after the step."""
        return set()

    def should_compute(self, global_step: int) -> bool:
        """Whether a step is tracked."""
        return bool(self._track_schedule(global_step))

    def track(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> None:
        """Compute and store, if the step is tracked."""
        raise NotImplementedError

    def _save(self, global_step: int, value: Any) -> None:
        if value is not None:
            self.output[global_step] = plain(value)
        if self._verbose:
            name = type(self).__name__
            print(f"[Step {global_step} | {name}]: Store iteration {global_step}, value {value}")


def plain(value: Any) -> Any:
    """Tensors as arrays, in nested containers.

    Raises:
        NotImplementedError: for anything that cannot be stored.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(each) for each in value)
    if isinstance(value, (int, float)) or hasattr(value, "__array__"):
        return value
    raise NotImplementedError(f"a value of type {type(value).__name__} cannot be stored")


class SingleStepQuantity(Quantity):
    """One that is computed from one step."""

    def track(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> None:
        if self.should_compute(global_step):
            self._save(global_step, self.compute(global_step, params, batch_loss))
        elif self._verbose:
            print(f"[Step {global_step} | {type(self).__name__}]: No computation scheduled")

    def compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        """The value of a step; ``None`` is not stored."""
        return self._compute(global_step, params, batch_loss)

    def _compute(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> Any:
        raise NotImplementedError


class ByproductQuantity(SingleStepQuantity):
    """One that needs nothing from the backward pass but the gradient."""


class TwoStepQuantity(Quantity):
    """One that is computed from two steps.

    Attributes:
        SAVE_SHIFT: how many steps before the end the result is filed.
    """

    SAVE_SHIFT = 0

    def __init__(self, track_schedule: Schedule, verbose: bool = False) -> None:
        super().__init__(track_schedule, verbose)
        self._cache: dict[int, Any] = {}

    def is_start(self, global_step: int) -> bool:
        """Whether something begins at a step."""
        return self.should_compute(global_step)

    def is_end(self, global_step: int) -> bool:
        """Whether something ends at a step."""
        return self.should_compute(global_step - self.SAVE_SHIFT) and global_step >= self.SAVE_SHIFT

    def track(self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None) -> None:
        with torch.no_grad():
            if self.is_end(global_step) and global_step - self.SAVE_SHIFT in self._cache:
                value = self._compute_end(global_step, params, batch_loss)
                self._save(global_step - self.SAVE_SHIFT, value)
                self._cache.pop(global_step - self.SAVE_SHIFT, None)
            if self.is_start(global_step):
                self._cache[global_step] = self._compute_start(global_step, params, batch_loss)

    def _compute_start(
        self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None
    ) -> Any:
        raise NotImplementedError

    def _compute_end(
        self, global_step: int, params: Sequence[Tensor], batch_loss: Tensor | None
    ) -> Any:
        raise NotImplementedError
