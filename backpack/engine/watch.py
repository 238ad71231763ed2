"""A block that is open: it sees calls of ``backward``, and begins a run for each backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from backpack._ambient import ambient
from backpack._torch import (
    call_at_end,
    current_node,
    current_task,
    fakes,
    has_values,
    keeps_graph,
    leaf_of,
    uncompiled_calls,
)
from backpack.capture import loss_records
from backpack.engine.direct import fill, fills, pass_down
from backpack.engine.run import Run
from backpack.engine.state import Block, Nested, Options, current_block, mark_used
from backpack.graph.outputs import LossRecord
from backpack.graph.taps import Recording
from backpack.losses.likelihoods import LIKELIHOODS
from backpack.quantities.matrix_products import Product


class WatchedBlock(Block):
    """A block with its watch."""

    def __init__(self, owner: Options) -> None:
        super().__init__(owner)
        self.watch = _Watch(self)

    def open(self) -> None:
        """From now on, calls of its thread are seen."""
        self.compile_again = uncompiled_calls()
        ambient.blocks.append(self)
        self.watch.__enter__()

    def close(self) -> None:
        """Nothing is seen any more; what its runs hold is let go of."""
        try:
            self.watch.__exit__(None, None, None)
        finally:
            self.compile_again()
            del self.watch  # which refers to the block
            ambient.blocks.remove(self)
            for run in list(self.runs.values()):
                run.abort()
            self.runs.clear()
            if not self.owner.collects:
                self.forget_earlier()


class _Watch(TorchFunctionMode):
    """Sees calls of ``backward`` and ``torch.autograd.grad`` inside a block."""

    only_backward = True  # while a forward pass is recorded

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Looked up each time: tools that watch backward passes put their own functions there.
        if func is not Tensor.backward and func is not torch.autograd.grad:  # nearly all calls
            result = func(*args, **kwargs) if kwargs else func(*args)
            if func in LIKELIHOODS and result.grad_fn is not None:
                loss_records.note_likelihood(func, args, kwargs or {}, result.grad_fn)
            if ambient.recorder is None:  # which notes what the model makes
                self.block.made.note(result)
                if result is None or (args and result is args[0]):
                    self.block.made.note_written(args)
            return result
        kwargs = kwargs or {}
        products = any(isinstance(ext, Product) for ext in self.block.owner.extensions)
        if products and not self.block.nested:
            kwargs = {**kwargs, "retain_graph": True}
        if func is Tensor.backward:
            gradient = kwargs.get("gradient", args[1] if len(args) > 1 else None)
            limited = kwargs.get("inputs", args[4] if len(args) > 4 else None) is not None
            return self._backward(func, args, kwargs, [args[0]], [gradient], limited=limited)
        else:
            outputs = kwargs.get("outputs", args[0] if args else ())
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            gradients = kwargs.get("grad_outputs", args[2] if len(args) > 2 else None)
            if gradients is None:
                gradients = [None] * len(outputs)
            elif isinstance(gradients, Tensor):
                gradients = [gradients]
            inputs = kwargs.get("inputs", args[1] if len(args) > 1 else ())
            inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
            batched = kwargs.get("is_grads_batched")
            if batched or any(isinstance(t, Tensor) and t.dim() for t in outputs):
                mark_used(self.block.thread)
                # A Jacobian or Hessian product, not the gradient of a loss.
                with Nested(self.block):
                    return func(*args, **kwargs)
            if kwargs.get("create_graph", args[4] if len(args) > 4 else False) and (
                ambient.recorder is not None
                or all(isinstance(t, Tensor) and not isinstance(t, Parameter) for t in inputs)
            ):
                # A derivative in the model's inputs, or in its forward pass (a step for a task), which
                # the loss is going to contain.
                with Nested(self.block):
                    return func(*args, **kwargs)
            wanted = {t for t in inputs if isinstance(t, Tensor)}
            return self._backward(func, args, kwargs, list(outputs), list(gradients), wanted, True)

    def _backward(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: list[Any],
        gradients: list[Any],
        wanted: set[Tensor] | None = None,
        limited: bool = False,
    ) -> Any:
        block = self.block
        outer = block.roots, block.wanted, block.complete
        mark_used(block.thread)
        plain = all(isinstance(t, Tensor) and t.grad_fn is not None for t in outputs)
        block.made.note(outputs)
        if block.nested or not plain or not block.owner.active or current_block() is not block:
            return func(*args, **kwargs)
        if fakes():
            raise NotImplementedError(
                "tables of where samples are, which backpack keeps between passes, must not be made in "
                "a FakeTensorMode; to plan without numbers, move model and data to the meta device "
                "(model.to('meta')), or see backpack.plan"
            )
        for t in outputs:
            if has_values(t) and not (
                math.isfinite(t.item()) if t.numel() == 1 else bool(torch.isfinite(t).all())
            ):
                raise ValueError(
                    f"backpack: the loss is not finite ({t.detach().flatten()[:3].tolist()}); look "
                    "for NaN in the inputs or a learning rate that is too large"
                )
        handles = []
        chosen = block.owner.parameters
        if chosen is not None:
            if wanted is None and limited:
                wanted = set(_leaves(kwargs.get("inputs", args[4] if len(args) > 4 else None)))
            wanted = set(chosen) if wanted is None else wanted & chosen
        try:
            block.wanted, block.complete = wanted, not limited
            block.roots = [
                (get_gradient_edge(t), torch.ones_like(t) if g is None else g)
                for t, g in zip(outputs, gradients, strict=True)
            ]
            block.hooked = any(t._backward_hooks for t in outputs)
            without = block.owner.gradient is False
            if func is Tensor.backward and block.listens and (without or fills(block)):
                return self._directly(*args, **kwargs)
            # The run begins before anything is executed and freed.
            begins = partial(_run_begins, block)
            handles = [edge.node.register_prehook(begins) for edge, _ in block.roots]
            return func(*args, **kwargs)
        except RuntimeError as error:
            if all(map(has_values, outputs)):
                raise
            raise RuntimeError(
                f"{error} (On the meta device nothing can be tried out, nor read from an index: "
                "backpack.plan(...) tells what a pass takes, from one forward pass with numbers)"
            ) from error
        finally:
            block.roots, block.wanted, block.complete = outer
            for handle in handles:
                handle.remove()

    def _directly(
        self,
        tensor: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Tensor | GradientEdge | Sequence[Tensor | GradientEdge] | None = None,
    ) -> None:
        """The quantities of ``tensor.backward(...)``, without the gradient."""
        if gradient is None and tensor.numel() != 1:
            raise RuntimeError("backward() of a tensor with several entries needs their gradient")
        if inputs is not None:
            inputs = inputs.values() if isinstance(inputs, dict) else inputs
            inputs = [inputs] if isinstance(inputs, (Tensor, GradientEdge)) else list(inputs)
            if not inputs:
                raise RuntimeError("inputs of backward() is empty")
            leaves = set(_leaves(inputs))
            self.block.wanted = leaves if self.block.wanted is None else leaves & self.block.wanted
        keeps = create_graph if retain_graph is None else retain_graph
        with torch.set_grad_enabled(create_graph):
            if self.block.owner.gradient == "forms":
                fill(self.block, keeps, inputs)
            else:
                pass_down(self.block, keeps or self.block.owner.retain_graph)


def _leaves(inputs: Any) -> Iterator[Tensor]:
    """The parameters that ``backward(inputs=...)`` computes gradients of."""
    if isinstance(inputs, dict):
        inputs = inputs.values()
    for each in [inputs] if isinstance(inputs, (Tensor, GradientEdge)) else inputs:
        leaf = each if isinstance(each, Tensor) else leaf_of(each.node)
        if leaf is not None:
            yield leaf


def _run_begins(block: Block, grads: Any) -> None:
    """A backward call seen by the block's watch has reached its root."""
    if not block.nested and block.listens:
        _run_of(block).taps_at_current_node(grads)


def _run_of(block: Block) -> Run:
    task = current_task()
    run = block.runs.get(task)
    if run is None:
        mark_used(block.thread)
        keeps = keeps_graph()
        run = block.runs[task] = Run(block, task, keeps or block.owner.retain_graph)
        call_at_end(run.end)
        run.begin()
    return run


def _reached(recording: Recording, loss: LossRecord | None, grads: Any) -> None:
    """Backward has reached a loss or a model output."""
    block = current_block()
    if block is None or not block.listens:
        if not keeps_graph():
            recording.release()
        return
    if block.nested:
        return
    run, node = _run_of(block), current_node()
    run.reach(node)
    if loss is not None:
        run.loss(loss, GradientEdge(node, 0), grads[0])
    run.taps_at_current_node(grads)


loss_records.reached = _reached
