"""What kind of module is it?"""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule
from torch.nn.modules.loss import _Loss

from backpack.custom_module.branching import Parallel
from backpack.custom_module.reduce_tuple import ReduceTuple

_LIKELIHOODS = (
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.CrossEntropyLoss,
    nn.GaussianNLLLoss,
    nn.MSELoss,
    nn.NLLLoss,
    nn.PoissonNLLLoss,
)
_NO_OPS = (nn.Sequential, Parallel, ReduceTuple, GraphModule)


def is_loss(module: nn.Module) -> bool:
    """Whether a module is one of torch's loss functions (or a subclass of one)."""
    return isinstance(module, _Loss)


def is_nll(module: nn.Module) -> bool:
    """Whether a loss is, up to scale and constants, the negative log-likelihood of its target.

    Then the model output parametrises a distribution from which would-be targets can be drawn:
    categorical, Bernoulli, normal or Poisson.
    """
    return isinstance(module, _LIKELIHOODS)


def is_no_op(module: nn.Module) -> bool:
    """Whether a module only passes values between other modules and computes nothing itself."""
    return isinstance(module, _NO_OPS)
