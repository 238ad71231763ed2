"""Names of the original that have no meaning here: they can be imported, and say why when used."""

from __future__ import annotations

from typing import Any, NoReturn


class ModuleExtension:
    """Stands for the original's class for one quantity of one kind of module.

    Raises:
        NotImplementedError: always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__}: quantities are not written once per kind of module here. The "
            "built-in ones hold for every module, so that none needs to be registered. A quantity of "
            "your own is one subclass of backpack.extensions.BackpropExtension with `savefield` and "
            "`reduce(form)`, for all modules at once"
        )


class _Absent:
    remedy: str

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} does not exist here: {self.remedy}")


class HBP(_Absent):
    """The original's undocumented base of KFAC, KFLR and KFRA."""

    remedy = "choose by name, KFAC (sampled loss Hessian) or KFLR (exact loss Hessian)"
