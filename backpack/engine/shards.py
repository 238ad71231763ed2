"""Parameters that ``fully_shard`` keeps in parts: a process has one, and finds its part of values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.graph import Node

from backpack._torch import ShardGroup, foreign_shards, shard_groups
from backpack.engine.state import Options
from backpack.graph.nodes import walk
from backpack.graph.survey import Graph
from backpack.graph.taps import MODEL_OUTPUT, TAPS, notes
from backpack.quantities.combining import Joined, Rule
from backpack.quantities.matrix_products import Product
from backpack.quantities.parts import checked_rule
from backpack.quantities.processes import Processes

IN_PARTS = "parameters are in parts (fully_shard)"
REMEDY = (
    "use DistributedDataParallel with backpack(..., process_group=...), fully_shard over one axis of "
    "processes, or a model that is not sharded"
)


class Shards:
    """The parts, the whole parameters with which the model computes, and their processes.

    Args:
        groups: parameters that are gathered together.
    """

    def __init__(self, groups: list[ShardGroup]) -> None:
        self.groups = groups
        every = [each for group in groups for each in group.parameters]
        self.parts: dict[Tensor, Any] = {whole: part for part, whole, _ in every if whole is not None}
        self._wholes = {part: whole for whole, part in self.parts.items()}
        self._without_gradient = [whole for whole in self.parts if whole.grad is None]

    def part(self, parameter: Tensor) -> Any:
        """What the user sees of a parameter."""
        return self.parts.get(parameter, parameter)

    def whole(self, parameter: Tensor) -> Tensor:
        """With what the model computes."""
        return self._wholes.get(parameter, parameter)

    def processes(self, given: Processes | None, size: int | None, gather: bool) -> Processes:
        """Those that work on parts of one batch.

        Args:
            given: those that the user has given, if they are several.
            size: their number.
            gather: whether values of single samples are gathered from all.

        Raises:
            NotImplementedError: if parameters are spread over other ones.
        """
        meshes = {str(part.device_mesh.mesh.tolist()): part.device_mesh for part in self.parts.values()}
        if given is None and len(meshes) > 1:
            raise NotImplementedError(
                "parameters are spread over different processes; say which work on parts of one batch, "
                "backpack(..., process_group=...)"
            )
        for mesh in meshes.values():
            if given is None and mesh.ndim > 1:
                raise NotImplementedError(
                    f"parameters are spread over processes along {mesh.ndim} axes; say which processes "
                    "work on parts of one batch, backpack(..., process_group=...)"
                )
            if size not in (None, mesh.size()):
                raise NotImplementedError(
                    f"parameters are spread over {mesh.size()} processes, and process_group has "
                    f"{size}; give fully_shard a mesh of the processes of process_group"
                )
        if given is not None:
            return given
        return Processes(next(iter(meshes.values())).get_group(), gather)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Passes through the graph above the models do not make torch gather or exchange anything."""
        with ExitStack() as stack:
            for group in self.groups:
                stack.enter_context(group.quiet())
            yield

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Passes gather parameters and let them go; all processes must make the same ones."""
        with ExitStack() as stack:
            for group in self.groups:
                stack.enter_context(group.passing())
            yield

    @contextmanager
    def gathered(self, last: bool = False) -> Iterator[None]:
        """All parameters are whole; all processes must come here. With ``last``, backward is over."""
        with ExitStack() as stack:
            for group in self.groups:
                stack.enter_context(group.whole(last))
            yield

    def reset(self) -> None:
        """Backward raised an error: the model is ready for the next forward pass."""
        for group in self.groups:
            group.reset()
        for whole in self._without_gradient:
            whole.grad = None

    def own(self, parameter: Tensor, rule: Rule, value: Any, gathers: bool) -> Any:
        """This process's part of a value: a ``DTensor`` that is spread as the parameter is.

        Values that are not made of entries of the parameter, such as squared norms and Kronecker
        factors, are the same in all processes.
        """
        part = self.parts.get(parameter)
        lead = rule.axis + 1 if isinstance(rule, Joined) else 0
        if part is None or not isinstance(value, Tensor) or value.shape[lead:] != part.shape:
            return value
        if lead and not gathers:
            return value
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh = part.device_mesh
        everywhere = [Replicate()] * mesh.ndim
        spread = [Shard(p.dim + lead) if isinstance(p, Shard) else p for p in part.placements]
        whole = DTensor.from_local(value.to(part.dtype), mesh, everywhere, run_check=False)
        return whole.redistribute(mesh, spread)


def shards_below(roots: Sequence[Node]) -> Shards | None:
    """Parameters of models below the roots of a backward pass that are in parts, if there are any.

    Raises:
        NotImplementedError: for parameters that are in parts in another way than by ``fully_shard``.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    groups: list[ShardGroup] = []
    notes_below = [notes(node) for node in walk(roots)]
    recordings = [each.recording for here in notes_below for each in here.get(MODEL_OUTPUT, ())]
    recordings += [tap.recording for here in notes_below for tap in here.get(TAPS, ())]
    for module in {id(m): m for r in recordings if (m := r.module()) is not None}.values():
        here = shard_groups(module)
        groups += here
        every = [each for group in here for each in group.parameters]
        whole_of = {part: whole for part, whole, _ in every}
        part_of = {other: part for part, *others in every for other in others if other is not None}
        hidden = {whole for part, whole in foreign_shards(module).items() if part not in whole_of}
        for name, parameter in module.named_parameters():
            part = part_of.get(parameter, parameter)
            whole = whole_of.get(part)
            if parameter in hidden or _is_spread(part if whole is None else whole):
                raise NotImplementedError(_why(f"'{name}'", parameter in hidden))
    return Shards(groups) if groups else None


