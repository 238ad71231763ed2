"""BackPACK, built anew: more than the gradient, for any PyTorch model.

Extend a model and a loss, and compute quantities during ``loss.backward()``:

    model, lossfunc = extend(model), extend(lossfunc)
    loss = lossfunc(model(X), y)
    with backpack(Variance(), DiagGGNExact()):
        loss.backward()
"""

from backpack import extensions
from backpack.accumulation import accumulating
from backpack.batch import Batch
from backpack.capture import disable
from backpack.compat import convert_module_to_backpack, memory_cleanup
from backpack.dataset import accumulate
from backpack.engine import backpack
from backpack.extend import extend, unextend
from backpack.losses import loss_rule
from backpack.oracle import check
from backpack.rules import op_rule

__all__ = [
    "Batch",
    "accumulate",
    "accumulating",
    "backpack",
    "check",
    "convert_module_to_backpack",
    "disable",
    "extend",
    "extensions",
    "loss_rule",
    "memory_cleanup",
    "op_rule",
    "unextend",
]
