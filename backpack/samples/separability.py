"""Does an operation keep samples apart? Asked of operations that nothing else is known of.

An operation keeps samples apart if its Jacobian is block-diagonal: with a scale ``s_n`` for every
sample and any cotangent ``c``, the vector-Jacobian product of ``s c`` is ``s`` times that of ``c``.
That is tried out once, on detached copies and away from the caller's graph, hooks and random numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, saved_tensors_hooks

from backpack._torch import has_values, tree_flatten, tree_unflatten, without_torch_function
from backpack.samples.axis import SampleAxis, owners_of

_verdicts: dict[Any, Any] = {}
# In place of an answer that depends on the values of constants.
_BY_VALUE = "by value"
_CAPACITY = 4096
# What picked rows take by which they are looked up, and the most that they may.
_held, _BYTES = 0, 2**25
# Samples that an operation is tried out with where it takes fewer than there are.
FEW = 5


def is_sample_separable(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    place: int,
    data: Sequence[tuple[Tensor, SampleAxis]],
    axis: SampleAxis,
) -> bool:
    """Whether the samples of a result depend on no other samples of the arguments.

    The answer is remembered for arguments of the same kind, unless some are integers or masks: these
    may say where entries go. So may numbers that are no data: a matrix that is multiplied with the
    sample axis is diagonal today, and full tomorrow. With these the answer is remembered only if it is
    the same for numbers without zeros.

    Args:
        func: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        place: which of its results.
        data: the arguments that have a sample axis.
        axis: the sample axis that the result would have.

    Returns:
        ``False`` if samples are mixed, ``True`` if they are not, and outside grad mode. Integers cannot
        be differentiated: they are exchanged, and ``False`` says also that no exchange shows anything.
    """
    if not torch.is_grad_enabled():
        return True
    if not all(has_values(tensor) for tensor, _ in data):
        return True  # nothing can be tried out, and no value be wrong
    axes = {id(tensor): found for tensor, found in data}
    leaves, spec = tree_flatten((args, kwargs))
    if not any(id(x) in axes and _differentiable(x) and x.numel() for x in leaves):
        return _separable_by_values(func, leaves, spec, place, axes, axis)
    key = _key(func, leaves, str(spec), axes, place, axis)
    # Other threads may empty the dictionary at any time.
    known = None if key is None else _verdicts.get(key)
    if isinstance(known, bool):
        return known

    def results(leaves: list[Any]) -> Any:
        new_args, new_kwargs = tree_unflatten(leaves, spec)
        found = func(*new_args, **new_kwargs)
        return found if isinstance(found, Tensor) else found[place]

    few = None if key is None else _few(leaves, axes, axis)
    verdict = None if few is None else _tried(results, *few)
    if verdict is None:
        few, verdict = None, _tried(results, leaves, axes, axis) is not False
    if key is not None and known is None:
        tried, those, there = few or (leaves, axes, axis)
        full = [generic(x.shape, x) if _constant(x, those) else x for x in tried]
        fixed = not any(_constant(x, those) for x in tried)
        same = fixed or (verdict and _tried(results, full, those, there))
        _remember(key, verdict if same else _BY_VALUE)
    return verdict


def _constant(x: Any, axes: dict[int, SampleAxis]) -> bool:
    """Whether an argument has numbers that are no data."""
    return _differentiable(x) and id(x) not in axes and x.numel() > 0


def _separable_by_values(
    func: Callable[..., Any],
    leaves: list[Any],
    spec: Any,
    place: int,
    axes: dict[int, SampleAxis],
    axis: SampleAxis,
) -> bool:
    """Whether results stay as they are where only other samples' integers change.

    One sample after the other gets values that others have, which are as valid.
    """
    places = [j for j, x in enumerate(leaves) if id(x) in axes and isinstance(x, Tensor) and x.numel()]
    if axis.size == 1 or not places:
        return True

    def results(changed: dict[int, Tensor]) -> Tensor:
        kept = [x if id(x) in axes or not isinstance(x, Tensor) else spare(x) for x in leaves]
        here = [changed.get(j, x) for j, x in enumerate(kept)]
        new_args, new_kwargs = tree_unflatten(here, spec)
        found = func(*new_args, **new_kwargs)
        return (found if isinstance(found, Tensor) else found[place]).detach()

    seen = False
    with without_torch_function(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plain = results({})
            if not _differentiable(plain):
                return True
            for n in range(min(axis.size, FEW)):
                changed = {j: _exchanged(leaves[j], axes[id(leaves[j])], n) for j in places}
                differs = (results(changed) != plain) & ~(plain.isnan())
                own = owners_of(axis, plain.shape, plain.device) == n
                if bool((differs & ~own).any()):
                    return False
                seen = seen or bool(differs.any())
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            return False
    return seen


def _exchanged(x: Tensor, axis: SampleAxis, sample: int) -> Tensor:
    """A tensor in which the entries of one sample are others of its entries."""
    own = owners_of(axis, x.shape, x.device) == sample
    values = x.unique()
    if len(values) == 1:
        return torch.where(own, torch.where(x == 0, torch.ones_like(x), torch.zeros_like(x)), x)
    following = torch.searchsorted(values, x.contiguous()).add(1).remainder(len(values))
    return torch.where(own, values[following], x)


def spare(x: Tensor) -> Tensor:
    """A copy for a call that is not the user's: the operation may write to it (running statistics)."""
    return x.detach().clone()