def rules_in_parts(owner: Options) -> dict[str, Rule]:
    """How values of processes combine, by fields.

    Raises:
        NotImplementedError: for a quantity whose values do not.
    """
    try:
        return {e.savefield: checked_rule(e, "several processes") for e in owner.extensions}
    except NotImplementedError as error:
        raise NotImplementedError(f"{IN_PARTS}. {error}") from error


def no_products(products: Sequence[Product]) -> NotImplementedError:
    """Why there are none."""
    return NotImplementedError(
        f"{IN_PARTS}. {', '.join(ext.savefield for ext in products)}: products with curvature go "
        "through the graph after the backward pass, when parameters are in parts again; use a diagonal "
        "or Kronecker factors, or DistributedDataParallel"
    )


def refuse_in_parts(owner: Options, graph: Graph) -> None:
    """Refuse what cannot be computed where parameters are in parts.

    Raises:
        NotImplementedError: if something of that kind is asked for.
    """
    why = ""
    if owner.collects:
        why = (
            "Passes are put together (backpack.accumulate) from values of whole parameters; use a "
            f"block backpack(...) for a single pass, or {REMEDY}"
        )
    elif torch.is_grad_enabled():
        why = "create_graph=True: parts of values cannot be differentiated; leave it out"
    elif owner.extension_hook is not None:
        why = "an extension_hook finds no values on parameters that are gathered for it; leave it out"
    elif graph.within:
        why = (
            "the loss contains derivatives of the model, whose graph uses parameters that are let go "
            f"of; {REMEDY}"
        )
    if why:
        raise NotImplementedError(f"{IN_PARTS}. {why}")


def begin_together(
    processes: Processes, error: Exception | None, due: str | None, names: Sequence[str]
) -> tuple[bool, bool]:
    """Whether samples are to be found apart in any process; and whether by the same passes in all.

    Args:
        processes: all of them call this function.
        error: what this one ran into.
        due: if it is due in this one, the outline of its graph.
        names: parameters that are reached, in the order in which they are found.

    Raises:
        Exception: the process's own error.
        RuntimeError: for that of another process, or if backward reaches other parameters there.
    """
    told = processes.objects((None if error is None else str(error), due, list(names)))
    if error is not None:
        raise error
    for rank, (problem, _, _) in enumerate(told):
        if problem is not None:
            raise RuntimeError(f"in process {rank} of the process_group: {problem}")
    for rank, (_, _, reached) in enumerate(told):
        if reached != told[0][2]:
            other = sorted(set(reached) ^ set(told[0][2]))
            raise RuntimeError(
                f"{IN_PARTS}, whose values are put together while backward runs: it must reach the "
                f"same ones in all processes, but in processes 0 and {rank} it differs in "
                f"{', '.join(other[:4]) or 'their order'}. Let all of them take part everywhere "
                "(times zero)"
            )
    outlines = {outline for _, outline, _ in told}
    return outlines != {None}, len(outlines) == 1


def _why(name: str, hidden: bool) -> str:
    if hidden:
        return (
            f"parameter {name} is kept in parts by fully_shard of a module that the extended one is "
            "in, and is gathered by that one's hooks; extend the module that fully_shard was called "
            "with, backpack(..., parameters=...) chooses parameters"
        )
    return (
        f"parameter {name} is spread over processes as a DTensor (tensor parallelism), so that no "
        f"process sees its whole operation; {REMEDY}"
    )


def _is_spread(parameter: Tensor) -> bool:
    return hasattr(parameter, "placements")  # a DTensor, whose class takes long to import
