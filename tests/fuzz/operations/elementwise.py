"""Functions of single entries, and of two tensors that are broadcast."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz.draft import Given, Operation

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in "tanh sigmoid sin relu square abs erf".split()},
    **{name: getattr(torch, name) for name in "expm1 cosh atan nan_to_num".split()},
    **{name: getattr(F, name) for name in "gelu silu softplus elu mish hardtanh".split()},
    **{name: getattr(F, name) for name in "hardswish softsign tanhshrink celu logsigmoid".split()},
    "exp": lambda x: torch.exp(-x.abs()),
    "clamp": lambda x: x.clamp(-0.8, 0.9),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "sqrt": lambda x: (x.square() + 1).sqrt(),
    "reciprocal": lambda x: 1 / (2 + x.square()),
    "scale": lambda x: 0.7 * x,
    "shift": lambda x: x + 0.3,
    "negate": lambda x: -x,
    "tanh_": lambda x: x.clone().tanh_(),
    "relu_": lambda x: F.relu(1 * x, inplace=True),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "double": lambda x: x.float().double() if not x.requires_grad else x.double(),
}
UNARY = [Operation(name, lambda t, f=f: f(t.x), dims=(0, 9)) for name, f in _UNARY.items()]


def _pow(a: Tensor, b: Tensor) -> Tensor:
    return (a.abs() + 0.5) ** b


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "radd": lambda a, b: b + a,
    "add-alpha": lambda a, b: torch.add(b, a, alpha=0.5),
    "mul": lambda a, b: a * b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: torch.rsub(a, b, alpha=2),
    "div": lambda a, b: a / (b.square() + 1),
    "rdiv": lambda a, b: b / (a.square() + 1),
    "maximum": torch.maximum,
    "minimum": lambda a, b: torch.minimum(b, a),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "lerp": lambda a, b: torch.lerp(a, b.expand_as(a) if b.dim() <= a.dim() else b, 0.3),
    "addcmul": lambda a, b: torch.addcmul(a, b, a, value=0.5),
    "addcdiv": lambda a, b: torch.addcdiv(a, b, a.square() + 1),
    "hypot": lambda a, b: torch.hypot(a, b + 3),
    "atan2": lambda a, b: torch.atan2(a, b + 3),
    "pow": _pow,
    "logaddexp": torch.logaddexp,
    "add_": lambda a, b: a.clone().add_(b),
    "mul_": lambda a, b: a.clone().mul_(b),
}


def broadcast(t: Given) -> Sequence[Sequence[int]]:
    """A shape that is broadcast to that of ``x``."""
    rng = t.rng
    shape = [size if rng.random() < 0.6 else 1 for size in t.x.shape]
    start = rng.randrange(len(shape) + 1) if rng.random() < 0.4 else 0
    return [shape[start:]]


WITH_PARAMETER = [
    Operation(f"{name} parameter", lambda t, f=f: f(t.x, t.p[0]), broadcast, dims=(0, 9))
    for name, f in _BINARY.items()
]
WITH_DATA = [
    Operation(f"{name} data", lambda t, f=f: f(t.x, t.y), dims=(0, 9)) for name, f in _BINARY.items()
]
