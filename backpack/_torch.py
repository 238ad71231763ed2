"""What the library takes from torch's inside, each under a name of ours, and what we rely on.

In: a torch version. Out: the same names for the rest of the library: a new version is checked here.

Relied on beside these names: that nodes of the autograd graph have ``metadata`` (a dictionary that
lives as long as the node), ``next_functions``, ``_input_metadata`` (shape, dtype and device of what
arrives at each output), ``register_prehook`` and ``_saved_*`` attributes; that a node's type has the
name of its operation; that tensors count their in-place changes in ``_version`` and name what they
view in ``_base``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import Node
from torch.nn._reduction import legacy_get_string as reduction_name
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "SPACES",
    "AccumulateGrad",
    "call_at_end",
    "current_node",
    "current_task",
    "executes",
    "keeps_graph",
    "leaf_of",
    "pack_padded_sequence",
    "pad_packed_sequence",
    "reduction_name",
    "storage_users",
    "tree_flatten",
    "tree_unflatten",
    "without_torch_function",
]

# Where functions live that the torch-function protocol may report.
SPACES = (torch, Tensor, torch.nn.functional, torch._C._nn, torch.special, torch.linalg)

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

# What the functions of these names in ``torch.nn.utils.rnn`` call.
pack_padded_sequence: Any = torch._VF._pack_padded_sequence
pad_packed_sequence: Any = torch._VF._pad_packed_sequence


def call_at_end(function: Callable[[], None]) -> None:
    """Call a function when the backward pass under way is over, in whichever thread ends it."""
    Variable._execution_engine.queue_callback(function)


def leaf_of(node: Node | None) -> Any:
    """The leaf at which a node accumulates gradients; ``None``: it does not."""
    return getattr(node, "variable", None)


def storage_users(tensor: Tensor) -> int:
    """How many tensors and others hold a tensor's memory; the handle that asks is one of them."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
