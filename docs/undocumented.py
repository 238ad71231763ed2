"""Every public name is on one of the API pages; the build fails otherwise."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

PLACES = (
    "backpack",
    "backpack.extensions",
    "backpack.hessianfree",
    "backpack.custom_module",
    "backpack.optim",
    "backpack.own",
    "backpack.vivit",
    "backpack.vivit.extensions.hooks",
    "backpack.vivit.hessianfree",
    "backpack.cockpit",
    "backpack.cockpit.quantities",
    "backpack.cockpit.utils.configuration",
    "backpack.cockpit.utils.schedules",
)


def public_names() -> set[str]:
    """Full names of all that is meant to be imported by users."""
    places = [place for place in PLACES if find_spec(place)]
    utils = import_module("backpack.utils")
    places += [each.name for each in iter_modules(utils.__path__, "backpack.utils.")]
    return {f"{place}.{name}" for place in places for name in _exported(import_module(place))}


def _exported(module: Any) -> list[str]:
    """The names in ``__all__``, or what a module without one defines; submodules left out."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
    own = vars(module).items()
    return [
        name
        for name, each in own
        if not name.startswith("_") and getattr(each, "__module__", None) == module.__name__
    ]


def _check(app: Any, env: Any) -> None:
    from sphinx.util import logging

    documented = set(env.domaindata["py"]["objects"])
    for name in sorted(public_names() - documented):
        logging.getLogger(__name__).warning("%s is on no API page", name)


def setup(app: Any) -> dict[str, bool]:
    """Tell Sphinx to check once all pages are read."""
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True}
