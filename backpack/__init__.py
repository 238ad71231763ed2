"""BackPACK, built anew: more than the gradient, for any PyTorch model.

Extend a model and a loss, and compute quantities during ``loss.backward()``:

    model, lossfunc = extend(model), extend(lossfunc)
    loss = lossfunc(model(X), y)
    with backpack(Variance(), DiagGGNExact()):
        loss.backward()
"""

from backpack import extensions
from backpack.batch import Batch
from backpack.capture import disable
from backpack.engine import backpack
from backpack.extend import extend, unextend
from backpack.losses import loss_rule
from backpack.oracle import check
from backpack.rules import op_rule

__all__ = [
    "Batch",
    "backpack",
    "check",
    "disable",
    "extend",
    "extensions",
    "loss_rule",
    "op_rule",
    "unextend",
]
