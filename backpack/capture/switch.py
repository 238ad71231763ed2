"""Whether capture is on in a thread."""

from __future__ import annotations

import threading

from backpack._ambient import ambient


def captures(thread: int) -> bool:
    """Whether capture is on in a thread."""
    return thread not in ambient.switched_off


class _StoreIO:
    """The attribute of that name, read from the class or an instance."""

    def __get__(self, instance: object, owner: object) -> bool:
        return captures(threading.get_ident())


class disable:  # noqa: N801
    """Switch capture off in this thread: ``with disable(): model(X)`` records nothing.

    Class attribute ``store_io`` and :meth:`should_store_io` say whether capture is on, as in the
    original library. Blocks may be nested, and one object be used again and by several threads.
    """

    store_io = _StoreIO()

    def __enter__(self) -> None:
        thread = threading.get_ident()
        ambient.switched_off[thread] = ambient.switched_off.get(thread, 0) + 1

    def __exit__(self, *exc: object) -> None:
        thread = threading.get_ident()
        ambient.switched_off[thread] -= 1
        if not ambient.switched_off[thread]:
            del ambient.switched_off[thread]

    @staticmethod
    def should_store_io() -> bool:
        """Whether capture is on."""
        return captures(threading.get_ident())
