"""BackPACK, built anew: more than the gradient, for any PyTorch model.

Extend a model and a loss, and compute quantities during ``loss.backward()``:

    model, lossfunc = extend(model), extend(lossfunc)
    loss = lossfunc(model(X), y)
    with backpack(Variance(), DiagGGNExact()):
        loss.backward()
"""

from importlib import import_module, metadata
from typing import Any

from backpack import context, extensions
from backpack.capture.extend import extend, unextend
from backpack.capture.marks import mark
from backpack.capture.switch import disable
from backpack.compat import convert_module_to_backpack, memory_cleanup
from backpack.context import CTX
from backpack.dataset.accumulating import accumulating
from backpack.dataset.loop import accumulate
from backpack.engine.block import backpack
from backpack.engine.plan import plan
from backpack.losses.base import loss_rule
from backpack.quantities.reading import collect
from backpack.rules.base import op_rule
from backpack.samples.axis import SampleAxis
from backpack.testing.oracle import check

try:
    __version__ = metadata.version("backpack-anew")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
__all__ = [
    "CTX",
    "SampleAxis",
    "accumulate",
    "accumulating",
    "backpack",
    "check",
    "collect",
    "context",
    "convert_module_to_backpack",
    "disable",
    "extend",
    "extensions",
    "loss_rule",
    "mark",
    "hessianfree",
    "memory_cleanup",
    "op_rule",
    "optim",
    "own",
    "plan",
    "unextend",
]

# Packages that stand on the core: imported when they are asked for.
_LATER = ("hessianfree", "optim", "own")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return import_module(f"backpack.{name}")
    raise AttributeError(f"module 'backpack' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
