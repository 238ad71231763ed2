"""What an extension hook finds on a layer or a loss while it looks at it: inputs and ``output``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def passes_its_input_on(module: nn.Module) -> bool:
    """Whether a module's operation has the module's own inputs: layers and losses of torch."""
    if not type(module).__module__.startswith("torch.nn.modules"):
        return False
    several = isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear))
    return not several and getattr(module, "padding_mode", "zeros") == "zeros"


class LayerIO:
    """``module.input0``, ... and ``module.output`` while an extension hook looks at a module.

    The output is no longer there, as nothing in backward needs it: it is computed if it is asked for.
    ``torch.nn.Module`` looks for attributes it does not have among its buffers.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.module, self.inputs = module, inputs

    def __enter__(self) -> None:
        for j, given in enumerate(self.inputs):
            self.module.__dict__[f"input{j}"] = given
        self.module.__dict__["_buffers"] = _Buffers(self.module._buffers)
        self.module.__dict__["_buffers"].compute = self.output

    def output(self) -> Tensor:
        with torch.no_grad():
            return self.module.forward(*self.inputs)

    def __exit__(self, *exc: object) -> None:
        for j in range(len(self.inputs)):
            self.module.__dict__.pop(f"input{j}", None)
        self.module.__dict__["_buffers"] = dict(self.module._buffers)


class _Buffers(dict[str, Any]):
    """A module's buffers and its output."""

    compute: Callable[[], Tensor]

    def __contains__(self, name: object) -> bool:
        return name == "output" or super().__contains__(name)

    def __missing__(self, name: str) -> Tensor:
        if name != "output":
            raise KeyError(name)
        return self.compute()
