"""Functions of the original that have little or nothing to do here."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from backpack.kronecker.block import KroneckerBlock

Module = TypeVar("Module", bound=nn.Module)


def memory_cleanup(module: nn.Module) -> None:
    """Let go of the graphs that a module's parameters hold on to by their gradients and quantities.

    Only what was asked for with ``backward(create_graph=True)`` and products with curvature
    (:class:`~backpack.extensions.GGNMP` and its like) have a graph. It holds the parameters, which hold
    it: a cycle through autograd that Python does not see, so that neither is freed when the model goes,
    as with ``p.grad`` in torch. After this call gradients and quantities have the same values, and no
    graph; products are gone.

    In any other pass there is nothing to do: what is captured lives on the autograd graph, and goes
    when the graph goes.

    Args:
        module: a module, whose parameters are looked at.

    Example:
        >>> import torch
        >>> from backpack import backpack, extend
        >>> from backpack.extensions import Variance
        >>> model = extend(nn.Linear(3, 2))
        >>> with backpack(Variance()):
        ...     model(torch.rand(4, 3)).square().sum().backward(create_graph=True)
        >>> penalty = model.weight.variance.sum()  # may be differentiated
        >>> memory_cleanup(model)
        >>> penalty.requires_grad, model.weight.variance.requires_grad
        (True, False)
    """
    for p in module.parameters():
        if p.grad is not None and p.grad.requires_grad:
            p.grad = p.grad.detach()
        for name, value in list(p.__dict__.items()):
            if callable(value) and getattr(value, "__module__", "").startswith("backpack."):
                del p.__dict__[name]
            else:
                p.__dict__[name] = _without_graph(value)


def _without_graph(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.grad_fn is not None else value
    if isinstance(value, KroneckerBlock):
        return value.detach()
    if isinstance(value, (list, tuple)):
        parts = [_without_graph(each) for each in value]
        same = all(new is old for new, old in zip(parts, value, strict=True))
        named = hasattr(value, "_fields")
        return value if same else type(value)(*parts) if named else type(value)(parts)
    return value


def convert_module_to_backpack(module: Module, debug: bool = False) -> Module:
    """Give the module back as it is: no model needs converting."""
    return module
