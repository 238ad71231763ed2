"""The original's ``Cockpit``: quantities around a backward pass that the user marks by a block."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from backpack import backpack, disable
from backpack.cockpit.context import CockpitCTX, get_loss
from backpack.cockpit.quantities.quantity import Quantity
from backpack.own import BackpropExtension


class Cockpit:
    """Tracks quantities of a training run, under the original's names and with its numbers.

    New code is better served by :func:`~backpack.cockpit.watch`, which leaves the loop as it is.

    Example:
        >>> import torch
        >>> from backpack import extend
        >>> from backpack.cockpit import quantities
        >>> from backpack.cockpit.utils.schedules import linear
        >>> model, lossfunc = extend(torch.nn.Linear(4, 3)), extend(torch.nn.CrossEntropyLoss())
        >>> tracked = [quantities.Loss(linear(1)), quantities.NormTest(linear(1))]
        >>> cp = Cockpit(model.parameters(), tracked)
        >>> loss = lossfunc(model(torch.rand(5, 4)), torch.tensor([0, 1, 2, 1, 0]))
        >>> with cp(0, info={"loss": loss, "batch_size": 5}):
        ...     loss.backward(create_graph=cp.create_graph(0))
        >>> sorted(cp.get_output()[0])
        ['Loss', 'NormTest']

    Args:
        params: the parameters.
        quantities: instances of classes in :mod:`backpack.cockpit.quantities`.

    Raises:
        ValueError: if a parameter does not require grad, or something else is no quantity.
    """

    BACKPACK_CONV_SAVE_MEMORY = True

    def __init__(self, params: Iterable[Tensor], quantities: Sequence[Quantity] | None = None) -> None:
        self.params = list(params)
        if any(not p.requires_grad for p in self.params):
            raise ValueError("Got a parameter with requires_grad=False")
        self.quantities: list[Quantity] = []
        self.output: dict[int, dict[str, Any]] = defaultdict(dict)
        self._optimizer_name: str | None = None
        for each in quantities or ():
            self.add(each)

    def add(self, quantity: Quantity) -> None:
        """Track one more.

        Raises:
            ValueError: if it is no quantity.
        """
        if not isinstance(quantity, Quantity):
            raise ValueError(f"Expected instance of Quantity, got {quantity!r}")
        self.quantities.append(quantity)

    def create_graph(self, global_step: int) -> bool:
        """Whether ``backward`` must keep a graph of the gradient; none of our quantities needs one."""
        return any(quantity.create_graph(global_step) for quantity in self.quantities)

    def __call__(
        self,
        global_step: int,
        *exts: BackpropExtension,
        info: dict[str, Any] | None = None,
        debug: bool = False,
    ) -> BackwardCTX:
        """A block around the backward pass of a step.

        Args:
            global_step: the step.
            *exts: quantities of the user's own, which stay on the parameters.
            info: ``"loss"``, ``"batch_size"``, ``"individual_losses"``, ``"optimizer"``, where known.
            debug: print what was captured.
        """
        if info and info.get("optimizer") is not None:
            self._optimizer_name = type(info["optimizer"]).__name__
        return BackwardCTX(self, global_step, exts, info, debug)

    def track(self, global_step: int, protected_savefields: Iterable[str] = ()) -> None:
        """Compute what is due, and let go of what it was computed from."""
        loss = get_loss(global_step)
        if loss is not None and bool(loss.detach().isnan().any()):
            warnings.warn(f"the loss of step {global_step} is NaN", stacklevel=2)
        for quantity in self.quantities:
            quantity.track(global_step, self.params, loss)
        self._free(global_step, set(protected_savefields))

    def _free(self, global_step: int, protected: set[str]) -> None:
        fields = {ext.savefield for ext in self.extensions(global_step)} - protected
        for p in self.params:
            for field in fields:
                p.__dict__.pop(field, None)

    def extensions(self, global_step: int) -> list[BackpropExtension]:
        """What the quantities want of a backward pass, each field once."""
        found: dict[str, BackpropExtension] = {}
        for quantity in self.quantities:
            for ext in quantity.extensions(global_step):
                known = found.get(ext.savefield)
                if known is None or getattr(ext, "diagonal", False):
                    found[ext.savefield] = ext
        return list(found.values())

    def log(
        self,
        global_step: int,
        epoch_count: int,
        train_loss: float,
        valid_loss: float,
        test_loss: float,
        train_accuracy: float,
        valid_accuracy: float,
        test_accuracy: float,
        learning_rate: float,
    ) -> None:
        """Store what the user knows of a step."""
        self.output[global_step].update(
            epoch_count=epoch_count,
            train_loss=train_loss,
            valid_loss=valid_loss,
            test_loss=test_loss,
            train_accuracy=train_accuracy,
            valid_accuracy=valid_accuracy,
            test_accuracy=test_accuracy,
            learning_rate=learning_rate,
        )

    def get_output(self) -> dict[int, dict[str, Any]]:
        """Values by step and name of the quantity's class."""
        for quantity in self.quantities:
            for step, value in quantity.get_output().items():
                self.output[step][type(quantity).__name__] = value
        return self.output

    def write(self, logpath: str | Path) -> None:
        """Write all values to ``logpath + ".json"``."""
        path = Path(f"{logpath}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            json.dump(self.get_output(), file, indent=4, sort_keys=True, default=_encode)
        print(f"[cockpit] writing output to {path}")


def _encode(value: Any) -> Any:
    """Arrays as the original writes them."""
    if hasattr(value, "tolist") and getattr(value, "shape", None) is not None:
        if not value.shape:
            return value.tolist()
        found = {"__ndarray__": value.tolist(), "dtype": str(value.dtype), "shape": list(value.shape)}
        return found | ({"Corder": True} if len(value.shape) > 1 else {})
    raise TypeError(f"a {type(value).__name__} cannot be written")


class BackwardCTX:
    """The block that :meth:`Cockpit.__call__` opens."""

    def __init__(
        self,
        cockpit: Cockpit,
        global_step: int,
        exts: Sequence[BackpropExtension],
        info: dict[str, Any] | None,
        debug: bool,
    ) -> None:
        for ext in exts:
            assert isinstance(ext, BackpropExtension), f"{ext!r} is no BackpropExtension"
        self.cockpit, self.step, self.exts = cockpit, global_step, tuple(exts)
        self.info, self.debug = info, debug
        self._block: AbstractContextManager[Any]

    def __enter__(self) -> None:
        CockpitCTX.set(self.info, self.step)
        own = [ext.savefield for ext in self.exts]
        asked = [e for e in self.cockpit.extensions(self.step) if e.savefield not in own]
        hooks = [h for q in self.cockpit.quantities for h in q.extension_hooks(self.step)]
        if not asked and not own and not hooks:
            self._block = disable()
        else:
            self._block = backpack(
                *self.exts, *asked, extension_hook=_all(hooks) if hooks else None, debug=self.debug
            )
        self._block.__enter__()

    def __exit__(self, kind: Any, *exc: Any) -> None:
        self._block.__exit__(kind, *exc)
        try:
            protected = {ext.savefield for ext in self.exts}
            for quantity in self.cockpit.quantities:
                protected |= quantity.protected_savefields(self.step)
            if kind is None:
                self.cockpit.track(self.step, protected)
            else:
                self.cockpit._free(self.step, protected)
        finally:
            CockpitCTX.erase(self.step)


def _all(
    hooks: Sequence[Callable[[nn.Module], None]],
) -> Callable[[nn.Module], None]:
    def hook(module: nn.Module) -> None:
        for each in hooks:
            each(module)

    return hook
