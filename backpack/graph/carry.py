"""Columns carried from one place of the graph to others below it.

Letters: ``v`` columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from backpack._torch import has_values
from backpack.forms.limits import COLUMN_BYTES
from backpack.graph.nodes import children_of, walk
from backpack.samples.separability import generic

# On a CPU fresh memory costs more than it saves: columns go together only if they are small.
SEVERAL, SMALL_COLUMN = 5, 2**19


def bytes_at(places: Sequence[GradientEdge]) -> int:
    """Memory that one column takes at these places."""
    sizes = (edge.node._input_metadata[edge.output_nr] for edge in places)
    return sum(prod(size.shape) * size.dtype.itemsize for size in sizes)


def columns_at_once(places: Sequence[GradientEdge], device: str, chunk_size: int | None) -> int:
    """How many columns are held at these places at a time.

    Args:
        places: where a column takes memory; twice if it does so twice.
        device: kind of device they are on.
        chunk_size: what the user asked for; by default as many as fit the budget.
    """
    if chunk_size is not None:
        return chunk_size
    return max(1, COLUMN_BYTES[device] // max(bytes_at(places), 1))


def carry(
    start: GradientEdge | Sequence[GradientEdge],
    targets: Sequence[GradientEdge],
    columns: Tensor | Sequence[Tensor],
    passing: Sequence[GradientEdge] = (),
    sample: int | None = None,
) -> list[Tensor | None]:
    """Vector-Jacobian products of all columns, ``[v, *start.shape] -> [v, *target.shape]`` each.

    With several starts, the ``v``-th column is that of all of them together.

    Batched on devices, and on a CPU where columns are small. Large ones go one at a time there: fresh
    memory costs more than it saves. Their size is that at the targets and at the places in ``passing``.
    ``sample`` is the one that the graph is masked for, if it is: the graph of another one has the same
    operations, but zeros elsewhere.
    """
    starts = [start] if isinstance(start, GradientEdge) else start
    columns = [columns] if isinstance(columns, Tensor) else columns
    # Where columns start they have arrived.
    here = dict(zip(((edge.node, edge.output_nr) for edge in starts), columns, strict=True))
    if len(starts) == 1 and here.keys() & {(edge.node, edge.output_nr) for edge in targets}:
        further = [edge for edge in targets if (edge.node, edge.output_nr) not in here]
        carried = iter(carry(starts, further, columns) if further else ())
        arrived = (here.get((edge.node, edge.output_nr)) for edge in targets)
        return [next(carried) if found is None else found for found in arrived]
    count = columns[0].shape[0]
    small = count >= SEVERAL and bytes_at([*targets, *passing]) <= SMALL_COLUMN
    if count > 1 and (small or columns[0].device.type != "cpu"):
        found = _carried_at_once(starts, targets, columns, sample)
        if found is not None:
            return found
    results: list[list[Tensor]] = [[] for _ in targets]
    for column in zip(*columns, strict=True):
        grads = _carried(starts, targets, column)
        for result, grad in zip(results, grads, strict=True):
            if grad is not None:
                result.append(grad)
    return [None if not r else r[0].unsqueeze(0) if len(r) == 1 else torch.stack(r) for r in results]


def _carried(
    starts: Sequence[GradientEdge],
    targets: Sequence[GradientEdge],
    column: Sequence[Tensor],
    batched: bool = False,
) -> list[Tensor | None]:
    with nullcontext() if batched else differentiable_twice():
        found = torch.autograd.grad(
            list(starts),
            list(targets),
            list(column),
            is_grads_batched=batched,
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    return list(found)


# Whether torch carries columns at once without mistakes, by the operations that they go through, and
# how often they went since that was tried.
_batchable: dict[Any, bool] = {}
_uses: dict[Any, int] = {}
_CAPACITY, _AGAIN_AFTER = 4096, 100


def _carried_at_once(
    starts: Sequence[GradientEdge],
    targets: Sequence[GradientEdge],
    columns: Sequence[Tensor],
    sample: int | None,
) -> list[Tensor | None] | None:
    """All columns at once; ``None`` if torch cannot, or makes mistakes.

    Some operations cannot be batched, or only with errors of all kinds, and some come out wrong (the
    second derivative of group norm, where sizes happen to fit). So the first time that so many columns
    go through operations of some kinds and shapes, and again at a low rate, a combination of them is
    carried by itself as well. What comes out as zero proves nothing, and is tried again the next time.
    """
    key = (_way(starts, targets), len(columns[0]), sample)
    if _batchable.get(key) is False:
        return None
    try:
        found = _carried(starts, targets, columns, batched=True)
    except RuntimeError:
        return None
    if not all(map(has_values, columns)):
        return found  # there is nothing to try out
    uses = _uses[key] = _uses.get(key, -1) + 1
    if key in _batchable and uses % _AGAIN_AFTER:
        return found
    if len(_uses) > _CAPACITY:
        _batchable.clear()
        _uses.clear()
    alike = _combine_alike(starts, targets, columns, found)
    if not alike or all(each is None or bool(each.any()) for each in found):
        _batchable[key] = alike
    return found if alike else None


def _combine_alike(
    starts: Sequence[GradientEdge],
    targets: Sequence[GradientEdge],
    columns: Sequence[Tensor],
    found: Sequence[Tensor | None],
) -> bool:
    """Whether carrying a combination of columns gives the combination of what they give."""
    weights = generic((columns[0].shape[0],), columns[0].detach().abs())
    with torch.no_grad():
        mixed = [torch.tensordot(weights.to(c.dtype), c.detach(), 1) for c in columns]
        wanted = _carried(starts, targets, mixed)
    for each, one in zip(found, wanted, strict=True):
        if each is None or one is None:
            if each is not one:
                return False
            continue
        each = each.detach()
        together = torch.tensordot(weights.to(each.dtype), each, 1)
        sizes = torch.tensordot(weights.to(each.abs().dtype), each.abs(), 1)
        close = torch.finfo(one.dtype).eps ** 0.75 * (sizes.max() if sizes.numel() else 0)
        if not bool(((together - one).abs() <= close).all()):
            return False
    return True


def _way(starts: Sequence[GradientEdge], targets: Sequence[GradientEdge]) -> int:
    """The same number for ways down the graph through the same operations, with the same shapes."""
    stops = {edge.node for edge in targets}
    parts: list[Any] = []
    for edge in (*starts, *targets):
        about = edge.node._input_metadata[edge.output_nr]
        parts += [type(edge.node), edge.output_nr, about.dtype, *about.shape]
    nodes = walk((edge.node for edge in starts), lambda n: [] if n in stops else children_of(n))
    return hash((*parts, *map(type, nodes)))


# What to do, by what the operation is called.
_REMEDIES = {
    "embedding_bag": "in place of an EmbeddingBag take an Embedding, and sum its rows",
    "_nested_": "let the model return the rows of nested tensors (x.values())",
    "attention": "for attention, run the forward pass inside "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
}


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Say in our words where torch has no second derivative of an operation."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        missing = "is not implemented" in text or (
            isinstance(error, NotImplementedError) and "_nested_" in text
        )
        if not missing or "cannot be differentiated twice" in text:
            raise
        remedy = next((r for name, r in _REMEDIES.items() if name in text), _REMEDIES["attention"])
        raise NotImplementedError(
            f"an operation of the model or the loss cannot be differentiated twice ({text}); {remedy}"
        ) from error


@contextmanager
def hooks_suspended(leaf: Tensor) -> Iterator[None]:
    """Keep tensor hooks (the user's, and our own) from changing what arrives at a leaf."""
    hooks = leaf._backward_hooks
    kept = dict(hooks) if hooks else {}
    if hooks:
        hooks.clear()
    try:
        yield
    finally:
        if hooks is not None:
            hooks.update(kept)


def pull_back(edge: GradientEdge, leaf: Tensor, columns: Tensor) -> Tensor:
    """Columns at a derived tensor carried on to a leaf, ``[m, *t] -> [m, *p]``."""
    return pull_back_to_all(edge, [leaf], columns)[0]


def pull_back_to_all(edge: GradientEdge, leaves: Sequence[Tensor], columns: Tensor) -> list[Tensor]:
    """Columns at a derived tensor carried on to several leaves at once."""
    with ExitStack() as stack:
        for leaf in leaves:
            stack.enter_context(hooks_suspended(leaf))
        found = carry(edge, [get_gradient_edge(leaf) for leaf in leaves], columns)
    return [
        leaf.new_zeros(len(columns), *leaf.shape) if result is None else result
        for leaf, result in zip(leaves, found, strict=True)
    ]