def _remember(key: Any, verdict: Any) -> None:
    global _held
    parts = [x for part in key for x in (part if isinstance(part, tuple) else (part,))]
    size = sum(x.picked.nbytes for x in parts if isinstance(x, SampleAxis) and x.picked is not None)
    if len(_verdicts) >= _CAPACITY or _held + size > _BYTES:
        _verdicts.clear()
        _held = 0
    _held += size
    _verdicts[key] = verdict


def remembers(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether :func:`is_sample_separable` can tell, once for all calls with arguments of that kind."""
    leaves, spec = tree_flatten((args, kwargs))
    return torch.is_grad_enabled() and _key(func, leaves, str(spec), {}) is not None


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _key(func: Any, leaves: list[Any], spec: str, axes: dict[int, SampleAxis], *rest: Any) -> Any:
    """What the answer depends on; ``None`` if that includes values of tensors."""
    parts: list[Any] = []
    for x in leaves:
        if not isinstance(x, Tensor):
            parts.append((type(x), x))
        elif _differentiable(x):
            parts.append((x.shape, x.dtype, x.device, x.layout, axes.get(id(x))))
        else:
            return None
    key = (func, spec, *parts, *rest)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _few(
    leaves: list[Any], axes: dict[int, SampleAxis], axis: SampleAxis
) -> tuple[list[Any], dict[int, SampleAxis], SampleAxis] | None:
    """The arguments with few samples only, which cost less; ``None`` if there are no more."""
    found = [*axes.values(), axis]
    if axis.size <= FEW or not all(each.plain and each.size == axis.size for each in found):
        return None
    here, fewer = list(leaves), {}
    for j, x in enumerate(leaves):
        if id(x) in axes:
            here[j] = x.detach().narrow(axes[id(x)].dim, 0, FEW)
            fewer[id(here[j])] = replace(axes[id(x)], size=FEW)
    return here, fewer, replace(axis, size=FEW)


def _tried(
    results: Callable[[list[Any]], Any],
    leaves: list[Any],
    axes: dict[int, SampleAxis],
    axis: SampleAxis,
) -> bool | None:
    """Try in double precision at the values given, and at others where the operation takes them.

    Single values may hide what an operation does: rows that are sorted already, zeros.

    Returns:
        ``None`` if no attempt went through.
    """
    known = None
    devices = {x.device for x in leaves if isinstance(x, Tensor) and x.device.type != "cpu"}
    kinds = {"cpu", *(device.type for device in devices)}
    cuda = [device for device in devices if device.type == "cuda"]
    with (
        without_torch_function(),
        saved_tensors_hooks(lambda x: x, lambda x: x),
        torch.random.fork_rng(devices=cuda),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for change in (_same, _others):
            for wide in (True, False):
                try:
                    with _without_autocast(kinds if wide else set()):
                        if not _scales(results, leaves, axes, axis, change, wide):
                            return False
                    known = True
                    break
                except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
                    pass  # not in this precision, or not at these values
    return known


class _without_autocast:
    """Autocast off for some kinds of devices."""

    def __init__(self, kinds: set[str]) -> None:
        self.blocks = [torch.autocast(kind, enabled=False) for kind in sorted(kinds)]

    def __enter__(self) -> None:
        for block in self.blocks:
            block.__enter__()

    def __exit__(self, *exc: Any) -> None:
        for block in reversed(self.blocks):
            block.__exit__(*exc)


def _same(x: Tensor) -> Tensor:
    return x


def _others(x: Tensor) -> Tensor:
    """The same entries in another order and size: positive ones stay positive."""
    if x.layout != torch.strided:
        return x
    flat = x.flatten()
    flat = torch.where(flat == 0, torch.ones_like(flat), flat)[torch.randperm(len(flat)).to(x.device)]
    return (flat * generic(flat.shape, flat)).reshape(x.shape)


def generic(shape: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers between 0.5 and 1.5 without a pattern; both parts of complex ones."""
    if like.is_complex():
        parts = generic((2, *shape), like.real)
        return torch.complex(parts[0], parts[1]).to(like.dtype)
    count = torch.Size(shape).numel()
    steps = torch.arange(1, count + 1, device=like.device, dtype=torch.float32)
    return (0.5 + (12.9898 * steps).sin().mul(437.585453).frac().abs()).to(like.dtype).reshape(shape)


def _scales(
    results: Callable[[list[Any]], Any],
    leaves: list[Any],
    axes: dict[int, SampleAxis],
    axis: SampleAxis,
    change: Callable[[Tensor], Tensor],
    wide: bool,
) -> bool:
    here, places = list(leaves), []
    for j, x in enumerate(leaves):
        if isinstance(x, Tensor) and id(x) not in axes:
            here[j] = spare(x)
        if not _differentiable(x):
            continue
        copy = here[j].detach()
        if wide:
            copy = copy.to(torch.complex128 if x.is_complex() else torch.float64)
        if id(x) in axes:
            copy = change(copy).detach().requires_grad_()
            places.append(j)
        here[j] = copy
    out = results(here)
    if not isinstance(out, Tensor) or not out.requires_grad or not out.numel():
        return True
    inputs = [here[j] for j in places]
    cotangent = generic(out.shape, out)
    scaled = cotangent * _scale(axis, out)
    plain = torch.autograd.grad(out, inputs, cotangent, retain_graph=True, allow_unused=True)
    found = torch.autograd.grad(out, inputs, scaled, allow_unused=True)
    return _agree(plain, found, [axes[id(leaves[j])] for j in places], out.dtype)


def _scale(axis: SampleAxis, like: Tensor) -> Tensor:
    """One number for each sample, along the sample axis of a tensor."""
    ids = axis.sample_ids(like.device)
    scales = generic((int(ids.max()) + 1,), like.real if like.is_complex() else like)[ids]
    return scales.reshape([-1 if d == axis.dim else 1 for d in range(like.dim())])


# --------------------------------------------------------------------------------------
# Custom autograd.Functions, by their own backward


def axis_by_backward(
    output: Tensor,
    edges: Sequence[GradientEdge],
    axes: Sequence[SampleAxis],
    candidates: Sequence[SampleAxis],
    key: Any,
) -> SampleAxis | str:
    """The sample axis of a Function's result with which its backward keeps samples apart.

    Args:
        output: the result, which is part of the graph.
        edges: where the data enters.
        axes: sample axes there.
        candidates: axes that the result may have, those that come first are preferred.
        key: what the answer depends on besides shapes; ``None`` if it is not to be remembered.

    Returns:
        Why there is none, if there is none.
    """
    device = output.device
    if key is not None:
        shapes = tuple(tuple(edge.node._input_metadata[edge.output_nr].shape) for edge in edges)
        here = (output.output_nr, output.shape, output.dtype, device)
        key = ("backward", key, shapes, *here, *axes, *candidates)
        if (known := _verdicts.get(key)) is not None:
            return known
    cotangent, node = generic(output.shape, output), output.grad_fn
    assert node is not None
    children = [(child, nr) for child, nr in node.next_functions]
    places = [children.index((edge.node, edge.output_nr)) for edge in edges]

    def pulled(columns: Tensor) -> list[Tensor | None]:
        """What the Function's backward gives, and no other: the user's hooks below are not called."""
        handle = node.register_hook(_stop)
        try:
            torch.autograd.grad(output, edges, columns, retain_graph=True, allow_unused=True)
        except _FarEnoughError as stopped:
            return [stopped.gradients[place] for place in places]
        finally:
            handle.remove()
        raise RuntimeError("its backward was not reached")

    verdict: SampleAxis | str = "mixes samples"
    with (
        without_torch_function(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            plain = pulled(cotangent)
            for axis in candidates:
                if _agree(plain, pulled(cotangent * _scale(axis, output)), axes, output.dtype):
                    verdict = axis
                    break
        except Exception as error:  # whatever the user's code raises when called at this time
            return f"whose backward cannot be tried out ({type(error).__name__}: {error})"
    if key is not None:
        _remember(key, verdict)
    return verdict


class _FarEnoughError(Exception):
    """A backward pass has come as far as it was meant to."""

    def __init__(self, gradients: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.gradients = gradients


def _stop(gradients: Sequence[Tensor | None], _: Any) -> None:
    raise _FarEnoughError(gradients)


def _agree(
    plain: Sequence[Tensor | None],
    found: Sequence[Tensor | None],
    axes: Sequence[SampleAxis],
    dtype: torch.dtype,
) -> bool:
    """Whether products of scaled cotangents are the scaled products."""
    tolerance = torch.finfo(dtype).eps ** 0.5
    for before, after, axis in zip(plain, found, axes, strict=True):
        if before is None or after is None:
            continue
        wanted = before.to_dense() * _scale(axis, before)
        error = (after.to_dense() - wanted).abs()
        largest = torch.nan_to_num(wanted.abs(), posinf=0.0).amax()
        if bool((error > tolerance * largest).any()):
            return False
    return True
