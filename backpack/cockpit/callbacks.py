"""Callbacks for trainers: each makes a monitor when training begins, and closes it when it ends.

The trainers' packages are imported when a callback is made, and need not be installed otherwise.
"""

from __future__ import annotations

from typing import Any

from backpack.cockpit.monitor import Monitor
from backpack.cockpit.watching import watch


class _Callback:
    """What the callbacks have in common.

    Attributes:
        monitor: the monitor of the run; ``None`` before training begins.
    """

    options: dict[str, Any]
    monitor: Monitor | None = None

    def __new__(cls, *args: Any, **options: Any) -> Any:
        base = cls._import()
        # Trainers want instances of a class of theirs.
        both = cls if issubclass(cls, base) else type(cls.__name__, (cls, base), {"_made": cls})
        return object.__new__(both)

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def __reduce__(self) -> Any:
        return _again, (getattr(self, "_made", type(self)), self.options)

    @classmethod
    def _import(cls) -> type:
        raise NotImplementedError

    def _begin(self, model: Any, optimizer: Any, step: int, **more: Any) -> None:
        self._end()
        self.monitor = watch(model, optimizer, **{**more, **self.options})
        if step:
            self.monitor.start_at(step)

    def _end(self) -> None:
        if self.monitor is not None:
            self.monitor.close()


def _again(cls: Any, options: dict[str, Any]) -> Any:
    return cls(**options)


class LightningCockpit(_Callback):
    """For a ``Trainer`` of Lightning (``lightning`` or ``pytorch_lightning``).

    Numbers go to the trainer's loggers, unless ``log`` says otherwise; checkpoints hold the monitor's
    state. Of several optimizers the first is listened to.

    Args:
        **options: of :func:`~backpack.cockpit.watch`.
    """

    _state: dict[str, Any] | None = None

    @classmethod
    def _import(cls) -> type:
        try:
            from lightning.pytorch import Callback
        except ImportError:
            try:
                from pytorch_lightning import Callback
            except ImportError as error:
                raise ImportError("LightningCockpit needs the package lightning") from error
        return Callback

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch."""
        model = getattr(trainer.strategy, "model", None)
        sinks = [logger.log_metrics for logger in getattr(trainer, "loggers", ())]
        step = int(trainer.global_step)
        self._begin(pl_module if model is None else model, trainer.optimizers[0], step, log=sinks)
        if self._state is not None:
            assert self.monitor is not None
            self.monitor.load_state_dict(self._state)
            self._state = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Watch no more."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Watch no more."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written, once training begins."""
        self._state = state_dict or None


class TransformersCockpit(_Callback):
    """For the ``Trainer`` of transformers.

    Numbers go to ``path``, to ``log``, or both; the trainer's own loggers are not asked, as they are
    callbacks like this one: pass ``log=wandb.log`` or a ``SummaryWriter``.

    Args:
        **options: of :func:`~backpack.cockpit.watch`.
    """

    @classmethod
    def _import(cls) -> type:
        try:
            from transformers import TrainerCallback
        except ImportError as error:
            raise ImportError("TransformersCockpit needs the package transformers") from error
        return TrainerCallback

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch."""
        self._begin(kwargs["model"], kwargs["optimizer"], int(state.global_step), together=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch no more."""
        self._end()
