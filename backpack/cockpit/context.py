"""What the user of a :class:`~backpack.cockpit.Cockpit` says of a step, under the original's names."""

from __future__ import annotations

from typing import Any


class CockpitCTX:
    """The ``info`` of steps that are under way."""

    INFO: dict[int, dict[str, Any]] = {}

    @classmethod
    def set(cls, info: dict[str, Any] | None, global_step: int) -> None:
        """Note what is known of a step."""
        cls.INFO[global_step] = dict(info or {})

    @classmethod
    def get(cls, name: str, global_step: int, default: Any = None) -> Any:
        """What the user has said, or a default."""
        return cls.INFO.get(global_step, {}).get(name, default)

    @classmethod
    def erase(cls, global_step: int) -> None:
        """The step is over."""
        cls.INFO.pop(global_step, None)


def get_batch_size(global_step: int) -> int | None:
    """The batch size, if it was said."""
    return CockpitCTX.get("batch_size", global_step)


def get_individual_losses(global_step: int) -> Any:
    """Each sample's loss, if they were given."""
    return CockpitCTX.get("individual_losses", global_step)


def get_optimizer(global_step: int) -> Any:
    """The optimizer, if it was given."""
    return CockpitCTX.get("optimizer", global_step)


def get_loss(global_step: int) -> Any:
    """The loss, if it was given."""
    return CockpitCTX.get("loss", global_step)
