"""The positive-curvature Hessian by brute force: what activations add to the generalized Gauss-Newton.

A Hessian is the Gauss-Newton matrix plus ``sum_k J_k^T diag(g_k s_k) J_k`` over operations ``f_k`` that
act on each number by itself, where nothing else inside of the model is bent: ``J_k`` the Jacobian of
what the operation takes, ``s_k`` its second derivative, ``g_k`` the gradient at what it gives. Each
entry of ``g_k s_k`` is made positive. Where the sum as it is does not make up the Hessian (a parameter
that is used several times, or bent itself), there is no such matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Calls(TorchFunctionMode):
    """Notes calls that take one tensor and give one of its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Callable[[Tensor], Tensor], Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        bent = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
        if isinstance(y, Tensor) and len(bent) == 1 and y.shape == args[bent[0]].shape:
            (place,) = bent
            call = lambda x: func(*args[:place], x, *args[place + 1 :], **kwargs)  # noqa: E731
            self.found.append((call, args[place], y))
        return y


def second_derivative(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of an operation that acts on each number by itself."""
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(call(x.clone()).sum(), x, create_graph=True)
    if not first.requires_grad:
        return torch.zeros_like(x)
    (second,) = torch.autograd.grad(first.sum(), x, allow_unused=True)
    return torch.zeros_like(x) if second is None else second


def activations(oracle: Any) -> tuple[Tensor, list[tuple[Callable[[Tensor], Tensor], Tensor, Tensor]]]:
    """The output, and calls whose argument depends on the data."""
    inputs = oracle.inputs
    oracle.inputs = tuple(2 * x + 1 if x.is_floating_point() else x.flip(0).roll(1, -1) for x in inputs)
    try:
        with Calls() as others:
            oracle.output()
    finally:
        oracle.inputs = inputs
    with Calls() as calls:
        output = oracle.output()
    if len(calls.found) != len(others.found):
        raise KeyError("no twin: calls depend on the data")
    both = zip(calls.found, others.found, strict=True)
    return output, [call for call, other in both if not torch.equal(call[1], other[1])]


def positive_block(
    oracle: Any, p: Tensor, ggn: Tensor, hessian: Tensor, modify: Callable[[Tensor], Tensor]
) -> Tensor:
    """``[P, P]`` of one parameter."""
    output, calls = activations(oracle)
    loss = oracle.loss(output)
    whole, positive = ggn.clone(), ggn.clone()
    for call, x, y in calls:
        second = second_derivative(call, x)
        (g,) = torch.autograd.grad(loss, y, retain_graph=True, allow_unused=True)
        if g is None or not second.any():
            continue
        rows = [
            torch.autograd.grad(entry, p, retain_graph=True, allow_unused=True)[0]
            for entry in x.flatten()
        ]
        J = torch.stack([(torch.zeros_like(p) if row is None else row).flatten() for row in rows])
        curvature = (g * second).flatten().unsqueeze(1)
        whole += J.T @ (curvature * J)
        positive += J.T @ (modify(curvature) * J)
    if not torch.allclose(whole, hessian, rtol=1e-8, atol=1e-10):
        raise KeyError("no twin: more than operations on single numbers is bent")
    return positive
