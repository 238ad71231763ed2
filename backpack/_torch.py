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
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node
from torch.nn._reduction import legacy_get_string as reduction_name
from torch.utils._pytree import tree_flatten, tree_unflatten

# What is passed on under a name of torch's; all that is defined here is open too.
__all__ = ["reduction_name", "tree_flatten", "tree_unflatten"]

# Where functions live that the torch-function protocol may report.
SPACES = (torch, Tensor, torch.nn.functional, torch._C._nn, torch.special, torch.linalg, torch.sparse)

# The type of nodes at which a gradient ends in a leaf, its attribute ``variable``.
AccumulateGrad: type = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]

# The number of the backward pass that calls the hook which asks; -1 outside of any.
current_task: Callable[[], int] = torch._C._current_graph_task_id
NO_TASK = -1

# Whether that pass keeps the graph (``retain_graph``).
keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph

# The node whose hook asks, if one does.
current_node: Callable[[], Any] = torch._C._current_autograd_node

# Whether that pass comes to a node (all do, but for ``backward(inputs=...)`` and ``autograd.grad``).
executes: Callable[[Node], bool] = torch._C._will_engine_execute_node

# Within the block, operations are not reported to torch-function modes.
without_torch_function: Callable[[], Any] = torch._C.DisableTorchFunction

# How many torch-function modes see what is called now (within one's own handler, the others), and each.
modes_open: Callable[[], int] = torch._C._len_torch_function_stack
mode_at: Callable[[int], Any] = torch._C._get_function_stack_at

# What the functions of these names in ``torch.nn.utils.rnn`` call.
pack_padded_sequence: Any = torch._VF._pack_padded_sequence
pad_packed_sequence: Any = torch._VF._pad_packed_sequence

# Sums, differences, copies and norms of lists of tensors, each of the one beside it; in place where
# the name ends so.
foreach_add_: Callable[..., None] = torch._foreach_add_
foreach_sub_: Callable[..., None] = torch._foreach_sub_
foreach_neg_: Callable[..., None] = torch._foreach_neg_
foreach_copy_: Callable[..., None] = torch._foreach_copy_
foreach_sub: Callable[..., tuple[Tensor, ...]] = torch._foreach_sub
foreach_norm: Callable[..., tuple[Tensor, ...]] = torch._foreach_norm

# What makes a nested tensor of jagged layout from rows, what gives these back, and what pads them.
nested_view: Any = torch._nested_view_from_jagged
nested_rows: Any = torch._nested_get_values
nested_padded: Any = torch.nested.to_padded_tensor


class NestedParts(NamedTuple):
    """What a nested tensor of jagged layout is made of, beside its rows.

    Attributes:
        offsets: where each component begins, and the last one ends, ``[B + 1]``.
        axis: the axis of rows.
        holes: whether there are rows that belong to no component.
        limits: the lengths of the shortest and the longest component, in tensors, where known.
    """

    offsets: Tensor
    axis: int
    holes: bool
    limits: tuple[Tensor | None, Tensor | None]


def nested_parts(x: Any) -> NestedParts:
    """Of a nested tensor of jagged layout; of any other layout all that it is has holes."""
    if x.layout != torch.jagged:
        return NestedParts(torch.zeros(1, dtype=torch.long), 0, True, (None, None))
    limits = x._min_seqlen_tensor, x._max_seqlen_tensor
    return NestedParts(x._offsets, x._ragged_idx - 1, x._lengths is not None, limits)


def nested_view_of(rows: Tensor, parts: NestedParts, axis: int) -> Tensor:
    """The nested tensor of rows that lie on an axis."""
    from torch.nested._internal.nested_tensor import _nt_view_dummy

    with without_torch_function():
        return nested_view(rows, parts.offsets, _nt_view_dummy(), None, axis + 1, *parts.limits)


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


def steps_running(optimizer: torch.optim.Optimizer) -> int:
    """How many calls of an optimizer's ``step`` are on this thread's stack, its hooks' among them.

    Each class's ``step`` is wrapped by a function that calls the hooks; a subclass's may call another.
    """
    count, frame = 0, sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == _OPTIMIZER:
            count += frame.f_locals.get("self") is optimizer
    return count


_OPTIMIZER = torch.optim.Optimizer.profile_hook_step.__code__.co_filename


def called_compiled(within: int = sys.maxsize) -> bool:
    """Whether the code that asks is called through ``torch.compile``, at most that far out."""
    frame = sys._getframe(1)
    for _ in range(within):
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


def has_values(tensor: Tensor) -> bool:
    """Whether there are numbers in a tensor: not on the meta device."""
    return not tensor.is_meta


def packs_saved_tensors() -> bool:
    """Whether what autograd saves is packed, by a checkpoint or an offload."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def fakes() -> bool:
    """Whether a ``FakeTensorMode`` is entered, in which no tensor has numbers."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def shows(condition: Tensor, otherwise: bool = False) -> bool:
    """Whether a condition holds; ``otherwise`` is the answer where there are no numbers."""
    return bool(condition) if has_values(condition) else otherwise


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Precision as it is written, on devices of a kind."""
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def sharded_modules(module: nn.Module) -> list[Any]:
    """The modules in it that ``fully_shard`` was called with."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [each for each in module.modules() if isinstance(each, kind)]


