"""What the library takes from torch's inside, each under a name of ours, and what we rely on.

In: a torch version. Out: the same names for the rest of the library: a new version is checked here.

Relied on beside these names: that nodes of the autograd graph have ``metadata`` (a dictionary that
lives as long as the node), ``next_functions``, ``_input_metadata`` (shape, dtype and device of what
arrives at each output), ``register_prehook`` and ``_saved_*`` attributes; that a node's type has the
name of its operation; that tensors count their in-place changes in ``_version`` and name what they
view in ``_base``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node
from torch.nn._reduction import legacy_get_string as reduction_name
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "SPACES",
    "AccumulateGrad",
    "call_at_end",
    "called_compiled",
    "current_node",
    "current_task",
    "executes",
    "in_transform",
    "keeps_graph",
    "leaf_of",
    "modes_open",
    "pack_padded_sequence",
    "pad_packed_sequence",
    "ran_compiled",
    "reduction_name",
    "rows_in_transform",
    "static_graphs",
    "storage_users",
    "tree_flatten",
    "tree_unflatten",
    "uncompiled",
    "uncompiled_calls",
    "unwrapped",
    "without_torch_function",
]

# Where functions live that the torch-function protocol may report.
SPACES = (torch, Tensor, torch.nn.functional, torch._C._nn, torch.special, torch.linalg, torch.sparse)

# The type of nodes at which a gradient ends in a leaf, its attribute ``variable``.
AccumulateGrad: type = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]

# The number of the backward pass that calls the hook which asks; -1 outside of any.
current_task: Callable[[], int] = torch._C._current_graph_task_id

# Whether that pass keeps the graph (``retain_graph``).
keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph

# The node whose hook asks, if one does.
current_node: Callable[[], Any] = torch._C._current_autograd_node

# Whether that pass comes to a node (all do, but for ``backward(inputs=...)`` and ``autograd.grad``).
executes: Callable[[Node], bool] = torch._C._will_engine_execute_node

# Within the block, operations are not reported to torch-function modes.
without_torch_function: Callable[[], Any] = torch._C.DisableTorchFunction

# How many torch-function modes see what is called now: within one's own handler, the others.
modes_open: Callable[[], int] = torch._C._len_torch_function_stack

# What the functions of these names in ``torch.nn.utils.rnn`` call.
pack_padded_sequence: Any = torch._VF._pack_padded_sequence
pad_packed_sequence: Any = torch._VF._pad_packed_sequence


_transforms = torch._C._functorch.peek_interpreter_stack


def in_transform() -> bool:
    """Whether the code that asks runs inside of a transform of ``torch.func``."""
    return _transforms() is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that transforms have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def rows_in_transform(tensor: Tensor) -> int | None:
    """How many tensors a transform maps over in place of this one; ``None``: over none."""
    functorch, count = torch._C._functorch, None
    while functorch.is_functorch_wrapped_tensor(tensor):
        below = functorch.get_unwrapped(tensor)
        if functorch.is_batchedtensor(tensor):
            count = (count or 1) * below.shape[functorch.maybe_get_bdim(tensor)]
        tensor = below
    return count


def call_at_end(function: Callable[[], None]) -> None:
    """Call a function when the backward pass under way is over, in whichever thread ends it."""
    Variable._execution_engine.queue_callback(function)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` was given; any other is itself."""
    while "_orig_mod" in module._modules and type(module).__name__ == "OptimizedModule":
        module = module._modules["_orig_mod"]  # type: ignore[assignment]
    return module


_stance_lock = threading.Lock()
# Who wants calls to be uncompiled, and what ends that. The stance is one for all threads.
_wanted: set[object] = set()
_stance: list[Any] = []


def uncompiled_calls() -> Callable[[], None]:
    """From now on, all that is compiled runs uncompiled, until the function returned is called."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return lambda: None  # nothing is compiled
    me = object()
    with _stance_lock:
        if not _wanted:
            _stance.append(torch.compiler.set_stance("force_eager"))
        _wanted.add(me)

    def end() -> None:
        with _stance_lock:
            _wanted.discard(me)
            if not _wanted and _stance:
                _stance.pop().__exit__(None, None, None)

    return end


def called_compiled() -> bool:
    """Whether the hook that asks is one of a module that is called through ``torch.compile``."""
    frame = sys._getframe(1)
    for _ in range(8):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_code.co_name == "compile_wrapper" and "_dynamo" in frame.f_code.co_filename:
            return True
    return False


def ran_compiled(node: Node) -> bool:
    """Whether a node is that of a compiled forward pass."""
    return "CompiledFunction" in node.name()


def leaf_of(node: Node | None) -> Any:
    """The leaf at which a node accumulates gradients; ``None``: it does not."""
    return getattr(node, "variable", None)


def storage_users(tensor: Tensor) -> int:
    """How many tensors and others hold a tensor's memory; the handle that asks is one of them."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def static_graphs(roots: Iterable[Node]) -> list[Any]:
    """``DistributedDataParallel`` modules below the roots that may be learning their static graph.

    The first backward pass through such a model's node asks for the exchange of gradients at its end,
    and notes in ``_static_graph_delay_allreduce_enqueued`` that it has.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    found, stack, seen = [], list(roots), set(roots)
    while stack:
        node = stack.pop()
        if type(node).__name__ == "_DDPSinkBackward":
            wrapper = node.ddp_weakref()  # type: ignore[attr-defined]
            if wrapper is not None and wrapper.static_graph:
                found.append(wrapper)
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return found
