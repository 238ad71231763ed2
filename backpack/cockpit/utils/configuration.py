"""The original's configurations: which quantities, by name."""

from __future__ import annotations

from collections.abc import Callable

from backpack.cockpit import quantities as q
from backpack.cockpit.quantities.quantity import Quantity
from backpack.cockpit.utils.schedules import linear

_ECONOMY = (
    *(q.Alpha, q.Distance, q.GradHist1d, q.GradNorm, q.InnerTest),
    *(q.Loss, q.NormTest, q.OrthoTest, q.UpdateSize),
)
_BUSINESS = (*_ECONOMY, q.TICDiag, q.HessTrace)
_FULL = (*_BUSINESS, q.HessMaxEV, q.GradHist2d)
_CONFIGURATIONS: dict[str, tuple[type, ...]] = {
    "economy": _ECONOMY,
    "business": _BUSINESS,
    "full": _FULL,
}


def quantities_cls_for_configuration(label: str) -> list[type]:
    """The classes of a configuration.

    Raises:
        KeyError: for a label that there is not.
    """
    if label not in _CONFIGURATIONS:
        raise KeyError(f"no configuration {label!r}; there are {list(_CONFIGURATIONS)}")
    return list(_CONFIGURATIONS[label])


def configuration(
    label: str, track_schedule: Callable[[int], bool] | None = None, verbose: bool = False
) -> list[Quantity]:
    """The quantities of a configuration.

    Args:
        label: ``"economy"``, ``"business"`` or ``"full"``.
        track_schedule: says of a step whether it is tracked; by default each is.
        verbose: print what is stored.
    """
    schedule = linear(1) if track_schedule is None else track_schedule
    return [cls(schedule, verbose=verbose) for cls in quantities_cls_for_configuration(label)]