class ShardGroup:
    """Parameters that ``fully_shard`` gathers and lets go of together.

    The model computes with whole parameters, other objects than the parts that the user sees, and the
    same ones in every pass; they lose their memory where they are let go of.

    Args:
        group: torch's ``FSDPParamGroup``.
        states: all that torch knows of the wrapped modules it belongs to.
    """

    def __init__(self, group: Any, states: list[Any]) -> None:
        self.group, self.states = group, states

    @property
    def parameters(self) -> list[tuple[Any, Tensor | None, Tensor | None]]:
        """What stands for each parameter: a part, the whole one, and a part between passes.

        The whole one is not there before the first pass, the last one only if a few processes keep
        larger parts of it until backward.
        """
        others = ("_unsharded_param", "_sharded_post_forward_param")
        return [
            (p.sharded_param, *(getattr(p, name, None) for name in others))
            for p in self.group.fsdp_params
        ]

    def let_go(self) -> None:
        """Keep the parts only."""
        self.group._to_sharded()

    def reset(self) -> None:
        """Forget a backward pass that raised an error."""
        for state in self.states:
            reset = getattr(state, "_reset_iter_state", None)
            if reset is not None and state._is_root:
                reset()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Hooks of the modules gather, exchange and let go of nothing, and leave no trace."""
        group, contexts = self.group, [state._state_ctx for state in self.states]
        kept = ("reduce_grads", "reshard_after_backward", "_training_state", "_post_forward_indices")
        before = {name: getattr(group, name) for name in kept}
        training = [state._training_state for state in self.states]
        queued = [context.post_backward_final_callback_queued for context in contexts]
        group.reduce_grads = group.reshard_after_backward = False
        group._training_state, group._post_forward_indices = _while_backward(group), []
        for context in contexts:
            context.post_backward_final_callback_queued = True
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(group, name, value)
            for state, each, context, flag in zip(self.states, training, contexts, queued, strict=True):
                state._training_state, context.post_backward_final_callback_queued = each, flag

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Passes gather and let go as a backward pass does, and exchange no gradients.

        All processes must make the same passes.
        """
        group, contexts = self.group, [state._state_ctx for state in self.states]
        reduces, training, was_whole = group.reduce_grads, group._training_state, group.is_unsharded
        indices, last = list(group._post_forward_indices), [c.is_last_backward for c in contexts]
        states = [state._training_state for state in self.states]
        group.reduce_grads = False
        for context in contexts:
            context.is_last_backward = False
        try:
            yield
        finally:
            group.reduce_grads, group._post_forward_indices = reduces, indices
            for state, each, context, flag in zip(self.states, states, contexts, last, strict=True):
                state._training_state, context.is_last_backward = each, flag
            if was_whole and training == _while_backward(group) and not group.is_unsharded:
                group.unshard()  # torch has seen backward begin there, and does not come again
                group.wait_for_unshard()
            group._training_state = training

    @contextmanager
    def whole(self, last: bool = False) -> Iterator[None]:
        """The parameters are whole, and hooks are quiet; all processes must come here.

        With ``last``, no backward pass of torch's own follows.
        """
        group, was_whole = self.group, self.group.is_unsharded
        group.unshard()
        group.wait_for_unshard()
        try:
            with self.quiet():
                yield
        finally:
            if last:
                group.comm_ctx.post_forward_order.clear()
                group._post_forward_indices.clear()
            if last or not was_whole:
                self.let_go()


def _while_backward(group: Any) -> Any:
    """The state of a group whose parameters a backward pass has gathered."""
    return type(group._training_state).PRE_BACKWARD


def shard_groups(module: nn.Module) -> list[ShardGroup]:
    """Groups of parameters of all modules in it that ``fully_shard`` was called with."""
    found: dict[Any, list[Any]] = {}
    for each in sharded_modules(module):
        state = each._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group is not None and state not in found.setdefault(group, []):
                found[group].append(state)
    return [ShardGroup(group, states) for group, states in found.items()]


def twins(module: nn.Module) -> dict[Tensor, list[Tensor]]:
    """Whatever else stands for parameters that are kept in parts."""
    every = [each for group in shard_groups(module) for each in group.parameters]
    found = [[t for t in each if t is not None] for each in every]
    return {t: [other for other in each if other is not t] for each in found for t in each}


def foreign_shards(module: nn.Module) -> dict[Tensor, Tensor]:
    """Whole parameters, by their parts, that ``fully_shard`` made of a module which this one is in.

    Torch puts them on the modules they belong to, whose hooks after loading a state are theirs.
    """
    found: dict[Tensor, Tensor] = {}
    for each in module.modules():
        for hook in each._load_state_dict_post_hooks.values():
            for cell in getattr(hook, "__closure__", None) or ():
                param = cell.cell_contents
                if type(param).__name__ == "FSDPParam" and hasattr(param, "_unsharded_param"):
                    found[param.sharded_param] = param._unsharded_param
    return found
